"""Optimizers in a state tree: the state of each parameter under the parameter's name, and the parameter
groups.

Names come from `torch.distributed.checkpoint.state_dict`, which needs the module that has the parameters.
That function would run `optimizer.step()` on an optimizer without state, to make it some; training would then
not be what it is without us (step counters start at 1, momentum at weight decay). So that is prevented, both
when saving and when restoring: state that is in the checkpoint and not in the optimizer is allocated here, by
what the checkpoint says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from ckptsvc.client.fingerprint import Fingerprint, values_of
from ckptsvc.client.modules import ModuleNode
from ckptsvc.client.parts import DTYPE_NAMES, LocalPart
from ckptsvc.client.values import SCALARS, Found, Leaf, same_if_unchanged
from ckptsvc.client.wanted import Wanted, as_leaf, fits, other_kind
from ckptsvc.errors import LayoutError
from ckptsvc.format.document import ArrayRef, join, replace_refs, split
from ckptsvc.format.objects import TensorRef
from ckptsvc.types import TensorMeta

State = dict[Any, Any]


class _Walked(msgspec.Struct, eq=False):
    """What a walk over the optimizer's state found.

    Attributes:
        parts: of the state's tensors.
        leaves: name -> live tensor of the state.
        mixed: parameter -> its state as it goes into the document, for states that are not tensors only.
        names: the names of the parameters, group by group, as the optimizer has them.
        groups: the groups as torch's function gave them.
        fingerprint: None if the state must be walked every time.
    """

    parts: tuple[LocalPart, ...]
    leaves: dict[str, Leaf]
    mixed: State
    names: list[list[Any]]
    groups: list[dict[str, Any]]
    fingerprint: Fingerprint | None


class OptimizerNode:
    """An optimizer of the state tree whose class keeps torch's own `state_dict`."""

    shared = True

    def __init__(self, path: str, optimizer: Optimizer, modules: Sequence[ModuleNode]) -> None:
        """`modules` are those of the state tree; parameters are called as there.

        If some parameter is in none of them, the state is stored under the optimizer's own numbers for its
        parameters.
        """
        self.path = path
        self.target = optimizer
        self._modules = modules
        self._module_walks = -1
        self._root: nn.Module | None = None
        self._walked: _Walked | None = None
        self._last: tuple[LocalPart, ...] = ()
        self._leaves: dict[str, Leaf] = {}
        self._state: State = {}

    def find(self) -> tuple[tuple[LocalPart, ...], State]:
        """The parts of its state; its parameter groups and what else of the state is not tensors."""
        self._find_root()
        walked = self._walked
        standard = _is_standard(self.target)
        if walked is None or not standard or walked.fingerprint is None or not walked.fingerprint.holds():
            walked = self._walk()
        mixed = self._scalars_of_now(walked)
        if mixed is None:  # a scalar has become something else
            walked = self._walk()
            mixed = walked.mixed
        found = Found(splittable=True)
        groups = self.target.param_groups if standard else walked.groups
        plain = {"state": mixed, "param_groups": self._plain_groups(found, groups, walked.names)}
        if not found.parts:
            return walked.parts, plain
        self._last = same_if_unchanged(self._last, [*walked.parts, *found.parts])
        return self._last, plain

    def _find_root(self) -> None:
        """Follows the modules: a parameter that is replaced or called otherwise there is so here."""
        walks = sum(module.walks for module in self._modules)
        if walks != self._module_walks:
            self._root = _root_of(self.target, [(module.path, module.target) for module in self._modules])
            self._walked = None
            self._module_walks = walks

    def _read(self) -> State:
        if self._root is None:
            return self.target.state_dict()
        with _without_first_step(self.target):
            return dict(get_optimizer_state_dict(self._root, self.target))

    def _walk(self) -> _Walked:
        read = self._read()
        found, mixed = Found(splittable=True), {}
        for key, entries in read["state"].items():
            path = join(self.path, "state", key)
            taken = found.take(entries, path)
            # where the names say it all, the document need not: thousands of references would be written
            # every time
            if type(key) is not str or type(entries) is not dict or not all(map(_is_named, entries.items())):
                mixed[key] = taken
        names = [list(group["params"]) for group in read["param_groups"]]
        self._walked = _Walked(
            tuple(found.parts), found.leaves, mixed, names, read["param_groups"], self._fingerprint()
        )
        return self._walked

    def _plain_groups(self, found: Found, groups: list[State], names: list[list[Any]]) -> list[State]:
        return [
            {k: found.take(v, join(self.path, "param_groups", i, k)) for k, v in group.items() if k != "params"}
            | {"params": list(names[i])}
            for i, group in enumerate(groups)
        ]

    def _fingerprint(self) -> Fingerprint | None:
        """None if there are containers in the state, which may change in ways that identity does not show."""
        optimizer = self.target
        if not all(type(entries) is dict for entries in optimizer.state.values()):
            return None
        values = list(values_of(optimizer.state.values()))
        tensors = [v for v in values if isinstance(v, Tensor)]
        if len(tensors) < len(values) and any(type(v) not in SCALARS for v in values if not isinstance(v, Tensor)):
            return None
        mask = None if len(tensors) == len(values) else [isinstance(v, Tensor) for v in values]

        def read() -> Iterable[Any]:
            state, groups = optimizer.state, optimizer.param_groups
            current = values_of(state.values())
            if mask is not None:
                current = list(current)
                current = compress(current, mask) if len(current) == len(mask) else ()
            parameters = chain.from_iterable(group["params"] for group in groups)
            return chain((state,), groups, state.keys(), current, parameters)

        return Fingerprint(read, tensors, shapes=False)

    def _scalars_of_now(self, walked: _Walked) -> State | None:
        """The mixed states with the scalars of now; None if there is something else where a scalar was."""
        if not walked.mixed or walked.fingerprint is None:
            return walked.mixed
        parameters = dict(zip(chain.from_iterable(walked.names), self._parameters(), strict=True))
        now = {}
        for key, taken in walked.mixed.items():
            entries = self.target.state[parameters[key]]
            now[key] = {k: v if isinstance(v, TensorRef) else entries[k] for k, v in taken.items()}
            if not all(type(v) in SCALARS or isinstance(v, TensorRef) for v in now[key].values()):
                return None
        return now

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.target.param_groups)

    def want(self, wanted: Wanted, plain: State) -> None:
        """Wants what `load(plain)` needs: the live state is filled in place, what is not there is allocated.

        State of parameters that this optimizer does not have is left alone: another rank may have them.
        """
        if not _is_optimizer_document(plain):
            raise other_kind(self.path)
        self.find()
        walked = self._walked or self._walk()
        found = Found(splittable=True)
        self._plain_groups(found, self.target.param_groups, walked.names)
        self._leaves = {**walked.leaves, **found.leaves}
        owners = dict(zip(chain.from_iterable(walked.names), self._parameters(), strict=True))
        keys = {str(key): key for key in owners}
        prefix = join(self.path, "state") + "/"
        self._state = {}
        for name in walked.leaves if wanted.stored is None else wanted.stored:
            if not name.startswith(prefix):
                continue
            text, slot, *deeper = split(name[len(prefix) :])
            key = keys.get(text)
            if key is not None and key not in plain["state"] and not deeper:
                self._state.setdefault(key, {})[slot] = self._target(wanted, name, slot, owners[key])
        for key, entries in plain["state"].items():
            if key not in owners and self._root is not None:
                continue
            self._state[key] = replace_refs(entries, partial(self._resolve, wanted, owners.get(key)))
        for group in plain["param_groups"]:
            replace_refs(group, partial(self._resolve, wanted, None))

    def _resolve(self, wanted: Wanted, parameter: Tensor | None, ref: TensorRef | ArrayRef) -> Any:
        keys = split(ref.name)
        return as_leaf(self._target(wanted, ref.name, keys[-1], parameter), ref)

    def _target(self, wanted: Wanted, name: str, slot: str, parameter: Tensor | None) -> Tensor:
        """The live tensor of that name if the checkpoint's fits into it, otherwise one like it should be."""
        leaf, meta = self._leaves.get(name), wanted.meta(name)
        tensor = leaf if isinstance(leaf, Tensor) else None
        if tensor is not None and meta is not None:
            live = TensorMeta(name, DTYPE_NAMES.get(tensor.dtype, ""), tuple(tensor.shape))
            tensor = tensor if fits(live, meta) else None
        if tensor is None:  # without a description `fresh` raises
            tensor = wanted.fresh(name) if meta is None else _like_state(meta, slot, parameter)
        wanted.fill(name, tensor, splittable=True)
        self._leaves[name] = tensor
        return tensor

    def load(self, plain: State) -> Optimizer:
        """Hands the filled state and the saved hyperparameters to the optimizer.

        Raises:
            LayoutError: the parameter groups are others than those that were saved, or the optimizer refuses.
        """
        optimizer = self.target
        walked = self._walked or self._walk()
        leaves, self._leaves = self._leaves, {}
        state, self._state = self._state, {}
        owners = dict(zip(chain.from_iterable(walked.names), self._parameters(), strict=True))
        saved = replace_refs(plain["param_groups"], lambda ref: as_leaf(leaves[ref.name], ref))
        groups = _match_groups(self.path, optimizer.param_groups, walked.names, saved)
        try:
            # What `set_optimizer_state_dict` does too, once it has found, in time quadratic in the number of
            # parameters, what belongs to this optimizer: its hooks run, and states go by the order of parameters.
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (RuntimeError, ValueError, KeyError) as error:
            raise LayoutError(f"/{self.path} cannot be loaded: {error}") from error
        _undo_casts(optimizer, owners, state)
        self._walked = None
        return optimizer


