"""What pickles of other frameworks hold beside tensors, as plain values that a document can have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckptsvc.errors import Damaged
from ckptsvc.format.document import join
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box
from ckptsvc.interop.logical import Foreign, Note
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.interop.torch_format.pickled_numpy import PickledArray
from ckptsvc.interop.torch_format.pickles import MAX_DEPTH, Stub
from ckptsvc.types import TensorMeta

SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray)

_LEFT_OUT = object()


class Plain:
    """Makes plain values of what a pickle held; tensors in it become tensors of the checkpoint.

    Attributes:
        left_out: names (JSON pointers) of what is neither plain nor a tensor, in the order they were met.
    """

    def __init__(self, foreign: Foreign) -> None:
        """`foreign` is the checkpoint that the values are of."""
        self.left_out: list[str] = []
        self._foreign = foreign

    def value(self, value: Any, path: str) -> Any:
        """A value of a pickle as plain Python; None where it is of a type that no document has.

        Args:
            value: what the restricted reader made.
            path: its name (see format.document.join).

        Raises:
            Damaged: nested more deeply than `MAX_DEPTH`.
        """
        made = self._value(value, path, 0)
        return None if made is _LEFT_OUT else made

    def note(self) -> None:
        """Note what was left out, if there is any."""
        if self.left_out:
            more = f" and {len(self.left_out) - 5} more" if len(self.left_out) > 5 else ""
            names = ", ".join(self.left_out[:5])
            self._foreign.notes.append(Note("lost", f"values that are neither plain nor tensors: {names}{more}"))

    def _value(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise Damaged(f"{path[:200]} is nested more than {MAX_DEPTH} deep")
        if type(value) in SCALARS:
            return value
        if isinstance(value, StoredTensor):
            return self._keep(path, value)
        if isinstance(value, PickledArray):
            return value.array
        if isinstance(value, np.generic):
            return value
        if isinstance(value, Stub) and type(value).__name__ == "Namespace":
            value = value.state if isinstance(value.state, dict) else {}
        if isinstance(value, Mapping):
            return self._mapping(value, path, depth)
        if isinstance(value, list | tuple):
            items = self._items(value, path, depth)
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, set | frozenset) and all(type(item) in SCALARS for item in value):
            return value
        self.left_out.append(path)
        return _LEFT_OUT

    def _keep(self, path: str, tensor: StoredTensor) -> Any:
        if not tensor.storage.key:
            self.left_out.append(f"{path} (a tensor in a compressed value)")
            return _LEFT_OUT
        meta = TensorMeta(path, tensor.dtype, tensor.shape)
        self._foreign.add(meta, Box.full(tensor.shape), tensor.where, tensor.block())
        return TensorRef(path)

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[Any, Any]:
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            below = join(path, key)
            if type(key) not in SCALARS and not isinstance(key, tuple):
                self.left_out.append(below)
                continue
            kept = self._value(item, below, depth + 1)
            if kept is not _LEFT_OUT:
                made[key] = kept
        return made

    def _items(self, value: Sequence[Any], path: str, depth: int) -> list[Any]:
        kept = (self._value(item, join(path, i), depth + 1) for i, item in enumerate(value))
        return [None if item is _LEFT_OUT else item for item in kept]


def put(tree: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    """Put a value into nested dicts and lists; what is missing on the way is made, gaps in lists are None.

    Args:
        tree: the outermost dict.
        path: keys of dicts (str) and indexes of lists (int).
        value: what is put there.

    Raises:
        Damaged: the path leads through something that is no such container, or far beyond the end of a list.
    """
    node: Any = tree
    for key, below in zip(path, (*path[1:], None), strict=True):
        if isinstance(node, list) and type(key) is int and key - len(node) < 1 << 20:
            node.extend([None] * (key + 1 - len(node)))
            known = node[key]
        elif isinstance(node, dict):
            known = node.get(key)
        else:
            raise Damaged(f"a value at {join('', *path)[:200]} has no place among the others")
        if below is None:
            node[key] = value
        elif known is None:
            node[key] = known = [] if type(below) is int else {}
        node = known
