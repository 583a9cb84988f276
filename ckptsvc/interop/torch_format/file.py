"""Files of `torch.save`, read without torch: the object with a `StoredTensor` in the place of every tensor.

Two formats (torch 2.13, `torch/serialization.py`):
- zip: `<name>/data.pkl` is the pickle, `<name>/data/<key>` the bytes of storage <key>, stored without compression;
- legacy: pickles of a magic number, a protocol version, system facts, the object, the storage keys; then each storage
  as its number of elements (int64) and its bytes.

A tensor is pickled as `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, a storage as the
persistent id ("storage", type, key, device, elements). Nothing of a tensor's data is read here.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.geometry.box import Box
from ckptsvc.geometry.reshard import Block
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.pickles import MAX_DEPTH, Allowed, Unpickler, joined, loads, shown, stub
from ckptsvc.interop.torch_format.zips import FileRange, data_offset
from ckptsvc.types import DTYPES

MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of the legacy format."""

MAX_PICKLE = 4 << 30
"""Largest pickle in a file, in bytes."""

MAX_DIMS = 64
"""Most dimensions of a tensor, as in torch."""

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
"""torch's storage classes and their element types."""


class Storage(msgspec.Struct, frozen=True):
    """The bytes of a storage: `nbytes` from byte `start` of the file `key`."""

    key: str
    start: int
    nbytes: int
    dtype: str


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor in a file.

    Attributes:
        dtype: torch's name for the element type.
        shape, strides: in elements.
        storage: where its storage lies.
        offset: of the first element in the storage, in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: Storage
    offset: int

    @property
    def where(self) -> tuple[str, int]:
        """File and byte of the first element."""
        return self.storage.key, self.storage.start + self.offset * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def is_contiguous(self) -> bool:
        """Whether its elements lie in row-major order without gaps."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    def block(self) -> Block | None:
        """How it is seen in its storage, from `where` on; None if contiguous.

        Raises:
            InvalidInput: its strides are those of no permuted box (an expanded tensor, a diagonal).
        """
        if self.is_contiguous() or 0 in self.shape:
            return None
        # the dimensions as they lie in memory; those of extent 1 lie anywhere
        real = sorted((d for d, n in enumerate(self.shape) if n > 1), key=lambda d: -self.strides[d])
        steps = [*(self.strides[d] for d in real), 1]
        inner = [*(self.shape[d] for d in real), 1]
        outer = [inner[0], *(a // b if b else 0 for a, b in pairwise(steps))]
        dense = all(a == b * n for (a, b), n in zip(pairwise(steps), outer[1:], strict=True))
        if not dense or any(n > m for n, m in zip(inner, outer, strict=True)):
            raise InvalidInput(f"a tensor of shape {list(self.shape)} with strides {list(self.strides)} is no box")
        places = {d: i for i, d in enumerate(real)}
        box = Box((0,) * len(inner), tuple(inner))
        return Block(tuple(outer), box, tuple(places.get(d, -1) for d in range(len(self.shape))))


class TorchFile(msgspec.Struct, frozen=True):
    """A file of `torch.save`: the object, and where the storages are that tensors refer to."""

    root: Any
    storages: dict[str, Storage]


def read_torch(
    files: Files, key: str, start: int = 0, nbytes: int | None = None, allowed: Allowed | None = None
) -> TorchFile:
    """The object in a file of `torch.save`, or in a range of a file.

    Args:
        files: where the file is.
        key: its name.
        start: first byte of the range.
        nbytes: its length; None is to the end of the file.
        allowed: what its pickle may name beyond tensors and plain types.

    Raises:
        InvalidInput: its pickle names something that is not on the list.
        Damaged: it is not such a file, or is truncated.
        NotFound: there is no such file.
    """
    length = files.size(key) - start if nbytes is None else nbytes
    what = f"{files.url}/{key}"
    if length < 8:
        raise Damaged(f"{what} has {length} bytes: it is not a file of torch.save")
    head = bytearray(4)
    files.read_into(key, start, memoryview(head))
    if head == b"PK\x03\x04":
        return _read_zip(files, key, start, length, allowed or {}, what)
    return _read_legacy(files, key, start, length, allowed or {}, what)


def tensors_in(root: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], StoredTensor]]:
    """Every tensor of an object with its path of keys; dicts, lists and tuples are walked.

    Raises:
        Damaged: nested more deeply than `MAX_DEPTH`.
    """
    if len(path) > MAX_DEPTH:
        raise Damaged(f"an object is nested more than {MAX_DEPTH} deep")
    if isinstance(root, StoredTensor):
        yield path, root
    elif isinstance(root, Mapping):
        for name, value in root.items():
            yield from tensors_in(value, (*path, name))
    elif isinstance(root, list | tuple):
        for i, value in enumerate(root):
            yield from tensors_in(value, (*path, i))


# ---- what torch's pickles name ------------------------------------------------------------------------------


class _Type(msgspec.Struct, frozen=True):
    """A torch dtype or storage class."""

    dtype: str


def _rebuild(
    storage: Storage, offset: int, size: Any, stride: Any, _grad: Any = False, _hooks: Any = None, metadata: Any = None
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    if metadata:  # {"conj": True}, {"neg": True}: what is stored is not what the tensor shows
        raise InvalidInput(
            "a tensor is a view that conjugates or negates what is stored",
            hint="save tensor.resolve_conj().resolve_neg()",
        )
    shape, strides = _size(size), _size(stride)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise Damaged(f"a tensor of shape {shown(size)} with strides {shown(stride)}")
    extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    if (offset + extent) * DTYPES[storage.dtype].itemsize > storage.nbytes and extent:
        raise Damaged(f"{storage.key}: a tensor of shape {list(shape)} is larger than its storage")
    return StoredTensor(storage.dtype, shape, strides, storage, offset)


def _rebuild_v3(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    if not isinstance(storage, Storage) or not isinstance(dtype, _Type):
        raise Damaged("a tensor without a storage or a type")
    typed = Storage(storage.key, storage.start, storage.nbytes, dtype.dtype)
    return _rebuild(typed, offset, size, stride, grad, hooks, metadata)


def _from_type(func: Callable[..., Any], _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    return func(*args)


_INTEGERS = frozenset({int})


def _size(value: Any = ()) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > MAX_DIMS or not _INTEGERS.issuperset(map(type, value)):
        raise Damaged(f"a shape is {shown(value)}")
    return tuple(value)


TORCH: Allowed = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Tensor"): stub("Tensor"),
    ("torch.nn.parameter", "Parameter"): lambda data, *_: data,
    ("torch", "Size"): _size,
    ("torch", "device"): lambda *args: joined(":", args),
    ("torch.serialization", "_get_layout"): lambda *args: joined("", args),
    ("torch.storage", "UntypedStorage"): _Type("uint8"),
    ("torch.storage", "TypedStorage"): stub("TypedStorage"),
    **{("torch", name): _Type(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): _Type(name) for name in DTYPES},
}
"""What the pickles of torch.save name."""


def _storage_type(kind: Any, what: str) -> str:
    if not isinstance(kind, _Type):
        raise Damaged(f"{what}: a storage of an unknown type")
    return kind.dtype


# ---- zip ----------------------------------------------------------------------------------------------------


def _read_zip(files: Files, key: str, start: int, length: int, allowed: Allowed, what: str) -> TorchFile:
    stream = io.BufferedReader(FileRange(files, key, start, length), 64 << 10)
    try:
        archive = zipfile.ZipFile(stream)
        members = {info.filename: info for info in archive.infolist()}
        root = next((name for name in members if name.endswith("/data.pkl") and name.count("/") == 1), None)
        if root is None or members[root].file_size > MAX_PICKLE:
            raise Damaged(f"{what} has no data.pkl: it is not a file of torch.save")
        if (
            members[root].compress_type != zipfile.ZIP_STORED
        ):  # torch never does; it may unpack to a thousand times more
            raise Damaged(f"{what} has a compressed data.pkl: it is not a file of torch.save")
        prefix = root.removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in members and members[order].file_size < 100 and archive.read(order).strip() != b"little":
            raise InvalidInput(f"{what} was written on a machine with another byte order")
        pickled = archive.read(root)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise Damaged(f"{what} is not a readable file of torch.save: {error}") from None
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        kind, name, _ = storage_id(pid, what)
        if name not in storages:
            member = members.get(f"{prefix}data/{name}")
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                raise Damaged(f"{what} lacks the storage {name[:80]!r}, or it is compressed")
            begin = start + data_offset(stream, member.header_offset, what)
            if begin + member.file_size > start + length:
                raise Damaged(f"{what} ends before its storage {name[:80]!r} does")
            storages[name] = Storage(key, begin, member.file_size, kind)
        return msgspec.structs.replace(storages[name], dtype=kind)

    return TorchFile(loads(pickled, {**TORCH, **allowed}, what, persistent), storages)


def storage_id(pid: Any, what: str) -> tuple[str, str, int]:
    """Element type, key and number of elements of the storage that a persistent id names."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[2], str):
        raise Damaged(f"{what} refers to {shown(pid)}, which is not a storage")
    if type(pid[4]) is not int or not 0 <= pid[4] < 1 << 48:
        raise Damaged(f"{what}: the storage {pid[2][:80]!r} has a number of elements that cannot be")
    if len(pid) > 5 and pid[5] is not None:
        raise InvalidInput(
            f"{what}: the storage {pid[2][:80]!r} is a view of another, as torch wrote them before 0.4",
            hint="load it with torch, and save it again",
        )
    return _storage_type(pid[1], what), pid[2], pid[4]


