"""What one agent believes about who coordinates one job, where coordinators are elected.

A key in etcd names the coordinator; it lives as long as its holder's lease. The revision at which the key was made is
the coordinator's term: every later coordinator has a higher one.

A coordinator decides only while its lease cannot have ended, which it tells by its own clock and nobody's word: it may
have been frozen, or cut off, for any time. That clock must count the time in which the machine slept. Agents refuse the
orders of a term that is older than the newest they have heard of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MARGIN = 0.2
"""Share of a lease's time at its end in which its holder does not decide any more: what it decided just before must
have arrived when the lease ends, and two clocks do not run alike."""

RENEWALS = 3
"""Times a lease is renewed in the time it lives."""

CANDIDATES_WAIT = 0.3
"""Seconds within which the agents of a job come forward, each after a time of its own, when there is no coordinator:
the first of ten thousand should have won before all have tried."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What the key says: who coordinates, and where it listens; `mark` is unique to the process, `lease` the key's."""

    term: int
    node: str
    address: str
    mark: str
    lease: int


@dataclass(frozen=True, slots=True)
class Campaign:
    """There is no coordinator: try to become it; answered by `won`, or by the next `seen`."""


@dataclass(frozen=True, slots=True)
class Lead:
    """We are the coordinator of this term: begin with nothing and let the agents report."""

    term: int


@dataclass(frozen=True, slots=True)
class Follow:
    """Another agent coordinates: report everything to it."""

    holder: Holder


@dataclass(frozen=True, slots=True)
class Resign:
    """We are not the coordinator any more: forget all that was decided, and give the lease back."""

    lease: int


Step = Campaign | Lead | Follow | Resign


@dataclass(frozen=True, slots=True)
class Verdict:
    """Steps in order, and why."""

    steps: Sequence[Step] = ()
    reasons: Sequence[str] = ()


@dataclass(slots=True)
class Tenure:
    """Our own time as coordinator; it ends at `until` unless the lease is renewed before."""

    term: int
    lease: int
    ttl: float
    until: float
    asked_at: float  # when the last renewal that was granted was sent


@dataclass(slots=True)
class Election:
    """One job as one agent sees it. Times are seconds of a clock that counts sleep too (CLOCK_BOOTTIME).

    Attributes:
        mark: of this process.
        holder: who coordinates; None while nobody is known to.
        tenure: ours, while we coordinate.
        term: the newest we have heard of.
        refused: orders of older terms.
    """

    job: str
    mark: str
    holder: Holder | None = None
    tenure: Tenure | None = None
    term: int = 0
    refused: int = field(default=0)

    def seen(self, holder: Holder | None, now: float) -> Verdict:
        """The key as a quorum of etcd knows it: who holds it, or that nobody does."""
        own = self.tenure
        if holder is None:
            ended = self._resign("its key is gone") if own else Verdict()
            self.holder = None
            return Verdict([*ended.steps, Campaign()], ended.reasons)
        if own and holder.term == own.term:
            return self.tick(now)
        ended = self._resign(f"{holder.node} holds term {holder.term}") if own else Verdict()
        if holder.mark == self.mark:
            # We took it and did not hear of it in time, or gave it up while etcd was out of reach.
            self.holder = None
            return Verdict(
                [*ended.steps, Resign(holder.lease)], [*ended.reasons, f"job {self.job}: giving up a stale key"]
            )
        if holder == self.holder:
            return ended
        reasons = [*ended.reasons, f"job {self.job}: {holder.node} coordinates, term {holder.term}"]
        if holder.term < self.term:
            reasons.append(f"job {self.job}: terms begin anew, etcd has lost what it knew")
        self.holder, self.term = holder, holder.term
        return Verdict([*ended.steps, Follow(holder)], reasons)

    def won(self, holder: Holder, ttl: float, asked_at: float, now: float) -> Verdict:
        """The key is ours; `asked_at` is when the lease of `ttl` seconds was asked for."""
        self.tenure = Tenure(holder.term, holder.lease, ttl, asked_at + ttl * (1 - MARGIN), asked_at)
        self.holder, self.term = holder, holder.term
        if now >= self.tenure.until:
            return self._resign("it took too long to hear of it")
        return Verdict([Lead(holder.term)], [f"job {self.job}: this agent coordinates, term {holder.term}"])

    def renewed(self, lease: int, ttl: float, asked_at: float, now: float) -> Verdict:
        """Answer to a renewal that was sent at `asked_at`; `ttl` 0 says that the lease has ended."""
        own = self.tenure
        if own is None or own.lease != lease:
            return Verdict()
        if ttl <= 0:
            return self._resign("its lease has ended")
        if now < own.until and asked_at > own.asked_at:
            own.ttl, own.asked_at, own.until = ttl, asked_at, asked_at + ttl * (1 - MARGIN)
        return self.tick(now)

    def tick(self, now: float) -> Verdict:
        """Whatever time alone decides. Once over, a tenure does not come back: much may have been decided elsewhere."""
        if self.tenure and now >= self.tenure.until:
            return self._resign("its lease was not renewed in time")
        return Verdict()

    def may_act(self, term: int, now: float) -> bool:
        """Whether the coordinator of this term, if that is us, may still decide."""
        return self.tenure is not None and self.tenure.term == term and now < self.tenure.until

    def admits(self, term: int) -> bool:
        """Whether an order of this term is to be obeyed; one that is not is counted."""
        if term >= self.term:
            return True
        self.refused += 1
        return False

    def _resign(self, why: str) -> Verdict:
        assert self.tenure is not None
        term, lease = self.tenure.term, self.tenure.lease
        self.tenure = self.holder = None
        return Verdict([Resign(lease)], [f"job {self.job}: this agent coordinates no more, term {term}: {why}"])
