"""From samples to a table: medians, ratios against the raw limits, and whether the bars of the design are met.

The ratio of a measure is the median of the ratios of the single repetitions: a limit and what is held against it were
measured within a second or two of each other, so the moods of a shared machine cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import msgspec

from ckptsvc.cli.bench_spec import Results, Sample

OURS = "ckptsvc"


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


Number = Callable[[Sample], float]


class Repetitions:
    """The samples of all ranks, merged: one number for each repetition of a system or limit."""

    def __init__(self, ranks: Sequence[Results]) -> None:
        self._ranks = ranks

    @property
    def gib(self) -> float:
        """Size of the state over all ranks."""
        return sum(r.nbytes for r in self._ranks) / 2**30

    def names(self) -> list[str]:
        """Systems and limits that were measured on every rank."""
        return [n for n in self._ranks[0].samples if all(n in r.samples for r in self._ranks)]

    def slowest(self, name: str, number: Number) -> list[float]:
        """For each repetition the largest number of any rank: the job waits for the last."""
        return self._merge(name, number, max)

    def total(self, name: str, number: Number) -> list[float]:
        """For each repetition the sum over the ranks."""
        return self._merge(name, number, sum)

    def _merge(self, name: str, number: Number, how: Callable[[Sequence[float]], float]) -> list[float]:
        columns = [[number(sample) for sample in rank.samples[name]] for rank in self._ranks if rank.samples.get(name)]
        return [how(row) for row in zip(*columns, strict=True)]


def over(ours: Sequence[float], limit: Sequence[float]) -> Value | None:
    """The ratios, repetition by repetition; None where the limit was not measured."""
    ratios = [a / b for a, b in zip(ours, limit, strict=False) if b > 0]
    return Value.of(ratios) if ratios else None


class Table:
    """Builds the rows of one workload."""

    def __init__(self, workload: str, ranks: Sequence[Results]) -> None:
        self._workload, self._all = workload, Repetitions(ranks)
        self._limits = {"memcpy", "direct write", "cold read"}
        self.rows: list[Row] = []

    @property
    def _peers(self) -> list[str]:
        return [n for n in self._all.names() if n not in self._limits and n not in (OURS, "from memory", "from store")]

    def timed(self, what: str, key: str, limit: str, bar: float, *, ours: str = OURS, compare: bool = True) -> None:
        """Seconds `key` of ours, and of the peers if they are to be compared, over the seconds of a raw limit."""
        numbers = self._all.slowest(ours, lambda s: s[key])
        limits = self._all.slowest(limit, lambda s: min(s.values())) if limit in self._all.names() else []
        peers = {p: Value.of(self._all.slowest(p, lambda s: s[key])) for p in self._peers if compare}
        self.rows.append(
            Row(
                workload=self._workload, what=what, unit="s", ours=Value.of(numbers), bar=bar, peers=peers,
                against=limit, limit=Value.of(limits) if limits else None, ratio=over(numbers, limits),
                missing="" if limits else f"{limit} was not measured",
            )
        )  # fmt: skip

    def plain(
        self, what: str, key: str, unit: str, bar: float | None, scale: float = 1.0, *, summed: bool = False
    ) -> None:
        """A number of ours and of the peers, as it is; summed over the ranks, or of the rank that has most."""
        merge = self._all.total if summed else self._all.slowest
        values = {n: Value.of(merge(n, lambda s: s[key] * scale)) for n in (OURS, *self._peers)}
        ours = values.pop(OURS)
        self.rows.append(Row(workload=self._workload, what=what, unit=unit, ours=ours, bar=bar, peers=values))

    def against(self, what: str, key: str, peer: str, bar: float) -> None:
        """How many times faster ours is than a peer."""
        numbers = self._all.slowest(OURS, lambda s: s[key])
        theirs = self._all.slowest(peer, lambda s: s[key]) if peer in self._all.names() else []
        self.rows.append(
            Row(
                workload=self._workload, what=what, unit="s", ours=Value.of(numbers), bar=bar, faster=True,
                against=peer, limit=Value.of(theirs) if theirs else None, ratio=over(theirs, numbers),
                missing="" if theirs else f"{peer} was not measured",
            )
        )  # fmt: skip

    @property
    def per_gib(self) -> float:
        """What turns seconds of all ranks into seconds per GiB of state."""
        return 1 / self._all.gib if self._all.gib else 0.0

    def reads(self, case: str, bar: float) -> None:
        """Bytes read job-wide over bytes needed, and the seconds it took."""
        read, needed = self._all.total(case, lambda s: s["read"]), self._all.total(case, lambda s: s["needed"])
        mebibytes = [n / 2**20 for n in read]
        self.rows.append(
            Row(
                workload=self._workload, what=f"bytes read, {case}", unit="MiB", ours=Value.of(mebibytes), bar=bar,
                against="bytes needed", limit=Value.of([n / 2**20 for n in needed]), ratio=over(read, needed),
            )
        )  # fmt: skip


def rows_of(workload: str, ranks: Sequence[Results]) -> list[Row]:
    """The rows of a workload from what its ranks have measured. The bars are those of the design."""
    table = Table(workload, ranks)
    if workload == "save":
        table.timed("loop blocked", "blocked", "memcpy", 1.15)
        table.timed("until durable", "durable", "direct write", 1.2)
        table.plain("CPU", "cpu", "s/GiB", 0.6, table.per_gib, summed=True)
    elif workload == "small":
        table.timed("loop blocked", "blocked", "memcpy", 1.5)
        table.against("until durable", "durable", "dcp", 12.0)
        table.plain("CPU", "cpu", "s/GiB", None, table.per_gib, summed=True)
    elif workload == "overlap":
        table.plain("slowdown of the loop beside a save", "slowdown", "%", 5.0, 100.0)
        table.plain("training time lost in all", "lost", "s/GiB", 0.07, table.per_gib)
        table.plain("until durable, beside the loop", "durable", "s", None)
    elif workload == "restore":
        table.timed("cold, from the store", "seconds", "cold read", 1.2, ours="from store")
        table.timed("after a kill, from memory", "seconds", "memcpy", 1.3, ours="from memory", compare=False)
    elif workload == "reshard":
        for case in ranks[0].samples:
            table.reads(case, 1.05)
    return table.rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for programs; `met` is true, false, or null where there is no bar."""
    return [{**msgspec.to_builtins(row), "met": row.met} for row in rows]