# ---- legacy -------------------------------------------------------------------------------------------------


def _read_legacy(files: Files, key: str, start: int, length: int, allowed: Allowed, what: str) -> TorchFile:
    """The pickles are at the beginning; the storages, which follow, are skipped over by their lengths."""
    # The pickles' length is nowhere said: read until they parse, which small files do at once.
    size = min(length, 1 << 20)
    while True:
        data = bytearray(size)
        files.read_into(key, start, memoryview(data))
        try:
            return _parse_legacy(files, key, start, length, bytes(data), allowed, what)
        except Damaged:
            if size == length or size >= MAX_PICKLE:
                raise
            size = min(length, size * 8)


def _parse_legacy(
    files: Files, key: str, start: int, length: int, data: bytes, allowed: Allowed, what: str
) -> TorchFile:
    stream = io.BytesIO(data)
    known: OrderedDict[str, tuple[str, int]] = OrderedDict()
    waiting: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        kind, name, elements = storage_id(pid, what)
        if known.setdefault(name, (kind, elements)) != (kind, elements):
            raise Damaged(f"{what} contradicts itself about the storage {name[:80]!r}")
        # The place is known only after this pickle: the key of the storage stands for it until then.
        return Storage(name, -1, elements * DTYPES[kind].itemsize, kind)

    everything = {**TORCH, **allowed}
    first = Unpickler(stream, everything, what).load()
    if first != MAGIC:
        raise Damaged(f"{what} is not a file of torch.save")
    Unpickler(stream, everything, what).load()
    facts = Unpickler(stream, everything, what).load()
    if not isinstance(facts, dict) or not facts.get("little_endian", True):
        raise InvalidInput(f"{what} was written on a machine with another byte order")
    root = Unpickler(stream, everything, what, persistent).load()
    keys = Unpickler(stream, everything, what).load()
    at, stated = start + stream.tell(), bytearray(8)
    for name in keys if isinstance(keys, list) else ():
        if not isinstance(name, str) or name not in known:
            raise Damaged(f"{what} has the storage {shown(name)} that nothing refers to")
        kind, elements = known[name]
        nbytes = elements * DTYPES[kind].itemsize
        waiting[name] = Storage(key, at + 8, nbytes, kind)
        if at + 8 + nbytes > start + length:
            raise Damaged(f"{what} ends before its storage {name[:80]!r} does")
        files.read_into(key, at, memoryview(stated))
        if int.from_bytes(stated, "little") != elements:
            raise Damaged(f"{what}: the storage {name[:80]!r} has not the {elements} elements that are referred to")
        at += 8 + nbytes
    return TorchFile(_placed(root, waiting, what, 0), waiting)


def _placed(node: Any, storages: Mapping[str, Storage], what: str, depth: int) -> Any:
    """The object with the places of the storages in its tensors."""
    if depth > MAX_DEPTH:
        raise Damaged(f"{what} is nested more than {MAX_DEPTH} deep")
    if isinstance(node, StoredTensor):
        if node.storage.key not in storages:
            raise Damaged(f"{what} lacks the storage {node.storage.key[:80]!r}")
        return msgspec.structs.replace(node, storage=storages[node.storage.key])
    if isinstance(node, dict):
        placed = type(node)() if type(node) in (dict, OrderedDict) else {}
        placed.update((name, _placed(value, storages, what, depth + 1)) for name, value in node.items())
        return placed
    if type(node) in (list, tuple):
        return type(node)(_placed(value, storages, what, depth + 1) for value in node)
    return node
