"""When a job that runs on fewer nodes than it could is started anew on more: at its next checkpoint, as a rule.

A node that has come (a spare, one that was mended, one that was late) could be used at once, and each step that the
job has done since its newest checkpoint would be lost for it. So a checkpoint is asked for, and waited for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

SETTLE = 5.0
"""Seconds after a node has come in which others may come too: one restart for all."""


class Reach(NamedTuple):
    """How far an attempt is.

    Attributes:
        done: steps done by the fastest rank; None where nobody tells.
        committed: step of the newest checkpoint; -1 where none is known.
    """

    done: int | None = None
    committed: int = -1


@dataclass(slots=True)
class Growth:
    """The nodes that wait for a place in one job.

    Attributes:
        patience: seconds that they wait for a checkpoint; None: for the next restart, whenever that is.
        since: when the first of those that wait now came; None: nobody waits.
        known: the newest checkpoint there was then.
        asked: a checkpoint has been asked for.
    """

    patience: float | None = None
    since: float | None = None
    known: int = -1
    asked: bool = False

    def look(self, waiting: Collection[str], reach: Reach, now: float, *, told: bool) -> str:
        """Why the job should be started anew now, as a clause; "" while it should not.

        Args:
            waiting: nodes that the running attempt could have and has not.
            reach: how far it is.
            now: the caller's clock.
            told: whether `reach.done` would be known by now if anybody ever told.
        """
        if self.patience is None or not waiting:
            self.since, self.asked = None, False
            return ""
        if self.since is None:
            self.since, self.known = now, reach.committed
        waited = now - self.since
        if waited < SETTLE:
            return ""
        if reach.done is None and told:
            return "at once, for its ranks do not tell of steps that could be lost"
        if reach.committed > self.known:
            return f"at the checkpoint of step {reach.committed}"
        if reach.done is not None and reach.done <= max(reach.committed, 0):
            return "and loses no step"
        if waited >= self.patience:
            return f"after {waited:.0f} s in which no checkpoint was committed"
        return ""

    def wants_checkpoint(self, now: float) -> bool:
        """Whether one is to be asked for; once for all nodes that wait."""
        if self.asked or self.since is None or now - self.since < SETTLE:
            return False
        self.asked = True
        return True
