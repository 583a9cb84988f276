"""The shard: one rank's snapshot as a safetensors file that is byte for byte the arena it was staged in.

A `ShardTemplate` fixes where every tensor lies, once for as long as the structure of the state holds; a
save then only writes the header. Layout, keys and limits are specified in `proto/FORMAT.md`, section "Shard".
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Final

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format import header, record
from ckptsvc.format.checksum import digest64
from ckptsvc.format.compat import FORMAT
from ckptsvc.format.header import HeaderEntry, header_length
from ckptsvc.format.limits import (
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    MAX_NDIM,
    MAX_RECORD_BYTES,
    MAX_TENSOR_BYTES,
)
from ckptsvc.geometry.box import Box, FlatRange, Region, fits
from ckptsvc.types import DTYPES, TensorMeta

__all__ = [
    "PAGE",
    "Entry",
    "Part",
    "ShardInfo",
    "ShardTable",
    "ShardTemplate",
    "decode_header",
    "header_length",
]

PAGE: Final = 4096
"""The data of a shard starts at a multiple of this, so that it can be mapped and written directly."""

PARTS: Final = "ckptsvc.parts"
"""The string of the metadata that holds what a key, a dtype tag and a shape cannot say."""

_ROOM: Final = 2560  # bytes kept free in a header for what changes from save to save: info record, objects entry
_RAW_TAG: Final = "U8"
_TAG_DTYPE: Final = {d.tag: d for d in DTYPES.values() if d.tag}
_QUOTES_PER_PART: Final = 8  # the key, the name, the dtype, the kind

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_JsonPart = tuple[str, str, list[_Count], str, list[_Count]]  # name, dtype, global shape, kind, numbers
_parts_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_part_decoder = msgspec.json.Decoder(_JsonPart)


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where a shard comes from. Together with the objects document all that changes from save to save.

    Attributes:
        run: the run it belongs to (URL of the store or another name of it).
        job: the job's name.
        step: the training step.
        epoch: which attempt of the run saved it (fencing).
        attempt: the attempt as the job's launcher counts it.
        rank: the rank whose snapshot this is.
        world_size: how many ranks the job had.
        structure: 16 hexadecimal digits that stand for the entries; the template fills them in.
        format: version of the format.
    """

    run: str
    job: str
    step: _Count
    epoch: _Count
    attempt: _Count
    rank: _Count
    world_size: _Count
    structure: str = ""
    format: str = FORMAT


class Part(msgspec.Struct, frozen=True, gc=False):
    """What a rank stores of one logical tensor."""

    meta: TensorMeta
    region: Region


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A part with its place in the shard.

    Attributes:
        meta: the logical tensor.
        region: which part of it, stored contiguously in row-major order.
        offset: absolute byte offset in the file.
        nbytes: its length.
    """

    meta: TensorMeta
    region: Region
    offset: int
    nbytes: int


class ShardTable(msgspec.Struct, frozen=True):
    """What the header of a shard says.

    Attributes:
        entries: in file order; the last one is the objects document.
        info: where the shard comes from.
        data_start: absolute byte offset of the first tensor.
    """

    entries: tuple[Entry, ...]
    info: ShardInfo
    data_start: int

    @property
    def objects(self) -> Entry:
        """The rank's objects document."""
        return self.entries[-1]


def objects_name(rank: int) -> str:
    """The logical tensor that holds the objects document of a rank."""
    return f"@rank/{rank}/objects"


