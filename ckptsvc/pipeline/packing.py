"""Extents made smaller before they are written: what is tried, and when it is worth it.

An extent is compressed alone or as what has changed since an earlier snapshot, whichever a small part of it says is
smaller, and stored as it is where neither helps. What compression costs and gains is measured on a few extents of the
very shard, and what the store takes on what was written before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ckptsvc.format.columnar import Int64
from ckptsvc.format.columns import Columns
from ckptsvc.format.planes import PLAIN, PLANES, compress, exclusive_or
from ckptsvc.types import DTYPE_BY_CODE

SAMPLE = 64 << 10
"""Bytes of an extent that are tried first."""

WORTH = 0.95
"""What must come out smaller than this part of itself to be stored compressed."""

TRIED = 8
"""Extents on which it is measured whether compression is worth it."""

GAIN = 0.9
"""Compressed writing must be expected to take at most this part of the time of plain writing."""

LEAST_MEASURED = 1 << 20
"""Bytes from which on a write says how fast a store is."""

MEASURED_EVERY = 16
"""One of so many shards in a row that it is worth to compress is not: what is compressed goes in small files, and does
not tell how fast the store is by now."""


class Packed(NamedTuple):
    """What is stored for an extent: the bytes, how, and whether they were combined with those of its base."""

    data: memoryview | bytes
    codec: int
    delta: bool


Base = Callable[[int], memoryview | None]
"""The bytes that an extent had in an earlier snapshot, by its number; None where there are none to be had."""


def pack(data: memoryview, base: memoryview | None, planes: int, level: int) -> Packed:
    """An extent as it is to be stored.

    Args:
        data: its bytes.
        base: bytes of the same size to which it may be stored as a difference.
        planes: bytes per element.
        level: of zstandard.
    """
    middle = (len(data) - SAMPLE) // 2 // 16 * 16
    part = slice(middle, middle + SAMPLE) if len(data) > 2 * SAMPLE else slice(None)
    alone = len(compress(data[part], planes, level))
    delta = len(compress(exclusive_or(data[part], base[part]), planes, level)) if base is not None else alone
    if min(alone, delta) <= WORTH * len(data[part]):
        combined = delta < alone
        content = exclusive_or(data, base) if combined and base is not None else data
        found = compress(content, planes, level)
        if len(found) <= WORTH * len(data):
            return Packed(found, planes, combined)
    return Packed(data, PLAIN, False)


def planes_of(columns: Columns, count: int, extent: int) -> Int64:
    """For each extent of a shard, the bytes per element of the tensor that it begins in.

    Tensors lie in a shard by the size of their elements, so that few extents have elements of two sizes.
    """
    if not len(columns):
        return np.ones(count, np.int64)
    order = np.argsort(columns.offset, kind="stable")
    row = np.searchsorted(columns.offset[order].astype(np.int64), np.arange(count) * extent, "right") - 1
    itemsize = np.array([min(DTYPE_BY_CODE[code].itemsize, max(PLANES)) for code in columns.dtype.tolist()], np.int64)
    found: Int64 = itemsize[order[np.maximum(row, 0)]]
    return found


class Trial(NamedTuple):
    """What compressing some extents came to: bytes per second of one thread, and stored bytes per byte."""

    speed: float
    ratio: float


def measure(extents: Sequence[int], packer: Callable[[int], Packed], size: Callable[[int], int]) -> Trial:
    """Compress a few of the extents, evenly spread, and see."""
    step = max(len(extents) // TRIED, 1)
    tried = list(extents[::step])[:TRIED]
    began = time.perf_counter()
    stored = sum(len(packer(number).data) for number in tried)
    seconds = max(time.perf_counter() - began, 1e-9)
    nbytes = max(sum(size(number) for number in tried), 1)
    return Trial(nbytes / seconds, stored / nbytes)


class Verdict(NamedTuple):
    """Whether a shard is written sooner compressed, and why, in words."""

    compressed: bool
    why: str


def is_worth(trial: Trial, bandwidth: float, threads: float) -> Verdict:
    """Whether to compress a shard.

    Args:
        trial: what compression does to it.
        bandwidth: bytes per second that the store takes from this writer.
        threads: that compress for it.
    """
    plain = 1 / bandwidth
    packed = max(1 / (trial.speed * threads), trial.ratio / bandwidth)
    worth = packed <= GAIN * plain
    speed = trial.speed * threads / 1e6
    why = f"the store takes {bandwidth / 1e6:.0f} MB/s, compression {speed:.0f} MB/s and leaves {trial.ratio:.0%}"
    return Verdict(worth, why)


class Judge:
    """Decides shard by shard whether to compress, from what the stores were measured to take. Thread-safe.

    Args:
        threads: that compress, for all shards together.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._bandwidth: dict[str, float] = {}  # bytes per second of one writer, by store
        self._in_a_row: dict[str, int] = {}  # shards that were compressed since that was measured
        self._lock, self._trying = threading.Lock(), threading.Lock()

    def note(self, store: str, nbytes: int, seconds: float) -> None:
        """A store took so many bytes, not compressed, in so many seconds; a small write says little."""
        if nbytes >= LEAST_MEASURED:
            with self._lock:
                now = nbytes / max(seconds, 1e-6)
                self._bandwidth[store] = (self._bandwidth.get(store, now) + now) / 2

    def knows(self, store: str) -> bool:
        """Whether it is known how fast a store is."""
        return store in self._bandwidth

    def verdict(
        self,
        store: str,
        extents: Sequence[int],
        packer: Callable[[int], Packed],
        size: Callable[[int], int],
        shards: int,
    ) -> Verdict | None:
        """Try it on a few extents; None for a shard that is not to be compressed, to see how fast the store is.

        Args:
            store: its URL.
            extents: what is to be written.
            packer: compresses one.
            size: how large one is.
            shards: that share the threads.
        """
        with self._lock:
            bandwidth, row = self._bandwidth.get(store), self._in_a_row.get(store, 0) + 1
            self._in_a_row[store] = row % MEASURED_EVERY
        if bandwidth is None or row == MEASURED_EVERY:
            return None
        with self._trying:  # one at a time: it takes memory, and is to be measured
            trial = measure(extents, packer, size)
        found = is_worth(trial, bandwidth, self._threads / max(shards, 1))
        if not found.compressed:
            self._in_a_row[store] = 0
        return found
