"""Where shards are read from: a store, or arenas in memory."""

from __future__ import annotations

from collections.abc import Mapping

from ckptsvc.errors import Damaged, NotFound
from ckptsvc.format.checksum import Digests
from ckptsvc.format.index import Index
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.segmented import read_segments


class StoreSource:
    """The shards of a committed checkpoint in its store, wherever their bytes are there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def size(self, shard: int) -> int:
        """See pipeline.read.Source."""
        return self._checkpoint.index.shards[shard].nbytes

    def digests(self, shard: int) -> Digests:
        """See pipeline.read.Source."""
        return self._checkpoint.index.digests(shard)

    def name(self, shard: int) -> str:
        """See pipeline.read.Source."""
        key, segments = self._checkpoint.key(shard), self._checkpoint.index.segments
        is_mapped = segments is not None and segments.is_mapped(shard)
        return f"{self._checkpoint.store.url}/{key}" + (" and the files it refers to" if is_mapped else "")

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """See pipeline.read.Source."""
        segments = self._checkpoint.index.segments
        if segments is not None and segments.is_mapped(shard):
            read_segments(self._checkpoint.store, segments, shard, offset, buffer)
            return
        key = self._checkpoint.key(shard)
        try:
            self._checkpoint.store.read_into(key, offset, buffer)
        except NotFound:
            raise Damaged(f"{self._checkpoint.store.url}/{key}, a shard, is missing") from None

    def view(self, shard: int) -> memoryview | None:
        """See pipeline.read.Source."""
        return None


class ArenaSource:
    """Shards that are in memory on this node, by their number in the index."""

    def __init__(self, index: Index, arenas: Mapping[int, memoryview]) -> None:
        self._index, self._arenas = index, arenas

    def size(self, shard: int) -> int:
        """See pipeline.read.Source."""
        return self._index.shards[shard].nbytes

    def digests(self, shard: int) -> Digests:
        """See pipeline.read.Source."""
        return self._index.digests(shard)

    def name(self, shard: int) -> str:
        """See pipeline.read.Source."""
        return f"{self._index.shards[shard].name} (in memory)"

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """See pipeline.read.Source."""
        buffer[:] = self._arenas[shard][offset : offset + len(buffer)]

    def view(self, shard: int) -> memoryview | None:
        """See pipeline.read.Source."""
        return self._arenas.get(shard)
