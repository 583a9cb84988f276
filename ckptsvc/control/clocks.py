"""Whether the time of day is what it should be by the time that has passed."""

from __future__ import annotations

from ckptsvc.quantities import duration

JUMP = 30.0
"""Seconds by which a clock may be off before it has jumped; a clock that is only corrected goes faster or slower."""


class Clocks:
    """Two clocks that should go alike.

    Args:
        wall: the time of day now, in seconds since 1970.
        passed: seconds since the machine was started.
    """

    def __init__(self, wall: float, passed: float) -> None:
        self._apart = wall - passed

    def look(self, wall: float, passed: float) -> str:
        """A sentence if the time of day has jumped since that was last said, or ""."""
        jumped = wall - passed - self._apart
        if abs(jumped) <= JUMP:
            return ""
        self._apart += jumped
        return (
            f"the clock of this node was put {duration(abs(jumped))} {'forward' if jumped > 0 else 'back'}: "
            "certificates and whatever ends at a date go by it, saves, restarts and retention do not"
        )
