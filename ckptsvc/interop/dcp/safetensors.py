"""What DCP writes as safetensors: `HuggingFaceStorageWriter`'s shards, and files of `SerializationFormat.SAFETENSORS`.

A safetensors file is the length of its header (uint64, little-endian), the header (JSON) and the data. DCP puts into
the header's `__metadata__` where the pieces belong: DCP_SHARDING_INFO = {name: {"saved_offsets": [...]}}. Nothing says
the shape of the whole tensor: it is as large as its pieces reach.

With `SerializationFormat.SAFETENSORS` such a file stands at the end of every `.distcp` file, and all its tensors
have its first byte as their offset; torch 2.13 cannot read that back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ckptsvc.errors import Damaged
from ckptsvc.geometry.box import Box
from ckptsvc.interop.dcp.metadata import Chunk, Directory, Place, Tensor, check_files
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.file import MAX_DIMS
from ckptsvc.types import DTYPES

MAX_HEADER = 1 << 30
"""Longest header, in bytes."""

_DTYPES = {dtype.tag: dtype.name for dtype in DTYPES.values() if dtype.tag}
_INFO = "DCP_SHARDING_INFO"


class _Stored(NamedTuple):
    dtype: str
    box: Box
    start: int
    nbytes: int


class _Header(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Offsets(msgspec.Struct):
    saved_offsets: list[int]


def is_shards(files: Files, prefix: str = "") -> bool:
    """Whether the files there are shards of `HuggingFaceStorageWriter`: they say so in their headers."""
    names = [name for name in files.children(prefix.rstrip("/")) if name.endswith(".safetensors")]
    return bool(names) and _INFO in _header(files, prefix + names[0], 0)[1]


def read_shards(files: Files, prefix: str = "") -> Directory:
    """What is in a directory of shards.

    Raises:
        Damaged: a header is not that of a safetensors file, or two contradict each other.
    """
    pieces: dict[str, list[tuple[str, _Stored]]] = {}
    for name in files.children(prefix.rstrip("/")):
        if name.endswith(".safetensors"):
            for tensor, stored in _stored(files, prefix + name, 0).items():
                pieces.setdefault(tensor, []).append((prefix + name, stored))
    tensors = {name: _tensor(files, name, found) for name, found in pieces.items()}
    directory = Directory(tensors, {}, {}, {})
    check_files(files, directory)
    return directory


def _tensor(files: Files, name: str, found: list[tuple[str, _Stored]]) -> Tensor:
    dtypes = {(stored.dtype, stored.box.ndim) for _, stored in found}
    if len(dtypes) != 1:
        raise Damaged(f"{files.url}: {name[:200]} has pieces of different types: {sorted(dtypes)}")
    shape = tuple(max(stops) for stops in zip(*(stored.box.stop for _, stored in found), strict=True))
    chunks = {
        stored.box: Chunk(stored.box, Place(key, stored.start, stored.nbytes, raw=True))
        for key, stored in found
        if not stored.box.is_empty
    }
    return Tensor(found[0][1].dtype, shape, list(chunks.values()))


def in_safetensors(directory: Directory) -> bool:
    """Whether its tensors are in safetensors: the length of their entries is that of the data alone."""
    chunks = ((tensor, chunk) for tensor in directory.tensors.values() for chunk in tensor.chunks)
    first = next(chunks, None)
    if first is None:
        return False
    tensor, chunk = first
    return not chunk.place.raw and not chunk.place.transforms and chunk.place.nbytes == tensor.nbytes(chunk.box)


def looked_up(files: Files, directory: Directory) -> Directory:
    """The same directory with the places of the tensors inside the safetensors.

    Raises:
        Damaged: a header lacks a tensor, or has another piece of it.
    """
    headers: dict[tuple[str, int], Mapping[str, _Stored]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in directory.tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            at = chunk.place[:2]
            if at not in headers:
                headers[at] = _stored(files, *at)
            stored = headers[at].get(name)
            if stored is None or (stored.dtype, stored.box) != (tensor.dtype, chunk.box):
                raise Damaged(f"{files.url}/{at[0]} does not have {chunk.box} of {name[:200]}")
            chunks.append(Chunk(chunk.box, Place(at[0], stored.start, stored.nbytes, raw=True)))
        tensors[name] = Tensor(tensor.dtype, tensor.shape, chunks)
    return Directory(tensors, directory.values, directory.paths, directory.extra)


def _stored(files: Files, key: str, start: int) -> Mapping[str, _Stored]:
    """The tensors of a safetensors file that begins at byte `start` of another."""
    what = f"{files.url}/{key}"
    entries, metadata, data = _header(files, key, start)
    try:
        offsets = msgspec.json.decode(metadata.get(_INFO, "{}"), type=dict[str, _Offsets])
    except msgspec.MsgspecError as error:
        raise Damaged(f"{what}: its {_INFO} is not readable: {error}") from None
    found = {}
    for name, entry in entries.items():
        dtype, shape = _DTYPES.get(entry.dtype, ""), tuple(entry.shape)
        origin = tuple(offsets[name].saved_offsets) if name in offsets else (0,) * len(shape)
        first, last = entry.data_offsets
        if (
            not dtype
            or len(shape) > MAX_DIMS
            or len(origin) != len(shape)
            or not all(0 <= n < 1 << 48 for n in (*shape, *origin, first))
            or last - first != math.prod(shape) * DTYPES[dtype].itemsize
        ):
            raise Damaged(
                f"{what}: {name[:200]} is said to be {entry.dtype}{list(shape)} at {list(entry.data_offsets)}"
            )
        found[name] = _Stored(dtype, Box(origin, shape), data + first, last - first)
    return found


def _header(files: Files, key: str, start: int) -> tuple[dict[str, _Header], dict[str, str], int]:
    """Entries, `__metadata__`, and the byte of the file at which the data begins."""
    what = f"{files.url}/{key}"
    length = bytearray(8)
    files.read_into(key, start, memoryview(length))
    size = int.from_bytes(length, "little")
    if size > min(MAX_HEADER, files.size(key) - start - 8):
        raise Damaged(f"{what} is not a safetensors file from byte {start} on")
    text = bytearray(size)
    files.read_into(key, start + 8, memoryview(text))
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Header) for name, entry in raw.items()}
    except msgspec.MsgspecError as error:
        raise Damaged(f"{what} is not a safetensors file from byte {start} on: {error}") from None
    return entries, metadata, start + 8 + size
