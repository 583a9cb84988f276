"""The other side of `storage.apart`: opens a store and answers calls, a thread for each line, until its owner ends.

It is given a socket (SOCK_SEQPACKET): first comes the address with the options, then, for each line, a socket and the
descriptor of the memory that both see. A line carries msgpack, each message after its length in four bytes:

    [op, bytes of memory, argument...] -> ["result", value] or ["error", code, what, hint, retryable]
                                       -> ["note", "ready" or "progress", bytes], answered by true to go on
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import sys
import threading
from typing import Any

import msgspec

from ckptsvc.errors import CkptsvcError, ConfigError
from ckptsvc.storage.api import Store
from ckptsvc.storage.registry import connect

_LENGTH = struct.Struct("<I")
_LONGEST = 1 << 30
_FIRST = 64 << 10

_OPS = ("capabilities", "put_if_absent", "read", "size", "children", "delete")


class _Stopped(Exception):
    """The owner's callback has raised."""


class _HungUp(Exception):
    """The line has broken in the middle of a call."""


def send(sock: socket.socket, message: Any) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(message)
    sock.sendall(_LENGTH.pack(len(body)) + body)


def receive(sock: socket.socket) -> Any:
    """Receive one message; EOFError where the other side has closed."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if length > _LONGEST:
        raise EOFError(f"a message of {length} bytes")
    return msgspec.msgpack.decode(_exactly(sock, length))


def _exactly(sock: socket.socket, nbytes: int) -> bytearray:
    buffer = bytearray(nbytes)
    with memoryview(buffer) as view:
        done = 0
        while done < nbytes:
            got = sock.recv_into(view[done:])
            if got == 0:
                raise EOFError("the connection was closed")
            done += got
    return buffer


class _Server:
    """The store, opened at the first call, so that what is wrong with it is an answer."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._asked = url, options
        self._lock = threading.Lock()
        self._store: Store | None = None

    def _opened(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = connect(*self._asked)
            return self._store

    def serve(self, sock: socket.socket, fd: int) -> None:
        """Answer what is asked on one line."""
        with sock:
            try:
                while True:
                    op, nbytes, *arguments = receive(sock)
                    send(sock, self._answer(sock, fd, op, nbytes, arguments))
            except (OSError, EOFError):
                os.close(fd)

    def _answer(self, sock: socket.socket, fd: int, op: str, nbytes: int, arguments: list[Any]) -> list[Any]:
        try:
            return ["result", self._do(sock, fd, op, nbytes, arguments)]
        except _HungUp as error:
            raise EOFError from error
        except CkptsvcError as error:
            return ["error", error.code, error.what, error.hint, error.retryable]
        except _Stopped:
            return ["result", None]
        except Exception as error:  # noqa: BLE001  one call must not end the others'
            return ["error", "store", f"{type(error).__name__}: {error}", "", False]

    def _do(self, sock: socket.socket, fd: int, op: str, nbytes: int, arguments: list[Any]) -> Any:
        store = self._opened()
        if op in _OPS:
            return msgspec.to_builtins(getattr(store, op)(*arguments), builtin_types=(bytes,))
        if op == "url":
            return store.url
        if op == "list":
            return [tuple(entry) for entry in store.list(*arguments)]
        if op not in ("read_into", "write"):
            raise ConfigError(f"{op!r} is no operation of a store")
        with mmap.mmap(fd, nbytes) as memory, memoryview(memory) as view:
            if op == "read_into":
                key, offset, length = arguments
                with view[:length] as part:
                    store.read_into(key, offset, part)
                return None
            key, size = arguments

            def note(kind: str) -> Any:
                def tell(nbytes: int) -> None:
                    try:
                        send(sock, ["note", kind, nbytes])
                        goes_on = receive(sock) is True
                    except (OSError, EOFError) as error:
                        raise _HungUp from error
                    if not goes_on:
                        raise _Stopped

                return tell

            store.write(key, view, size, ready=note("ready"), progress=note("progress"))
        return None


def main(fd: int, owner: int) -> None:
    """Serve until the owner says so or has ended."""
    with socket.socket(fileno=fd) as control:
        alive = os.pidfd_open(owner)
        waiting = select.poll()
        waiting.register(control, select.POLLIN)
        waiting.register(alive, select.POLLIN)
        server: _Server | None = None
        while True:
            ready = dict(waiting.poll())
            if alive in ready:
                os._exit(0)
            data, fds, _, _ = socket.recv_fds(control, _FIRST, 2)
            if not data:
                os._exit(0)  # a thread that hangs in the store must not keep this process
            if server is None:
                url, options = msgspec.msgpack.decode(data, type=tuple[str, dict[str, Any]])
                server = _Server(url, options)
            elif len(fds) == 2:
                line = socket.socket(fileno=fds[0])
                threading.Thread(target=server.serve, args=(line, fds[1]), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
