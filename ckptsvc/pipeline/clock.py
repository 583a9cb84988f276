"""The time of day as commits are stamped with it: it goes on evenly, whatever becomes of the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime


def passed() -> float:
    """Seconds since the machine was started, suspended or not: nobody can set that clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Steady:
    """The time of day when this was made, and what has passed since.

    A clock that is set while a job runs moves none of its commits, against which retention measures their age.

    Args:
        wall: the time of day, in seconds since 1970.
        passed: seconds since anything.
    """

    def __init__(self, wall: Callable[[], float] = time.time, passed: Callable[[], float] = passed) -> None:
        self._passed = passed
        self._offset = wall() - passed()

    def now(self) -> float:
        """Seconds since 1970."""
        return self._offset + self._passed()


_CLOCK = Steady()


def now_iso() -> str:
    """The time of day in this process, which does not jump; ISO 8601 in UTC."""
    return datetime.fromtimestamp(_CLOCK.now(), UTC).isoformat(timespec="milliseconds")
