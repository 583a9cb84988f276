"""Modules in a state tree: parameters, buffers and extra state under their fully qualified names.

Names and values come from `torch.distributed.checkpoint.state_dict`, which strips the prefixes of DDP,
`fully_shard`, activation checkpointing and torch.compile, and they go back through it, so that every
framework's own hooks run.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ckptsvc.client.fingerprint import Fingerprint, values_of
from ckptsvc.client.parts import LocalPart, local_of, parts_of
from ckptsvc.client.values import Found
from ckptsvc.client.wanted import Wanted, as_leaf, other_kind
from ckptsvc.errors import LayoutError, UnsupportedObject
from ckptsvc.format.document import join, references, replace_refs

State = dict[str, Any]


class ModuleNode:
    """A module of the state tree, wrapped and sharded in any way torch offers.

    Attributes:
        path: its JSON pointer in the tree.
        target: the module.
        walks: how often `find` had to walk: names and parameters are as they were as long as this is.
    """

    shared = True

    def __init__(self, path: str, module: nn.Module) -> None:
        """Raises UnsupportedObject for FSDP-1, whose state dict is not the memory that the program trains."""
        if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
            raise UnsupportedObject(
                f"/{path} uses FullyShardedDataParallel",
                hint="use torch.distributed.fsdp.fully_shard (FSDP2), which replaces it",
            )
        self.path = path
        self.target = module
        self._fingerprint: Fingerprint | None = None
        self._last: tuple[tuple[LocalPart, ...], State] = ((), {})
        self._wanted: State = {}
        self.walks = 0
        self._filled: dict[str, Any] = {}

    def find(self) -> tuple[tuple[LocalPart, ...], State]:
        """The parts of its tensors, and the extra state that is not tensors."""
        if self._fingerprint is None or not self._fingerprint.holds():
            self.walks += 1
            state, _ = _state_of(self.target)
            live = _Live(self.target)  # after the walk, whose hooks put sharded parameters in place of gathered ones
            found, plain = Found(), {}
            parts: list[LocalPart] = []
            for name, value in state.items():
                if isinstance(value, Tensor):
                    parts += parts_of(join(self.path, name), value, splittable=live.is_parameter(value))
                else:
                    plain[name] = found.take(value, join(self.path, name))
            cacheable = _is_standard(self.target) and all(map(live.has, state.values()))
            self._fingerprint = _fingerprint(self.target) if cacheable else None
            self._last = (*parts, *found.parts), plain
        return self._last

    def want(self, wanted: Wanted, plain: State) -> None:
        """Wants what `load(plain)` needs: the parameters and buffers are filled in place.

        Extra state may be of another size each time, so that it is made anew as the checkpoint says.
        """
        if not isinstance(plain, dict):
            raise other_kind(self.path)
        state, _ = _state_of(self.target)
        live = _Live(self.target)
        self._filled = {}
        for name, value in state.items():
            path = join(self.path, name)
            if name in plain:
                self._filled.update((ref.name, wanted.fresh(ref.name)) for ref in references(plain[name]))
            elif wanted.stored is None or isinstance(value, DTensor) or (live.has(value) and not _is_extra(name)):
                if isinstance(value, Tensor):
                    wanted.fill(path, value, splittable=live.is_parameter(value))
            elif wanted.meta(path) is not None:
                state[name] = wanted.fresh(path, value.device if isinstance(value, Tensor) else "cpu")
            else:
                wanted.absent.append(path)
        self._wanted = state

    def load(self, plain: State) -> nn.Module:
        """Hands the filled tensors and the extra state to the module, strictly.

        The tensors are the module's own, so that torch finds nothing to copy.

        Raises:
            LayoutError: the module refuses them.
        """
        state, by_torch = _state_of(self.target)
        state.update(self._wanted)
        filled, self._filled, self._wanted = self._filled, {}, {}
        for name, value in plain.items():
            state[name] = replace_refs(value, lambda ref: as_leaf(filled[ref.name], ref))
        if state:
            try:
                if by_torch:
                    set_model_state_dict(self.target, state)
                else:
                    _bare(self.target).load_state_dict(state)
            except RuntimeError as error:
                raise LayoutError(f"/{self.path} cannot be loaded: {error}") from error
        self._fingerprint = None
        return self.target


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"  # what `torch.nn.Module.state_dict` calls it


def _state_of(module: nn.Module) -> tuple[State, bool]:
    """The state dict, and whether torch's function could make it."""
    if next(module.parameters(), None) is None and not module.state_dict():
        return {}, True  # torch's function takes an empty state for a mistake
    try:
        return get_model_state_dict(module), True
    except (AttributeError, AssertionError):  # it looks every name up in the module; hooks may invent others
        return dict(_bare(module).state_dict()), False


def _bare(module: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    while True:
        inner = module.module if isinstance(module, DistributedDataParallel) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


class _Live:
    """The memory of a module's parameters and buffers, by address. Tensors without memory have address 0."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {local_of(p).data_ptr() for p in module.parameters()}
        self._buffers = {local_of(b).data_ptr() for b in module.buffers()}

    def has(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        address = local_of(value).data_ptr()
        return address in self._parameters or address in self._buffers

    def is_parameter(self, value: Tensor) -> bool:
        address = local_of(value).data_ptr()
        return address in self._parameters and address not in self._buffers


def _is_standard(module: nn.Module) -> bool:
    """True if the state dict is the parameters and persistent buffers and nothing else has a say in it."""
    base = nn.Module
    return all(
        type(m).state_dict is base.state_dict
        and type(m)._save_to_state_dict is base._save_to_state_dict
        and type(m).get_extra_state is base.get_extra_state
        and "state_dict" not in m.__dict__
        # torch's own hooks (fully_shard, activation checkpointing) only rename or reshard
        and all(
            getattr(hook, "__module__", "").startswith("torch.distributed.")
            for hook in chain(m._state_dict_hooks.values(), m._state_dict_pre_hooks.values())
        )
        for m in module.modules()
    )


def _fingerprint(module: nn.Module) -> Fingerprint:
    modules = list(module.modules())
    mixed = [m for m in modules if m._non_persistent_buffers_set]
    dicts: list[dict[Any, Any]] = [m._buffers for m in modules if not m._non_persistent_buffers_set]
    for m in modules:
        dicts += [m._parameters, m._modules, m._state_dict_hooks, m._state_dict_pre_hooks]
    empty = [d for d in dicts if not d]
    filled = [d for d in dicts if d]

    def read() -> Iterable[Any]:
        return chain(values_of(filled), chain.from_iterable(map(_persistent, mixed)))

    tensors = [x for x in read() if isinstance(x, Tensor)]
    return Fingerprint(read, tensors, shapes=True, empty=empty)


def _persistent(module: nn.Module) -> list[Tensor | None]:
    temporary = module._non_persistent_buffers_set
    return [buffer for name, buffer in module._buffers.items() if name not in temporary]
