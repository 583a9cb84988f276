"""Re-read a checkpoint and check every extent of every shard; name what is bad."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ckptsvc.errors import Damaged, NotFound
from ckptsvc.format.checksum import bad_extents
from ckptsvc.pipeline.catalog import Checkpoint

CHUNK_EXTENTS = 16


@dataclass(frozen=True, slots=True)
class Damage:
    """A byte range [start, stop) of an object that does not verify, and the logical tensors that lie in it."""

    key: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    why: str


def verify_checkpoint(
    checkpoint: Checkpoint, *, readers: int = 2, progress: Callable[[int], None] | None = None
) -> list[Damage]:
    """Every damage found in the shards; commit record and index were verified when the checkpoint was opened.

    Raises:
        StoreError: the store failed otherwise than by missing or short objects.
        LayoutError: the index has a hole.
    """
    checkpoint.index.check_cover()
    with ThreadPoolExecutor(readers, thread_name_prefix="ckptsvc-verify") as pool:
        shards = range(len(checkpoint.index.shards))
        found = pool.map(lambda shard: _verify_shard(checkpoint, shard, progress), shards)
        return [damage for damages in found for damage in damages]


def _verify_shard(checkpoint: Checkpoint, shard: int, progress: Callable[[int], None] | None) -> list[Damage]:
    index, store, key = checkpoint.index, checkpoint.store, checkpoint.key(shard)
    size, digests, extent = index.shards[shard].nbytes, index.digests(shard), index.info.extent
    try:
        actual = store.size(key)
    except NotFound:
        return [Damage(key, 0, size, _tensors(checkpoint, shard, 0, size), "the shard is missing")]
    damages = []
    if actual != size:
        why = f"the shard has {actual} bytes; the index says {size}"
        damages.append(Damage(key, min(actual, size), size, _tensors(checkpoint, shard, min(actual, size), size), why))
    buffer = memoryview(mmap.mmap(-1, extent * CHUNK_EXTENTS))
    for start in range(0, size, extent * CHUNK_EXTENTS):
        part = buffer[: min(extent * CHUNK_EXTENTS, size - start)]
        if start + len(part) > actual:
            break
        try:
            store.read_into(key, start, part)
        except Damaged as error:
            stop = start + len(part)
            damages.append(Damage(key, start, stop, _tensors(checkpoint, shard, start, stop), error.what))
            continue
        for number in bad_extents(part, digests, start // extent, extent):
            low, high = number * extent, min((number + 1) * extent, size)
            damages.append(Damage(key, low, high, _tensors(checkpoint, shard, low, high), "checksum mismatch"))
        if progress:
            progress(len(part))
    return damages


def _tensors(checkpoint: Checkpoint, shard: int, start: int, stop: int) -> tuple[str, ...]:
    index = checkpoint.index
    first = index.region_offset.astype(np.int64)
    inside = (index.region_shard == shard) & (first < stop) & (first + index.region_nbytes > start)
    return tuple(sorted({index.name_at(int(row)) for row in index.region_tensor[inside]}))
