"""A restore in which the job reads every byte once: ranks divide the windows, read them, and pass on what others want.

    1. every rank plans its own windows (pipeline.read); windows are a fixed grid, so the plans speak of the same things
    2. (shard, window, mask of extents) is gathered; each window gets one reader among those who want it and can read it
    3. in rounds, each reader reads its next window and sends it to the others who want it; all deliver to their targets

A rank that meets a damaged window goes on with the rounds, so that nobody waits for ever, and says so at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptsvc.client.group import Group, gather_rows
from ckptsvc.errors import Damaged
from ckptsvc.pipeline.read import (
    Sink,
    Source,
    Window,
    deliver,
    fill,
    read_windows,
    verify,
    window_buffer,
    window_bytes,
)

Key = tuple[int, int]
"""(shard, window number)."""

Progress = Callable[[int], None]
"""Takes the bytes that have come in since the last call."""


@dataclass(frozen=True, slots=True)
class Task:
    """One window in one round: who reads which extents, who gets which."""

    key: Key
    reader: int
    mask: int
    wanters: tuple[tuple[int, int], ...]  # (rank, mask), without the reader


@dataclass(frozen=True, slots=True)
class Readable:
    """What this rank can read: every shard (a store all ranks reach), or these only (arenas of its node)."""

    everything: bool
    shards: frozenset[int] = frozenset()


def assign(tables: Sequence[Sequence[Sequence[int]]], readable: Sequence[Readable]) -> list[list[Task]]:
    """Rounds of tasks, each reader at most once a round. The same on every rank: a pure function of what was gathered.

    Args:
        tables: for each rank its rows (shard, window, mask).
        readable: for each rank what it can read.

    Raises:
        Damaged: a window is wanted that nobody can read.
    """
    wanted: dict[Key, list[tuple[int, int]]] = {}
    for rank, rows in enumerate(tables):
        for shard, number, mask in rows:
            wanted.setdefault((int(shard), int(number)), []).append((rank, int(mask)))
    load = [0] * len(tables)
    queues: list[list[Task]] = [[] for _ in tables]
    for key in sorted(wanted):
        wanters = wanted[key]
        able = [r for r, _ in wanters if readable[r].everything or key[0] in readable[r].shards]
        if not able:
            able = [r for r, what in enumerate(readable) if what.everything or key[0] in what.shards]
        if not able:
            raise Damaged(f"shard {key[0]} is in no node's memory")
        union = 0
        for _, mask in wanters:
            union |= mask
        reader = min(able, key=load.__getitem__)
        load[reader] += union.bit_count()
        others = tuple((r, m) for r, m in wanters if r != reader)
        queues[reader].append(Task(key, reader, union, others))
    rounds = max((len(q) for q in queues), default=0)
    return [[q[i] for q in queues if i < len(q)] for i in range(rounds)]


def exchange(
    group: Group,
    windows: dict[Key, Window],
    readable: Readable,
    source: Source,
    extent: int,
    sink: Sink,
    progress: Progress = lambda nbytes: None,
) -> int:
    """Fill every rank's targets; all ranks call this together.

    Returns:
        bytes this rank has read.

    Raises:
        Damaged, StoreError: what this rank met, after all rounds; the caller asks the others.
    """
    rows = np.array([(w.shard, w.number, w.mask) for w in windows.values()], np.int64).reshape(-1, 3)
    tables = gather_rows(group, rows)
    told = group.all_gather(np.array([readable.everything, *sorted(readable.shards)], np.int64).tobytes())
    parsed = [np.frombuffer(t, np.int64) for t in told]
    rounds = assign([t.tolist() for t in tables], [Readable(bool(p[0]), frozenset(p[1:].tolist())) for p in parsed])
    if not any(
        task.wanters or task.key not in windows for tasks in rounds for task in tasks if task.reader == group.rank
    ) and (not any(r == group.rank for tasks in rounds for task in tasks for r, _ in task.wanters)):
        # Nothing to pass on: read at full speed.
        ordered = [windows[key] for key in sorted(windows)]
        return read_windows(ordered, source, extent, sink, progress=progress)
    return _Rounds(group, windows, source, extent, sink, progress).run(rounds)


class _Rounds:
    def __init__(
        self,
        group: Group,
        windows: dict[Key, Window],
        source: Source,
        extent: int,
        sink: Sink,
        progress: Progress,
    ) -> None:
        self._group, self._windows, self._source = group, windows, source
        self._extent, self._sink, self._progress = extent, sink, progress
        self._free = [window_buffer(extent) for _ in range(3)]
        self._spare: list[memoryview] = []  # to receive into: fresh memory for every window costs more than the copy
        self._failure: Exception | None = None
        self._read = 0

    def run(self, rounds: list[list[Task]]) -> int:
        mine = [[t for t in tasks if t.reader == self._group.rank] for tasks in rounds]
        with ThreadPoolExecutor(1, thread_name_prefix="ckptsvc-read") as pool:
            ahead = self._start(pool, mine[0]) if rounds else None
            for i, tasks in enumerate(rounds):
                following = self._start(pool, mine[i + 1]) if i + 1 < len(rounds) else None
                receiving = [self._receive(task) for task in tasks if self._mask_for_me(task)]
                if mine[i] and ahead:
                    self._pass_on(mine[i][0], ahead.result())
                for work, window, buffer in receiving:
                    work.wait()
                    self._progress(len(buffer))
                    self._deliver(window, buffer)
                    self._spare.append(buffer)
                ahead = following
        if self._failure:
            raise self._failure
        return self._read

    def _start(self, pool: ThreadPoolExecutor, tasks: list[Task]) -> Future[memoryview] | None:
        return pool.submit(self._fetch, tasks[0]) if tasks else None

    def _fetch(self, task: Task) -> memoryview:
        buffer = self._free.pop()
        window = Window(*task.key)

        def read() -> None:
            nbytes = fill(window, task.mask, self._source, self._extent, buffer)
            self._read += nbytes
            self._progress(nbytes)
            verify(window, task.mask, self._source, self._extent, buffer)

        self._guard(read)
        return buffer

    def _pass_on(self, task: Task, buffer: memoryview) -> None:
        sending = [self._group.send(buffer[slice(*self._hull(task, mask))], rank) for rank, mask in task.wanters]
        window = self._windows.get(task.key)
        if window is not None:
            self._deliver(window, buffer)
        for work in sending:
            work.wait()
        self._free.append(buffer)

    def _mask_for_me(self, task: Task) -> int:
        return next((mask for rank, mask in task.wanters if rank == self._group.rank), 0)

    def _receive(self, task: Task) -> tuple[Any, Window, memoryview]:
        buffer = self._spare.pop() if self._spare else window_buffer(self._extent)
        first, last = self._hull(task, self._mask_for_me(task))
        return self._group.receive(buffer[first:last], task.reader), self._windows[task.key], buffer

    def _hull(self, task: Task, mask: int) -> tuple[int, int]:
        """Byte range of the window from the first to the last extent of a mask, ending with the shard."""
        low = (mask & -mask).bit_length() - 1
        start = task.key[1] * window_bytes(self._extent)
        last = min(mask.bit_length() * self._extent, self._source.size(task.key[0]) - start)
        return low * self._extent, last

    def _deliver(self, window: Window, buffer: memoryview) -> None:
        self._guard(lambda: deliver(window, buffer, self._sink))

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  whatever it is: the others wait for the rounds to go on
            self._failure = self._failure or error
