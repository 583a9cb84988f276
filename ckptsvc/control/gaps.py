"""How long a job's ranks have gone without a sign of life, lately."""

from __future__ import annotations

import math

RECENT = 2000.0
"""Gaps after which the history counts half: a job that becomes slower is soon judged by what it is now."""

_SHORTEST, _RATIO = 0.001, 1.05
_LONGEST = 400  # buckets: 0.001 x 1.05^400 is 3.5 days


class Gaps:
    """Recent gaps of one phase: counts in buckets 5 % wide, so that memory and time do not grow with the job."""

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}
        self.total = 0.0

    def add(self, seconds: float, count: float = 1.0) -> None:
        """Take in `count` gaps of that length."""
        bucket = math.ceil(math.log(max(seconds, _SHORTEST) / _SHORTEST, _RATIO))
        bucket = min(bucket, _LONGEST)
        self._counts[bucket] = self._counts.get(bucket, 0.0) + count
        self.total += count
        if self.total > RECENT:
            self._counts = {b: c / 2 for b, c in self._counts.items() if c > 0.1}
            self.total = sum(self._counts.values())

    def quantile(self, share: float) -> float:
        """Seconds that this share of the gaps do not exceed (5 % too long at most); 0 without any."""
        left = self.total * (1.0 - share)
        for bucket in sorted(self._counts, reverse=True):
            left -= self._counts[bucket]
            if left < 0:
                return float(_SHORTEST * _RATIO**bucket)
        return 0.0
