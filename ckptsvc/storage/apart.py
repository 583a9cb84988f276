"""A store whose calls run in a process of their own, for a program that forks.

Clients of object stores have threads that a forked child does not have: its calls would wait for ever. A training
process forks when its data loader starts workers, so it never makes such a client: `storage.apart_process` does, which
is started anew and not forked. What is read comes back through shared memory.

Calls run side by side, each on a line of its own: a socket for questions and answers, and some memory. No thread
waits on this side.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ckptsvc.errors import BY_CODE, StoreError, StoreUnavailable
from ckptsvc.storage.apart_process import receive, send
from ckptsvc.storage.api import READ_LIMIT, Capabilities, Entry, Progress
from ckptsvc.storage.arguments import check_key, check_prefix, check_size, check_target

LINES = 8
"""Calls at a time; further ones wait."""

BLOCK = 32 << 20
"""Bytes read in one call; the memory of a line has as many at most, while nothing is written."""

_END_PATIENCE = 5.0  # seconds for the process to end by itself


class Apart:
    """The store at `url`, opened by another process.

    Args:
        url: its address.
        options: for its driver.

    Raises:
        ConfigError: the driver refuses address or options.
        StoreUnavailable: the process does not start.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._asked = url, dict(options)
        self._begin()
        try:
            self.url: str = self._call("url")
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """As a new store, and in a forked child, where locks may be held by threads that it does not have."""
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(LINES)
        self._process: _Process | None = None

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`; through here a store survives a fork."""
        return msgspec.structs.replace(msgspec.convert(self._call("capabilities"), Capabilities), fork_safe=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`."""
        return bool(self._call("put_if_absent", check_key(key), bytes(data)))

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        content: bytes = self._call("read", check_key(key), limit)
        return content

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`."""
        check_key(key)
        with check_target(buffer, offset) as view:
            for start in range(0, len(view) or 1, BLOCK):
                with view[start : start + BLOCK] as part, self._line() as line:
                    memory = line.memory(len(part))
                    line.ask("read_into", key, offset + start, len(part))
                    part[:] = memory[: len(part)]

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`; the bytes are copied to the process as they are ready."""
        check_key(key)
        copied = 0
        with check_size(data, size) as view, self._line() as line:
            memory = line.memory(size)

            def on_note(kind: str, nbytes: int) -> None:
                nonlocal copied
                if kind == "ready" and nbytes > copied:
                    if ready is not None:
                        ready(nbytes)
                    memory[copied:nbytes] = view[copied:nbytes]
                    copied = nbytes
                elif kind == "progress" and progress is not None:
                    progress(nbytes)

            try:
                line.ask("write", key, size, on_note=on_note)
            finally:
                line.shrink(BLOCK)

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return int(self._call("size", check_key(key)))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`."""
        return (Entry(*each) for each in self._call("list", check_prefix(prefix)))

    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        names: Sequence[str] = self._call("children", check_prefix(prefix))
        return names

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._call("delete", check_key(key))

    def close(self) -> None:
        """End the process, unless it is that of the process this one was forked from."""
        if self._owner != os.getpid():
            return
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.end()

    def _call(self, op: str, *arguments: Any) -> Any:
        with self._line() as line:
            return line.ask(op, *arguments)

    @contextlib.contextmanager
    def _line(self) -> Iterator[_Line]:
        """A line that nobody else uses meanwhile; a broken one is not used again, nor is a process that has ended."""
        if self._owner != os.getpid():
            self._begin()
        with self._slots:
            process = self._live()
            try:
                line = process.take()
            except StoreUnavailable:  # it has died
                self._forget(process)
                raise
            try:
                yield line
            except StoreUnavailable:
                if line.broken:
                    self._forget(process)
                raise
            finally:
                process.give(line)

    def _live(self) -> _Process:
        with self._lock:
            if self._process is None:
                self._process = _Process(*self._asked)
            return self._process

    def _forget(self, process: _Process) -> None:
        with self._lock:
            if self._process is process:
                self._process = None
        process.end()


class _Line:
    """One call at a time. `broken` is set while an answer is awaited: it may still come when nobody asks any more."""

    def __init__(self, sock: socket.socket, fd: int) -> None:
        self._sock, self._fd = sock, fd
        self._mapped: mmap.mmap | None = None
        self.broken = False

    def memory(self, nbytes: int) -> memoryview:
        """The first bytes of the memory that both sides see, at least so many."""
        if self._mapped is None or len(self._mapped) < nbytes:
            length = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._fd, max(length, os.fstat(self._fd).st_size))
            self._mapped = mmap.mmap(self._fd, length)
        return memoryview(self._mapped)

    def shrink(self, nbytes: int) -> None:
        """Give memory back beyond so many bytes."""
        if self._mapped is not None and len(self._mapped) > nbytes:
            self._mapped = None
            os.ftruncate(self._fd, 0)

    def ask(self, op: str, *arguments: Any, on_note: Any = None) -> Any:
        """One question; its answer, or the error that is the answer."""
        failure: BaseException | None = None
        self.broken = True
        try:
            send(self._sock, [op, os.fstat(self._fd).st_size, *arguments])
            while (message := receive(self._sock))[0] == "note":
                try:
                    on_note(*message[1:])
                except BaseException as error:  # noqa: BLE001  raised again below, when the other side has stopped
                    failure = error
                send(self._sock, failure is None)
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            raise StoreUnavailable(f"the process that opened the store has ended: {error}") from None
        self.broken = False
        if failure is not None:
            raise failure
        if message[0] == "error":
            code, what, hint, retryable = message[1:]
            raised = BY_CODE.get(code, StoreError)(what, hint=hint)
            raised.retryable = retryable
            raise raised
        return message[1]

    def close(self) -> None:
        self._mapped = None
        self._sock.close()
        os.close(self._fd)


class _Process:
    """The other process, and the lines to it."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._free: list[_Line] = []
        self._ended = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            numbers = map(str, (theirs.fileno(), os.getpid()))
            command = [sys.executable, "-P", "-m", "ckptsvc.storage.apart_process", *numbers]
            try:
                self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
            except OSError as error:
                self._control.close()
                raise StoreUnavailable(f"no process could be started for {url}: {error.strerror}") from None
        self._control.send(msgspec.msgpack.encode([url, dict(options)]))

    def take(self) -> _Line:
        """A line nobody uses."""
        with self._lock:
            if self._free:
                return self._free.pop()
        ours, theirs = socket.socketpair()
        fd = os.memfd_create("ckptsvc-apart")
        line = _Line(ours, fd)
        try:
            with theirs:
                socket.send_fds(self._control, [b"line"], [theirs.fileno(), fd])
        except OSError as error:
            line.close()
            raise StoreUnavailable(f"the process that opened the store has ended: {error.strerror}") from None
        return line

    def give(self, line: _Line) -> None:
        """Take a line back."""
        with self._lock:
            if not line.broken and not self._ended:
                self._free.append(line)
                return
        line.close()

    def end(self) -> None:
        """End the process."""
        with self._lock:
            self._ended, free, self._free = True, self._free, []
        for line in free:
            line.close()
        with contextlib.suppress(OSError):  # a fork may hold a copy of our end, so that to close it is not enough
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self._process.wait(_END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the kernel
                self._process.wait(_END_PATIENCE)
