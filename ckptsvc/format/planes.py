"""How extents are compressed: their bytes sorted into planes, then zstandard.

The elements of a tensor of floats differ in all their bytes, but each byte of an element has a meaning of its own: the
one with the exponent takes few values, the last ones of the mantissa all of them. With the first bytes of all elements
first, then the second, and so on, each block that zstandard looks at holds bytes of one meaning.

Before that an extent may be combined by exclusive or with the same extent of another snapshot (a *delta*): what two
steps of a training have in common becomes zeros.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import Damaged, InvalidInput

PLAIN: Final = 0
"""The codec of bytes that are stored as they are; any other codec is the number of planes."""

PLANES: Final = (1, 2, 4, 8)
"""Bytes per element that are sorted into planes; 1 leaves the order as it is."""

Buffer = bytes | bytearray | memoryview
Bytes = NDArray[np.uint8]


def compress(data: Buffer, planes: int, level: int) -> bytes:
    """The zstandard frame, which states its content's size, of the data sorted into planes.

    Args:
        data: at least one byte.
        planes: bytes per element, one of `PLANES`; bytes beyond the last whole element stay at the end.
        level: of zstandard; 1 is the fastest that finds anything.

    Raises:
        InvalidInput: there is no such codec.
    """
    import zstandard  # here: it costs a reader of plain checkpoints 30 ms

    if planes not in PLANES:
        raise InvalidInput(f"bytes cannot be sorted into {planes} planes")
    return zstandard.ZstdCompressor(level=level).compress(_sorted(data, planes).data)


def decompress(data: Buffer, planes: int, nbytes: int, what: str) -> memoryview:
    """The opposite of `compress`.

    Args:
        data: one frame and nothing else.
        planes: as it was compressed.
        nbytes: what it must come to.
        what: where the frame comes from, for the message.

    Raises:
        Damaged: it is no such frame, or comes to another size.
    """
    import zstandard

    try:
        found = zstandard.get_frame_parameters(data)
        if found.content_size != nbytes or found.window_size > max(2 * nbytes, 1 << 20):
            raise Damaged(f"{what} holds {found.content_size} bytes instead of {nbytes}")
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Damaged(f"{what} cannot be decompressed: {error}") from None
    if len(content) != nbytes:
        raise Damaged(f"{what} holds {len(content)} bytes instead of {nbytes}")
    return _joined(np.frombuffer(content, np.uint8), planes).data


def exclusive_or(data: Buffer, base: Buffer) -> memoryview:
    """Two buffers of the same size, combined: doing it twice gives back the first."""
    return np.bitwise_xor(np.frombuffer(data, np.uint8), np.frombuffer(base, np.uint8)).data


def _sorted(data: Buffer, planes: int) -> Bytes:
    found = np.frombuffer(data, np.uint8)
    if planes == 1:
        return found
    whole = len(found) // planes * planes
    out = np.empty_like(found)
    by_plane = out[:whole].reshape(planes, -1)
    if planes == 2:  # four times as fast as the transpose
        words = found[:whole].view("<u2")
        for plane in range(2):
            np.right_shift(words, np.uint16(8 * plane), out=by_plane[plane], casting="unsafe")
    else:
        by_plane[...] = found[:whole].reshape(-1, planes).T
    out[whole:] = found[whole:]
    return out


def _joined(found: Bytes, planes: int) -> Bytes:
    if planes == 1:
        return found
    whole = len(found) // planes * planes
    out = np.empty_like(found)
    out[:whole].reshape(-1, planes)[...] = found[:whole].reshape(planes, -1).T
    out[whole:] = found[whole:]
    return out
