"""What a process remembers of the shards it has written: enough to tell what of the next ones is new.

Two digests of each extent and the place of its bytes. Nothing is kept beyond the process: what was not seen written and
committed by the same process is never referred to.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from ckptsvc.format.checksum import Digests
from ckptsvc.format.columnar import Bool
from ckptsvc.format.extents import ExtentTable

Key = tuple[int, int]
"""(epoch, step) of a checkpoint."""

REMEMBERED = 4
"""Shards of a rank that are remembered: those that may turn out to be the newest that is committed."""

MOST_USES = 3
"""Shards in a row that may refer to the same checkpoint. So many may well be on their way at once; when there are more,
something keeps them from being committed, and it may be the very thing that they refer to: a whole one is written."""


@dataclass(slots=True)
class Past:
    """A shard that was written.

    Attributes:
        low: the xxh3_64 of each extent.
        high: 64 bits more of each, see `strong_digests`.
        nbytes: of the shard.
        extent: bytes per digest.
        table: where its extents are.
        path: the arena that held it.
        age: shards since the last whole one.
        uses: shards that have referred to this one.
    """

    low: Digests
    high: Digests
    nbytes: int
    extent: int
    table: ExtentTable
    path: str
    age: int
    uses: int = 0

    def same(self, low: Digests, high: Digests, nbytes: int) -> Bool:
        """Which extents of a shard of `nbytes` bytes, with these digests, are as they were here."""
        count = min(len(low), len(self.low))
        found = np.zeros(len(low), np.bool_)
        found[:count] = (low[:count] == self.low[:count]) & (high[:count] == self.high[:count])
        if nbytes != self.nbytes and count:  # there the one or the other may be shorter
            found[count - 1] = False
        return found


class History:
    """The shards of a process, by store and rank. Thread-safe.

    Args:
        full_every: of so many shards of a rank in a row one is written whole.
    """

    def __init__(self, full_every: int) -> None:
        self._full_every = full_every
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], dict[Key, Past]] = {}

    def base(self, store: str, rank: int, committed: Key, extent: int) -> Past | None:
        """What the rank's next shard may refer to; None where it must be whole.

        Args:
            store: its URL.
            rank: whose shard.
            committed: the newest checkpoint that is known to be committed: all it refers to is there as well.
            extent: bytes per digest.
        """
        with self._lock:
            known = self._known.get((store, rank), {})
            for old in [key for key in known if key < committed]:
                del known[old]
            past = known.get(committed)
            if past is None or past.extent != extent:
                return None
            past.uses += 1
            return past if past.age + 1 < self._full_every and past.uses <= MOST_USES else None

    def remember(self, store: str, rank: int, key: Key, past: Past) -> None:
        """A shard is durable."""
        with self._lock:
            known = self._known.setdefault((store, rank), {})
            known[key] = past
            for older in sorted(known)[1:-REMEMBERED]:  # the first may be the newest that is committed
                del known[older]
