"""Files of segments: what of a shard is new, with a header, and where each extent of it has come to lie."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import xxhash

from ckptsvc.errors import StoreError
from ckptsvc.format.commit import shard_name
from ckptsvc.format.extents import Rows
from ckptsvc.format.planes import PLAIN
from ckptsvc.format.segment_file import Part, SegmentFileInfo, encode_header
from ckptsvc.format.segments import PLACE, StoredFile
from ckptsvc.format.shard import ShardInfo
from ckptsvc.pipeline.assembled import Piece, write_assembled
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.write import ShardImage
from ckptsvc.storage import Store


class Chunk(NamedTuple):
    """What is stored for `extents` extents from `first` on; see `packing.Packed`."""

    first: int
    extents: int
    data: Piece
    codec: int
    delta: bool


class Chapter(NamedTuple):
    """What one file consists of.

    Attributes:
        chunks: in the order of the shard.
        room: page-aligned memory in which these lie one after the other, behind whole pages that are free for the
            header; None where each is somewhere else.
        free: how many bytes are free.
    """

    chunks: Sequence[Chunk]
    room: memoryview | None = None
    free: int = 0


class SegmentWriter:
    """Writes the files of one shard.

    Attributes:
        files: all files, those that were known before and those written.
        name: the first of the files written.
        nbytes: of all files written.
    """

    def __init__(self, store: Store, shard: ShardImage, info: ShardInfo, files: Sequence[StoredFile]) -> None:
        self._store, self._shard = store, shard
        self._info = SegmentFileInfo.of(info, shard.extent, shard.nbytes)
        self.files, self._known = list(files), len(files)
        self.name, self.nbytes = "", 0

    def write(self, chapters: Iterable[Chapter], rows: Rows, bases: Rows) -> float:
        """Write a file for each chapter, and note in `rows` where the extents are.

        Args:
            chapters: what to store.
            rows: [extents] of `extents.ROW`; those of the chapters are filled. They have the extents' own digests.
            bases: the rows of the shard that deltas have their bases in.

        Returns:
            seconds that the store took.

        Raises:
            StoreError, SaveFailed: as the store; what was written is removed then.
        """
        seconds = 0.0
        try:
            for chapter in chapters:
                began = time.perf_counter()
                self._write(chapter, rows, bases)
                seconds += time.perf_counter() - began
        except BaseException:
            for file in self.files[self._known :]:  # nothing will ever refer to it
                with suppress(StoreError):
                    self._store.delete(file.key)
            raise
        return seconds

    def _write(self, chapter: Chapter, rows: Rows, bases: Rows) -> None:
        parts = [Part(c.first, c.extents, len(c.data), c.codec, c.delta) for c in chapter.chunks]
        header = encode_header(self._info, parts)
        name = shard_name(self._shard.rank, secrets.token_hex(4))
        self.name = self.name or name
        size = self._put(f"{self._shard.folder}/{name}", header, chapter)
        number, offset = len(self.files), len(header)
        self.files.append(StoredFile(self._shard.folder, name, size, len(header), xxhash.xxh3_64_intdigest(header)))
        self.nbytes += size
        for chunk in chapter.chunks:
            here = rows[chunk.first : chunk.first + chunk.extents]
            here["file"], here["codec"] = number, chunk.codec
            if chunk.codec == PLAIN:
                starts = np.arange(chunk.extents) * self._shard.extent
                here["offset"] = offset + starts
                here["nbytes"] = np.minimum(self._shard.extent, len(chunk.data) - starts)
            else:
                here["offset"], here["nbytes"] = offset, len(chunk.data)
                assert isinstance(chunk.data, memoryview), "what was compressed is in memory"
                here["digest"] = xxhash.xxh3_64_intdigest(chunk.data)
            if chunk.delta:
                base = bases[chunk.first]
                for field in PLACE:
                    here[f"base_{field}"] = base[field]
            offset += len(chunk.data)

    def _put(self, key: str, header: bytes, chapter: Chapter) -> int:
        """Write one file, and return its size."""
        if chapter.room is None:
            return write_assembled(self._store, key, [memoryview(header), *(chunk.data for chunk in chapter.chunks)])
        size = len(header) + sum(len(chunk.data) for chunk in chapter.chunks)
        start = chapter.free - len(header)
        chapter.room[start : chapter.free] = header
        with chapter.room[start : start + size] as file:
            self._store.write(key, file, size, progress=lambda _: failpoint("in_shard"))
        return size
