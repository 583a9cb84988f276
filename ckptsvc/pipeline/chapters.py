"""What is compressed of a shard, file by file, in memory that grows neither with shards nor with how many there are.

A store wants the size of an object before its first byte, and the header of a file of segments says how large each of
them is. So what is compressed is held until a file of it is full: in one of a few buffers that all shards of a process
share. A shard that finds none waits for its turn; two at a time let it compress one file while another is written.
Where writes hang that hold all of them, nobody's turn comes: what is left of the other shards is stored as it is.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

PATIENCE = 20.0
"""Seconds in which a buffer must be taken or given back, or those who wait go without: a store that takes less than a
buffer in that time is as good as none."""

_LOOK = 0.5
"""Seconds between looks at whether who waits is to go on."""

_ORDINARY = 1 << 20  # larger extents are compressed one at a time

Packer = Callable[[int], Packed]
"""Makes an extent, by its number, smaller."""

Plain = Callable[[Sequence[int]], Iterable[Chapter]]
"""Stores extents, by their numbers, as they are, and needs no buffer for it."""


class _Filled(NamedTuple):
    chapter: Chapter
    buffer: mmap.mmap


class _Buffers:
    """The buffers, for one after the other in the order in which they ask. Thread-safe."""

    def __init__(self) -> None:
        self._free = [mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(BUFFERS)]
        self._waiting: deque[Future[mmap.mmap]] = deque()  # nobody, where there is a free one
        self._lock = threading.Lock()
        self._moved = time.monotonic()  # when one was last taken or given back

    def spare(self) -> mmap.mmap | None:
        """One that nobody else waits for, if there is one."""
        with self._lock:
            if not self._free:
                return None
            self._moved = time.monotonic()
            return self._free.pop()

    def take(self, go_on: Callable[[], None]) -> mmap.mmap | None:
        """One when it is one's turn; None where that does not come. `go_on` is called meanwhile, and may raise."""
        turn: Future[mmap.mmap] = Future()
        with self._lock:
            if self._free:
                self._moved = time.monotonic()
                return self._free.pop()
            self._waiting.append(turn)
        try:
            while not turn.done() and time.monotonic() < self._moved + PATIENCE:
                wait([turn], min(_LOOK, PATIENCE))
                go_on()
        except BaseException:
            if not turn.cancel():
                self.give_back(turn.result())
            raise
        return None if turn.cancel() else turn.result()

    def give_back(self, buffer: mmap.mmap) -> None:
        """To whoever has waited longest."""
        buffer.madvise(mmap.MADV_DONTNEED)  # a process that saves once in an hour need not hold it
        with self._lock:
            self._moved = time.monotonic()
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():  # otherwise it waits no more
                    turn.set_result(buffer)
                    return
            self._free.append(buffer)


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
        self._buffers = _Buffers()

    def chapters(
        self, extents: Iterable[int], packer: Packer, extent: int, plain: Plain, go_on: Callable[[], None]
    ) -> Generator[Chapter]:
        """What is to be stored, file by file; the next one is compressed while one is written. Close it.

        Args:
            extents: numbers of the extents, ascending.
            packer: called in the threads of this object.
            extent: bytes of one, `LARGEST` at most.
            plain: has what is left, where no buffer is to be had.
            go_on: called now and then where this waits for one; raises to end that.

        Raises:
            CkptsvcError: what `packer` or `go_on` raised.
        """
        left = deque(extents)
        following: Future[_Filled] | None = None
        try:
            while left or following:
                if following is None:
                    buffer = self._buffers.take(go_on)
                    if buffer is None:
                        yield from plain(left)
                        return
                    following = self._filling.submit(self._fill, buffer, left, packer, extent)
                filled = following.result()
                spare = self._buffers.spare() if left else None
                following = self._filling.submit(self._fill, spare, left, packer, extent) if spare else None
                try:
                    yield filled.chapter
                finally:
                    self._buffers.give_back(filled.buffer)
        finally:  # what is being filled looks at the arena until it is
            if following and following.exception() is None:
                self._buffers.give_back(following.result().buffer)

    def _fill(self, buffer: mmap.mmap, left: deque[int], packer: Packer, extent: int) -> _Filled:
        """Compress as much as a buffer has room for, whatever it comes to."""
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
            self._buffers.give_back(buffer)
            raise

    def _fits(self, end: int, parts: int, pending: int, extent: int) -> bool:
        return end + (pending + 1) * extent <= BUFFER and parts + pending < PARTS

    def _packed(self, packer: Packer, number: int, extent: int) -> Packed:
        with self._large if extent > _ORDINARY else nullcontext():
            return packer(number)
