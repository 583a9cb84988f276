"""The plain values of a checkpoint (its objects documents), as a flat list of paths, for people and for comparing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from ckptsvc.errors import InvalidInput
from ckptsvc.format.objects import Opaque, TensorRef, decode
from ckptsvc.format.shard import objects_name
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource

SEQUENCES = (list, tuple, set, frozenset)
_PLAIN = (bool, int, float, str, type(None))


class Value(NamedTuple):
    """One value.

    Attributes:
        path: the JSON pointer of its place in the state tree, without the leading slash.
        type: the name of its type.
        value: itself.
    """

    path: str
    type: str
    value: Any


def read_documents(checkpoint: Checkpoint, ranks: Sequence[int]) -> list[Any]:
    """The objects documents of some ranks: their state trees with a `TensorRef` where a tensor was.

    Values of types that have a codec elsewhere come as `Opaque`.

    Raises:
        InvalidInput: the checkpoint was saved by fewer ranks.
        Damaged, StoreError: a document cannot be read.
    """
    wants = []
    for rank in ranks:
        name = objects_name(rank)
        if name not in checkpoint.index:
            world = checkpoint.index.info.world_size
            hint = "it was saved by one rank, 0" if world == 1 else f"it was saved by the ranks 0 to {world - 1}"
            raise InvalidInput(f"{checkpoint.ref.name} has nothing of a rank {rank}", hint=hint)
        meta = checkpoint.index.meta(name)
        wants.append(Want(name, meta.dtype, meta.shape, Box.full(meta.shape)))
    found = read_arrays(checkpoint.index, StoreSource(checkpoint), wants)
    return [decode(data.tobytes(), want.name, strict=False) for data, want in zip(found, wants, strict=True)]


def flatten(tree: Any, path: str = "") -> Iterator[Value]:
    """Every value of a tree. Lists, tuples and sets of plain values are one value each; tensors are left out."""
    if isinstance(tree, TensorRef):
        return
    if isinstance(tree, dict) and tree:
        for key, item in tree.items():
            yield from flatten(item, _joined(path, key))
    elif isinstance(tree, list | tuple) and not all(map(is_plain, tree)):
        for number, item in enumerate(tree):
            yield from flatten(item, _joined(path, number))
    elif path:
        yield Value(path, tree.tag if isinstance(tree, Opaque) else type(tree).__name__, tree)


def without_skeleton(values: Sequence[Value], names: Sequence[str]) -> list[Value]:
    """The values without the empty dicts that stand where tensors were.

    Args:
        values: of a document.
        names: of all tensors, sorted.
    """

    def holds_tensors(path: str) -> bool:
        at = bisect_left(names, f"{path}/")
        return at < len(names) and names[at].startswith(f"{path}/")

    return [value for value in values if not (value.type == "dict" and holds_tensors(value.path))]


def is_plain(value: Any) -> bool:
    """Whether it is one that JSON knows and that holds no others."""
    return type(value) in _PLAIN


def text(value: Any) -> str:
    """A value for people. It may be long, and it may hold characters that a terminal must not get."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}, xxh3 {xxhash.xxh3_64_hexdigest(_bytes(value))}"
    if isinstance(value, np.generic):
        return str(value)
    if isinstance(value, Opaque):
        return text(value.value)
    if isinstance(value, bytes | bytearray) and len(value) > 32:
        return f"{len(value):,} bytes, xxh3 {xxhash.xxh3_64_hexdigest(value)}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}" if value else "{}"
    return repr(value)


def as_json(value: Any) -> Any:
    """A value as JSON has it: itself, a list of such, or its text."""
    if is_plain(value) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return {} if isinstance(value, dict) else text(value)  # `flatten` gives empty ones only


def same(a: Any, b: Any, tolerance: float | None = None) -> bool:
    """Whether two values are equal: of one type, bit for bit; a NaN equals a NaN.

    Args:
        a: a value.
        b: another.
        tolerance: take floats for equal where |a - b| <= tolerance * max(1, |a|, |b|); None: only equal ones.
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        near = tolerance is not None and math.isfinite(a - b) and abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
        return near or (a == b and math.copysign(1.0, a) == math.copysign(1.0, b))
    if isinstance(a, complex):
        return same(a.real, b.real, tolerance) and same(a.imag, b.imag, tolerance)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _bytes(a) == _bytes(b)
    if isinstance(a, msgspec.Struct):
        return all(same(x, y, tolerance) for x, y in zip(_fields(a), _fields(b), strict=True))
    if isinstance(a, Mapping):
        return len(a) == len(b) and all(key in b and same(a[key], b[key], tolerance) for key in a)
    return bool(a == b)


def _fields(value: msgspec.Struct) -> list[Any]:
    return [getattr(value, name) for name in value.__struct_fields__]


def _bytes(value: np.ndarray[Any, Any] | np.generic) -> bytes:
    return np.ascontiguousarray(value).tobytes()


def _joined(path: str, key: object) -> str:
    part = str(key).replace("~", "~0").replace("/", "~1")
    return f"{path}/{part}" if path else part
