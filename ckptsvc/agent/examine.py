"""What the kernel says of a rank that does not move, without asking the rank: state, processor time, where it waits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptsvc.rpc.v1 import coordinator_pb2 as pb

WATCHED = 0.3
"""Seconds over which processor time is measured, if there is that much."""

MAX_THREADS = 512
"""Threads of a process that are looked at."""

MAX_CHILDREN = 64
"""Children of a process that are looked at."""


@dataclass(frozen=True, slots=True)
class Target:
    """One rank to examine; `pid` is 0 for a process of another pid namespace."""

    rank: int
    pid: int


async def collect(targets: Sequence[Target], seconds: float) -> list[pb.RankEvidence]:
    """Evidence about each of the ranks, within `seconds`. What cannot be found out is left empty, with a note."""
    before = await asyncio.to_thread(lambda: [_threads(t.pid) for t in targets])
    watched = min(WATCHED, seconds / 2)
    await asyncio.sleep(watched)
    return await asyncio.to_thread(
        lambda: [_evidence(t, then, watched) for t, then in zip(targets, before, strict=True)]
    )


def process_state(pid: int) -> str:
    """The state of a process as /proc has it: R, S, D, T, Z, ...; X: there is none; "" for pid 0."""
    if pid <= 0:
        return ""
    return _stat(Path(f"/proc/{pid}/stat"))[0]


def activity(pid: int) -> tuple[int, float]:
    """(bytes read and written by a process and its children, seconds of processor time its children have used)."""
    children = _children(pid)
    io = sum(_io_bytes(each) for each in (pid, *children))
    ticks = sum(_stat(Path(f"/proc/{child}/stat"))[1] for child in children)
    return io, ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in _threads(pid):
        try:
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except (OSError, ValueError):  # it is gone, or the kernel was built without
            continue
    return found[:MAX_CHILDREN]


def _io_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()[:2]
        return sum(int(line.partition(": ")[2]) for line in lines)
    except (OSError, ValueError):
        return 0


def _evidence(target: Target, before: dict[int, int], seconds: float) -> pb.RankEvidence:
    evidence = pb.RankEvidence(rank=target.rank, pid=target.pid, enqueued=-1, completed=-1)
    if target.pid <= 0:
        evidence.notes.append("its process is in another pid namespace")
        return evidence
    evidence.state = process_state(target.pid)
    after = _threads(target.pid)
    ticks = max((after[t] - before[t] for t in after.keys() & before.keys()), default=0)
    evidence.cpu = min(max(ticks, 0) / os.sysconf("SC_CLK_TCK") / seconds, 1.0)
    try:
        waits_in = Path(f"/proc/{target.pid}/wchan").read_text()
    except OSError as error:
        evidence.notes.append(f"wchan: {error.strerror}")
    else:
        evidence.waits_in = "" if waits_in == "0" else waits_in[:64]
    return evidence


def _threads(pid: int) -> dict[int, int]:
    """Processor time of each thread of a process, in clock ticks."""
    if pid <= 0:
        return {}
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return {}
    return {int(name): _stat(Path(f"/proc/{pid}/task/{name}/stat"))[1] for name in names[:MAX_THREADS]}


def _stat(path: Path) -> tuple[str, int]:
    """(state, user and system time in ticks) from a stat file; ("X", 0) if it is gone."""
    try:
        # The name of the program stands in parentheses and may hold anything, parentheses too.
        fields = path.read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return "X", 0
