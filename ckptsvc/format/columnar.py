"""Tables as columns in one safetensors file, and the checks on columns that touch no region one by one.

A column is a one-dimensional array. Lists of different lengths (names, shapes) are one flat column plus a
column of counts, or of ends: list i is `flat[ends[i - 1]:ends[i]]`, with `ends[-1]` taken as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import Damaged
from ckptsvc.format import header
from ckptsvc.format.limits import MAX_NAME_BYTES

Array = NDArray[Any]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
UInt64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

CHUNK: Final = 1 << 18
"""Rows that are checked at a time, so that temporary columns stay small."""

_TAG_OF_NUMPY: Final[dict[Any, str]] = {
    np.dtype(np.uint8): "U8",
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint64): "U64",
    np.dtype(np.int64): "I64",
}
_ALIGNMENT: Final = 64


def encode(columns: Mapping[str, Array], info: bytes) -> bytes:
    """A safetensors file of columns.

    Args:
        columns: one-dimensional arrays of uint8, uint32, uint64 or int64 by name.
        info: the info record, in canonical form.
    """
    in_order = sorted(columns.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned
    entries: dict[str, Any] = {header.METADATA: {header.INFO: info.decode()}}
    position = 0
    for name, column in in_order:
        stop = position + column.nbytes
        tag = _TAG_OF_NUMPY[column.dtype]
        entries[name] = {"dtype": tag, "shape": column.shape, "data_offsets": (position, stop)}
        position = stop
    body = msgspec.json.encode(entries)
    length = -(-(header.LENGTH_BYTES + len(body)) // _ALIGNMENT) * _ALIGNMENT - header.LENGTH_BYTES
    data = [np.ascontiguousarray(column).view(np.uint8).data for _, column in in_order if column.size]
    return b"".join([length.to_bytes(header.LENGTH_BYTES, "little"), body.ljust(length), *data])


def decode(
    data: bytes | memoryview, wanted: Mapping[str, Any], what: str, info_limit: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The columns of a file, as views of its bytes, and its info record, parsed and its version checked.

    Columns that are not wanted (of a newer minor version) are left out.

    Args:
        data: the whole file.
        wanted: the dtype of each column that must be there.
        what: the name of the file, for messages.
        info_limit: the most bytes the info record may have.

    Raises:
        Damaged: the file is malformed or a column is missing or of another dtype.
        IncompatibleVersion: it is of a newer major version of the format.
    """
    found = header.decode(data, len(data), what, info_limit)
    columns: dict[str, Array] = {}
    for name, dtype in wanted.items():
        entry = found.entries.get(name)
        if entry is None or len(entry.shape) != 1 or entry.tag != _TAG_OF_NUMPY[np.dtype(dtype)]:
            raise Damaged(f"{what} has no column {name!r} of {np.dtype(dtype)}")
        columns[name] = np.frombuffer(data, dtype, entry.shape[0], entry.start)
    return columns, found.info


def starts(counts: Array) -> Int64:
    """Where each list begins in the flat column, from the lengths of the lists."""
    first = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], dtype=np.int64, out=first[1:])
    return first


def gather(flat: Array, first: Int64, counts: Array) -> Array:
    """Some lists of a flat column, as a flat column: its list i is `flat[first[i]:first[i] + counts[i]]`."""
    out = np.empty(int(counts.sum(dtype=np.int64)), flat.dtype)
    position = 0
    for rows in chunks(len(counts), len(out)):
        begin, count = first[rows], counts[rows]
        if (count == count[0]).all():
            index = (begin[:, None] + np.arange(int(count[0]), dtype=np.int64)).reshape(-1)
        else:
            index = np.repeat(begin - starts(count), count)
            index += np.arange(len(index), dtype=np.int64)
        np.take(flat, index, out=out[position : position + len(index)])
        position += len(index)
    return out


def split(flat: UInt8, ends: Array) -> Iterator[bytes]:
    """The lists of a flat column of bytes."""
    start = 0
    for rows in chunks(len(ends)):
        stops = ends[rows].astype(np.int64)
        text = flat[start : stops[-1]].tobytes()
        stops -= start
        start += len(text)
        for low, high in pairwise([0, *stops.tolist()]):
            yield text[low:high]


def chunks(n: int, items: int = 0) -> Iterator[slice]:
    """Slices of at most `CHUNK` rows that cover n rows; fewer where the rows have many `items` in all."""
    step = max(1, CHUNK * n // max(n, items, 1))
    return (slice(low, min(low + step, n)) for low in range(0, n, step))


def check_ends(ends: Array, total: int, what: str, least: int = 0, most: int = 2**63 - 1) -> None:
    """Raises Damaged unless the ends describe lists of `least` to `most` items that fill `total` exactly."""
    fine = int(ends[-1]) == total if len(ends) else total == 0
    previous = 0
    for rows in chunks(len(ends)) if fine else ():
        part = ends[rows]
        # Compared before they are subtracted: a difference of unsigned numbers wraps around.
        if not (int(part[0]) >= previous and (part[1:] >= part[:-1]).all() and int(part[-1]) <= total):
            fine = False
            break
        lengths = np.diff(part.astype(np.int64), prepend=np.int64(previous))
        fine = fine and bool(((lengths >= least) & (lengths <= most)).all())
        previous = int(part[-1])
    if not fine:
        raise Damaged(f"{what} do not add up")


def check_names(names: UInt8, ends: Array, what: str) -> None:
    """Raises Damaged unless every name is valid UTF-8 of an allowed length."""
    check_ends(ends, len(names), f"the names of {what}", 1, MAX_NAME_BYTES)
    try:
        text = names.tobytes()
        if text.isascii():
            return
        text.decode()
    except UnicodeError:
        raise Damaged(f"{what} has names that are not UTF-8") from None
    # Valid as a whole; each name is, too, if none begins inside a character.
    if ((names[ends[:-1].astype(np.int64)] & 0xC0) == 0x80).any():
        raise Damaged(f"{what} has names that are not UTF-8")
