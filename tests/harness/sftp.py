"""An SFTP server on loopback, in threads of the test: paramiko's, on a directory, with keys made for the test.

As OpenSSH's does, a rename of a file refuses to replace another. What paramiko does not serve, hard links and fsync
(extensions of OpenSSH's), it answers with "unsupported".
"""

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import paramiko
from paramiko.sftp import SFTP_OK


class Handle(paramiko.SFTPHandle):
    def __init__(self, fd, flags):
        super().__init__(flags)
        self.fd = fd

    def close(self):
        os.close(self.fd)

    def read(self, offset, length):
        return os.pread(self.fd, length, offset)

    def write(self, offset, data):
        try:
            while data:
                done = os.pwrite(self.fd, data, offset)
                data, offset = data[done:], offset + done
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)
        return SFTP_OK

    def stat(self):
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.fd))


def _answered(method):
    """Errors of the system as the protocol's."""

    def call(self, *arguments):
        try:
            found = method(self, *arguments)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)
        return SFTP_OK if found is None else found

    return call


class Files(paramiko.SFTPServerInterface):
    """The whole file system, for whoever has the key."""

    replaces = False

    @_answered
    def list_folder(self, path):
        found = []
        for name in os.listdir(path):
            with suppress(FileNotFoundError):
                found.append(paramiko.SFTPAttributes.from_stat(os.lstat(os.path.join(path, name)), name))
        return found

    @_answered
    def stat(self, path):
        return paramiko.SFTPAttributes.from_stat(os.stat(path))

    @_answered
    def lstat(self, path):
        return paramiko.SFTPAttributes.from_stat(os.lstat(path))

    @_answered
    def open(self, path, flags, attr):
        return Handle(os.open(path, flags, 0o666), flags)

    @_answered
    def remove(self, path):
        os.remove(path)

    @_answered
    def rename(self, oldpath, newpath):
        if self.replaces:
            os.rename(oldpath, newpath)
        else:
            os.link(oldpath, newpath)
            os.unlink(oldpath)

    @_answered
    def mkdir(self, path, attr):
        os.mkdir(path)

    @_answered
    def rmdir(self, path):
        os.rmdir(path)

    def canonicalize(self, path):
        return os.path.normpath("/" + path)


class ReplacingFiles(Files):
    """A server whose rename replaces, against the protocol."""

    replaces = True


class SilentFiles(Files):
    """A server that stops answering questions about files whose name says so, until `go_on`."""

    go_on = threading.Event()

    def stat(self, path):
        if path.endswith("silent"):
            self.go_on.wait()
        return super().stat(path)


class Door(paramiko.ServerInterface):
    """Lets in whoever has the client's key."""

    def __init__(self, key):
        self.key = key

    def check_auth_publickey(self, username, key):
        return paramiko.AUTH_SUCCESSFUL if key == self.key else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username):
        return "publickey"

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED


class SftpServer:
    """Serves until `close`.

    Attributes:
        url: of a directory: SftpServer.url + "/absolute/path".
        key_file: the client's key.
        known_hosts: a file with the server's key.
        command: a program that speaks SFTP on its standard streams (OpenSSH's sftp-server), instead of paramiko.
    """

    def __init__(self, folder: Path, files: type[Files] = Files, command: str = ""):
        self._host_key, client_key = paramiko.ECDSAKey.generate(), paramiko.ECDSAKey.generate()
        self.key_file, self.known_hosts = folder / "key", folder / "known_hosts"
        client_key.write_private_key_file(str(self.key_file))
        self._client_key, self._files, self._command = client_key, files, command
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.known_hosts.write_text(f"[127.0.0.1]:{port} {self._host_key.get_name()} {self._host_key.get_base64()}\n")
        self.url = f"fsspec+sftp://tester@127.0.0.1:{port}"
        self._transports = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(self._host_key)
            if self._command:
                transport.set_subsystem_handler("sftp", Bridge, self._command)
            else:
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, self._files)
            self._transports.append(transport)
            with suppress(paramiko.SSHException, EOFError):
                transport.start_server(server=Door(self._client_key))

    def options(self):
        """What a client needs to get in."""
        return {"key_filename": str(self.key_file), "look_for_keys": False, "allow_agent": False}

    def close(self):
        """Hang up on everybody, and listen no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for transport in self._transports:
            transport.close()
            transport.join(5)


class Bridge(paramiko.server.SubsystemHandler):
    """Gives a channel to a program."""

    def __init__(self, channel, name, server, command):
        super().__init__(channel, name, server)
        self.command = command

    def start_subsystem(self, name, transport, channel):
        import subprocess

        program = subprocess.Popen([self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

        def answers():
            with suppress(OSError):
                while data := os.read(program.stdout.fileno(), 1 << 16):
                    channel.sendall(data)

        back = threading.Thread(target=answers, daemon=True)
        back.start()
        with suppress(OSError):
            while data := channel.recv(1 << 16):
                program.stdin.write(data)
        program.stdin.close()
        program.wait()
        back.join()
        program.stdout.close()
