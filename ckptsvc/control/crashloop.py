"""Attempts that fail without getting anywhere: when to stop trying, and what they had in common.

Progress is a newer step that could be restored: one that is committed, or complete in memory. Steps alone are not, for
they are lost with the attempt. Nodes that are lost are no crash of the program, and do not count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

UNKNOWN_AFTER = 60.0
"""Seconds an attempt must run to count as progress where no rank has ever told how far it is."""


@dataclass(frozen=True, slots=True)
class Crash:
    """How an attempt ended.

    Attributes:
        rank, node: of the rank that failed first; -1 and "" where nobody could be named.
        how: in words: "exited with status 1".
        step: steps done by then; None where no rank has told.
        seconds: how long the attempt had run.
    """

    attempt: int
    rank: int
    node: str
    how: str
    step: int | None
    seconds: float


@dataclass(slots=True)
class CrashLoop:
    """The crashes in a row without progress. `limit`: how many end the job; 0: it goes on for ever."""

    limit: int
    saved: int = -1
    crashes: list[Crash] = field(default_factory=list)

    def crashed(self, crash: Crash, saved: int) -> str:
        """An attempt has failed; returns why there should be no further one, or "".

        Args:
            crash: how it ended.
            saved: the newest step that could be restored, -1 where there is none.
        """
        silent = crash.step is None and crash.seconds >= UNKNOWN_AFTER
        if saved > self.saved or silent:
            self.crashes.clear()
            self.saved = max(saved, self.saved)
            return ""
        self.crashes.append(crash)
        if not self.limit or len(self.crashes) < self.limit:
            return ""
        where = f"beyond step {self.saved}" if self.saved >= 0 else "to a first checkpoint"
        return f"{len(self.crashes)} attempts in a row have failed, and none has come {where}; {common(self.crashes)}"


def common(crashes: list[Crash]) -> str:
    """What they had in common, as a clause: "each time rank 3 on node b exited with status 1 after step 150"."""
    said = []
    for name, values in (
        ("rank {}", [c.rank for c in crashes if c.rank >= 0]),
        ("on node {}", [c.node for c in crashes if c.node]),
        ("{}", [c.how for c in crashes if c.how]),
        ("after step {}", [c.step for c in crashes if c.step is not None]),
    ):
        if len(values) == len(crashes) and len(set(values)) == 1:
            said.append(name.format(values[0]))
    if said:
        return f"each time {' '.join(said)}"
    ends = ", ".join(f"{how} ({times} times)" for how, times in Counter(c.how for c in crashes).most_common())
    return f"they have nothing in common: {ends}"


def describe_status(status: int) -> str:
    """A wait status as words: "exited with status 3" or "was killed by signal 9"."""
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
