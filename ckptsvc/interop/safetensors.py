"""Safetensors files of other frameworks: the header read, and the plan of a file to be written.

Source: the safetensors format (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from ckptsvc.errors import Damaged, UnsupportedObject
from ckptsvc.format.header import LENGTH_BYTES, METADATA, HeaderEntry, decode_safetensors, header_length
from ckptsvc.geometry.box import Region
from ckptsvc.interop.files import Files
from ckptsvc.interop.outputs import Fill, OutputFile
from ckptsvc.types import DTYPES

ALIGNMENT = 64
"""The data begins at a multiple of this; the header is padded with spaces, as the format allows."""

DTYPE_OF_TAG = {dtype.tag: dtype.name for dtype in DTYPES.values() if dtype.tag}
"""Our name for each element type of the format."""


class Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        key: its name in the file.
        dtype: its element type in the file.
        shape: its shape in the file.
        name: the canonical name of the logical tensor it is a part of.
        region: which part.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    name: str
    region: Region

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_safetensors(files: Files, key: str) -> dict[str, HeaderEntry]:
    """The tensors of a file in file order, with absolute offsets.

    Raises:
        Damaged: it is not a safetensors file, or is truncated, or its tensors do not tile it.
        NotFound: there is none.
    """
    what, size = f"{files.url}/{key}", files.size(key)
    if size < LENGTH_BYTES:
        raise Damaged(f"{what} has {size} bytes: it is not a safetensors file")
    first = bytearray(LENGTH_BYTES)
    files.read_into(key, 0, memoryview(first))
    prefix = bytearray(LENGTH_BYTES + min(header_length(bytes(first), what), size - LENGTH_BYTES))
    files.read_into(key, 0, memoryview(prefix))
    return decode_safetensors(memoryview(prefix), size, what)


def safetensors_output(
    key: str, tensors: Iterable[Tensor], metadata: Mapping[str, str], *, rank: int = 0
) -> OutputFile:
    """The plan of a file.

    Raises:
        UnsupportedObject: the format has no tag for an element type.
    """
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    fills, at = [], 0
    for tensor in tensors:
        tag = DTYPES[tensor.dtype].tag
        if not tag:
            raise UnsupportedObject(
                f"{tensor.key}: safetensors has no element type {tensor.dtype}", hint="cast it with --dtype"
            )
        header[tensor.key] = {"dtype": tag, "shape": tensor.shape, "data_offsets": (at, at + tensor.nbytes)}
        fills.append((at, tensor))
        at += tensor.nbytes
    body = msgspec.json.encode(header)
    body += b" " * (-(LENGTH_BYTES + len(body)) % ALIGNMENT)
    start = LENGTH_BYTES + len(body)
    return OutputFile(
        key,
        start + at,
        [(0, len(body).to_bytes(LENGTH_BYTES, "little") + body)],
        [Fill(start + place, t.name, t.region, t.dtype) for place, t in fills if t.nbytes],
        (),
        rank,
    )
