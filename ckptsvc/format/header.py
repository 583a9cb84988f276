"""The safetensors file, which shards and indexes share: 8 bytes of length, a JSON header, then the data.

Source of the layout: the safetensors format (https://github.com/huggingface/safetensors, "Format"). On top
of it we require what lets a reader trust the offsets (the entries tile the data without hole or overlap,
no key occurs twice) and an info record under `__metadata__`, which says which version of the format the
rest has.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from ckptsvc.errors import Damaged
from ckptsvc.format import record
from ckptsvc.format.limits import MAX_ENTRY_BYTES, MAX_HEADER_BYTES, MAX_NDIM, MAX_TENSOR_BYTES
from ckptsvc.format.record import PARSE_ERRORS
from ckptsvc.types import DTYPES

METADATA: Final = "__metadata__"
"""The reserved key of a safetensors header that holds strings instead of a tensor."""

INFO: Final = "ckptsvc"
"""The string of the metadata that holds the info record."""

LENGTH_BYTES: Final = 8

ITEMSIZE_BY_TAG: Final = {d.tag: d.itemsize for d in DTYPES.values() if d.tag}

_Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_TENSOR_BYTES)]
_QUOTES_PER_ENTRY: Final = 10  # "key", "dtype" and its value, "shape", "data_offsets"


class _JsonEntry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Number]
    data_offsets: tuple[_Number, _Number]


class HeaderEntry(NamedTuple):
    """One tensor of a file, as its header describes it.

    Attributes:
        tag: the dtype as safetensors spells it.
        shape: in elements.
        start: absolute byte offset in the file of its first byte.
        stop: of the byte after its last.
    """

    tag: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """A decoded header.

    Attributes:
        entries: by key, in file order.
        metadata: the strings under `__metadata__`.
        info: the info record, parsed, its version checked.
        data_start: absolute byte offset of the first tensor.
    """

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]
    info: dict[str, Any]
    data_start: int


_entries_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry_decoder = msgspec.json.Decoder(_JsonEntry)
_metadata_decoder = msgspec.json.Decoder(dict[str, str])


def header_length(first: bytes | memoryview, what: str = "the file") -> int:
    """Bytes of JSON that follow the first 8 bytes of a file.

    Args:
        first: at least the first 8 bytes.
        what: the name of the file, for the message.

    Raises:
        Damaged: there are fewer bytes, or the length is not one a header can have.
    """
    if len(first) < LENGTH_BYTES:
        raise Damaged(f"{what} is truncated: {len(first)} bytes, no header")
    length = int.from_bytes(bytes(first[:LENGTH_BYTES]), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise Damaged(f"{what} has no valid header: its length would be {length} bytes")
    return length


def decode(prefix: bytes | memoryview, file_size: int, what: str, info_limit: int) -> Header:
    """Decodes and checks a header.

    Args:
        prefix: the first bytes of the file, at least all of its header.
        file_size: bytes of the whole file.
        what: the name of the file, for messages.
        info_limit: the most bytes its info record may have.

    Raises:
        Damaged: truncated, not a header of ours, or its entries do not tile the data.
        IncompatibleVersion: the file is of a newer major version of the format.
    """
    body, raw, metadata = _json(prefix, file_size, what)
    if metadata is None or INFO not in metadata:
        raise Damaged(f"{what} was not written by ckptsvc: its header has no info record")
    # a newer format may have entries of another form
    info = record.parse(metadata[INFO].encode(), info_limit, f"the info record of {what}")
    data_start = LENGTH_BYTES + len(body)
    return Header(_entries(body, raw, metadata, file_size, what), metadata, info, data_start)


def decode_safetensors(prefix: bytes | memoryview, file_size: int, what: str) -> dict[str, HeaderEntry]:
    """The tensors of any safetensors file, in file order, checked.

    Args:
        prefix: the first bytes of the file, at least all of its header.
        file_size: bytes of the whole file.
        what: the name of the file, for messages.

    Raises:
        Damaged: truncated, malformed, or its entries do not tile the data.
    """
    body, raw, metadata = _json(prefix, file_size, what)
    return _entries(body, raw, metadata, file_size, what)


def _json(
    prefix: bytes | memoryview, file_size: int, what: str
) -> tuple[bytes, dict[str, msgspec.Raw], dict[str, str] | None]:
    """The text of the header, its entries still raw, and its metadata if it has any."""
    length = header_length(prefix, what)
    data_start = LENGTH_BYTES + length
    if len(prefix) < data_start or file_size < data_start:
        raise Damaged(f"{what} is truncated: {min(len(prefix), file_size)} bytes, its header has {data_start}")
    body = bytes(prefix[LENGTH_BYTES:data_start])
    try:
        raw = _entries_decoder.decode(body)
        strings = raw.pop(METADATA, None)
        return body, raw, None if strings is None else _metadata_decoder.decode(strings)
    except PARSE_ERRORS as error:
        raise Damaged(f"{what} has a malformed header: {error}") from None


def _entries(
    body: bytes, raw: dict[str, msgspec.Raw], metadata: dict[str, str] | None, file_size: int, what: str
) -> dict[str, HeaderEntry]:
    data_start = LENGTH_BYTES + len(body)
    try:
        entries = {
            key: _entry(key, _entry_decoder.decode(bounded(value)), data_start, what) for key, value in raw.items()
        }
    except PARSE_ERRORS as error:
        raise Damaged(f"{what} has a malformed header: {error}") from None
    # A JSON parser silently keeps the last of two equal keys, so that two readers might see different files.
    marks = 0 if metadata is None else 2 + 4 * len(metadata)
    if count_quotes(body) != marks + _QUOTES_PER_ENTRY * len(entries):
        raise Damaged(f"{what} has a malformed header: a key occurs twice")
    return _tiled(entries, data_start, file_size, what)


def bounded(value: msgspec.Raw) -> msgspec.Raw:
    """A value of a JSON object, not too long to be decoded. Raises msgspec.ValidationError when it is."""
    if memoryview(value).nbytes > MAX_ENTRY_BYTES:
        raise msgspec.ValidationError(f"an entry has more than {MAX_ENTRY_BYTES} bytes")
    return value


def count_quotes(text: bytes) -> int:
    """Quotation marks in valid JSON that open or close a string, which tells how many strings it has.

    Backslashes occur only inside strings, where pairs of them stand for one; what is left before a mark
    escapes it.
    """
    unpaired = text.replace(b"\\\\", b"")
    return unpaired.count(b'"') - unpaired.count(b'\\"')


def _entry(key: str, entry: _JsonEntry, data_start: int, what: str) -> HeaderEntry:
    start, stop = entry.data_offsets
    itemsize = ITEMSIZE_BY_TAG.get(entry.dtype)
    if itemsize is None:
        raise Damaged(f"{what}: {key[:200]!r} has the unknown dtype {entry.dtype!r}")
    if len(entry.shape) > MAX_NDIM + 1:  # a dtype stored as bytes has one dimension more
        raise Damaged(f"{what}: {key[:200]!r} has {len(entry.shape)} dimensions")
    if stop - start != prod(entry.shape) * itemsize:
        raise Damaged(f"{what}: {key[:200]!r} has offsets that do not fit its shape and dtype")
    return HeaderEntry(entry.dtype, tuple(entry.shape), data_start + start, data_start + stop)


def _tiled(entries: dict[str, HeaderEntry], data_start: int, file_size: int, what: str) -> dict[str, HeaderEntry]:
    """The entries in file order, once it is sure that they fill the data exactly."""
    in_order = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    position = data_start
    for key, entry in in_order.items():
        if entry.start != position:
            raise Damaged(f"{what}: {key[:200]!r} starts at byte {entry.start}, the data before it ends at {position}")
        position = entry.stop
    if position != file_size:
        raise Damaged(f"{what} has {file_size} bytes, its header describes {position}")
    return in_order
