"""Files that `torch.load(weights_only=True)` reads, planned before a tensor is read; see `torch_file` for the format.

The pickle is put together opcode by opcode (protocol 2, as torch writes): plain values, containers, tensors, and the
few globals that a foreign format asks for. Nothing is pickled that is not one of these.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ckptsvc.errors import UnsupportedObject
from ckptsvc.geometry.box import Region
from ckptsvc.interop.outputs import Crc, Fill, OutputFile
from ckptsvc.interop.pickles import MAX_DEPTH
from ckptsvc.interop.torch_file import STORAGES
from ckptsvc.types import DTYPES

ALIGNMENT = 64
"""Storages begin at multiples of this, as torch's own do; `torch.load(mmap=True)` needs it."""

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_ZIP64 = 0xFFFFFFFF


class Slot(msgspec.Struct, frozen=True, eq=False):
    """Stands for a contiguous tensor in the object to be written. One slot in several places is one tensor shared.

    Attributes:
        name: canonical name of the logical tensor.
        region: the part of it that the tensor is.
        dtype: its element type in the file.
        shape: its shape in the file; as many elements as the region.
    """

    name: str
    region: Region
    dtype: str
    shape: tuple[int, ...]


class Packed(msgspec.Struct, frozen=True, eq=False):
    """Stands for a contiguous tensor that is made of regions; zero where there is none.

    Attributes:
        dtype: its element type in the file.
        size: number of elements.
        parts: (first element, canonical name, region), ascending.
        extents: its shape in the file; None if it has one dimension.
    """

    dtype: str
    size: int
    parts: tuple[tuple[int, str, Region], ...]
    extents: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return (self.size,) if self.extents is None else self.extents


