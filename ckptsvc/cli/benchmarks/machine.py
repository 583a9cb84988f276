"""The machine a benchmark runs on: what it is, what CPU time processes took, and its page cache."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckptsvc_drivers.linux import file_system, in_page_cache

import ckptsvc

_TICKS = os.sysconf("SC_CLK_TCK")
_DROP_CACHES = "/proc/sys/vm/drop_caches"
_LOOKED_AT = 64 << 20  # bytes at the head of a file by which is judged whether it is cached


def facts(directory: str) -> dict[str, str]:
    """What numbers were measured on, for people: processor, memory, file system, versions, load."""
    cores = len(os.sched_getaffinity(0))
    versions = [f"{name} {_version(name)}" for name in ("torch", "numpy", "safetensors")]
    return {
        "processor": f"{cores} cores, {_first('/proc/cpuinfo', 'model name') or platform.processor() or '?'}",
        "memory": f"{_kilobytes('MemTotal') / 2**20:.1f} GiB, {available_memory() / 2**30:.1f} GiB available",
        "file system": f"{file_system(directory) or 'unknown'} at {directory}",
        "software": f"ckptsvc {ckptsvc.__version__}, {', '.join(versions)}, Python {platform.python_version()}, "
        f"Linux {platform.release()}",
        "load": load(),
    }


def load() -> str:
    """The load average over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return _kilobytes("MemAvailable") * 1024


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU seconds (user and system) that these processes and all below them have used so far.

    Children that have ended and were waited for count as well; processes that are not there count nothing. Source:
    /proc/<pid>/stat, see proc_pid_stat(5); the kernel keeps it to one tick, usually 10 ms.
    """
    used: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            text = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has just ended
        # The name of the program is in brackets and may have any characters in it.
        fields = text[text.rindex(")") + 2 :].split()
        pid, parent = int(entry), int(fields[1])
        used[pid] = sum(map(int, fields[11:15])) / _TICKS
        children.setdefault(parent, []).append(pid)
    total, waiting, seen = 0.0, list(roots), set[int]()
    while waiting:
        pid = waiting.pop()
        if pid not in seen:
            seen.add(pid)
            total += used.get(pid, 0.0)
            waiting += children.get(pid, ())
    return total


def evict(paths: Sequence[Path]) -> str:
    """Take files out of the page cache, so that the next read is cold.

    Returns:
        how it was done, for people; "in memory: ..." where files are nowhere else, "warm: ..." where it failed.
    """
    if not paths:
        return "nothing to evict"
    kind = file_system(str(paths[0].parent))
    if kind in ("tmpfs", "ramfs"):
        return f"in memory: nothing is cold on {kind}"
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # only clean pages can go
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    if not any(map(_is_cached, paths)):
        return "posix_fadvise(DONTNEED) on the files"
    try:
        Path(_DROP_CACHES).write_text("1")
    except OSError as error:
        return f"warm: posix_fadvise has no effect here, and {_DROP_CACHES}: {error.strerror}"
    return "warm: neither way has an effect" if any(map(_is_cached, paths)) else _DROP_CACHES


def _is_cached(path: Path) -> bool:
    size = os.stat(path).st_size
    if not size:
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        return in_page_cache(fd, 0, min(size, _LOOKED_AT))
    finally:
        os.close(fd)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kilobytes(field: str) -> int:
    words = _first("/proc/meminfo", field).split()
    return int(words[0]) if words else 0


def _first(path: str, name: str) -> str:
    """The value of the first line `name: value` of a file; "" where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
