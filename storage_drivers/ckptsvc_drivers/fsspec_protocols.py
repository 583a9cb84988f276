"""What fsspec hides about each protocol: how an object is created only if absent, and how it becomes durable.

fsspec's own `mode="create"` looks first and writes then, unless a file system does better. So a way that the protocol
itself offers is named here for each one that has any; the store still tries it before it trusts it.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ckptsvc.storage import TEMPORARY_PREFIX

FileSystem = Any
"""An fsspec.AbstractFileSystem; which methods and attributes it has beyond that, its protocol says."""

_SFTP_TIMEOUT = 60.0  # seconds without a byte from the server
_SFTP_READ = 32768  # bytes: more than that a server need not answer
_CONFLICTS = 20
_PRECONDITION = ("PreconditionFailed", "pre-conditions", "ConditionNotMet", "conditionNotMet")


@dataclass(frozen=True, slots=True)
class Protocol:
    """Attributes:
    create: makes an object with this path and content, all or nothing; returns False where one was there. None where
        the protocol is not known to have a way.
    how: that way, in words.
    open: opens a file for writing where fsspec's own way is not the best; `path` and bytes per call.
    read: returns the bytes of a file from one offset to another, likewise.
    sync: makes an open file that has been written durable; None where closing it does, or nothing can.
    durable: what is written is durable when a call returns, as far as is known.
    directories: it has directories, which are to be removed when they become empty; writing replaces in place there.
    one_thread: a file system object serves one thread at a time: paramiko's clients take each other's answers, and wait
        for ever.
    arguments: for the file system, unless the caller gives others.
    prepare: called once with a new file system.
    """

    create: Callable[[FileSystem, str, bytes], bool] | None = None
    how: str = ""
    open: Callable[[FileSystem, str, int], Any] = lambda filesystem, path, block: filesystem.open(
        path, "wb", block_size=block
    )
    read: Callable[[FileSystem, str, int, int], bytes] = lambda filesystem, path, start, stop: filesystem.cat_file(
        path, start=start, end=stop
    )
    sync: Callable[[Any], None] | None = None
    durable: bool = False
    directories: bool = False
    one_thread: bool = False
    arguments: Callable[[], dict[str, Any]] = dict
    prepare: Callable[[FileSystem], None] = lambda _: None


def protocol(name: str) -> Protocol:
    """What is known of a protocol; nothing of most."""
    return _KNOWN.get(name, Protocol())


# --- local files ------------------------------------------------------------------------------------------------


def _create_local(filesystem: FileSystem, path: str, data: bytes) -> bool:
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            _sync_local(file)
        os.link(temporary, path)
        _sync_directory(path)
    except FileExistsError:
        return False
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    return True


def _sync_local(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    _sync_directory(getattr(file, "path", "") or file.name)


def _sync_directory(path: str) -> None:
    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return  # somebody has removed the file again, and the directory with it
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# --- memory -----------------------------------------------------------------------------------------------------


def _create_in_memory(filesystem: FileSystem, path: str, data: bytes) -> bool:
    from fsspec.implementations.memory import MemoryFile

    made = MemoryFile(filesystem, path, data)
    return filesystem.store.setdefault(path, made) is made  # one step under the interpreter lock


# --- SFTP -------------------------------------------------------------------------------------------------------


def _create_by_sftp(filesystem: FileSystem, path: str, data: bytes) -> bool:
    """A synced temporary file gets the name: by OpenSSH's hard link, or by a rename, which must not replace."""
    client, temporary = filesystem.ftp, _temporary(path)
    try:
        with client.open(temporary, "wx") as file:
            file.write(data)
            _sync_sftp(file)
        try:
            if not _extended(client, "hardlink@openssh.com", temporary, path):
                client.rename(temporary, path)  # in version 3 of the protocol an error where the target exists
        except OSError as error:
            if error.errno is None and filesystem.exists(path):  # "Failure" is all that version 3 can say
                return False
            raise
        return True
    finally:
        with suppress(OSError):
            client.remove(temporary)


def _open_by_sftp(filesystem: FileSystem, path: str, block: int) -> Any:
    """Requests of 32 KiB, of which many are under way; one after the other would take a round trip each."""
    file = filesystem.ftp.open(path, "wb", bufsize=0)
    file.set_pipelined(True)
    return file


