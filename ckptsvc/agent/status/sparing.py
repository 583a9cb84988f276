"""How much of an agent's time the status document may take: what is asked for too often is told as it was."""

from __future__ import annotations

import time
from collections.abc import Callable

SECOND = 1.0

SHARE = 0.25
"""Seconds of processor time in a second: a document of a large job takes some hundredths."""


class Sparing:
    """The document, made anew for each who asks as long as there is time for it; else a second old at most.

    Args:
        make: makes it.
        clock: seconds, of the world.
        spent: seconds of processor time of this thread.
    """

    def __init__(
        self,
        make: Callable[[], bytes],
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        self._make, self._clock, self._spent = make, clock, spent
        self._since, self._used, self._last = -SECOND, 0.0, b""

    def get(self) -> bytes:
        """The document."""
        now = self._clock()
        if now - self._since >= SECOND:
            self._since, self._used = now, 0.0
        if self._used < SHARE:
            before = self._spent()
            self._last = self._make()
            self._used += self._spent() - before
        return self._last