class ShardTemplate:
    """Where every tensor of one rank's shard lies. Planned once per structure; all methods are cheap.

    Args:
        parts: what the rank stores; order does not change the meaning of the file.

    Raises:
        InvalidInput: a name, dtype, shape or region is impossible, a part occurs twice, a name is
            reserved, or there are more parts than a header can hold.

    Attributes:
        entries: the parts with their places, in the order given.
        data_start: absolute byte offset of the first tensor, a multiple of `PAGE`: the size of the header.
        tensor_bytes: bytes of all parts; there are no holes between them.
        objects_offset: absolute byte offset of the objects document, which follows.
        structure: 16 hexadecimal digits; equal for equal parts at equal places.
    """

    __slots__ = ("_fixed", "data_start", "entries", "objects_offset", "structure", "tensor_bytes")

    def __init__(self, parts: Sequence[Part]) -> None:
        _check_parts(parts)
        # Largest items first: every tensor is aligned to its own item size without padding.
        order = sorted(range(len(parts)), key=lambda i: -DTYPES[parts[i].meta.dtype].itemsize)
        offsets = [0] * len(parts)
        position = 0
        keys: set[str] = {header.METADATA}
        listed: dict[str, _JsonPart] = {}
        lines: list[bytes] = []
        for i in order:
            part, offsets[i] = parts[i], position
            position += _nbytes(part)
            key = _key(part, keys)
            keys.add(key)
            if key != part.meta.name or not _is_plain(part):
                listed[key] = _describe(part)
            lines.append(_json_entry(key, *_stored_as(part), offsets[i], position))
        parts_text = msgspec.json.encode(msgspec.json.encode(listed).decode())
        self._fixed = b',"%b":%b},%b' % (PARTS.encode(), parts_text, b"".join(line + b"," for line in lines))
        self.structure = digest64(self._fixed)
        self.tensor_bytes = position
        self.data_start = -(-(header.LENGTH_BYTES + len(self._fixed) + _ROOM) // PAGE) * PAGE
        self.objects_offset = self.data_start + position
        if self.objects_offset > MAX_TENSOR_BYTES:
            raise InvalidInput(f"a shard with {position} bytes of tensors is too large")
        if self.data_start - header.LENGTH_BYTES > MAX_HEADER_BYTES:
            raise InvalidInput(
                f"the header of a shard with {len(parts)} tensors would have {self.data_start} bytes; "
                f"at most {MAX_HEADER_BYTES} are allowed",
                hint="spread the state over more ranks, or use shorter names",
            )
        self.entries = tuple(
            Entry(part.meta, part.region, self.data_start + offset, _nbytes(part))
            for part, offset in zip(parts, offsets, strict=True)
        )

    def header(self, info: ShardInfo, objects_nbytes: int) -> bytes:
        """The first `data_start` bytes of the file: a safetensors header, padded with spaces.

        Args:
            info: where the shard comes from; its `structure` is replaced by the template's.
            objects_nbytes: size of the objects document.

        Raises:
            InvalidInput: the names of run and job are too long (about 1500 bytes together are safe).
        """
        info = msgspec.structs.replace(info, structure=self.structure)
        stop = self.tensor_bytes + objects_nbytes
        length = self.data_start - header.LENGTH_BYTES
        objects = _json_entry(objects_name(info.rank), _RAW_TAG, (objects_nbytes,), self.tensor_bytes, stop)
        pieces = [
            length.to_bytes(header.LENGTH_BYTES, "little"),
            b'{"%b":{"%b":' % (header.METADATA.encode(), header.INFO.encode()),
            msgspec.json.encode(record.canonical(info).decode()),
            self._fixed,
            objects + b"}",
        ]
        room = self.data_start - sum(map(len, pieces))
        if room < 0:
            size = len(info.run) + len(info.job)
            raise InvalidInput(f"the names of the run and the job have {size} characters, too many for a shard")
        return b"".join([*pieces, b" " * room])

    def total(self, objects_nbytes: int) -> int:
        """Bytes of the whole file."""
        return self.objects_offset + objects_nbytes


def decode_header(prefix: bytes | memoryview, file_size: int, what: str = "the shard") -> ShardTable:
    """Decodes the header of a shard and checks all it says.

    Args:
        prefix: the first bytes of the file, at least all of its header.
        file_size: bytes of the whole file.
        what: the name of the file, for messages.

    Raises:
        Damaged: the file is truncated or its header is malformed or contradicts itself.
        IncompatibleVersion: the file is of a newer major version of the format.
    """
    found = header.decode(prefix, file_size, what, MAX_RECORD_BYTES)
    info = record.convert(found.info, ShardInfo, f"the info record of {what}")
    if found.data_start % PAGE:
        raise Damaged(f"{what}: the data starts at byte {found.data_start}, not at a multiple of {PAGE}")
    objects = found.entries.pop(objects_name(info.rank), None)
    if objects is None or objects.tag != _RAW_TAG or len(objects.shape) != 1 or objects.stop != file_size:
        raise Damaged(f"{what} does not end with the objects document of rank {info.rank}")
    listed = _decode_parts(found.metadata.get(PARTS, ""), what)
    entries = []
    for key, stored in found.entries.items():
        part = _part(key, stored, listed.pop(key, None), what)
        entries.append(Entry(part.meta, part.region, stored.start, stored.stop - stored.start))
    if listed:
        raise Damaged(f"{what} describes {next(iter(listed))[:200]!r}, which it does not have")
    try:
        _check_unique([Part(e.meta, e.region) for e in entries])
    except InvalidInput as error:
        raise Damaged(f"{what}: {error.what}") from None
    meta = TensorMeta(objects_name(info.rank), "uint8", objects.shape)
    entries.append(Entry(meta, Box.full(objects.shape), objects.start, objects.stop - objects.start))
    return ShardTable(tuple(entries), info, found.data_start)


def check_meta(meta: TensorMeta) -> None:
    """Refuses a logical tensor that no file can hold.

    Raises:
        InvalidInput: the name, dtype or shape is impossible; the message says which and why.
    """
    name, dtype, shape = meta
    try:
        length = len(name.encode())
    except UnicodeError:
        raise InvalidInput(f"the tensor name {name[:200]!r} is not valid Unicode") from None
    if not 1 <= length <= MAX_NAME_BYTES:
        raise InvalidInput(f"the tensor name {name[:200]!r} has {length} bytes; 1 to {MAX_NAME_BYTES} are allowed")
    if dtype not in DTYPES:
        raise InvalidInput(f"{name!r} has the unknown dtype {dtype[:200]!r}")
    if len(shape) > MAX_NDIM:
        raise InvalidInput(f"{name!r} has {len(shape)} dimensions; at most {MAX_NDIM} are allowed")
    # Without its zeros, so that the shape of an empty tensor fits in 64 bits too.
    if min(shape, default=0) < 0 or prod(n for n in shape if n) * DTYPES[dtype].itemsize > MAX_TENSOR_BYTES:
        raise InvalidInput(f"{name!r} has the impossible shape {shape}")


def check_region(meta: TensorMeta, region: Region) -> None:
    """Refuses a region that is not inside its (valid) tensor.

    Raises:
        InvalidInput: it is not.
    """
    if not fits(region, meta.shape):
        raise InvalidInput(f"{meta.name!r} has the shape {meta.shape}; {region} is not inside it")


def _check_parts(parts: Sequence[Part]) -> None:
    for part in parts:
        check_meta(part.meta)
        check_region(part.meta, part.region)
        name = part.meta.name
        if name.startswith("@rank/") and name.endswith("/objects") and name.count("/") == 2:
            raise InvalidInput(f"the name {name!r} is reserved for the objects document")
    _check_unique(parts)


def _check_unique(parts: Sequence[Part]) -> None:
    metas: dict[str, TensorMeta] = {}
    seen: set[tuple[str, Region]] = set()
    for part in parts:
        name = part.meta.name
        if metas.setdefault(name, part.meta) != part.meta:
            raise InvalidInput(f"{name!r} occurs with two dtypes or global shapes: {metas[name]} and {part.meta}")
        if (name, part.region) in seen:
            raise InvalidInput(f"{name!r} occurs twice with {part.region}")
        seen.add((name, part.region))


def _is_whole(part: Part) -> bool:
    return part.region == Box.full(part.meta.shape)


def _is_plain(part: Part) -> bool:
    """Whether key, dtype tag and shape of the header say everything about the part."""
    return bool(DTYPES[part.meta.dtype].tag) and _is_whole(part)


def _region_shape(part: Part) -> tuple[int, ...]:
    return (part.region.length,) if isinstance(part.region, FlatRange) else part.region.shape


def _nbytes(part: Part) -> int:
    return prod(_region_shape(part)) * DTYPES[part.meta.dtype].itemsize


def _stored_as(part: Part) -> tuple[str, tuple[int, ...]]:
    """Dtype tag and shape in the safetensors header."""
    dtype, shape = DTYPES[part.meta.dtype], _region_shape(part)
    if dtype.tag:
        return dtype.tag, shape
    return _RAW_TAG, (*shape, dtype.itemsize) if dtype.itemsize > 1 else shape


def _key(part: Part, taken: set[str]) -> str:
    """A key for people to read; it is made unique, because nobody has to parse it."""
    key, region = part.meta.name, part.region
    if isinstance(region, FlatRange):
        key += f"@flat:{region.start}:{region.length}"
    elif not _is_whole(part):
        key += "@" + ",".join(f"{o}:{n}" for o, n in zip(region.origin, region.shape, strict=True))
    while key in taken:
        key += "@"
    return key


def _describe(part: Part) -> _JsonPart:
    name, dtype, shape = part.meta
    region = part.region
    if isinstance(region, FlatRange):
        return name, dtype, list(shape), "flat", [region.start, region.length]
    return name, dtype, list(shape), "box", [*region.origin, *region.shape]


def _json_entry(key: str, tag: str, shape: tuple[int, ...], start: int, stop: int) -> bytes:
    entry = {"dtype": tag, "shape": shape, "data_offsets": (start, stop)}
    return msgspec.json.encode(key) + b":" + msgspec.json.encode(entry)


def _decode_parts(text: str, what: str) -> dict[str, _JsonPart]:
    raw = text.encode()
    try:
        listed = {key: _part_decoder.decode(header.bounded(value)) for key, value in _parts_decoder.decode(raw).items()}
    except record.PARSE_ERRORS as error:
        raise Damaged(f"{what} has a malformed list of parts: {error}") from None
    if header.count_quotes(raw) != _QUOTES_PER_PART * len(listed):
        raise Damaged(f"{what} has a malformed list of parts: a key occurs twice")
    return listed


def _part(key: str, stored: HeaderEntry, listed: _JsonPart | None, what: str) -> Part:
    """The part that an entry of the header stands for."""
    try:
        if listed is None:
            if stored.tag not in _TAG_DTYPE:
                raise InvalidInput(f"{key[:200]!r} has the unknown dtype {stored.tag!r}")
            part = Part(TensorMeta(key, _TAG_DTYPE[stored.tag].name, stored.shape), Box.full(stored.shape))
        else:
            name, dtype, shape, kind, numbers = listed
            part = Part(TensorMeta(name, dtype, tuple(shape)), _region(kind, numbers))
        check_meta(part.meta)
        check_region(part.meta, part.region)
        if _stored_as(part) != (stored.tag, stored.shape):
            raise InvalidInput(f"{key[:200]!r} is stored as {stored.tag} {stored.shape}, which does not fit {part}")
    except InvalidInput as error:
        raise Damaged(f"{what}: {error.what}") from None
    return part


def _region(kind: str, numbers: list[int]) -> Region:
    if kind == "flat" and len(numbers) == 2:
        return FlatRange(*numbers)
    if kind == "box" and len(numbers) % 2 == 0:
        half = len(numbers) // 2
        return Box(tuple(numbers[:half]), tuple(numbers[half:]))
    raise InvalidInput(f"no region is written as {kind[:200]!r} with {len(numbers)} numbers")
