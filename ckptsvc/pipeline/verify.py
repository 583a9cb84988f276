"""Re-read a checkpoint and check every extent of every shard; name what is bad."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from ckptsvc.errors import Damaged, LayoutError, NotFound, StoreDenied, StoreError, StoreUnavailable
from ckptsvc.format.checksum import bad_extents
from ckptsvc.format.planes import PLAIN
from ckptsvc.format.segments import Segment, StoredFile
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.sources import StoreSource

CHUNK_EXTENTS = 16
"""Extents read at a time."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A byte range [start, stop) of an object that does not verify, and the logical tensors that lie in it.

    What lies in no tensor is the header of a shard, an index or a commit record.
    """

    key: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    why: str


def verify_checkpoint(
    checkpoint: Checkpoint, *, readers: int = 2, progress: Callable[[int], None] | None = None
) -> list[Damage]:
    """Every damage found in the shards; commit record and index were verified when the checkpoint was opened.

    Args:
        checkpoint: what to read.
        readers: shards that are read at a time.
        progress: called with bytes dealt with since the last call, from several threads; the size of all shards in
            the end, whatever was missing.

    Raises:
        StoreError: the store failed altogether. A range that alone cannot be read is damage.
    """
    damages: list[Damage] = []
    try:
        checkpoint.index.check_cover()
    except LayoutError as error:
        key = f"{checkpoint.ref.name}/{checkpoint.commit.index}"
        damages.append(Damage(key, 0, checkpoint.commit.index_bytes, (), f"the index has a hole: {error.what}"))
    stopped = threading.Event()
    with ThreadPoolExecutor(readers, thread_name_prefix="ckptsvc-verify") as pool:
        shards = [_Shard(checkpoint, number, progress or (lambda _: None), stopped) for number in
            range(len(checkpoint.index.shards))]  # fmt: skip
        futures = [pool.submit(shard.verify) for shard in shards]
        try:
            for future in futures:
                damages.extend(future.result())
        except BaseException:  # an interrupt from the keyboard too: nobody wants to wait for the rest
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return damages


class _Shard:
    """One shard while it is being verified."""

    def __init__(
        self, checkpoint: Checkpoint, number: int, progress: Callable[[int], None], stopped: threading.Event
    ) -> None:
        self._checkpoint, self._number = checkpoint, number
        self._progress, self._stopped = progress, stopped
        self._key = checkpoint.key(number)
        self._size = checkpoint.index.shards[number].nbytes
        self._extent = checkpoint.index.info.extent
        self._source = StoreSource(checkpoint)
        segments = checkpoint.index.segments
        self._segments = segments if segments is not None and segments.is_mapped(number) else None

    def verify(self) -> list[Damage]:
        """What is wrong with it; nothing once the others have been told to stop."""
        try:
            return [] if self._stopped.is_set() else self._verify()
        except BaseException:
            self._stopped.set()
            raise

    def _verify(self) -> list[Damage]:
        if self._segments is not None:
            return self._verify_segments()
        try:
            actual = self._checkpoint.store.size(self._key)
        except NotFound:
            self._progress(self._size)
            return [self._damage(0, self._size, "the shard is missing")]
        # Of a shard that ends too early, the extents that are there whole can still be judged.
        readable = self._size if actual >= self._size else actual // self._extent * self._extent
        damages = [self._damage(*bad) for bad in _merged(self._bad(readable))]
        if actual != self._size:
            why = f"the shard has {actual} bytes; the index says {self._size}"
            damages.append(self._damage(readable, max(actual, self._size), why))
            self._progress(self._size - readable)
        return damages

    def _verify_segments(self) -> list[Damage]:
        """Where the shard is in pieces: its files are judged by size and header, its bytes by the extents they make."""
        assert self._segments is not None
        damages = []
        for file in self._segments.files_of(self._number):
            why = self._bad_file(file)
            if why:
                damages.append(Damage(file.key, 0, file.header_nbytes or file.nbytes, (), why))
        for start, stop, why in _merged(self._bad(self._size)):
            found = self._segments.find(self._number, start, stop)
            damages.extend(self._segment_damage(segment, start, stop, why) for segment in found)
        return damages

    def _bad_file(self, file: StoredFile) -> str:
        """Why a file of segments is not as the index says, apart from its segments; "" if it is."""
        store = self._checkpoint.store
        try:
            actual = store.size(file.key)
            if actual != file.nbytes:
                return f"the file has {actual} bytes; the index says {file.nbytes}"
            header = bytearray(file.header_nbytes)
            if header:
                store.read_into(file.key, 0, memoryview(header))
        except NotFound:
            return "the file is missing"
        except Damaged as error:
            return f"cannot be read: {error.what}"
        if header and xxhash.xxh3_64_intdigest(header) != file.header_digest:
            return "checksum mismatch"
        return ""

    def _segment_damage(self, segment: Segment, start: int, stop: int, why: str) -> Damage:
        """Damage of the bytes [start, stop) of the shard, as the place that one of its segments has in its file."""
        assert self._segments is not None
        place = segment.place
        low, high = max(start, segment.start), min(stop, segment.stop)
        tensors = self._damage(low, high, why).tensors
        at, nbytes = place.offset, place.nbytes
        if place.codec == PLAIN:
            at, nbytes = at + low - segment.start, high - low
        if segment.base is not None:
            why += f", here or in its base in {self._segments.files[segment.base.file].key}"
        return Damage(self._segments.files[place.file].key, at, at + nbytes, tensors, why)

    def _bad(self, readable: int) -> Iterator[tuple[int, int, str]]:
        """(start, stop, why) of every extent in the first bytes that does not verify."""
        extent, span = self._extent, self._extent * CHUNK_EXTENTS
        buffer = memoryview(mmap.mmap(-1, min(span, max(readable, 1))))
        for start in range(0, readable, span):
            if self._stopped.is_set():
                return
            stop = min(start + span, readable)
            if self._read(start, buffer[: stop - start]) is None:
                yield from self._mismatches(start, buffer[: stop - start])
            else:  # once more, extent by extent, to tell which bytes they are
                for low in range(start, stop, extent):
                    part = buffer[: min(extent, stop - low)]
                    why = self._read(low, part)
                    if why is None:
                        yield from self._mismatches(low, part)
                    else:
                        yield low, low + len(part), why
            self._progress(stop - start)

    def _read(self, start: int, buffer: memoryview) -> str | None:
        """Fill the buffer; returns why these bytes cannot be read, or None."""
        try:
            self._source.read_into(self._number, start, buffer)
        except (StoreUnavailable, StoreDenied):
            raise  # says nothing about the bytes
        except (Damaged, StoreError) as error:
            return f"cannot be read: {error.what}"
        return None

    def _mismatches(self, start: int, part: memoryview) -> Iterator[tuple[int, int, str]]:
        digests = self._checkpoint.index.digests(self._number)
        for number in bad_extents(part, digests, start // self._extent, self._extent):
            low = number * self._extent
            yield low, min(low + self._extent, start + len(part)), "checksum mismatch"

    def _damage(self, start: int, stop: int, why: str) -> Damage:
        index = self._checkpoint.index
        first = index.region_offset.astype(np.int64)
        inside = (index.region_shard == self._number) & (first < stop) & (first + index.region_nbytes > start)
        rows = np.unique(index.region_tensor[inside])
        return Damage(self._key, start, stop, tuple(sorted(index.name_at(int(row)) for row in rows)), why)


def _merged(ranges: Iterator[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Neighbouring ranges that are bad for the same reason as one: a lost shard is one line and not a million."""
    pending: tuple[int, int, str] | None = None
    for start, stop, why in ranges:
        if pending and (pending[1], pending[2]) == (start, why):
            pending = (pending[0], stop, why)
        else:
            if pending:
                yield pending
            pending = (start, stop, why)
    if pending:
        yield pending