def _is_named(item: tuple[Any, Any]) -> bool:
    return type(item[0]) is str and isinstance(item[1], Tensor)


def _is_optimizer_document(plain: Any) -> bool:
    if not isinstance(plain, dict):
        return False
    state, groups = plain.get("state"), plain.get("param_groups")
    return (
        isinstance(state, dict)
        and isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    )


def has_own_state_dict(optimizer: Optimizer) -> bool:
    """True for an optimizer that decides itself what its state is, as ZeroRedundancyOptimizer does."""
    return type(optimizer).state_dict is not Optimizer.state_dict or "state_dict" in optimizer.__dict__


def _is_standard(optimizer: Optimizer) -> bool:
    return not (optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks)


@contextmanager
def _without_first_step(optimizer: Optimizer) -> Iterator[None]:
    """Keeps torch from running `optimizer.step()`, which it does only if there is no state at all."""
    groups = (p for group in optimizer.param_groups for p in group["params"])
    first = next(groups, None)
    if optimizer.state or first is None:
        yield
        return
    optimizer.state[first] = {}
    try:
        yield
    finally:
        for parameter in [p for p, entries in optimizer.state.items() if not entries]:
            del optimizer.state[parameter]


class _Joined(nn.Module):
    """Several modules as one, for an optimizer over all of them. Never called."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        for path, module in modules:
            self._modules[path.replace(".", "_")] = module  # not add_module: it refuses some names


def _root_of(optimizer: Optimizer, modules: Sequence[tuple[str, nn.Module]]) -> nn.Module | None:
    """The module, or several as one, that has all the optimizer's parameters; None if some are nowhere."""
    needed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not all(isinstance(key, Tensor) for key in optimizer.state):
        return None
    chosen, covered = [], set[int]()
    for path, module in modules:
        has = {id(p) for p in module.parameters()} & needed
        if has == needed:
            return module
        if has - covered:
            chosen.append((path, module))
            covered |= has
    return _Joined(chosen) if covered == needed else None


