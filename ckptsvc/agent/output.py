"""What ranks write: kept in a file for each, and shown with the rank in front of every line."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Callable
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


async def copy(reading: int, name: str, kept: Path | None, heard: Callable[[bytes], None] = lambda line: None) -> None:
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
    file = _opened(kept)
    shown: BinaryIO | None = sys.stdout.buffer
    with contextlib.closing(transport), contextlib.closing(file) if file else contextlib.nullcontext():
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError as error:
                line = await reader.readexactly(error.consumed)
            except asyncio.IncompleteReadError as error:
                line = error.partial
            if not line:
                return
            heard(line)
            # A rank must not die of a full disk or of a terminal that is gone: its output goes on being read.
            file = _write(file, line, f"the output of rank {name} is not kept any more")
            shown = _write(shown, prefix + line.removesuffix(b"\n") + b"\n", "")


def _opened(path: Path | None) -> BinaryIO | None:
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab", buffering=0)
    except OSError as error:
        _warn(f"{path}: {error.strerror}; the output is not kept")
        return None


def _write(sink: BinaryIO | None, data: bytes, why: str) -> BinaryIO | None:
    """Write all; None from the first failure on."""
    if sink is None:
        return None
    try:
        sink.write(data)
        sink.flush()
    except (OSError, ValueError) as error:
        if why:
            _warn(f"{why}: {error}")
        return None
    return sink


def _warn(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"ckptsvc run: {message}", file=sys.stderr, flush=True)  # noqa: T201
