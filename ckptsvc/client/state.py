"""The state tree: what of a training program is captured, and where it goes back.

    tree = StateTree({"model": model, "optimizer": optimizer, "best": 0.3}, rank, world_size)
    capture = tree.capture()                    # at every save: parts to copy, plain values to write
    wanted = tree.targets(stored, objects)      # to restore: parts to fill from the checkpoint ...
    values = tree.load(objects)                 # ... and then this

The tree's values are modules, optimizers, objects with `state_dict`, tensors, arrays and plain values, also
in nested dicts, lists and tuples. A logical tensor is called by the JSON pointer of its place. Capturing
changes nothing in the program: no parameter, no step counter, no generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from ckptsvc.client import codecs, rng
from ckptsvc.client.modules import ModuleNode
from ckptsvc.client.optimizers import OptimizerNode, has_own_state_dict
from ckptsvc.client.parts import Capture, Holders, Identity, LocalPart, digest, identity_of
from ckptsvc.client.values import CONTAINERS, Stateful, StatefulNode, ValueNode
from ckptsvc.client.wanted import Stored, Wanted, listed
from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.document import RANK, RNG, WORLD_SIZE, join

__all__ = ["Capture", "Holders", "LocalPart", "StateTree"]


codecs.register()

Node = ModuleNode | OptimizerNode | StatefulNode | ValueNode
"""A leaf of the tree. `find` captures it, `want` says what to fill, `load` restores it; `shared` says whether
its parts are remembered and looked through for tensors that are the same memory."""


def optimizers_in(tree: Mapping[str, Any]) -> list[Optimizer]:
    """Every optimizer of a state tree."""
    return [obj for _, obj in _objects(tree, "") if isinstance(obj, Optimizer)]


class _Branch(NamedTuple):
    """A container that has objects somewhere inside."""

    source: Any
    kind: Callable[[Any], Any]
    items: tuple[tuple[Any, _Branch | Node], ...]


class _Merged(NamedTuple):
    """Parts with tied memory taken out, and what follows from them alone."""

    of: tuple[tuple[LocalPart, ...], ...]
    parts: tuple[LocalPart, ...]
    aliases: dict[str, str]
    devices: frozenset[torch.device]


class StateTree:
    """What is captured of one rank.

    Attributes:
        unexpected: after `targets`, the stored names that this rank's tree has no place for. Pipeline stages
            have such; all ranks together should have a place for every name, which only the session can tell.
        absent: after `targets`, what the tree has and the checkpoint has not.
        cast: after `targets`, the names that are stored in another precision.
    """

    def __init__(self, tree: Mapping[str, Any], rank: int, world_size: int, include_rng: bool = True) -> None:
        """Looks through the tree once.

        Args:
            tree: name -> object. It is read again at every capture: values may be replaced in it.
            rank: this rank; 0 without a process group.
            world_size: the number of ranks.
            include_rng: whether random number generators are captured and restored.

        Raises:
            InvalidInput: a key that is not a non-empty string, or begins with "@".
            UnsupportedObject: a module of a kind, or with a tensor of a kind, that cannot be stored.
        """
        for key in tree:
            if not _is_key(key):
                raise InvalidInput(
                    f"the state tree has the key {key!r}",
                    hint="use non-empty strings that do not begin with '@'",
                )
        self._tree = tree
        self._rank = rank
        self._world_size = world_size
        self._include_rng = include_rng
        self.unexpected: list[str] = []
        self.absent: list[str] = []
        self.cast: list[str] = []
        self._build()

    def _build(self) -> None:
        modules = {path: ModuleNode(path, m) for path, m in _objects(self._tree, "") if isinstance(m, nn.Module)}
        for node in modules.values():
            node.find()  # torch's hooks then leave the sharded parameters in place, which the optimizers know
        self._root = _branch(self._tree, "", modules, self._rank)
        self._nodes: list[Node] = []
        _map(self._root, lambda node, _: self._nodes.append(node))
        # Modules first: optimizers call their parameters as they do. The others last: see `load`.
        self._nodes.sort(key=lambda node: _LOAD_ORDER.get(type(node), len(_LOAD_ORDER)))
        self._shared = _merge(())
        self._all: tuple[tuple[Any, ...], tuple[LocalPart, ...]] = ((), ())
        self._structure: tuple[_Merged, Any, str] | None = None
        self._ready = False
        self._devices: frozenset[torch.device] = frozenset()

    def capture(self) -> Capture:
        """The state now. Later calls only check that all tensors are where the first one found them.

        Raises:
            UnsupportedObject: a tensor that cannot be stored, with its path and kind. (Plain values that
                cannot be stored are refused by `ckptsvc.format.objects.encode`, in the same words.)
        """
        if not _unchanged(self._root):
            self._build()
        found = {id(node): node.find() for node in self._nodes}
        shared = [found[id(node)][0] for node in self._nodes if node.shared]
        own = [found[id(node)][0] for node in self._nodes if not node.shared]
        objects: dict[str, Any] = _map(self._root, lambda node, _: found[id(node)][1])
        if not _identical(self._shared.of, shared):
            self._shared = _merge(shared)
        if not _identical(self._all[0], [self._shared, *own]):
            self._all = (self._shared, *own), tuple(chain(self._shared.parts, *own))
        parts = self._all[1]
        mine = parts[len(self._shared.parts) :]
        objects |= {RANK: self._rank, WORLD_SIZE: self._world_size}
        if self._include_rng:  # last, because a data loader that is asked for its state may draw a number
            objects[RNG] = rng.capture(self._shared.devices | {part.tensor.device for part in mine})
        return Capture(parts, self._shared.aliases, self._digest(parts, mine), objects)

    def _digest(self, parts: tuple[LocalPart, ...], mine: tuple[LocalPart, ...]) -> str:
        described = [(part.meta, part.region) for part in mine]
        last = self._structure
        if last is None or last[0] is not self._shared or last[1] != described:
            last = self._structure = (self._shared, described, digest(parts, self._shared.aliases))
        return last[2]

    def targets(
        self,
        stored: Stored | None = None,
        objects: Mapping[str, Any] | None = None,
        *,
        strict: bool = True,
        cast: bool = False,
    ) -> Capture:
        """What must be filled so that `load(objects)` restores a checkpoint.

        The tensors in the parts are the live ones wherever there is live memory. Nothing of the program
        changes before they are filled.

        Args:
            stored: every name in the checkpoint, aliases too, with its description. None: as the tree is now.
            objects: the decoded document of the rank to restore: this one's, or another's if there were fewer
                ranks then; parts "@rank/<r>/..." are of the rank that wrote it. None: as the tree is now.
            strict: refuse a checkpoint that lacks something of the tree and, if this is the only rank, one
                that has more than the tree. Otherwise what it lacks stays as it is and what it has more is
                ignored.
            cast: take floating-point tensors that are stored in another precision.

        Raises:
            LayoutError: names are missing, or stored with another dtype or shape.
        """
        if not _unchanged(self._root):
            self._build()
        wanted = Wanted(stored, cast=cast)

        def want(node: Node, plain: Any) -> None:
            if plain is _ABSENT:
                wanted.absent.append(node.path)
            else:
                node.want(wanted, plain)

        _map(self._root, want, self.capture().objects if objects is None else objects)
        self.unexpected = sorted(
            n for n in (() if stored is None else stored) if n not in wanted.names and not n.startswith("@")
        )
        self.absent, self.cast = wanted.absent, wanted.cast or []
        if strict:
            wanted.check()
            if self.unexpected and self._world_size == 1:
                raise LayoutError(
                    listed(self.unexpected, "in the checkpoint and not in the state tree"),
                    hint="attach the tree that was saved, or load what you need yourself with ckptsvc.load()",
                )
        self._ready = True
        merged = _merge((tuple(wanted.parts),))
        self._devices = merged.devices
        return Capture(merged.parts, merged.aliases, digest(merged.parts, merged.aliases), objects)

    def load(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a checkpoint back, after the parts of `targets` were filled.

        Modules come first, then optimizers, all other objects, and last the generators (only from this rank's
        own
        document: two ranks must not draw the same numbers).

        Args:
            objects: the same document that was given to `targets`.

        Returns:
            The restored tensors, arrays and plain values of the tree; not the objects with a state of their
            own.

        Raises:
            LayoutError: an object refuses its state.
        """
        if not self._ready:
            self.targets(None, objects)
        self._ready = False
        given: dict[int, Any] = {}
        _map(self._root, lambda node, plain: given.update({id(node): plain}), objects)
        values: dict[str, Any] = {}
        for node in self._nodes:
            if given[id(node)] is not _ABSENT:
                values[node.path] = node.load(given[id(node)])
        restored: dict[str, Any] = _values(self._root, values)
        if self._include_rng and RNG in objects and objects.get(RANK) == self._rank:
            rng.restore(objects[RNG], self._devices)
        return restored