def _like_state(meta: TensorMeta, slot: str, parameter: Tensor | None) -> Tensor:
    """Memory for a tensor of optimizer state that the optimizer has not made yet.

    As torch's optimizers make it: `zeros_like(parameter)` for what has the parameter's shape, and step
    counters on the host (`Optimizer.load_state_dict` moves them where `capturable` or `fused` wants them).
    """
    dtype = getattr(torch, meta.dtype)
    if parameter is None or slot == "step":
        return torch.empty(meta.shape, dtype=dtype)
    if tuple(parameter.shape) == tuple(meta.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if isinstance(parameter, DTensor) and meta.shape:  # factored moments, as new_zeros() of a DTensor makes them
        mesh = parameter.device_mesh
        local = torch.empty(meta.shape, dtype=dtype, device=parameter.device)
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return torch.empty(meta.shape, dtype=dtype, device=parameter.device)


class _Names(list[Any]):
    """The names of a group. `Optimizer.load_state_dict` asks for every tensor whether its parameter is among them."""

    def __init__(self, names: Iterable[Any] = ()) -> None:
        super().__init__(names)
        self._set = frozenset(self)

    def __contains__(self, name: object) -> bool:
        return name in self._set


def _match_groups(path: str, live: list[State], names: list[list[Any]], saved: list[State]) -> list[State]:
    """The saved hyperparameters for the live groups: by a parameter they share, otherwise by their place."""
    matched = []
    by_name = {name: group for group in saved for name in group["params"]}
    for i, group in enumerate(live):
        found = next((by_name[name] for name in names[i] if name in by_name), None)
        if found is None:
            if len(saved) != len(live):
                raise LayoutError(
                    f"/{path} has {len(live)} parameter groups here and {len(saved)} in the checkpoint",
                    hint="build the optimizer with the same groups",
                )
            found = saved[i]
        keep = {"params": _Names(names[i])} | ({"param_names": group["param_names"]} if "param_names" in group else {})
        matched.append({k: v for k, v in group.items() if k != "params"} | found | keep)
    return matched


def _undo_casts(optimizer: Optimizer, owners: State, state: State) -> None:
    """Puts back what `Optimizer.load_state_dict` cast to the parameter's dtype, which may lose bits."""
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return
    for key, entries in state.items():
        loaded: State = optimizer.state.get(owners[key], {}) if key in owners else {}
        for slot, value in entries.items():
            same = isinstance(value, Tensor) and value.dtype == getattr(loaded.get(slot), "dtype", None)
            if slot in loaded and slot != "step" and not same:
                loaded[slot] = value
