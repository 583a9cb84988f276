"""An object of a store that is put together from pieces while it is written, a few blocks at a time.

A driver writes one stretch of page-aligned memory. Here that has nothing in it at first: when the driver asks whether
bytes are ready they are copied there, and when they are written their pages are given back. So an object of any size
takes as much memory as the driver has in flight.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Protocol

from ckptsvc.errors import SaveFailed
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.storage import Store

_HUGE = 2 << 20
"""Bytes of a huge page: memory is given back in such pieces."""


class Piece(Protocol):
    """Bytes that are had when they are asked for, maybe more than once."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, part: slice, /) -> memoryview:
        """Those from part.start to before part.stop."""


def write_assembled(store: Store, key: str, pieces: Sequence[Piece]) -> int:
    """Write an object that consists of these pieces; returns its size.

    Raises:
        SaveFailed: the driver took bytes without asking whether they are ready.
        StoreError: as the store raises.
    """
    size = sum(map(len, pieces))
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    filling = _Filling(memory, pieces)
    view = memoryview(memory)
    try:
        store.write(key, view, size, ready=filling.ready, progress=filling.progress)
    finally:
        view.release()
        memory.close()
    if filling.most < size:
        store.delete(key)
        raise SaveFailed(f"the store {store.url} does not wait for what it writes: its driver ignores `ready`")
    return size


class _Filling:
    """Copies pieces into memory as far as they are asked for.

    `most` is the most bytes that were asked for.
    """

    def __init__(self, memory: mmap.mmap, pieces: Sequence[Piece]) -> None:
        self._memory, self._pieces = memory, pieces
        self._ends = list(accumulate(map(len, pieces)))
        self._restart()
        self.most = 0

    def _restart(self) -> None:
        self._filled = self._written = self._dropped = self._piece = 0

    def ready(self, nbytes: int) -> None:
        """Have the first so many bytes in place."""
        if self._written and nbytes <= self._filled:  # the write is tried again, from its first byte on
            self._restart()
        self.most = max(self.most, nbytes)
        while self._filled < nbytes:
            piece, end = self._pieces[self._piece], self._ends[self._piece]
            start = self._filled - (end - len(piece))
            stop = min(len(piece), start + nbytes - self._filled)
            self._memory[self._filled : self._filled + stop - start] = piece[start:stop]
            self._filled += stop - start
            if self._filled == end:
                self._piece += 1

    def progress(self, nbytes: int) -> None:
        """The next so many bytes are written: their memory may go."""
        failpoint("in_shard")
        self._written += nbytes
        whole = self._written // _HUGE * _HUGE
        if whole > self._dropped:
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_DONTNEED, self._dropped, whole - self._dropped)
            self._dropped = whole
