"""What is compressed of a shard, file by file, in memory that grows neither with shards nor with how many there are.

A store wants the size of an object before its first byte, and the header of a file of segments says how large each of
them is. So what is compressed is held until a file of it is full: in one of a few buffers that all shards of a process
share. A shard that finds none waits for its turn; two at a time let it compress one file while another is written.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

from ckptsvc.pipeline.packing import Packed
from ckptsvc.pipeline.segment_write import Chapter, Chunk

BUFFERS = 3
"""How many there are."""

BUFFER = 10 << 20
"""Bytes of one, header and all: with what the threads have in work, all stays under 64 MiB."""

HEADER = 1 << 20
"""Bytes of it that are kept free for the header: enough for so many parts as there may be, of 112 bytes each."""

PARTS = 8192
"""Segments of a file at most."""

LARGEST = 4 << 20
"""Extents of more bytes are not compressed: to compress one takes four times as much memory as it has."""

MOST_THREADS = 4
"""Threads that compress at most: each has an extent in work, as a rule one of 1 MiB."""

_ORDINARY = 1 << 20  # larger extents are compressed one at a time

Packer = Callable[[int], Packed]
"""Makes an extent, by its number, smaller."""


class _Filled(NamedTuple):
    chapter: Chapter
    buffer: mmap.mmap


class Press:
    """The threads that compress, and the buffers. Thread-safe.

    Args:
        threads: how many, within `MOST_THREADS`.
    """

    def __init__(self, threads: int) -> None:
        self._threads = min(threads, MOST_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ckptsvc-pack")
        self._filling = ThreadPoolExecutor(BUFFERS, thread_name_prefix="ckptsvc-fill")
        self._large = threading.Lock()
        self._buffers: queue.Queue[mmap.mmap] = queue.Queue()
        for _ in range(BUFFERS):
            self._buffers.put(mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def chapters(self, extents: Iterable[int], packer: Packer, extent: int) -> Generator[Chapter]:
        """What is to be stored, file by file; the next one is compressed while one is written. Close it.

        Args:
            extents: numbers of the extents, ascending.
            packer: called in the threads of this object.
            extent: bytes of one, `LARGEST` at most.

        Raises:
            CkptsvcError: what `packer` raised.
        """
        left = deque(extents)
        following = self._filling.submit(self._fill, left, packer, extent)
        try:
            while filled := following.result():
                following = self._filling.submit(self._fill, left, packer, extent)
                try:
                    yield filled.chapter
                finally:
                    self._give_back(filled.buffer)
        finally:  # what is being filled looks at the arena until it is
            if not following.cancel() and following.exception() is None and (unread := following.result()):
                self._give_back(unread.buffer)

    def _fill(self, left: deque[int], packer: Packer, extent: int) -> _Filled | None:
        """Compress as much as a buffer has room for, whatever it comes to; None where nothing is left."""
        if not left:
            return None
        buffer = self._buffers.get()
        chunks: list[Chunk] = []
        pending: deque[tuple[int, Future[Packed]]] = deque()
        room, end, most = memoryview(buffer), HEADER, max(self._threads, 2) if extent <= _ORDINARY else 1
        try:
            while True:
                while left and len(pending) < most and self._fits(end, len(chunks), len(pending), extent):
                    number = left.popleft()
                    pending.append((number, self._pool.submit(self._packed, packer, number, extent)))
                if not pending:
                    return _Filled(Chapter(chunks, room, HEADER), buffer)
                number, future = pending.popleft()
                packed = future.result()
                stop = end + len(packed.data)
                room[end:stop] = packed.data
                chunks.append(Chunk(number, 1, room[end:stop], packed.codec, packed.delta))
                end = stop
        except BaseException:
            for _, future in pending:
                future.cancel() or future.exception()
            self._give_back(buffer)
            raise

    def _fits(self, end: int, parts: int, pending: int, extent: int) -> bool:
        return end + (pending + 1) * extent <= BUFFER and parts + pending < PARTS

    def _packed(self, packer: Packer, number: int, extent: int) -> Packed:
        with self._large if extent > _ORDINARY else nullcontext():
            return packer(number)

    def _give_back(self, buffer: mmap.mmap) -> None:
        buffer.madvise(mmap.MADV_DONTNEED)  # a process that saves once in an hour need not hold it
        self._buffers.put(buffer)
