"""Has a job become slower? The steps of the last seconds on one node, beside those before.

A step that is long once is none of this: the median counts. What stays slow becomes the usual in the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptsvc.control.gaps import Gaps

FACTOR = 3.0
LEAST = 0.1
"""Times the usual, and seconds more than that, from which on steps are slow. Less is the noise of a busy machine."""

WINDOW, FEWEST = 4.0, 5
"""Seconds of steps, and steps, that are compared with those before."""

KNOWN = 20
"""Steps from which on it is known what is usual."""

ACCEPTED = 600.0
"""Seconds after which slow steps are the usual ones."""


class Slower(NamedTuple):
    """Medians, in seconds for a step: before, and now."""

    usual: float
    seconds: float


@dataclass(slots=True)
class Slowness:
    """The steps of one node's ranks in one attempt."""

    _usual: Gaps = field(default_factory=Gaps)
    _recent: deque[tuple[float, float, int]] = field(default_factory=deque)  # when it was seen, seconds, steps
    _steps: int = 0  # in _recent
    _since: float | None = None  # slow

    def take(self, seconds: float, count: int, now: float) -> None:
        """So many steps were seen at `now` that took so long each."""
        self._recent.append((now, seconds, count))
        self._steps += count

    def look(self, now: float) -> Slower | None:
        """Whether steps are slow now; None: they are not, or not enough is known."""
        while self._recent and self._steps - self._recent[0][2] >= FEWEST and now - self._recent[0][0] > WINDOW:
            _, seconds, count = self._recent.popleft()
            self._steps -= count
            if self._since is None:
                self._usual.add(seconds, count)
        slower = self._compare(now)
        if slower is None:
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since > ACCEPTED:
            self._usual, self._since = Gaps(), None
            return None
        return slower

    def _compare(self, now: float) -> Slower | None:
        if self._usual.total < KNOWN or self._steps < FEWEST or now - self._recent[0][0] < WINDOW / 2:
            return None
        usual, seconds = self._usual.quantile(0.5), self._median()
        return Slower(usual, seconds) if seconds > max(FACTOR * usual, usual + LEAST) else None

    def _median(self) -> float:
        left = self._steps / 2
        for seconds, count in sorted((seconds, count) for _, seconds, count in self._recent):
            left -= count
            if left <= 0:
                return seconds
        return 0.0
