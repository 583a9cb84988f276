"""Large ranges between memory and a file: direct I/O in blocks, by a few threads that all transfers share.

Views of the caller's memory are released explicitly, not when the garbage collector or a traceback lets go of
them, so that the caller can close that memory as soon as a transfer has returned or raised.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from ckptsvc.storage.api import Progress
from ckptsvc_drivers.linux import System
from ckptsvc_drivers.threads import Threads

PAGE = mmap.PAGESIZE
"""Alignment of direct I/O in memory, offset and length; most file systems ask for 512, none met for more."""


@dataclass(slots=True)
class File:
    """An open file.

    Attributes:
        fd: its descriptor.
        direct: it is in direct mode.
        refused: why it is not, where it was asked for.
        block: bytes of a transfer that suit how the file is striped, a multiple of `PAGE`; 0 is any number.
    """

    fd: int
    direct: bool = False
    refused: str = ""
    block: int = 0

    def set_direct(self, on: bool) -> None:
        """Switch direct mode; OSError EINVAL where the file system has none."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        self.direct = on


class Transfer:
    """The threads, and how work is cut for them.

    Args:
        system: the calls to make.
        threads: how many.
        block: bytes per call in direct mode, a multiple of `PAGE`.
    """

    def __init__(self, system: System, threads: int, block: int) -> None:
        self._system, self._threads, self._block = system, Threads(threads), block

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def write(self, file: File, view: memoryview, ready: Progress | None, progress: Progress | None) -> None:
        """Write all of `view` from offset 0 on, padded with zeros to whole pages."""
        whole = len(view) // PAGE * PAGE

        def write_step(start: int, stop: int) -> int:
            with view[start:stop] as part:
                return self.write_all(file, part, start)

        self._threads.spread(write_step, whole, file.block or self._block, ready, progress)
        if rest := len(view) - whole:
            if ready is not None:
                ready(len(view))
            with mmap.mmap(-1, PAGE) as page, memoryview(page) as padded:
                padded[:rest] = view[whole:]
                self.write_all(file, padded, whole)
            if progress is not None:
                progress(rest)

    def read(self, file: File, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on; EOFError, with the offset, where the file ends before.

        In direct mode `offset` and the address of `view` are multiples of `PAGE`.
        """
        if file.direct:
            whole, step = len(view) // PAGE * PAGE, self._block
        else:  # in two runs through the page cache: one is slower, more confuse its read-ahead
            whole, step = len(view), max(self._block, (len(view) + 1) // 2)

        def read_step(start: int, stop: int) -> int:
            with view[start:stop] as part:
                return self.read_all(file, part, offset + start)

        if whole <= step:
            read_step(0, whole)
        else:
            self._threads.spread(read_step, whole, step)
        if whole < len(view):
            file.set_direct(False)
            with view[whole:] as tail:
                self.read_all(file, tail, offset + whole)

    def write_all(self, file: File, part: memoryview, offset: int) -> int:
        """Write `part` at `offset` in this thread; returns its length."""
        return self._repeat(self._system.pwrite, file, part, offset)

    def read_all(self, file: File, part: memoryview, offset: int) -> int:
        """Fill `part` from `offset` in this thread; returns its length; EOFError as in `read`."""
        return self._repeat(self._system.pread, file, part, offset)

    def _repeat(self, call: Callable[[int, memoryview, int], int], file: File, part: memoryview, offset: int) -> int:
        """Call until all of `part` is through, in direct mode as long as the file system takes it."""
        done = 0
        while done < len(part):
            direct = file.direct
            try:
                with part[done:] as rest:
                    moved = call(file.fd, rest, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                file.refused = "the file system refuses it when a block is transferred"
                file.set_direct(False)
            else:
                if moved == 0:
                    raise EOFError(offset + done)
                done += moved
        return done
