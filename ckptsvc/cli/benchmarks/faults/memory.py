"""A memory limit for one process, by a cgroup of its own.

Files and meaning: the kernel's manual, admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")

ALLOWED = 128 << 20
"""Bytes that a process may take after it was limited; what it has already is not counted."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A cgroup with a limit."""

    folder: Path

    def remove(self) -> None:
        """Once its process has ended, which the kernel notices a little later."""
        for _ in range(50):
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)
            else:
                return


def make() -> Limit:
    """An empty cgroup with the limit.

    Raises:
        OSError: that is not permitted here, or the kernel has no memory cgroups.
    """
    name = f"ckptsvc-bench-{secrets.token_hex(4)}"
    first = (ROOT / "memory").is_dir()  # version 1
    folder = ROOT / "memory" / name if first else ROOT / name
    folder.mkdir()
    limited = Limit(folder)
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(ALLOWED))
        # Else it would go on, ever slower, where there is swap.
        with contextlib.suppress(OSError):
            (folder / ("memory.swappiness" if first else "memory.swap.max")).write_text("0")
    except OSError:
        limited.remove()
        raise
    return limited


def limit(pid: int) -> Limit:
    """Limit a process.

    Raises:
        OSError: as `make`.
    """
    limited = make()
    (limited.folder / "cgroup.procs").write_text(str(pid))
    return limited


def is_permitted() -> bool:
    """Whether processes can be limited here."""
    if os.geteuid() != 0:
        return False
    try:
        make().remove()
    except OSError:
        return False
    return True
