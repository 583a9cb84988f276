"""Does a rank make progress? Judged by the history of its own job: per phase, by quantiles, on one node.

Every sign of life (a step, `progress`, another phase) ends a *gap*. A rank is stalled when its present gap is longer
than

    max(factor x the 99th percentile of this job's recent gaps in the same phase, floor)

and, as long as the job has few such gaps, longer than `startup` as well. For a process that is stopped, the floor is
enough. Nothing outlives the attempt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptsvc.control.gaps import RECENT, Gaps
from ckptsvc.control.slowness import Slowness
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

STEP = "step"
"""The phase in which every sign of life is a training step."""

ENOUGH = 20
"""Gaps from which on the history of a phase counts."""

WARM_UP = 3
"""Steps of each rank that do not count: they compile, and fill caches."""

SHARE = 0.99
STILL_SLOWER = 1.3
"""Times the length of a step that was told from which on it is told again."""

PAUSE = 2.0
"""Seconds between two looks from which on the agent itself was stopped or starved: measuring starts again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is normal.

    Attributes:
        floor: seconds without progress that are never a stall.
        factor: times the 99th percentile of the gaps so far.
        startup: seconds that a phase without history may be without progress.
    """

    floor: float = 4.0
    factor: float = 3.0
    startup: float = 600.0


class Sight(NamedTuple):
    """What a rank's heartbeat page says; times in seconds of one clock, which need not be ours."""

    step: int
    at: float  # of the last sign of life
    phases: int  # how many it has gone through
    since: float  # when the present one began
    phase: str


@dataclass(slots=True)
class _Rank:
    sight: Sight
    quiet: float = 0.0  # seconds without progress, as far as somebody was looking
    steps: int = 0  # seen
    stopped: bool = False


@dataclass(slots=True)
class Stalls:
    """The ranks of one attempt of a job on one node. Only one of them at a time is reported, the longest stalled."""

    job: str
    node: str
    attempt: int
    limits: Limits
    looks_every: float = 0.25
    patience: float = 0.0  # seconds after which a stall is reported, unless the process is stopped (see control.pace)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _gaps: dict[str, Gaps] = field(default_factory=dict)
    _looked: float | None = None
    _told: int | None = None
    _slowness: Slowness = field(default_factory=Slowness)
    _told_slow: float = 0.0  # seconds for a step, as last told

    def look(self, sights: Mapping[int, Sight], now: float, stopped: Collection[int] = ()) -> list[pb.Report]:
        """Take in what all ranks' pages say at `now`; returns what the coordinator should hear.

        `stopped` are ranks (of those that are `suspicious`) whose process is stopped.
        """
        elapsed = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        paused = elapsed > PAUSE
        for rank in self._ranks.keys() - sights.keys():
            del self._ranks[rank]
            if rank == self._told:
                self._told = None  # the coordinator hears that it has left
        for rank, sight in sights.items():
            known = self._ranks.setdefault(rank, _Rank(sight))
            if sight != known.sight:
                if not paused:
                    self._learn(known, sight)
                known.sight, known.quiet = sight, 0.0
            else:
                # What this agent has missed counts little: it may have been stopped together with the rank.
                known.quiet = 0.0 if paused else known.quiet + min(elapsed, 2 * self.looks_every)
            known.stopped = rank in stopped
        return self._changes() + self._slowed(now)

    def suspicious(self) -> list[int]:
        """Ranks without progress for longer than the floor: worth a look at their process."""
        return [rank for rank, known in self._ranks.items() if known.quiet > self.limits.floor]

    def quiet(self, rank: int) -> float:
        """Seconds for which a rank has been seen to make no progress."""
        known = self._ranks.get(rank)
        return known.quiet if known else 0.0

    def allowed(self, rank: int) -> float:
        """Seconds without progress that are normal for what a rank is doing; 0 for one that is not known."""
        known = self._ranks.get(rank)
        if known is None:
            return 0.0
        if known.stopped:
            return self.limits.floor
        gaps = self._gaps.get(known.sight.phase)
        longest = self.limits.factor * gaps.quantile(SHARE) if gaps else 0.0
        if gaps is None or gaps.total < ENOUGH:
            longest = max(longest, self.limits.startup)
        return max(longest, self.limits.floor)

    def standing(self) -> list[pb.Report]:
        """What a coordinator that knows nothing must hear."""
        return [] if self._told is None else [self._stalled(self._told)]

    def _learn(self, known: _Rank, sight: Sight) -> None:
        before = known.sight
        count = min(max(sight.step - before.step, 1), int(RECENT))
        if sight.phases != before.phases:
            # The gap in which the phase ended; if others came and went since the last look, it was shorter than that.
            self._add(known, before.phase, sight.since - before.at, 1)
            self._add(known, sight.phase, (sight.at - sight.since) / count, count)
            return
        whole = sight.at - before.at
        # Of several steps between two looks, at least one is known to have taken as long as nothing was seen.
        longest = min(max(whole / count, known.quiet), whole)
        self._add(known, sight.phase, longest, 1)
        if count > 1:
            self._add(known, sight.phase, (whole - longest) / (count - 1), count - 1)

    def _add(self, known: _Rank, phase: str, seconds: float, count: int) -> None:
        if seconds <= 0 or count <= 0:
            return  # a clock that went back, or nothing there yet
        if phase == STEP:
            known.steps += count
            if known.steps <= WARM_UP:
                return
            self._slowness.take(seconds, count, self._looked or 0.0)
        self._gaps.setdefault(phase, Gaps()).add(seconds, count)

    def _slowed(self, now: float) -> list[pb.Report]:
        """Said when steps have become slow, and when they become slower still."""
        slower = self._slowness.look(now)
        if slower is None:
            self._told_slow = 0.0
            return []
        if slower.seconds < STILL_SLOWER * self._told_slow:
            return []
        self._told_slow = slower.seconds
        step = max(known.sight.step for known in self._ranks.values())
        event = pb.Slowed(
            job=self.job, node=self.node, attempt=self.attempt, step=step, usual=slower.usual, seconds=slower.seconds
        )
        return [pb.Report(slowed=event)]

    def _changes(self) -> list[pb.Report]:
        late = {rank: self.quiet(rank) for rank in self.suspicious() if self.quiet(rank) > self._told_after(rank)}
        told = self._told
        if told in late or (told is None and not late):
            return []
        self._told = max(late, key=late.__getitem__) if late else None
        changes = self.standing()
        if told is not None:
            changes.append(pb.Report(moved=pb.Moved(job=self.job, attempt=self.attempt, rank=told)))
        return changes

    def _told_after(self, rank: int) -> float:
        return self.allowed(rank) + (0.0 if self._ranks[rank].stopped else self.patience)

    def _stalled(self, rank: int) -> pb.Report:
        known = self._ranks[rank]
        event = pb.Stalled(
            job=self.job,
            node=self.node,
            attempt=self.attempt,
            rank=rank,
            phase=known.sight.phase,
            step=known.sight.step,
            seconds=known.quiet,
            threshold=self.allowed(rank),
            stopped=known.stopped,
        )
        return pb.Report(stalled=event)
