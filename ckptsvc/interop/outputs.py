"""What an exporter plans: files of another format, before a byte of a tensor is read.

An exporter is a function `(logical, options) -> Output`. It decides every file's name, length and fixed bytes (headers,
pickles, directories) and which region of which tensor fills the rest; `conversion.convert` reads, casts and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptsvc.geometry.box import Region
from ckptsvc.interop.logical import Note


class Fill(NamedTuple):
    """Bytes of a file that are a region of a tensor, row-major.

    Attributes:
        offset: the first byte in the file.
        name: the canonical name of the tensor (see `interop.logical`).
        region: which part of it; a flat range or a box.
        dtype: the element type in the file; values are cast if the tensor has another.
    """

    offset: int
    name: str
    region: Region
    dtype: str


class Crc(NamedTuple):
    """A CRC-32 (as in zip files) of `nbytes` bytes from `start` on, to be put at the bytes `at`, all of them later.

    It is stored as a little-endian uint32.
    """

    start: int
    nbytes: int
    at: tuple[int, ...]


class OutputFile(msgspec.Struct, frozen=True):
    """One file of tensors.

    Attributes:
        key: its name below the target.
        nbytes: its length.
        fixed: (offset, bytes), ascending; where there are neither fixed bytes nor fills, the file has zeros.
        fills: ascending by offset, not overlapping; all files of an output name tensors in one common order, so that
            several can be written while a tensor is read once.
        crcs: ascending by start.
        rank: for formats that have one file a rank: which rank it belongs to.
    """

    key: str
    nbytes: int
    fixed: Sequence[tuple[int, bytes]] = ()
    fills: Sequence[Fill] = ()
    crcs: Sequence[Crc] = ()
    rank: int = 0


class Small(NamedTuple):
    """A small file, known whole."""

    key: str
    data: bytes


Digests = NDArray[np.uint64]
"""xxh3_64 of every extent of a file (format.checksum)."""


def _nothing(_: Mapping[str, Digests]) -> Sequence[Small]:
    return ()


class Output(msgspec.Struct, frozen=True):
    """All of a checkpoint in another format.

    Attributes:
        files: the files of tensors.
        finish: makes the small files that are written last, in this order, given the digests of every file by its key;
            the last one makes the checkpoint complete in the eyes of its framework.
        notes: what is lost or changed.
        facts: what identifies the plan (a conversion is resumed only by the same one): options, layout.
    """

    files: Sequence[OutputFile]
    finish: Callable[[Mapping[str, Digests]], Sequence[Small]] = _nothing
    notes: Sequence[Note] = ()
    facts: dict[str, Any] = {}
