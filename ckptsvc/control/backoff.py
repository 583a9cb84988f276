"""How many shards a node drains at a time: fewer while the store is slow, one after another while it fails.

Many nodes that press on a file system in trouble make it worse; each of them sees by itself that it writes slower than
it did, and halves what it has under way. It takes one more whenever that goes well.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOW, WELL = 0.5, 0.75
"""Shares of the best rate below which a store is slow, and from which on all is well."""

FADE = 0.99
"""What becomes of the best rate with every write: a store that has become slower for good is not slow for ever."""

LEAST_BYTES = 16 << 20
"""A write of fewer says nothing about the rate."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds after a failure in which nothing is tried; doubled with every further one."""


@dataclass(slots=True)
class Backoff:
    """What one node has seen of one store.

    Attributes:
        most: shards at a time when all is well.
        allowed: shards at a time now.
        best: bytes per second, of all shards under way together, that the store is known to take.
        rate: the same, at the last write.
        pause: seconds to wait before the next try; 0.0 unless the last one failed.
        trouble: what the store does: "", "fails", "is slow" or "recovers".
    """

    most: int
    allowed: int = 0
    best: float = 0.0
    rate: float = 0.0
    pause: float = 0.0
    trouble: str = ""

    def __post_init__(self) -> None:
        self.allowed = self.most

    def wrote(self, nbytes: int, seconds: float, under_way: int) -> None:
        """A write has ended well, one of so many; `seconds` without those for which a limit has held it back."""
        self.pause = 0.0
        self.trouble = self.trouble and "recovers"
        if nbytes >= LEAST_BYTES and seconds > 0:
            self.rate = nbytes * under_way / seconds
            self.best = max(self.best * FADE, self.rate)
        if self.rate < SLOW * self.best:
            self.trouble = "is slow"
            if nbytes >= LEAST_BYTES:
                self.allowed = max(1, self.allowed // 2)
        elif self.rate >= WELL * self.best:
            self.allowed = min(self.most, self.allowed + 1)
            self.trouble = self.trouble if self.allowed < self.most else ""

    def failed(self) -> None:
        """A write has failed, and may pass when it is tried again."""
        self.allowed, self.trouble = 1, "fails"
        self.pause = min(2 * self.pause or FIRST_PAUSE, LONGEST_PAUSE)
