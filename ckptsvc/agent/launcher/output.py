"""What ranks write: kept in a file for each, and shown with the rank in front of every line."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ckptsvc.agent.launcher.outlet import CHUNK, Outlet, Place

PIPE_BYTES = 1 << 20
"""How far a rank may write ahead of this process (if the kernel allows that much): a print must not stop a training."""


def log_file(directory: Path, attempt: int, rank: int) -> Path:
    """Where the output of a rank is kept."""
    return directory / f"attempt_{attempt}" / f"rank_{rank}.log"


def pipe() -> tuple[int, int]:
    """Both ends of a pipe for output: (to read from, to write to)."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


class Output:
    """What the ranks of a launcher, and the launcher itself, have to say; nobody waits for a terminal or a disk."""

    def __init__(self) -> None:
        self._shown, self._said, self._kept = (Outlet(name) for name in ("stdout", "stderr", "logs"))
        # By number: a stream of Python's has a lock, at which a process whose thread is stuck would not end.
        self._stdout, self._stderr = Place(None, _fd(sys.__stdout__)), Place(None, _fd(sys.__stderr__))

    def say(self, message: str) -> None:
        """Tell the user something, on the terminal's standard error."""
        self._said.put(self._stderr, f"{message}\n".encode("utf-8", "replace"))

    async def copy(
        self, reading: int, name: str, kept: Path | None, heard: Callable[[bytes], None] = lambda line: None
    ) -> None:
        """Copy lines until the last writer has closed the pipe.

        Args:
            reading: the end of the pipe to read from; it is closed here.
            name: shown before every line, in brackets.
            kept: the file to append to.
            heard: called with every line.
        """
        reader = asyncio.StreamReader(CHUNK)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0)
        )
        prefix = f"[{name}] ".encode()
        log = Place(kept, failed=lambda why: self._not_kept(name, why)) if kept else None
        if log is not None:
            self._kept.put(log, b"")  # the file is there also for a rank that says nothing
        try:
            while line := await _line(reader):
                heard(line)
                # A rank must not die of a full disk or of a terminal that is gone: its output goes on being read.
                if log is not None:
                    self._kept.put(log, line)
                self._shown.put(self._stdout, prefix + line.removesuffix(b"\n") + b"\n")
        finally:
            transport.close()
            if log is not None:
                self._kept.finish(log)

    async def close(self) -> None:
        """Write what still waits, if that goes on; nothing can be said after it."""
        self._shown.finish(self._stdout)
        self._said.finish(self._stderr)
        outlets = (self._shown, self._said, self._kept)
        await asyncio.gather(*(asyncio.to_thread(outlet.close) for outlet in outlets))

    def _not_kept(self, name: str, why: str) -> None:
        self.say(f"ckptsvc run: the output of rank {name} is not kept any more: {why}")


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line, or as much of it as is shown at once; empty at the end."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as error:
        return await reader.readexactly(error.consumed)
    except asyncio.IncompleteReadError as error:
        return error.partial


def _fd(stream: TextIO | None) -> int:
    return -1 if stream is None else stream.fileno()  # None: it was closed when this process was started
