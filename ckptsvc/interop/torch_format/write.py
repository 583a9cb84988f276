"""Files that `torch.load(weights_only=True)` reads, planned before a tensor is read; see `torch_file` for the format.

The pickle is put together opcode by opcode (protocol 2, as torch writes): plain values, containers, tensors, and the
few globals that a foreign format asks for. Nothing is pickled that is not one of these.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ckptsvc.errors import UnsupportedObject
from ckptsvc.geometry.box import Region
from ckptsvc.interop.archive import ArchivePlan
from ckptsvc.interop.outputs import Fill, OutputFile
from ckptsvc.interop.torch_format.file import STORAGES
from ckptsvc.interop.torch_format.pickles import MAX_DEPTH
from ckptsvc.types import DTYPES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


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
    folder = key.rsplit("/", 1)[-1].rsplit(".", 1)[0] or "archive"
    archive = ArchivePlan()
    archive.member(f"{folder}/data.pkl", pickled)
    archive.member(f"{folder}/byteorder", b"little")
    for number, storage in enumerate(pickler.storages):
        _add_storage(archive, f"{folder}/data/{number}", storage)
    archive.member(f"{folder}/version", b"3\n")
    return archive.output(key, rank)


def _add_storage(archive: ArchivePlan, name: str, storage: Slot | Packed | Inline) -> None:
    if isinstance(storage, Inline):
        archive.member(name, storage.data)
        return
    itemsize = DTYPES[storage.dtype].itemsize
    size = math.prod(storage.shape) * itemsize
    if isinstance(storage, Packed):
        fills = [Fill(i * itemsize, n, region, storage.dtype) for i, n, region in storage.parts]
    else:
        fills = [Fill(0, storage.name, storage.region, storage.dtype)] if size else []
    archive.filled(name, size, fills)


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
