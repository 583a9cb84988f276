"""When a job must begin to stop so that its last save is committed before its time is over."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SAFETY = 2.0
"""The last save may take this many times as long as the slowest of the recent ones."""

UNKNOWN_SAVE = 60.0
"""Seconds that a save is taken to last while none has been measured."""

STEPS_AHEAD = 4
"""Steps between the wish to stop and the step at which all ranks do (see membership.Job.order_saves)."""

LARGEST_SHARE = 0.25
"""The most of a job's time that is set aside for its end: a job with little time must still get on."""

RECENT = 8
"""Saves that count."""


@dataclass(slots=True)
class Pace:
    """How long the saves and the steps of a job take, all in seconds."""

    saves: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    step: float = 0.0

    @property
    def slowest_save(self) -> float:
        """The slowest of the recent saves, or a guess."""
        return max(self.saves, default=UNKNOWN_SAVE)


@dataclass(frozen=True, slots=True)
class Limit:
    """A job's time.

    Attributes:
        began, ends: on one and the same clock, in seconds.
        margin: seconds that shall be left over.
    """

    began: float
    ends: float
    margin: float


def stop_at(limit: Limit, pace: Pace) -> float:
    """The time, on the clock of `limit`, at which the job should be asked to stop."""
    lead = limit.margin + SAFETY * pace.slowest_save + STEPS_AHEAD * pace.step
    return limit.ends - min(lead, LARGEST_SHARE * max(0.0, limit.ends - limit.began))


def reason(limit: Limit, pace: Pace, now: float) -> str:
    """Why the job is asked to stop, as words."""
    measured = f"a save takes up to {pace.slowest_save:.1f} s" if pace.saves else "no save has been measured yet"
    return f"the scheduler ends the job in {limit.ends - now:.0f} s; {measured}"
