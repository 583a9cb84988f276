"""What of a state tree is not modules or optimizers: tensors, arrays, plain values, objects with a state.

A tensor or an array of the user's is filled in place when it is restored. An object with `state_dict` and
`load_state_dict` is asked for its state at every capture, and what it says is this rank's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torch.utils.dlpack import from_dlpack

from ckptsvc.client.fingerprint import Fingerprint
from ckptsvc.client.parts import LocalPart, parts_of
from ckptsvc.client.wanted import Wanted, as_leaf
from ckptsvc.errors import UnsupportedObject
from ckptsvc.format.document import ArrayRef, join, own_name, references, replace_refs
from ckptsvc.format.objects import TensorRef


@runtime_checkable
class Stateful(Protocol):
    """What schedulers, data loaders and many others offer."""

    def state_dict(self) -> Any:
        """The state as tensors and plain values."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """The opposite."""


CONTAINERS = frozenset({dict, list, tuple, OrderedDict})
"""What tensors are looked for in. Types are matched exactly, as in the document."""

SCALARS = frozenset({int, float, bool, str, type(None)})
"""Immutable types of plain values."""

Leaf = Tensor | np.ndarray[Any, Any]


@runtime_checkable
class ForeignArray(Protocol):
    """An array of another framework (JAX, CuPy), read through DLPack (the Python array API standard).

    It is restored as a tensor, which they take in the same way: theirs are immutable and cannot be filled.
    """

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """A capsule with its memory."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """Where that is."""


class Found:
    """Takes the tensors and arrays out of nested containers and names them.

    Attributes:
        parts: of all tensors found so far.
        leaves: name -> the live tensor or array.
        foreign: the names of arrays of other frameworks.
    """

    def __init__(self, own: Callable[[str], str] | None = None, *, splittable: bool = False) -> None:
        """`own` turns a path into the name of what is this rank's alone; None if every rank has the same."""
        self.parts: list[LocalPart] = []
        self.leaves: dict[str, Leaf] = {}
        self.foreign: set[str] = set()
        self._own = own
        self._splittable = splittable
        self._inside: set[int] = set()

    def take(self, value: Any, path: str) -> Any:
        """`value` without its tensors: containers anew, references where tensors were, the rest as it is.

        Raises:
            UnsupportedObject: a tensor that cannot be stored, a container that contains itself, or two
                tensors whose keys look the same when written as text.
        """
        if isinstance(value, Tensor):
            # a sharded tensor is one tensor of all ranks, whoever speaks of it
            name = path if self._own is None or isinstance(value, DTensor) else self._own(path)
            self._add(name, value, value)
            return TensorRef(name)
        if isinstance(value, np.ndarray):
            tensor = as_tensor(value)
            if tensor is None:
                return value.copy()
            name = path if self._own is None else self._own(path)
            self._add(name, value, tensor)
            return ArrayRef(name)
        if isinstance(value, ForeignArray):
            name = path if self._own is None else self._own(path)
            self._check_new(name)
            self.parts += parts_of(name, _imported(value, path), splittable=self._splittable)
            self.foreign.add(name)
            return TensorRef(name)
        kind = type(value)
        if kind not in CONTAINERS:
            return value
        if id(value) in self._inside:
            raise UnsupportedObject(f"/{path} contains itself")
        self._inside.add(id(value))
        taken: Any
        if kind is dict or kind is OrderedDict:
            taken = kind((key, self.take(item, join(path, key))) for key, item in value.items())
        else:
            taken = kind(self.take(item, join(path, index)) for index, item in enumerate(value))
        self._inside.remove(id(value))
        return taken

    def _add(self, name: str, leaf: Leaf, tensor: Tensor) -> None:
        self._check_new(name)
        self.parts += parts_of(name, tensor, splittable=self._splittable)
        self.leaves[name] = leaf

    def _check_new(self, name: str) -> None:
        if name in self.leaves or name in self.foreign:
            raise UnsupportedObject(
                f"two tensors are both called /{name}", hint="do not mix keys such as 1 and '1' in one dict"
            )


def _imported(array: ForeignArray, path: str) -> Tensor:
    try:
        return from_dlpack(array)
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise UnsupportedObject(f"/{path}: {kind} cannot be read through DLPack: {error}") from error


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor | None:
    """A tensor with the array's memory, or a copy where that cannot be; None if torch lacks the type."""
    try:
        return torch.from_numpy(array if shares_memory(array) else array.copy())
    except TypeError:
        return None


def shares_memory(array: np.ndarray[Any, Any]) -> bool:
    """Whether filling `as_tensor(array)` fills the array."""
    return array.flags.writeable and all(stride >= 0 for stride in array.strides)


