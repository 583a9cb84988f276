"""The mean of the weights of several checkpoints, as one checkpoint.

Its averaged tensors are files that do not exist: their bytes are computed when they are read, in float32 for elements
of 16 bits and in float64 for wider ones, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.checksum import Digests
from ckptsvc.geometry.box import Box, FlatRange, Region
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.interop.conversion.casts import decode, encode, is_float
from ckptsvc.interop.conversion.produce import EdgeCache
from ckptsvc.interop.conversion.select import Derived, select
from ckptsvc.interop.logical import MODEL, Logical, Note
from ckptsvc.pipeline.read import READERS, Source, Want, carrier, read_arrays, window_bytes
from ckptsvc.types import DTYPES

_BLOCK = 1 << 20  # elements that are averaged at a time
_EDGES = 16 << 20  # bytes kept of what was read of each checkpoint


def memory_for(members: int, extent: int) -> int:
    """Bytes of memory that the mean of so many checkpoints takes, beside what any conversion does."""
    reading = 2 * window_bytes(extent) + 4 * 8 * _BLOCK if members else 0
    return members * _EDGES + (READERS + 1) * reading


class Averaged(Derived):
    """Several checkpoints of one model as one: the floating-point tensors of the model are averaged.

    All else is the first one's, without the optimizer's state, which belongs to no average.

    Args:
        members: at least one.

    Raises:
        InvalidInput: there is none.
        LayoutError: a tensor is missing in one, or has another shape or dtype there.
    """

    def __init__(self, members: Sequence[Logical]) -> None:
        if not members:
            raise InvalidInput("there is no checkpoint to average")
        members = [select(member, drop_optimizer=True) for member in members]
        first = members[0]
        super().__init__(first)
        names = [name for name in first.names() if name.startswith(MODEL) and is_float(first.meta(name).dtype)]
        for member in members[1:]:
            for name in names:
                if name not in member or member.meta(name) != first.meta(name):
                    raise LayoutError(f"{name} of {first.origin} is not the same tensor in {member.origin}")
        self._members = members
        self._numbers = {name: number for number, name in enumerate(names)}
        self._source = _Mean(self, members, names)
        origins = ", ".join(member.origin for member in members)
        self.notes.append(Note("warning", f"{len(names)} tensors are the mean of {len(members)}: {origins}"))
        self.touching = self._touching
        self.shard_name = lambda shard: self._source.name(shard)
        self.close = self._close

    @property
    def source(self) -> Source:
        """See Logical."""
        return self._source

    def _touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        name = self.base.resolve(name)
        number = self._numbers.get(name)
        if number is None:
            return [_renumbered(stored) for stored in self.base.touching(name, wanted)]
        meta = self.base.meta(name)
        nbytes = prod(meta.shape) * DTYPES[meta.dtype].itemsize
        return [StoredRegion(name, Box.full(meta.shape), 2 * number + 1, 0, nbytes)]

    def _close(self) -> None:
        for member in self._members:
            member.close()


def _renumbered(stored: StoredRegion) -> StoredRegion:
    return StoredRegion(stored.tensor, stored.region, 2 * stored.shard, stored.offset, stored.nbytes, stored.block)


class _Mean:
    """Odd shards are averaged tensors, even ones those of the first member; see pipeline.read.Source."""

    def __init__(self, owner: Averaged, members: Sequence[Logical], names: Sequence[str]) -> None:
        self._owner, self._members, self._names = owner, members, names
        self._sources = [EdgeCache(member.source, member.extent, _EDGES) for member in members]

    def size(self, shard: int) -> int:
        if not shard % 2:
            return self._members[0].source.size(shard // 2)
        meta = self._owner.base.meta(self._names[shard // 2])
        return prod(meta.shape) * DTYPES[meta.dtype].itemsize

    def digests(self, shard: int) -> Digests | None:
        return None if shard % 2 else self._members[0].source.digests(shard // 2)

    def name(self, shard: int) -> str:
        if not shard % 2:
            return self._members[0].source.name(shard // 2)
        return f"the mean of {self._names[shard // 2]}"

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        if not shard % 2:
            self._members[0].source.read_into(shard // 2, offset, buffer)
            return
        name = self._names[shard // 2]
        itemsize = DTYPES[self._owner.base.meta(name).dtype].itemsize
        target: Any = np.frombuffer(buffer, carrier(itemsize))
        start = offset // itemsize
        for first in range(0, len(target), _BLOCK):
            count = min(_BLOCK, len(target) - first)
            target[first : first + count] = self._mean(name, FlatRange(start + first, count))

    def _mean(self, name: str, part: FlatRange) -> Any:
        meta = self._owner.base.meta(name)
        total: Any = np.zeros(part.length, np.float32 if DTYPES[meta.dtype].itemsize < 4 else np.float64)
        want = Want(name, meta.dtype, meta.shape, part)
        for member, source in zip(self._members, self._sources, strict=True):
            total += decode(read_arrays(member, source, [want], readers=1)[0], meta.dtype)
        total /= len(self._members)
        return encode(total, meta.dtype)

    def view(self, shard: int) -> memoryview | None:
        return None