class _Answers:
    """Takes an SFTP client's answers to reads, in whatever order they come."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.data: dict[int, bytes] = {}

    def _async_response(self, kind: int, message: Any, number: int) -> None:
        from paramiko.sftp import CMD_DATA

        if kind != CMD_DATA:
            self._client._convert_status(message)  # raises
        self.data[number] = message.get_string()


def _read_by_sftp(filesystem: FileSystem, path: str, start: int, stop: int) -> bytes:
    """All requests at once. (SFTPFile.readv is meant for this, and was measured to be ten times slower.)"""
    from paramiko.sftp import CMD_READ, int64

    client, parts = filesystem.ftp, []
    answers = _Answers(client)
    with client.open(path, "rb") as file:
        wanted = {}
        for offset in range(start, stop, _SFTP_READ):
            size = min(_SFTP_READ, stop - offset)
            number = client._async_request(answers, CMD_READ, file.handle, int64(offset), size)
            wanted[number] = offset, size
        while len(answers.data) < len(wanted):
            client._read_response()
        for number, (offset, size) in wanted.items():
            part = answers.data[number]
            if len(part) < size:  # a server may send less than it was asked for
                file.seek(offset + len(part))
                part += file.read(size - len(part))
            parts.append(part)
    return b"".join(parts)


def _sync_sftp(file: Any) -> None:
    file.flush()
    while file._reqs:  # answers to what is under way, and the errors among them: closing the file would drop them
        file.sftp._read_response(file._reqs.popleft())
    _extended(file.sftp, "fsync@openssh.com", file.handle)


def _extended(client: Any, name: str, *arguments: Any) -> bool:
    """Ask an SFTP server for an extension of OpenSSH's; returns False where it has none of that name."""
    from paramiko.sftp import CMD_EXTENDED

    try:
        client._request(CMD_EXTENDED, name, *arguments)
    except OSError as error:
        if "unsupported" not in str(error).lower():
            raise
        return False
    return True


def _sftp_arguments() -> dict[str, Any]:
    """Only hosts in the user's known_hosts: paramiko by itself takes any host for the right one."""
    import paramiko

    class KnownHosts(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]  # paramiko has no types
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            known = paramiko.HostKeys()
            for path in ("/etc/ssh/ssh_known_hosts", os.path.expanduser("~/.ssh/known_hosts")):
                with suppress(OSError):
                    known.load(path)
            if not known.check(hostname, key):
                print_of = key.get_base64()[-16:]
                raise paramiko.SSHException(
                    f"the {key.get_name()} key ..{print_of} of {hostname} is not in known_hosts"
                )

    timeouts = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), _SFTP_TIMEOUT)
    return {"host_key_policy": KnownHosts(), **timeouts}


def _prepare_sftp(filesystem: FileSystem) -> None:
    filesystem.ftp.get_channel().settimeout(_SFTP_TIMEOUT)  # paramiko would wait for ever


# --- object stores ----------------------------------------------------------------------------------------------


def _create_on_object_store(filesystem: FileSystem, path: str, data: bytes, **how: Any) -> bool:
    """One PUT with a condition; small enough for one, since on a multipart upload servers ignore the condition."""
    for attempt in range(_CONFLICTS):
        try:
            filesystem.pipe_file(path, data, mode="create", **how)
        except FileExistsError:
            return False
        except OSError as error:
            said = f"{error} {error.__cause__}"
            if error.errno == errno.EINVAL and any(word in said for word in _PRECONDITION):  # as s3fs has it
                return False
            if "ConditionalRequestConflict" not in said or attempt == _CONFLICTS - 1:
                raise
            time.sleep(0.1)  # S3's answer while another such PUT is under way: neither has won yet
        else:
            return True
    raise AssertionError("the last attempt returns or raises")


def _create_on_google(filesystem: FileSystem, path: str, data: bytes) -> bool:
    """A resumable upload of one chunk; for less than a chunk gcsfs ends lines in a way that strict servers refuse."""
    return _create_on_object_store(filesystem, path, data, chunksize=len(data))


def _temporary(path: str) -> str:
    return f"{path.rpartition('/')[0]}/{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


_LOCAL = Protocol(_create_local, "a hard link of a temporary file", sync=_sync_local, durable=True, directories=True)
_SFTP = Protocol(
    _create_by_sftp,
    "a hard link or a rename at the server",
    open=_open_by_sftp,
    read=_read_by_sftp,
    sync=_sync_sftp,
    directories=True,
    one_thread=True,
    arguments=_sftp_arguments,
    prepare=_prepare_sftp,
)
_OBJECTS = Protocol(_create_on_object_store, "one PUT with a condition", durable=True)

_KNOWN = {
    "file": _LOCAL,
    "local": _LOCAL,
    "memory": Protocol(_create_in_memory, "one step in this process"),
    "sftp": _SFTP,
    "ssh": _SFTP,
    **dict.fromkeys(("s3", "s3a", "az", "abfs", "abfss"), _OBJECTS),
    **dict.fromkeys(("gs", "gcs"), replace(_OBJECTS, create=_create_on_google)),
}
