"""Extents made smaller before they are written: what is tried, and when it is worth it.

An extent is compressed alone or as what has changed since an earlier snapshot, whichever a small part of it says is
smaller, and stored as it is where neither helps. What compression costs and gains is measured on a few extents of the
very shard, and what the store takes on what was written before.
"""

from __future__ import annotations

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


def is_worth(trial: Trial, bandwidth: float, threads: float) -> tuple[bool, str]:
    """Whether a shard is written sooner compressed, and why.

    Args:
        trial: what compression does to it.
        bandwidth: bytes per second that the store takes from this writer.
        threads: that compress for it.
    """
    plain = 1 / bandwidth
    packed = max(1 / (trial.speed * threads), trial.ratio / bandwidth)
    worth = packed <= GAIN * plain
    how = f"the store takes {bandwidth / 1e6:.0f} MB/s; compression gives {trial.speed * threads / 1e6:.0f} MB/s"
    return worth, f"{how} and leaves {trial.ratio:.0%}: {'compressed' if worth else 'not compressed'}"
