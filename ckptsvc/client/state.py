"""The state tree: what of a training program is captured, and where it goes back.

    tree = StateTree({"model": model, "optimizer": optimizer, "best": 0.3}, rank, world_size)
    capture = tree.capture()                    # at every save: parts to copy, plain values to write
    wanted = tree.targets(stored, objects)      # to restore: parts to fill from the checkpoint ...
    values = tree.load(objects)                 # ... and then this

The tree's values are modules, optimizers, objects with `state_dict`, tensors, arrays and plain values, also in nested
dicts, lists and tuples. A logical tensor is called by the JSON pointer of its place. Capturing changes nothing in the
program: no parameter, no step counter, no generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ckptsvc.client import rng
from ckptsvc.client.document import RANK, RNG, WORLD_SIZE, join
from ckptsvc.client.modules import ModuleNode
from ckptsvc.client.optimizers import OptimizerNode, has_own_state_dict
from ckptsvc.client.parts import Capture, Holders, Identity, LocalPart, digest, identity_of
from ckptsvc.client.values import Stateful, StatefulNode, ValueNode
from ckptsvc.client.wanted import Stored, Wanted, listed
from ckptsvc.errors import InvalidInput, LayoutError

__all__ = ["Capture", "Holders", "LocalPart", "StateTree"]


class Node(Protocol):
    """One object of the tree.

    Attributes:
        path: its JSON pointer in the tree.
        shared: whether its parts are cached and looked through for tensors that are the same memory.
    """

    path: str

    @property
    def shared(self) -> bool: ...

    def find(self) -> tuple[tuple[LocalPart, ...], Any]: ...

    def want(self, wanted: Wanted, plain: Any) -> None: ...

    def load(self, plain: Any) -> Any: ...


class _Branch(NamedTuple):
    """A container that has objects somewhere inside."""

    source: Any
    kind: type
    items: tuple[tuple[Any, _Branch | Node], ...]


class _Shared(NamedTuple):
    """The parts of modules and optimizers, with tied memory taken out."""

    of: tuple[tuple[LocalPart, ...], ...]
    parts: tuple[LocalPart, ...]
    aliases: dict[str, str]


class StateTree:
    """What is captured of one rank.

    Args:
        tree: name -> object. The mapping is kept, and read again at every capture: a value may be replaced in it.
        rank: this rank; 0 without a process group.
        world_size: the number of ranks.
        include_rng: whether random number generators are captured and restored.

    Attributes:
        unexpected: after `targets`, the stored names that this rank's tree has no place for. Under pipeline parallelism
            there are such; together the ranks should have a place for every name, which only the session can tell.
    """

    def __init__(self, tree: Mapping[str, Any], rank: int, world_size: int, include_rng: bool = True) -> None:
        for key in tree:
            if not isinstance(key, str) or not key or key.startswith("@"):
                raise InvalidInput(
                    f"the state tree has the key {key!r}", hint="use non-empty strings that do not begin with '@'"
                )
        self._tree = tree
        self._rank = rank
        self._world_size = world_size
        self._include_rng = include_rng
        self.unexpected: list[str] = []
        self._build()

    def _build(self) -> None:
        modules = [(path, obj) for path, obj in _objects(self._tree, "") if isinstance(obj, nn.Module)]
        nodes: dict[int, ModuleNode] = {}
        for path, module in modules:
            node = nodes[id(module)] = ModuleNode(path, module)
            node.find()  # now, because torch's hooks then leave sharded parameters, which the optimizers know
        self._root = _branch(self._tree, "", modules, self._rank)
        self._shared = _Shared((), (), {})
        self._described: tuple[Any, str] = (None, "")

    def capture(self) -> Capture:
        """The state now. The first call walks everything; later ones look whether all tensors are still there.

        Raises:
            UnsupportedObject: something that cannot be stored, with its path and type. Plain objects of types
                without a codec are told by `ckptsvc.format.objects.encode`.
        """
        if not _unchanged(self._root):
            self._build()
        shared: list[tuple[LocalPart, ...]] = []
        own: list[tuple[LocalPart, ...]] = []

        def find(node: Node, _: Any) -> Any:
            parts, plain = node.find()
            (shared if node.shared else own).append(parts)
            return plain

        objects = _map(self._root, find)
        if not _same(self._shared.of, shared):
            self._shared = _merge(shared)
        parts = self._shared.parts + tuple(chain.from_iterable(own))
        objects |= {RANK: self._rank, WORLD_SIZE: self._world_size}
        if self._include_rng:  # last: a loader asked for its state may draw from them
            objects[RNG] = rng.capture(_devices(parts))
        return Capture(parts, self._shared.aliases, self._structure(parts), objects)