class ValueNode:
    """A tensor, an array, a plain value, or containers of such."""

    shared = False

    def __init__(self, path: str, get: Callable[[], Any]) -> None:
        """`get` reads the value out of the user's container, where it may have been replaced."""
        self.path = path
        self._get = get
        self._last: tuple[tuple[LocalPart, ...], Any] = ((), None)
        self._fingerprint: Fingerprint | None = None
        self._targets: dict[str, Leaf] = {}

    def find(self) -> tuple[tuple[LocalPart, ...], Any]:
        """The parts and the plain values now."""
        if self._fingerprint is None or not self._fingerprint.holds():
            found = Found()
            plain = found.take(self._get(), self.path)
            self._last = same_if_unchanged(self._last[0], found.parts), plain
            cacheable = len(found.parts) > _FEW and all(map(_is_constant, _outline(self._get())))
            self._fingerprint = self._remember(found) if cacheable else None
        return self._last

    def _remember(self, found: Found) -> Fingerprint:
        tensors = [leaf if isinstance(leaf, Tensor) else as_tensor(leaf) for leaf in found.leaves.values()]
        return Fingerprint(lambda: _outline(self._get()), [t for t in tensors if t is not None], shapes=True)

    def want(self, wanted: Wanted, plain: Any) -> None:
        """Wants what `load(plain)` needs. A live tensor or array is filled in place.

        Values only the checkpoint has (a longer list) are made anew, with the tensors in them.
        """
        found = Found()
        found.take(self._get(), self.path)
        self._targets = {}
        names = {ref.name for ref in references(plain)}
        wanted.absent += (found.leaves.keys() | found.foreign) - names
        for name in sorted(names):
            leaf = found.leaves.get(name)
            if leaf is None or (isinstance(leaf, np.ndarray) and not shares_memory(leaf)):
                self._targets[name] = wanted.fresh(name)
                continue
            self._targets[name] = leaf
            tensor = leaf if isinstance(leaf, Tensor) else as_tensor(leaf)
            assert tensor is not None
            wanted.fill(name, tensor)

    def load(self, plain: Any) -> Any:
        """The restored value: the live tensors and arrays, filled by now, among the plain values."""
        targets, self._targets = self._targets, {}
        return replace_refs(plain, lambda ref: as_leaf(targets[ref.name], ref))


_FEW = 100
"""Up to so many tensors a walk costs less than a millisecond."""


def _outline(value: Any) -> list[Any]:
    """The keys and leaves of nested containers, in their order."""
    if type(value) not in CONTAINERS:
        return [value]
    outline: list[Any] = []
    if isinstance(value, dict):
        outline += value.keys()
        value = value.values()
    for item in value:
        if type(item) in CONTAINERS:
            outline += (type(item), *_outline(item))
        else:
            outline.append(item)
    return outline


def _is_constant(leaf: Any) -> bool:
    """Whether the leaf says the same as long as it is the same object (but for the elements of a tensor)."""
    return isinstance(leaf, Tensor | type) or type(leaf) in SCALARS


class StatefulNode:
    """An object with `state_dict` and `load_state_dict` that is neither a module nor an optimizer."""

    shared = False

    def __init__(self, path: str, target: Stateful, rank: int) -> None:
        self.path = path
        self.target = target
        self._rank = rank
        self._targets: dict[str, Leaf] = {}

    def _found(self) -> tuple[Found, Any]:
        found = Found(lambda path: own_name(self._rank, path))
        return found, found.take(self.target.state_dict(), self.path)

    def find(self) -> tuple[tuple[LocalPart, ...], Any]:
        """The parts and the plain values of its state now."""
        found, plain = self._found()
        return tuple(found.parts), plain  # not remembered: the tensors may be copies made for this call

    def want(self, wanted: Wanted, plain: Any) -> None:
        """Wants fresh memory as large as what was saved, which `load` hands to the object.

        The state of now says nothing about the sizes in the state that was saved. Only sharded tensors, which
        could not be allocated here, are taken from it.
        """
        found, _ = self._found()
        self._targets = {}
        for ref in references(plain):
            leaf = found.leaves.get(ref.name)
            if isinstance(leaf, DTensor) or (leaf is not None and wanted.stored is None):
                tensor = leaf if isinstance(leaf, Tensor) else as_tensor(leaf)
                assert tensor is not None
                wanted.fill(ref.name, tensor)
                self._targets[ref.name] = leaf
            else:
                device = leaf.device if isinstance(leaf, Tensor) else "cpu"
                self._targets[ref.name] = wanted.fresh(ref.name, device)

    def load(self, plain: Any) -> Any:
        """Hands the restored state to the object."""
        targets, self._targets = self._targets, {}
        self.target.load_state_dict(replace_refs(plain, lambda ref: as_leaf(targets[ref.name], ref)))
        if isinstance(self.target, DataLoader):
            # A loader that resumes draws from the global generators when its iterator is made. Asking for its
            # state makes it now, before the generators are restored: the program then draws what it drew
            # before.
            self.target.state_dict()
        return self.target


def same_if_unchanged(last: tuple[LocalPart, ...], parts: list[LocalPart]) -> tuple[LocalPart, ...]:
    """The tuple of last time if it still says the same, so that the caller can tell by its identity."""
    unchanged = len(last) == len(parts) and all(
        old.meta == new.meta
        and old.region == new.region
        and old.tensor.data_ptr() == new.tensor.data_ptr()
        and old.tensor.stride() == new.tensor.stride()
        and old.tensor.device == new.tensor.device
        for old, new in zip(last, parts, strict=True)
    )
    return last if unchanged else tuple(parts)