_ABSENT = object()

_LOAD_ORDER: dict[type, int] = {ModuleNode: 0, OptimizerNode: 1}


def _items(source: Any) -> Iterable[tuple[Any, Any]]:
    return source.items() if isinstance(source, Mapping) else enumerate(source)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and bool(key) and not key.startswith("@")


def _is_object(value: Any) -> bool:
    return isinstance(value, nn.Module | Optimizer | Stateful) and not isinstance(value, type)


def _objects(source: Any, path: str, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The objects with a state of their own in nested containers, with their paths."""
    for key, value in _items(source):
        if _is_object(value):
            yield join(path, key), value
        elif type(value) in CONTAINERS and id(value) not in around:
            yield from _objects(value, join(path, key), (*around, id(value)))


def _branch(source: Any, path: str, modules: Mapping[str, ModuleNode], rank: int) -> _Branch:
    def node(key: Any, value: Any) -> _Branch | Node:
        here = join(path, key)
        if isinstance(value, nn.Module):
            return modules[here]
        if isinstance(value, Optimizer) and not has_own_state_dict(value):
            return OptimizerNode(here, value, list(modules.values()))
        if _is_object(value):
            return StatefulNode(here, value, rank)
        if type(value) in CONTAINERS and next(_objects(value, ""), None) is not None:
            return _branch(value, here, modules, rank)
        return ValueNode(here, lambda: source[key])

    kind: Callable[[Any], Any] = type(source) if type(source) in CONTAINERS else dict
    return _Branch(source, kind, tuple((key, node(key, value)) for key, value in _items(source)))


def _unchanged(branch: _Branch) -> bool:
    """Whether the objects of a branch are still the ones that its nodes speak of."""
    source = branch.source
    if [key for key, _ in _items(source)] != [key for key, _ in branch.items]:
        return False
    for key, item in branch.items:
        value = source[key]
        if isinstance(item, _Branch):
            if value is not item.source or not _unchanged(item):
                return False
        elif isinstance(item, ValueNode):
            if isinstance(value, nn.Module | Optimizer):
                return False
        elif value is not item.target:
            return False
    return True


def _map(branch: _Branch, visit: Callable[[Node, Any], Any], plain: Any = None) -> Any:
    """A container like the branch with what `visit` makes of each node and of its place in `plain`."""
    made = []
    for key, item in branch.items:
        below = _at(plain, key)
        made.append((key, _map(item, visit, below) if isinstance(item, _Branch) else visit(item, below)))
    return branch.kind(made if isinstance(branch.source, Mapping) else [value for _, value in made])


def _at(plain: Any, key: Any) -> Any:
    if isinstance(plain, Mapping):
        return plain.get(key, _ABSENT)
    if isinstance(plain, list | tuple) and isinstance(key, int) and key < len(plain):
        return plain[key]
    return _ABSENT


def _values(branch: _Branch, values: Mapping[str, Any]) -> dict[Any, Any]:
    """The values at the nodes that are not objects, in nested dicts; as now where none was restored."""
    made: dict[Any, Any] = {}
    for key, item in branch.items:
        if isinstance(item, _Branch):
            inner = _values(item, values)
            if inner:
                made[key] = inner
        elif isinstance(item, ValueNode):
            made[key] = values.get(item.path, branch.source[key])
    return made


def _identical(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))


def _merge(groups: Sequence[tuple[LocalPart, ...]]) -> _Merged:
    """All parts, those of the same memory once under the first name that it has."""
    names: dict[tuple[Identity, ...], str] = {}
    aliases: dict[str, str] = {}
    parts: list[LocalPart] = []
    for name, same_name in groupby(chain.from_iterable(groups), key=lambda part: part.meta.name):
        pieces = list(same_name)
        identities = tuple(identity for identity in map(identity_of, pieces) if identity is not None)
        first = names.setdefault(identities, name) if identities else name
        if first != name:
            aliases[name] = first
        else:
            parts += pieces
    devices = frozenset(part.tensor.device for part in parts)
    return _Merged(tuple(groups), tuple(parts), aliases, devices)
