"""Which copies on a node's local disk may go, and which must: the last good one of a job never does."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import NamedTuple

Key = tuple[int, int]
"""(epoch, step)."""


class Stage(enum.Enum):
    """How far a snapshot has come."""

    PENDING = "pending"  # its save has not ended: it may be drained yet
    LOCAL = "local"  # it is on the local disks, and not to be drained
    COMMITTED = "committed"  # it is in the durable store


class Kept(NamedTuple):
    """What a node has of one snapshot: bytes of all its shards; `in_use`: a restore or a drain reads it."""

    key: Key
    stage: Stage
    nbytes: int
    in_use: bool = False


def expendable(kept: Sequence[Kept], complete: Collection[Key], keep: int, over: int) -> list[Key]:
    """What to remove, oldest first.

    A snapshot that is on local disks alone may go when a newer one is whole on them, or committed. One that is in the
    durable store may go at any time; it stays only to make a restore fast.

    Args:
        kept: of one job.
        complete: snapshots that are whole on the job's local disks.
        keep: so many of the newest that are whole stay, as long as there is room.
        over: bytes that must go beyond that, if they may.
    """
    left = sorted((k for k in kept), key=lambda k: k.key)
    good = [k.key for k in left if k.key in complete or k.stage is Stage.COMMITTED]
    spared = set(good[-keep:]) if keep else set()
    gone = []
    for each in left:
        newer = any(key > each.key for key in good)
        may = each.stage is Stage.COMMITTED or (each.stage is Stage.LOCAL and newer)
        must = over > 0 or (newer and each.key not in spared)
        if may and must and not each.in_use:
            gone.append(each.key)
            over -= each.nbytes
    return gone
