"""How much memory this process has and may take."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ckptsvc.errors import InvalidInput

MOST_BY_DEFAULT = 4 << 30
"""More makes a conversion no faster: it only has to hide the latency of the stores."""

LEAST_BY_DEFAULT = 256 << 20

_CGROUP = Path("/sys/fs/cgroup")


def available(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes that can be taken without pushing others out: of the machine, and of the cgroup where it has a limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError):
        lines = meminfo.read_text().splitlines()
        free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), free)
    with suppress(OSError, ValueError):
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            used = int((cgroup / "memory.current").read_text())
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            free = min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    return max(free, 0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def checked_memory(wanted: int | None, processes: int = 1) -> int:
    """Bytes that each of some processes on this machine may take.

    Args:
        wanted: what was asked for, for all of them together, with the program itself; None is a quarter of what is
            free, at most 4 GiB each.
        processes: how many.

    Raises:
        InvalidInput: there is not so much.
    """
    there = available()
    if wanted is None:
        return max(min(there // 4, MOST_BY_DEFAULT * processes) // processes, LEAST_BY_DEFAULT) + resident()
    if wanted > there:
        raise InvalidInput(
            f"--memory {wanted >> 20} MiB is more than the {there >> 20} MiB that are free here",
            hint="give less, or free some",
        )
    return wanted // processes
