"""What /proc says of a process (proc(5)). Nothing here stops it or needs its help."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

MAX_TASKS = 4096
"""Threads that are looked at."""

MAX_CHILDREN = 64
"""Children of a process that are looked at."""

T = TypeVar("T")

_MAX_FILE = 1 << 16
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_KERNEL_FRAME = re.compile(r"\[<[0-9a-f]+>\] (\w[\w.]*)")


@dataclass(slots=True)
class Process:
    """What was seen.

    Attributes:
        state: as in /proc; "X" if there is no such process.
        threads: how many it has.
        resident: bytes of memory.
        cpu: share of a core that its busiest thread used, 0 to 1.
        waits_in: the kernel function that the main thread sleeps in; "" if it runs, or that is not readable.
        notes: what is remarkable, or could not be found out.
    """

    state: str = "X"
    threads: int = 0
    resident: int = 0
    cpu: float = 0.0
    waits_in: str = ""
    notes: list[str] = field(default_factory=list)


def has_ended(pidfd: int, seconds: float = 0.0) -> bool:
    """Whether the process of a descriptor has ended, or does so within some seconds."""
    poll = select.poll()  # select knows no descriptors beyond 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def look(pid: int, pidfd: int, window: float) -> Process:
    """Look at a process for `window` seconds.

    May hang where the process is stuck in the kernel: call it through `aside`.

    Args:
        pid: its number.
        pidfd: a descriptor of it, which tells it from a later one of the same number.
        window: seconds between the two looks at the clocks of its threads; 0: only one look.
    """
    found = Process()
    try:
        folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return found
    try:
        # The folder is of the process that has the number now; as that of the descriptor still runs, it is the same.
        if has_ended(pidfd):
            return found
        before, began = _clocks(folder) if window else {}, time.monotonic()
        time.sleep(window)
        stat = _stat(folder, "stat")
        found.state, found.threads = stat[0], int(stat[17])
        found.resident = int(stat[21]) * _PAGE
        if window:
            spent = time.monotonic() - began
            ticks = max((now - before.get(tid, now) for tid, now in _clocks(folder).items()), default=0)
            found.cpu = min(1.0, ticks / _TICKS / spent)
            found.notes += _blocked(folder)
        if found.state not in "RZ":
            found.waits_in = _waits_in(folder, "")
    except (FileNotFoundError, ProcessLookupError):
        return Process()  # it has ended meanwhile
    finally:
        os.close(folder)
    return found


_VMSTAT = Path("/proc/vmstat")


def oom_kills(path: Path = _VMSTAT) -> int:
    """How many processes the kernel has killed on this node for lack of memory, since it was started.

    Whether all memory was used up or a cgroup's limit was reached makes no difference (the counter oom_kill of
    /proc/vmstat, since Linux 4.13), nor whose process it was.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = path.read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0


class OomKills:
    """How many of them there were lately."""

    def __init__(self, path: Path = _VMSTAT) -> None:
        self._path = path
        self._before = self._at_last = oom_kills(path)

    def lately(self) -> int:
        """Since the last call of `forget` but one."""
        return max(oom_kills(self._path) - self._before, 0)

    def forget(self) -> None:
        """What was known at the last call is no news any more."""
        self._before, self._at_last = self._at_last, oom_kills(self._path)


def state(pid: int) -> str:
    """The state of a process as in /proc; "X" if there is no such process, "" for pid 0 (another pid namespace)."""
    return _of(pid, "stat", lambda text: text.rpartition(")")[2].split()[0], "X") if pid > 0 else ""


def activity(pid: int) -> tuple[int, float]:
    """(bytes that a process and its children have read and written, seconds of processor time of its children).

    Only children that run now count, as far as the kernel lists them.
    """
    if pid <= 0:
        return 0, 0.0
    try:
        tasks = os.listdir(f"/proc/{pid}/task")[:MAX_TASKS]
    except OSError:
        tasks = []
    children = [int(child) for task in tasks for child in _of(pid, f"task/{task}/children", str, "").split()]
    del children[MAX_CHILDREN:]
    moved = sum(_of(each, "io", _moved, 0) for each in (pid, *children))
    return moved, sum(_of(child, "stat", _ticks, 0) for child in children) / _TICKS


def _of(pid: int, name: str, read: Callable[[str], T], missing: T) -> T:
    """What a file of a process says; `missing` if it has ended, or may not be looked at."""
    try:
        with open(f"/proc/{pid}/{name}", errors="replace") as file:
            return read(file.read(_MAX_FILE))
    except (OSError, ValueError, IndexError):
        return missing


def _moved(io: str) -> int:
    """The counters rchar and wchar: what went through read and write, to whatever file."""
    return sum(int(line.split()[1]) for line in io.splitlines()[:2])


def _ticks(stat: str) -> int:
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _read(folder: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, _MAX_FILE).decode("utf-8", "replace")
    finally:
        os.close(fd)


def _stat(folder: int, name: str) -> list[str]:
    """The fields after the command, which may itself hold spaces and brackets: state is [0], number 3 of proc(5)."""
    return _read(folder, name).rpartition(")")[2].split()


def _tasks(folder: int) -> Iterator[str]:
    fd = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield from os.listdir(fd)[:MAX_TASKS]
    finally:
        os.close(fd)


def _clocks(folder: int) -> dict[str, int]:
    """Ticks of processor time that each thread has used."""
    clocks = {}
    for tid in _tasks(folder):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            stat = _stat(folder, f"task/{tid}/stat")
            clocks[tid] = int(stat[11]) + int(stat[12])
    return clocks


def _blocked(folder: int) -> Iterator[str]:
    """Threads that not even SIGKILL reaches: they wait for a device or a file server."""
    for tid in _tasks(folder):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _stat(folder, f"task/{tid}/stat")[0] == "D":
                name = _read(folder, f"task/{tid}/comm").strip()
                where = _waits_in(folder, f"task/{tid}/") or "the kernel"
                yield f"thread {name} is in uninterruptible sleep in {where}"


def _waits_in(folder: int, task: str) -> str:
    """The kernel function a thread sleeps in, from whichever of the two files may be read."""
    with contextlib.suppress(PermissionError):
        function = _read(folder, f"{task}wchan").strip()
        if function not in ("", "0"):
            return function
    with contextlib.suppress(PermissionError):
        frame = _KERNEL_FRAME.match(_read(folder, f"{task}stack"))
        if frame:
            return frame[1]
    return ""
