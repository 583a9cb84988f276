"""Shards of which only what is new is written, and that compressed if it helps; see decision 016.

digests --compare with the past--> what has changed --pack--> files of segments --> the map for the index
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np

from ckptsvc.errors import InvalidInput
from ckptsvc.format.checksum import Digests, extent_digests, strong_digests
from ckptsvc.format.columnar import Int64
from ckptsvc.format.columns import Columns
from ckptsvc.format.extents import ExtentTable, Rows, empty_rows
from ckptsvc.format.planes import PLAIN
from ckptsvc.format.segments import StoredFile
from ckptsvc.format.shard import ShardInfo
from ckptsvc.pipeline import local_copy, packing
from ckptsvc.pipeline.assembled import Piece
from ckptsvc.pipeline.chapters import LARGEST, MOST_THREADS, Packer, Press
from ckptsvc.pipeline.local_copy import Copy, Stretch
from ckptsvc.pipeline.packing import Judge, Verdict
from ckptsvc.pipeline.past import History, Key, Past
from ckptsvc.pipeline.references import is_there
from ckptsvc.pipeline.segment_write import Chapter, Chunk, SegmentWriter
from ckptsvc.pipeline.write import DIGESTING, ShardImage, Written, write_shard
from ckptsvc.storage import Progress, Store

MAX_PARTS = 1 << 18
"""Segments in a file at most: a header has to hold an entry for each."""

MOSTLY_NEW = 0.9
"""Where a greater part than this has changed, all is written: straight from the arena, and nothing hangs on others."""

Pages = Callable[[str, int], AbstractContextManager[memoryview]]
OnDigests = Callable[[Digests], None]
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


@dataclass(frozen=True, slots=True)
class _Source:
    """A shard that is to be stored, wherever its bytes are.

    Attributes:
        shard: which; its image may be empty.
        columns, info: its table, and where it comes from.
        low: the xxh3_64 of each extent.
        high: 64 bits more of each (see `strong_digests`); none where nothing may refer to it.
        bytes_of: those of the extents from one number to before another.
        whole: writes all of it as one file.
        path: the arena it is in, if it is in one.
    """

    shard: ShardImage
    columns: Columns
    info: ShardInfo
    low: Digests
    high: Digests
    bytes_of: Callable[[int, int], Piece]
    whole: Callable[[], Written]
    path: str = ""

    def size(self, number: int) -> int:
        """How many bytes an extent has."""
        return len(self.bytes_of(number, number + 1))

    def extent(self, number: int) -> memoryview:
        """The bytes of an extent."""
        found = self.bytes_of(number, number + 1)
        return found[0 : len(found)]


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
        self._judge = Judge(min(economy.threads, MOST_THREADS))
        self._press = Press(economy.threads) if economy.compression != "off" else None
        self._lock = threading.Lock()
        self._active = 0

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
        past = self._base(store, shard, committed)
        if past is None and not self._may_compress(store, shard):
            digest = strong_digests if self._economy.incremental else _weak_digests
            written = self._write_whole(store, shard, path, on_digests, _Clock(ready), digest)
            return replace(written, verdict=self._too_large(shard))
        ready(shard.nbytes)
        columns, info = shard.describe()
        with DIGESTING:
            low, high = strong_digests(shard.image[: shard.nbytes], shard.extent)
        on_digests(low)

        def whole() -> Written:
            known = partial(_known_digests, low, high)
            return self._write_whole(store, shard, path, lambda _: None, _Clock(lambda nbytes: None), known)

        with ExitStack() as stack:
            earlier = self._earlier(stack, past if self._may_compress(store, shard) else None)
            source = _Source(shard, columns, info, low, high, shard.bytes_of, whole, path)
            return self._write_less(store, source, past, earlier, partial(ready, shard.nbytes))

    def drain(self, local: Store, store: Store, copy: Copy, committed: Key, go_on: Callable[[], None]) -> Written:
        """Write a copy on the local disk to the store, or as much of it as is needed.

        It is never stored as differences: these need the arena of another snapshot.

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
        shard = ShardImage(memoryview(b""), label.nbytes, label.extent, label.epoch, label.step, label.rank)
        high = np.empty(0, np.uint64)
        if self._economy.incremental:
            high = local_copy.strong_halves(local, copy, go_on)
        past = self._base(store, shard, committed)
        if past is not None and not is_there(store, past.table.files):
            past = None  # the commit would fail for it, and the copy go with the save

        def whole() -> Written:
            seconds = local_copy.drain(local, store, copy, go_on)
            self._judge.note(store.url, label.nbytes, seconds)
            table = ExtentTable.whole(StoredFile(shard.folder, copy.name, label.nbytes), label.extent, low)
            self._remember(store, shard, Past(low, high, label.nbytes, label.extent, table, "", 0))
            return Written(copy.name, label.nbytes, low, columns, info, None, label.nbytes)

        def bytes_of(first: int, last: int) -> Piece:
            return Stretch(local, copy, first, last - first, go_on)

        source = _Source(shard, columns, info, low, high, bytes_of, whole)
        return self._write_less(store, source, past, lambda number: None, go_on)

    def _base(self, store: Store, shard: ShardImage, committed: Key) -> Past | None:
        """What a shard may refer to."""
        if not self._economy.incremental or committed >= (shard.epoch, shard.step):
            return None
        return self._history.base(store.url, shard.rank, committed, shard.extent)

    def _may_compress(self, store: Store, shard: ShardImage) -> bool:
        """Whether it may be compressed; "auto" needs a measure of the store first."""
        if self._press is None or shard.extent > LARGEST:
            return False
        return self._economy.compression == "zstd" or self._judge.knows(store.url)

    def _too_large(self, shard: ShardImage) -> Verdict | None:
        if self._press is None or shard.extent <= LARGEST:
            return None
        return Verdict(False, f"save.extent is {shard.extent} bytes: more than {LARGEST} are not compressed")

    def _write_whole(
        self, store: Store, shard: ShardImage, path: str, on_digests: OnDigests, clock: _Clock, digest: Digest
    ) -> Written:
        """Write all of it as one file, straight from the arena, and remember it."""
        high: list[Digests] = []

        def digest_with(buffer: memoryview, extent: int) -> Digests:
            low, more = digest(buffer, extent)
            high.append(more)
            return low

        written = write_shard(
            store, shard.image, shard.nbytes, extent=shard.extent, epoch=shard.epoch, step=shard.step, rank=shard.rank,
            pool=self._pool, on_digests=on_digests, ready=clock.ready, digest_with=digest_with,
        )  # fmt: skip
        self._judge.note(store.url, shard.nbytes, clock.seconds)
        table = ExtentTable.whole(StoredFile(shard.folder, written.name, shard.nbytes), shard.extent, written.digests)
        self._remember(store, shard, Past(written.digests, high[0], shard.nbytes, shard.extent, table, path, 0))
        return written

    def _remember(self, store: Store, shard: ShardImage, past: Past) -> None:
        if self._economy.incremental:
            self._history.remember(store.url, shard.rank, (shard.epoch, shard.step), past)

    def _write_less(
        self, store: Store, source: _Source, past: Past | None, earlier: packing.Base, go_on: Callable[[], None]
    ) -> Written:
        """Write what cannot be referred to, in files of segments; or all of it, where that is most of it."""
        shard, low, high = source.shard, source.low, source.high
        rows, files = _unchanged(past, low, high, shard.nbytes)
        todo = np.flatnonzero(rows["file"] < 0)
        planes = packing.planes_of(source.columns, len(rows), shard.extent)
        packer = partial(self._pack, source, earlier, planes)
        with self._at_work():
            verdict = self._verdict(store, source, todo, packer)
            if not verdict.compressed and len(todo) > MOSTLY_NEW * len(rows):
                return replace(source.whole(), verdict=verdict if verdict.why else None)
            writer = SegmentWriter(store, shard, source.info, files)
            with ExitStack() as stack:
                plain = partial(_plain, bytes_of=source.bytes_of)
                chapters: Iterable[Chapter] = plain(todo)
                if verdict.compressed and self._press is not None:
                    compressed = self._press.chapters(todo.tolist(), packer, shard.extent, plain, go_on)
                    chapters = stack.enter_context(closing(compressed))
                seconds = writer.write(chapters, rows, past.table.rows if past else rows)
        if not verdict.compressed:
            self._judge.note(store.url, writer.nbytes, seconds)
        table = ExtentTable(tuple(writer.files), rows)
        age = past.age + 1 if past is not None else 0
        self._remember(store, shard, Past(low, high, shard.nbytes, shard.extent, table, source.path, age))
        return Written(
            writer.name, shard.nbytes, low, source.columns, source.info, table.segments(shard.nbytes, shard.extent),
            writer.nbytes, verdict if verdict.why else None,
        )  # fmt: skip

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Counts the shards that share the threads."""
        with self._lock:
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

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

    def _pack(self, source: _Source, earlier: packing.Base, planes: Int64, number: int) -> packing.Packed:
        data, base = source.extent(number), earlier(number)
        if base is not None and len(base) != len(data):
            base = None
        return packing.pack(data, base, int(planes[number]), self._economy.level)

    def _verdict(self, store: Store, source: _Source, todo: Int64, packer: Packer) -> Verdict:
        """Whether to compress; without words where that was no question."""
        if not self._may_compress(store, source.shard):
            return self._too_large(source.shard) or Verdict(False, "")
        if self._economy.compression == "zstd":
            return Verdict(True, "")
        found = self._judge.verdict(store.url, todo.tolist(), packer, source.size, self._active)
        return found or Verdict(False, "")


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


def _plain(extents: Sequence[int] | Int64, bytes_of: Callable[[int, int], Piece]) -> list[Chapter]:
    """Runs of extents to be stored as they are, file by file: as a rule it is one."""
    todo = np.array(extents, np.int64)
    first = np.flatnonzero(np.concatenate((np.ones(min(len(todo), 1), np.bool_), np.diff(todo) != 1)))
    runs = zip(todo[first].tolist(), np.diff(np.append(first, len(todo))).tolist(), strict=True)
    chunks = [Chunk(start, count, bytes_of(start, start + count), PLAIN, False) for start, count in runs]
    return [Chapter(chunks[start : start + MAX_PARTS]) for start in range(0, len(chunks), MAX_PARTS)]
