"""Checksums: xxh3_64 for every extent of a shard, xxh3_128 for small whole objects.

An extent is a fixed number of bytes of the file, counted from its first byte; the last one may be shorter.
So any range that is read can be verified by reading a little more, and a bad byte is found to within one
extent. The hash guards against damage, not against forgery (https://github.com/Cyan4973/xxHash, seed 0).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from ckptsvc.errors import Damaged, InvalidInput

EXTENT: Final = 1 << 20
"""Bytes per digest that are written by default: 8 bytes of index per MiB."""

_LOW: Final = (1 << 64) - 1
_SHORT: Final = 240

Digests = npt.NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview


def extent_count(nbytes: int, extent: int = EXTENT) -> int:
    """How many extents a file of `nbytes` bytes has."""
    return -(-nbytes // extent)


def extent_digests(buffer: Buffer, extent: int = EXTENT) -> Digests:
    """One xxh3_64 per extent of the buffer, which starts at a boundary between extents.

    Raises:
        InvalidInput: `extent` is not positive.
    """
    if extent <= 0:
        raise InvalidInput(f"an extent has at least one byte, not {extent}")
    view = memoryview(buffer).cast("B")
    digest = xxhash.xxh3_64_intdigest
    starts = range(0, len(view), extent)
    return np.fromiter((digest(view[i : i + extent]) for i in starts), dtype=np.uint64, count=len(starts))


def strong_digests(buffer: Buffer, extent: int = EXTENT) -> tuple[Digests, Digests]:
    """Two digests per extent: that of `extent_digests`, and 64 more bits, in the time of one.

    The low half of an xxh3_128 is the xxh3_64 for inputs of more than 240 bytes (both end in the same merge of the same
    accumulators); shorter ones, of which a file has at most its last extent, are hashed twice.

    Raises:
        InvalidInput: `extent` is not positive.
    """
    if extent <= 0:
        raise InvalidInput(f"an extent has at least one byte, not {extent}")
    view = memoryview(buffer).cast("B")
    low, high = np.empty((2, extent_count(len(view), extent)), np.uint64)
    for number, start in enumerate(range(0, len(view), extent)):
        part = view[start : start + extent]
        both = xxhash.xxh3_128_intdigest(part)
        high[number] = both >> 64
        low[number] = both & _LOW if len(part) > _SHORT else xxhash.xxh3_64_intdigest(part)
    return low, high


def bad_extents(buffer: Buffer, expected: Digests, first: int = 0, extent: int = EXTENT) -> list[int]:
    """Numbers (counted over the file) of the extents in the buffer that do not verify.

    Args:
        buffer: bytes of the file from extent number `first` on; it ends at a boundary between extents or
            with the file.
        expected: the digests of the whole file.
        first: the number of the first extent in the buffer.
        extent: bytes per extent.

    Raises:
        InvalidInput: the buffer has more extents than the file has from `first` on.
    """
    found = extent_digests(buffer, extent)
    wanted = expected[first : first + len(found)]
    if first < 0 or len(wanted) != len(found):
        raise InvalidInput(f"{len(found)} extents from {first} on, but the file has {len(expected)}")
    return [first + int(i) for i in np.flatnonzero(found != wanted)]


def check(buffer: Buffer, expected: Digests, what: str, first: int = 0, extent: int = EXTENT) -> None:
    """Verifies a buffer as `bad_extents` does.

    Raises:
        Damaged: the digest of an extent is wrong; the message names `what` and the first bad byte range.
        InvalidInput: as in `bad_extents`.
    """
    bad = bad_extents(buffer, expected, first, extent)
    if bad:
        start = bad[0] * extent
        stop = min(start + extent, first * extent + memoryview(buffer).nbytes)
        raise Damaged(f"{what}: bytes {start} to {stop} do not match their checksum ({len(bad)} bad extents)")


def digest64(data: Buffer) -> str:
    """xxh3_64 of the data as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def digest128(data: Buffer) -> str:
    """xxh3_128 of the data as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)
