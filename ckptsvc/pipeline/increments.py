"""Shards of which only what is new is written, and that compressed if it helps; see decision 016.

digests --compare with the past--> what has changed --pack--> files of segments --> the map for the index
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np

from ckptsvc.errors import InvalidInput
from ckptsvc.format.checksum import Digests, extent_digests, strong_digests
from ckptsvc.format.columnar import Int64
from ckptsvc.format.extents import ExtentTable, Rows, empty_rows
from ckptsvc.format.limits import MAX_SEGMENT_BYTES
from ckptsvc.format.planes import PLAIN
from ckptsvc.format.segments import StoredFile
from ckptsvc.pipeline import local_copy, packing
from ckptsvc.pipeline.assembled import Piece
from ckptsvc.pipeline.local_copy import Copy, Stretch
from ckptsvc.pipeline.past import History, Key, Past
from ckptsvc.pipeline.segment_write import Chunk, SegmentWriter
from ckptsvc.pipeline.write import DIGESTING, ShardImage, Written, write_shard
from ckptsvc.storage import Progress, Store

MAX_FILES = 16
"""Files that a compressed shard is divided into at most: what is written must be held until its size is known."""

CHAPTER = 64 << 20
"""Bytes of a shard that are compressed before a file is written, at least."""

MAX_PARTS = 1 << 18
"""Segments in a file at most, whatever that makes of the number of files: a header has to hold an entry for each."""

MOSTLY_NEW = 0.9
"""Where a greater part than this has changed, all is written: straight from the arena, and nothing hangs on others."""

LEAST_MEASURED = 1 << 20
"""Bytes from which on a write says how fast a store is."""

Pages = Callable[[str, int], AbstractContextManager[memoryview]]
OnDigests = Callable[[Digests], None]
Packer = Callable[[int], packing.Packed]
Digest = Callable[[memoryview, int], tuple[Digests, Digests]]


@dataclass(frozen=True, slots=True)
class Economy:
    """What is done to write less.

    Attributes:
        incremental: refer to what has not changed.
        full_every: of so many shards of a rank in a row one is written whole.
        compression: "off"; "zstd": always; "auto": where it is measured to be done sooner.
        level: of zstandard.
        threads: that compress, for all writers of this process.
    """

    incremental: bool = False
    full_every: int = 16
    compression: Literal["off", "auto", "zstd"] = "off"
    level: int = 1
    threads: int = 1


@dataclass(slots=True)
class _Clock:
    """Measures a write without the time in which it, in this thread, waited for what it writes."""

    inner: Progress
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    thread: int = field(default_factory=threading.get_ident)

    def ready(self, nbytes: int) -> None:
        began = time.perf_counter()
        self.inner(nbytes)
        if threading.get_ident() == self.thread:
            self.waited += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began - self.waited


class ShardWriter:
    """Writes the shards of one process. Thread-safe.

    Args:
        economy: what may be done to write less; without any of it, shards are written as by `write_shard`.
        pool: for checksums and tables.
        pages: the memory of an arena, by its path (`pipeline.arena.Mappings.pages`).
    """

    def __init__(self, economy: Economy, pool: Executor, pages: Pages) -> None:
        self._economy, self._pool, self._pages = economy, pool, pages
        self._history = History(economy.full_every)
        self._bandwidth: dict[str, float] = {}  # bytes per second of one writer, by store
        self._lock = threading.Lock()
        self._active = 0
        self._packing: ThreadPoolExecutor | None = None
        if economy.compression != "off":
            self._packing = ThreadPoolExecutor(economy.threads, thread_name_prefix="ckptsvc-pack")

    @property
    def is_incremental(self) -> bool:
        """Whether shards may refer to others."""
        return self._economy.incremental

    def write(
        self,
        store: Store,
        shard: ShardImage,
        *,
        path: str,
        committed: Key,
        on_digests: OnDigests,
        ready: Progress = lambda nbytes: None,
    ) -> Written:
        """Write a shard, or as much of it as is needed.

        Args:
            store: where to.
            shard: what.
            path: the arena it is in.
            committed: the newest checkpoint known to be committed.
            on_digests: see `write_shard`.
            ready: see `write_shard`.

        Raises:
            Damaged, SaveFailed, StoreError: as `write_shard`.
        """
        past = None
        if self._economy.incremental and committed < (shard.epoch, shard.step):
            past = self._history.base(store.url, shard.rank, committed, shard.extent)
        if past is None and not self._packs(store, shard):
            return self._whole(store, shard, path, on_digests, ready)
        with self._lock:
            self._active += 1
        try:
            ready(shard.nbytes)
            return self._parts(store, shard, path, past, on_digests)
        finally:
            with self._lock:
                self._active -= 1

    def drain(self, local: Store, store: Store, copy: Copy, committed: Key, go_on: Callable[[], None]) -> Written:
        """Write a copy on the local disk to the store, or as much of it as is needed; it is not compressed.

        Args:
            local: the folder of the job.
            store: where to.
            copy: what.
            committed: see `write`.
            go_on: see `local_copy.drain`.

        Raises:
            Damaged, StoreError: as `local_copy.drain`.
        """
        label, low = copy.label, copy.array()
        columns, info = local_copy.describe(local, copy)
        if not self._economy.incremental:
            local_copy.drain(local, store, copy, go_on)
            return Written(copy.name, label.nbytes, low, columns, info, None, label.nbytes)
        shard = ShardImage(memoryview(b""), label.nbytes, label.extent, label.epoch, label.step, label.rank)
        high = local_copy.strong_halves(local, copy, go_on)
        past = None
        if committed < (label.epoch, label.step):
            past = self._history.base(store.url, label.rank, committed, label.extent)
        rows, files = _unchanged(past, low, high, label.nbytes)
        todo = np.flatnonzero(rows["file"] < 0)
        if past is None or len(todo) > MOSTLY_NEW * len(rows):
            local_copy.drain(local, store, copy, go_on)
            table = ExtentTable.whole(StoredFile(shard.folder, copy.name, label.nbytes), label.extent, low)
            self._remember(store, shard, Past(low, high, label.nbytes, label.extent, table, "", 0))
            return Written(copy.name, label.nbytes, low, columns, info, None, label.nbytes)
        writer = SegmentWriter(store, shard, info, files)
        writer.write(_plain(todo, lambda first, last: Stretch(local, copy, first, last - first, go_on)), rows, rows)
        table = ExtentTable(tuple(writer.files), rows)
        self._remember(store, shard, Past(low, high, label.nbytes, label.extent, table, "", past.age + 1))
        segments = table.segments(label.nbytes, label.extent)
        return Written(writer.name, label.nbytes, low, columns, info, segments, writer.nbytes)

    def _packs(self, store: Store, shard: ShardImage) -> bool:
        """Whether it may be compressed; "auto" needs a measure of the store first."""
        if self._packing is None or shard.extent > MAX_SEGMENT_BYTES:
            return False
        return self._economy.compression == "zstd" or store.url in self._bandwidth

    def _whole(self, store: Store, shard: ShardImage, path: str, on_digests: OnDigests, ready: Progress) -> Written:
        """Write all of it as one file, and remember it."""
        digest: Digest = strong_digests if self._economy.incremental else _weak_digests
        return self._write_whole(store, shard, path, on_digests, _Clock(ready), digest)

    def _write_whole(
        self, store: Store, shard: ShardImage, path: str, on_digests: OnDigests, clock: _Clock, digest: Digest
    ) -> Written:
        high: list[Digests] = []

        def digest_with(buffer: memoryview, extent: int) -> Digests:
            low, more = digest(buffer, extent)
            high.append(more)
            return low

        written = write_shard(
            store, shard.image, shard.nbytes, extent=shard.extent, epoch=shard.epoch, step=shard.step, rank=shard.rank,
            pool=self._pool, on_digests=on_digests, ready=clock.ready, digest_with=digest_with,
        )  # fmt: skip
        self._note_bandwidth(store, shard.nbytes, clock.seconds)
        table = ExtentTable.whole(StoredFile(shard.folder, written.name, shard.nbytes), shard.extent, written.digests)
        self._remember(store, shard, Past(written.digests, high[0], shard.nbytes, shard.extent, table, path, 0))
        return written

    def _remember(self, store: Store, shard: ShardImage, past: Past) -> None:
        if self._economy.incremental:
            self._history.remember(store.url, shard.rank, (shard.epoch, shard.step), past)

    def _parts(self, store: Store, shard: ShardImage, path: str, past: Past | None, on_digests: OnDigests) -> Written:
        """Write what cannot be referred to, in files of segments."""
        columns, info = shard.describe()
        with DIGESTING:
            low, high = strong_digests(shard.image[: shard.nbytes], shard.extent)
        on_digests(low)
        rows, files = _unchanged(past, low, high, shard.nbytes)
        todo = np.flatnonzero(rows["file"] < 0)
        writer, worth, why = SegmentWriter(store, shard, info, files), False, ""
        with ExitStack() as stack:
            chapters: Iterable[list[Chunk]] = _plain(todo, shard.bytes_of)
            if self._packs(store, shard):
                planes = packing.planes_of(columns, len(rows), shard.extent)
                packer = partial(self._pack, shard, self._earlier(stack, past), planes)
                worth, why = self._is_worth(store, shard, todo, packer)
                if worth:
                    chapters = stack.enter_context(closing(self._packed(shard, todo, packer)))
            if not worth and len(todo) > MOSTLY_NEW * len(rows):
                clock = _Clock(lambda nbytes: None)
                known = partial(_known_digests, low, high)
                return replace(self._write_whole(store, shard, path, lambda _: None, clock, known), why=why)
            seconds = writer.write(chapters, rows, past.table.rows if past else rows)
        self._note_bandwidth(store, writer.nbytes, seconds)
        table = ExtentTable(tuple(writer.files), rows)
        age = past.age + 1 if past is not None else 0
        self._remember(store, shard, Past(low, high, shard.nbytes, shard.extent, table, path, age))
        segments = table.segments(shard.nbytes, shard.extent)
        return Written(writer.name, shard.nbytes, low, columns, info, segments, writer.nbytes, why)

    def _earlier(self, stack: ExitStack, past: Past | None) -> packing.Base:
        """Gives the bytes that an extent had in the past shard, where its arena still holds them."""
        image: memoryview | None = None
        if past is not None:
            with suppress(OSError, InvalidInput):  # the arena has been removed
                image = stack.enter_context(self._pages(past.path, past.nbytes))

        def base(number: int) -> memoryview | None:
            if past is None or image is None or number >= len(past.low) or past.table.rows["base_file"][number] >= 0:
                return None
            start = number * past.extent
            copy = memoryview(bytes(image[start : min(start + past.extent, past.nbytes)]))
            # The rank may be writing its next snapshot there by now.
            low, high = strong_digests(copy, past.extent)
            return copy if (low[0], high[0]) == (past.low[number], past.high[number]) else None

        return base

    def _pack(self, shard: ShardImage, base: packing.Base, planes: Int64, number: int) -> packing.Packed:
        data, earlier = shard.bytes_of(number, number + 1), base(number)
        if earlier is not None and len(earlier) != len(data):
            earlier = None
        return packing.pack(data, earlier, int(planes[number]), self._economy.level)

    def _is_worth(self, store: Store, shard: ShardImage, todo: Int64, packer: Packer) -> tuple[bool, str]:
        if self._economy.compression == "zstd":
            return True, ""
        trial = packing.measure(todo.tolist(), packer, lambda number: len(shard.bytes_of(number, number + 1)))
        return packing.is_worth(trial, self._bandwidth[store.url], self._economy.threads / max(self._active, 1))

    def _packed(self, shard: ShardImage, todo: Int64, packer: Packer) -> Generator[list[Chunk]]:
        """What is to be stored, file by file; the next is compressed while one is written."""
        assert self._packing is not None
        step = min(max(CHAPTER // shard.extent, -(-len(todo) // MAX_FILES), 1), MAX_PARTS)
        chapters = [todo[start : start + step].tolist() for start in range(0, len(todo), step)]
        pending: list[Future[packing.Packed]] = []
        try:
            for chapter, following in zip(chapters, [*chapters[1:], []], strict=True):
                pending = pending or [self._packing.submit(packer, extent) for extent in chapter]
                done = [Chunk(extent, 1, *future.result()) for extent, future in zip(chapter, pending, strict=True)]
                pending = [self._packing.submit(packer, extent) for extent in following]
                yield done
        finally:  # they look at the arena until they have ended
            for future in pending:
                future.cancel() or future.exception()

    def _note_bandwidth(self, store: Store, nbytes: int, seconds: float) -> None:
        """Remember how fast a store was; a small write says little about a large one."""
        if nbytes >= LEAST_MEASURED:
            with self._lock:
                now = nbytes / max(seconds, 1e-6)
                self._bandwidth[store.url] = (self._bandwidth.get(store.url, now) + now) / 2


def _weak_digests(buffer: memoryview, extent: int) -> tuple[Digests, Digests]:
    return extent_digests(buffer, extent), np.empty(0, np.uint64)


def _known_digests(low: Digests, high: Digests, buffer: memoryview, extent: int) -> tuple[Digests, Digests]:
    return low, high


def _unchanged(past: Past | None, low: Digests, high: Digests, nbytes: int) -> tuple[Rows, tuple[StoredFile, ...]]:
    """The rows of a shard, with the places of what has not changed filled in, and the files that they name."""
    rows = empty_rows(len(low))
    rows["digest"] = low
    if past is None:
        return rows, ()
    same = past.same(low, high, nbytes)
    same[:1] = False  # the header says which step it is; and so there is always something to write
    rows[same] = past.table.rows[np.flatnonzero(same)]
    return rows, past.table.files


def _plain(todo: Int64, bytes_of: Callable[[int, int], Piece]) -> list[list[Chunk]]:
    """Runs of extents to be stored as they are, file by file: as a rule it is one."""
    first = np.flatnonzero(np.concatenate((np.ones(min(len(todo), 1), np.bool_), np.diff(todo) != 1)))
    runs = zip(todo[first].tolist(), np.diff(np.append(first, len(todo))).tolist(), strict=True)
    chunks = [Chunk(start, count, bytes_of(start, start + count), PLAIN, False) for start, count in runs]
    return [chunks[start : start + MAX_PARTS] for start in range(0, len(chunks), MAX_PARTS)]
