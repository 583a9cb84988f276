"""The file that an agent's standard error goes to, where nobody else bounds it: its beginning is put aside, once.

Workers have inherited the same open file, so it is not replaced: it is copied and emptied. Whoever appends goes on at
its new end. A line that is written between the two is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import stat
from functools import partial
from pathlib import Path

from ckptsvc.agent.aside import aside

NAME = "agent.log"

MOST = 8 << 20
"""Bytes from which on it is put aside; one older is kept."""

EVERY = 10.0
"""Seconds between looks."""


async def bound(path: Path, fd: int = 2) -> None:
    """Keep a log bounded, until cancelled; does nothing where `fd` is something else."""
    while True:
        await asyncio.sleep(EVERY)
        with contextlib.suppress(OSError):  # a file system that hangs is looked at again later
            await aside(partial(put_aside, path, fd), EVERY)


def put_aside(path: Path, fd: int, most: int = MOST) -> None:
    """Copy a log that has grown too long to its name with ".1", and empty it."""
    own = os.fstat(fd)
    if not stat.S_ISREG(own.st_mode) or own.st_size <= most or not os.path.samestat(own, os.lstat(path)):
        return
    older = path.with_name(f"{path.name}.1")
    try:
        older.unlink(missing_ok=True)
        with open(path, "rb") as source, open(older, "xb", opener=_private) as target:
            shutil.copyfileobj(source, target)
    except OSError as error:  # the file system is full, perhaps because of this
        older.unlink(missing_ok=True)
        logging.getLogger("ckptsvc.agent").warning("the beginning of %s is lost: %s", path, error.strerror)
    os.truncate(path, 0)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
