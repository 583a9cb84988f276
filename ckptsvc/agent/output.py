"""What ranks write: kept in a file for each, and shown with the rank in front of every line."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from pathlib import Path
from typing import BinaryIO

PIPE_BYTES = 1 << 20
"""How far a rank may write ahead of this process (if the kernel allows that much): a print must not stop a training."""

CHUNK = 1 << 16
"""Longest line in bytes that is shown as one; a longer one is shown as several, and kept as it is."""


def log_file(directory: Path, attempt: int, rank: int) -> Path:
    """Where the output of a rank is kept."""
    return directory / f"attempt_{attempt}" / f"rank_{rank}.log"


def pipe() -> tuple[int, int]:
    """Both ends of a pipe for output: (to read from, to write to)."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


async def copy(reading: int, name: str, kept: Path | None) -> None:
    """Copy lines until the last writer has closed the pipe.

    Args:
        reading: the end of the pipe to read from; it is closed here.
        name: shown before every line, in brackets.
        kept: the file to append to.
    """
    reader = asyncio.StreamReader(CHUNK)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0)
    )
    prefix = f"[{name}] ".encode()
    with contextlib.closing(transport), contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(kept, "ab", buffering=0))  # noqa: ASYNC230  once, and local
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError as error:
                line = await reader.readexactly(error.consumed)
            except asyncio.IncompleteReadError as error:
                line = error.partial
            if not line:
                return
            if file is not None:
                file.write(line)
            sys.stdout.buffer.write(prefix + line.removesuffix(b"\n") + b"\n")
            sys.stdout.buffer.flush()
