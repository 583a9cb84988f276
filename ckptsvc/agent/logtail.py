"""The end of a log, as text that can be shown anywhere."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

MAX_BYTES = 16 << 10
"""Bytes of the file that are read."""

MAX_LINE = 1000
"""Characters shown of a line."""

# What terminals obey (ECMA-48): CSI sequences, OSC strings, and other escapes of two characters.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")


def tail(path: Path) -> str:
    """The last lines of a file; may hang where the file's server is dead.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a file")
        start = max(status.st_size - MAX_BYTES, 0)
        data = os.pread(fd, MAX_BYTES, start)
    finally:
        os.close(fd)
    text = data.decode("utf-8", "replace")
    return clean(text.partition("\n")[2] or text if start else text)


def clean(text: str) -> str:
    """Without what a terminal or a browser could take for a command; of a line drawn over itself, the last state."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in _ESCAPES.sub("", text).split("\n"))
    return "\n".join(_printable(line.expandtabs())[:MAX_LINE].rstrip() for line in lines).strip("\n")


def one_line(text: str) -> str:
    """The same in a single line."""
    return " ".join(clean(text).split())


def _printable(line: str) -> str:
    return line if line.isprintable() else "".join(c for c in line if c.isprintable())
