"""From samples to a table: medians, ratios against the raw limits, and whether the bars of the design are met.

The ratio of a measure is the median of the ratios of the single repetitions: a limit and what is held against it were
measured within a second or two of each other, so the moods of a shared machine cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import msgspec

from ckptsvc.cli.benchmarks.spec import OVERLAPPED, Results

OURS = "ckptsvc"
NOT_PEERS = {OURS, OVERLAPPED, "from store", "from memory", "memcpy", "direct write", "cold read"}


class Value(msgspec.Struct, frozen=True):
    """A number that was measured several times."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(numbers: Sequence[float]) -> Value:
        """Median, minimum and maximum."""
        return Value(median(numbers), min(numbers), max(numbers))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.

    Attributes:
        workload: which it belongs to.
        what: what was measured.
        unit: "s", "s/GiB", "%" or "x".
        ours: ckptsvc.
        against: the name of the raw limit, or of the peer, in the denominator of `ratio`; "" without one.
        limit: that limit.
        ratio: ours over the limit, or the limit over ours where `faster`.
        faster: the ratio says how many times faster ours is: more is better.
        bar: an upper bound of the ratio, or of ours where there is no ratio; a lower bound where `faster`.
        peers: the same measure of the peers.
        missing: why there is no ratio.
    """

    workload: str
    what: str
    unit: str
    ours: Value
    against: str = ""
    limit: Value | None = None
    ratio: Value | None = None
    faster: bool = False
    bar: float | None = None
    peers: dict[str, Value] = {}
    missing: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the bar; None without a bar, or without what it is held against."""
        if self.bar is None or (self.against and self.ratio is None):
            return None
        value = (self.ratio or self.ours).median
        return value >= self.bar if self.faster else value <= self.bar


class Repetitions:
    """The samples of all ranks, merged: one number for each repetition of a system or limit."""

    def __init__(self, ranks: Sequence[Results]) -> None:
        self._ranks = ranks

    @property
    def gib(self) -> float:
        """Size of the state over all ranks."""
        return sum(r.nbytes for r in self._ranks) / 2**30

    def names(self) -> list[str]:
        """Systems and limits that were measured on rank 0."""
        return list(self._ranks[0].samples)

    def of(self, name: str, key: str, *, summed: bool = False) -> list[float]:
        """For each repetition the largest number of any rank (the job waits for the last), or the sum of all.

        Args:
            name: the system or limit; none was measured if it is not there.
            key: which number of its samples; "" takes the smallest of each sample: the fastest of several ways.
            summed: add the ranks up.
        """
        measured = [rank.samples[name] for rank in self._ranks if name in rank.samples]
        columns = [[sample[key] if key else min(sample.values()) for sample in samples] for samples in measured]
        return [(sum if summed else max)(row) for row in zip(*columns, strict=True)]


class Table:
    """Builds the rows of one workload."""

    def __init__(self, workload: str, ranks: Sequence[Results]) -> None:
        self._workload, self._all = workload, Repetitions(ranks)
        self.rows: list[Row] = []

    def timed(self, what: str, key: str, limit: str, bar: float, ours: str = OURS, *, compare: bool = True) -> None:
        """Seconds of ours, and of the peers if they are to be compared, over those of a raw limit."""
        peers = self._peers(key) if compare else {}
        self._add(what, "s", self._all.of(ours, key), bar, peers, limit, self._all.of(limit, ""))

    def faster(self, what: str, key: str, peer: str, bar: float) -> None:
        """Seconds of ours and of all peers, and how many times those of one peer they are."""
        self._add(what, "s", self._all.of(OURS, key), bar, self._peers(key), peer, self._all.of(peer, key), faster=True)

    def plain(
        self, what: str, key: str, unit: str, bar: float | None, scale: float = 1, ours: str = OURS, *,
        summed: bool = False,
    ) -> None:  # fmt: skip
        """A number of ours and of the peers, as it is."""
        numbers = [scale * n for n in self._all.of(ours, key, summed=summed)]
        self._add(what, unit, numbers, bar, self._peers(key, scale, summed=summed) if ours == OURS else {})

    def reads(self, case: str, bar: float) -> None:
        """Bytes read by all ranks over bytes needed."""
        read, needed = ([n / 2**20 for n in self._all.of(case, key, summed=True)] for key in ("read", "needed"))
        self._add(f"bytes read, {case}", "MiB", read, bar, {}, "bytes needed", needed)

    def seconds_per_gib(self) -> float:
        """What turns seconds into seconds per GiB of state."""
        return 1 / self._all.gib

    def _peers(self, key: str, scale: float = 1, *, summed: bool = False) -> dict[str, Value]:
        others = [name for name in self._all.names() if name not in NOT_PEERS]
        return {n: Value.of([scale * x for x in self._all.of(n, key, summed=summed)]) for n in others}

    def _add(
        self, what: str, unit: str, ours: Sequence[float], bar: float | None, peers: dict[str, Value],
        against: str = "", limits: Sequence[float] = (), *, faster: bool = False,
    ) -> None:  # fmt: skip
        pairs = zip(limits, ours, strict=True) if faster else zip(ours, limits, strict=True)
        self.rows.append(
            Row(
                workload=self._workload,
                what=what,
                unit=unit,
                ours=Value.of(ours),
                against=against,
                limit=Value.of(limits) if limits else None,
                ratio=Value.of([a / b for a, b in pairs]) if limits else None,
                faster=faster,
                bar=bar,
                peers=peers,
                missing=f"{against} was not measured" if against and not limits else "",
            )
        )


def rows_of(workload: str, ranks: Sequence[Results]) -> list[Row]:
    """The rows of a workload from what its ranks have measured. The bars are those of the design."""
    table = Table(workload, ranks)
    match workload:
        case "save":
            table.timed("loop blocked", "blocked", "memcpy", 1.15)
            table.timed("until durable", "durable", "direct write", 1.2)
            table.plain("CPU", "cpu", "s/GiB", 0.6, table.seconds_per_gib(), summed=True)
        case "small":
            table.timed("loop blocked", "blocked", "memcpy", 1.5)
            table.faster("until durable", "durable", "dcp", 12)
            table.plain("CPU", "cpu", "s/GiB", None, table.seconds_per_gib(), summed=True)
        case "overlap":
            table.plain("slowdown of the loop", "slowdown", "%", 5, 100)
            table.plain("training time lost in all", "lost", "s/GiB", 0.07, table.seconds_per_gib())
            table.plain("until durable", "durable", "s", None)
            table.timed("overlap: loop blocked", "blocked", "memcpy", 0.1, OVERLAPPED, compare=False)
            table.plain("overlap: slowdown of the loop", "slowdown", "%", 5, 100, OVERLAPPED)
            table.plain("overlap: time lost in all", "lost", "s/GiB", 0.07, table.seconds_per_gib(), OVERLAPPED)
        case "restore":
            table.timed("cold, from the store", "seconds", "cold read", 1.2, "from store")
            table.timed("after a kill, from memory", "seconds", "memcpy", 1.3, "from memory", compare=False)
        case "reshard":
            for case in ranks[0].samples:
                table.reads(case, 1.05)
    return table.rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for programs; `met` is true, false, or null where there is no bar."""
    return [{**msgspec.to_builtins(row), "met": row.met} for row in rows]