class Inline(msgspec.Struct, frozen=True, eq=False):
    """Stands for a small tensor that is no part of any logical tensor; its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Global(msgspec.Struct, frozen=True):
    """Something the pickle names: a class, a function, a dtype."""

    module: str
    name: str


class Call(msgspec.Struct, frozen=True, gc=False):
    """The result of calling a global with plain arguments, given a state if that is not None."""

    function: Global
    args: tuple[Any, ...] = ()
    state: Any = None


class New(msgspec.Struct, frozen=True, eq=False, gc=False):
    """An object of a class made without calling its constructor, given a state if that is not None."""

    cls: Global
    state: Any = None


def torch_dtype(name: str) -> Global:
    """A torch dtype as a value."""
    return Global("torch", name)


def torch_output(key: str, root: Any, *, rank: int = 0) -> OutputFile:
    """The plan of a file whose object is `root`, with slots in the places of tensors.

    Args:
        key: the file's name.
        root: dicts, lists, tuples, plain values, `Slot`, `Packed`, `Inline`, `Global`, `Call`.
        rank: the rank it belongs to.

    Raises:
        UnsupportedObject: something else is in it; the message has its path.
    """
    pickler = Pickler()
    pickled = pickler.dump(root)
    return _Archive(key, rank).plan(pickled, pickler.storages)


class Pickler:
    """Writes one pickle and collects the storages it refers to.

    Attributes:
        storages: in the order of their keys.
    """

    def __init__(self) -> None:
        self.storages: list[Slot | Packed | Inline] = []
        self._keys: dict[int, str] = {}
        self._memo: dict[str | Global, bytes] = {}
        self._out = bytearray(b"\x80\x02")
        self._writers: dict[type, Callable[[Any, str, int], None]] = {
            dict: self._dict,
            OrderedDict: self._ordered,
            list: self._list,
            tuple: self._tuple,
            str: self._text,
            int: self._int,
            bytes: self._bytes,
            Slot: self._tensor,
            Packed: self._tensor,
            Inline: self._tensor,
            Global: self._global,
            Call: self._call,
            New: self._new,
        }

    def dump(self, root: Any) -> bytes:
        """The pickle of an object; see `torch_output`."""
        self._value(root, "", 0)
        return bytes(self._out + b".")

    def _value(self, value: Any, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise UnsupportedObject(f"{path[:200]}: nested more than {MAX_DEPTH} deep")
        if value is None:
            self._out += b"N"
        elif value is True or value is False:
            self._out += b"\x88" if value else b"\x89"
        elif type(value) is float:
            self._out += b"G" + struct.pack(">d", value)
        elif (writer := self._writers.get(type(value))) is not None:
            writer(value, path, depth)
        else:
            raise UnsupportedObject(f"{path or '/'}: {type(value).__name__} cannot be written to a file of torch.save")

    def _text(self, value: str, path: str, depth: int) -> None:
        if not self._again(value):
            encoded = value.encode("utf-8", "surrogatepass")
            self._out += b"X" + struct.pack("<I", len(encoded)) + encoded
            self._remember(value)

    def _bytes(self, value: bytes, path: str, depth: int) -> None:
        self._call(Call(Global("_codecs", "encode"), (value.decode("latin1"), "latin1")), path, depth)

    def _again(self, value: str | Global) -> bool:
        """Write a reference to a value that was written before; False if it was not."""
        known = self._memo.get(value)
        if known is not None:
            self._out += known
        return known is not None

    def _remember(self, value: str | Global) -> None:
        number = len(self._memo)
        wide = number > 255
        self._out += struct.pack("<cI", b"r", number) if wide else struct.pack("<cB", b"q", number)
        self._memo[value] = struct.pack("<cI", b"j", number) if wide else struct.pack("<cB", b"h", number)

    def _int(self, value: int, path: str, depth: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes([value])
        elif -(2**31) <= value < 2**31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > 255:
                raise UnsupportedObject(f"{path}: an integer of {len(data)} bytes")
            self._out += b"\x8a" + bytes([len(data)]) + data

    def _dict(self, value: Mapping[Any, Any], path: str, depth: int) -> None:
        self._out += b"}"
        self._items(value, path, depth)

    def _ordered(self, value: Mapping[Any, Any], path: str, depth: int) -> None:
        self._global(Global("collections", "OrderedDict"), path, depth)
        self._out += b")R"
        self._items(value, path, depth)

    def _items(self, value: Mapping[Any, Any], path: str, depth: int) -> None:
        if not value:
            return
        self._out += b"("
        for name, item in value.items():
            below = f"{path}/{name if type(name) in (str, int) else '(key)'}"
            self._value(name, below, depth + 1)
            self._value(item, below, depth + 1)
        self._out += b"u"

    def _list(self, value: list[Any], path: str, depth: int) -> None:
        self._out += b"]"
        if value:
            self._out += b"("
            for i, item in enumerate(value):
                self._value(item, f"{path}/{i}", depth + 1)
            self._out += b"e"

    def _tuple(self, value: tuple[Any, ...], path: str, depth: int) -> None:
        self._out += b"("
        for i, item in enumerate(value):
            self._value(item, f"{path}/{i}", depth + 1)
        self._out += b"t"

    def _global(self, value: Global, path: str, depth: int) -> None:
        if not self._again(value):
            self._out += b"c" + f"{value.module}\n{value.name}\n".encode()
            self._remember(value)

    def _call(self, value: Call, path: str, depth: int) -> None:
        self._global(value.function, path, depth)
        self._tuple(value.args, path, depth)
        self._out += b"R"
        if value.state is not None:
            self._value(value.state, f"{path}/(state)", depth + 1)
            self._out += b"b"

    def _new(self, value: New, path: str, depth: int) -> None:
        self._global(value.cls, path, depth)
        self._out += b")\x81"
        if value.state is not None:
            self._value(value.state, f"{path}/(state)", depth + 1)
            self._out += b"b"

    def _tensor(self, value: Slot | Packed | Inline, path: str, depth: int) -> None:
        """`_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`, v3 where no storage class fits."""
        size = math.prod(value.shape)
        known = _STORAGE_OF.get(value.dtype)
        kind = Global("torch", known) if known else Global("torch.storage", "UntypedStorage")
        elements = size if known else size * DTYPES[value.dtype].itemsize
        if id(value) not in self._keys:
            self._keys[id(value)] = str(len(self.storages))
            self.storages.append(value)
        strides = [1] * len(value.shape)
        for d in range(len(strides) - 2, -1, -1):
            strides[d] = strides[d + 1] * value.shape[d + 1]
        self._global(Global("torch._utils", "_rebuild_tensor_v2" if known else "_rebuild_tensor_v3"), path, depth)
        self._out += b"("
        self._tuple(("storage", kind, self._keys[id(value)], "cpu", elements), path, depth)
        self._out += b"Q"
        rest = (0, value.shape, tuple(strides), False, OrderedDict[str, Any]())
        for part in rest if known else (*rest, torch_dtype(value.dtype)):
            self._value(part, path, depth + 1)
        self._out += b"tR"


class _Archive:
    """Lays out the zip file: sizes are known before, CRCs of storages only after they were written.

    Members of storages therefore have their CRC behind the data (PKZIP APPNOTE 4.3.9, general purpose bit 3) and in the
    central directory at the end of the file.
    """

    def __init__(self, key: str, rank: int) -> None:
        self._key, self._rank = key, rank
        self._name = key.rsplit("/", 1)[-1].rsplit(".", 1)[0] or "archive"
        self._at = 0
        self._fixed: list[tuple[int, bytes]] = []
        self._fills: list[Fill] = []
        self._crcs: list[Crc] = []
        self._directory: list[tuple[str, int, int, int, int | None]] = []  # name, header, size, flags, crc
        self._waiting: list[tuple[int, int, int, int]] = []  # entry, first byte, size, place of the descriptor's CRC

    def plan(self, pickled: bytes, storages: list[Slot | Packed | Inline]) -> OutputFile:
        self._member("data.pkl", pickled)
        self._member("byteorder", b"little")
        for number, storage in enumerate(storages):
            self._storage(f"data/{number}", storage)
        self._member("version", b"3\n")
        self._end()
        return OutputFile(self._key, self._at, self._fixed, self._fills, self._crcs, self._rank)

    def _put(self, data: bytes) -> None:
        self._fixed.append((self._at, data))
        self._at += len(data)

    def _header(self, name: str, size: int, flags: int, crc: int) -> None:
        encoded = f"{self._name}/{name}".encode()
        large = size >= _ZIP64
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        short = self._at + 30 + len(encoded) + len(extra) + 4
        padding = -short % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (45 if large else 20, flags, 0, 0, 0x21, crc, *((_ZIP64,) * 2 if large else (size,) * 2))
        self._directory.append((encoded.decode(), self._at, size, flags, None if flags & 8 else crc))
        self._put(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields, len(encoded), len(extra)) + encoded + extra)

    def _member(self, name: str, data: bytes) -> None:
        self._header(name, len(data), 0, zlib.crc32(data))
        self._put(data)

    def _storage(self, name: str, storage: Slot | Packed | Inline) -> None:
        if isinstance(storage, Inline):
            self._member(name, storage.data)
            return
        itemsize = DTYPES[storage.dtype].itemsize
        size = math.prod(storage.shape) * itemsize
        self._header(name, size, 8, 0)
        start = self._at
        if isinstance(storage, Packed):
            self._fills.extend(Fill(start + i * itemsize, n, region, storage.dtype) for i, n, region in storage.parts)
        elif size:
            self._fills.append(Fill(start, storage.name, storage.region, storage.dtype))
        self._at += size
        self._waiting.append((len(self._directory) - 1, start, size, self._at + 4))
        self._put(struct.pack("<4sIQQ" if size >= _ZIP64 else "<4sIII", b"PK\x07\x08", 0, size, size))

    def _end(self) -> None:
        first = self._at
        places: dict[int, int] = {}
        for number, (name, header, size, flags, crc) in enumerate(self._directory):
            places[number] = self._at + 16
            self._put(_central(name.encode(), header, size, flags, crc or 0))
        for number, start, size, descriptor in self._waiting:
            self._crcs.append(Crc(start, size, (descriptor, places[number])))
        self._put(_end_of_directory(len(self._directory), first, self._at - first))


def _central(name: bytes, header: int, size: int, flags: int, crc: int) -> bytes:
    """An entry of the central directory (APPNOTE 4.3.12), ZIP64 fields only where needed."""
    wide = (*((size, size) if size >= _ZIP64 else ()), *((header,) if header >= _ZIP64 else ()))
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version, size32 = (45 if wide else 20), min(size, _ZIP64)
    head = (b"PK\x01\x02", version, version, flags, 0, 0, 0x21, crc, size32, size32)
    return (
        struct.pack("<4sHHHHHHIII", *head)
        + struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, min(header, _ZIP64))
        + name
        + extra
    )


def _end_of_directory(count: int, start: int, size: int) -> bytes:
    end = b""
    if count >= 0xFFFF or start >= _ZIP64 or size >= _ZIP64:  # APPNOTE 4.3.14 and 4.3.15
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    few = min(count, 0xFFFF)
    return end + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, few, few, min(size, _ZIP64), min(start, _ZIP64), 0)
