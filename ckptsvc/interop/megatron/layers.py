"""A model of Megatron-Core layer by layer, whether its checkpoint has the layers stacked or not.

Checkpoints in `torch_dist` form stack layers, and experts, in front (see `naming/maps/megatron.toml`); ranks of a
model have them one by one. Both are the same elements in the same order: a layer is a region of the stacked tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.megatron.names import STACKED
from ckptsvc.interop.naming.mapping import parameters
from ckptsvc.types import TensorMeta

SPECS = ("te", "local")
"""Names of norms: inside the linear layers after them, as of Transformer Engine, or modules of their own."""

FUSED = "self_attention.linear_qkv.layer_norm_weight"
"""The end of a name that only models with Transformer Engine have."""

LOCAL = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

_LAYER = re.compile(r"((?:\w+\.)*?layers)\.(\d{1,9})\.(.+)")
_STACKED_EXPERT = re.compile(r"(.*\.mlp\.experts)\.experts\.(linear_fc[12]\.(?:weight|bias))")
_EXPERT = re.compile(r"(mlp\.experts)\.local_experts\.(\d{1,9})\.(linear_fc[12]\.(?:weight|bias))")


class Source(NamedTuple):
    """A tensor, or a layer of one.

    Attributes:
        meta: the tensor of the checkpoint.
        at: the index of that layer, and expert, in its first dimensions.
    """

    meta: TensorMeta
    at: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        """Its shape without those dimensions."""
        return self.meta.shape[len(self.at) :]

    def box(self, box: Box) -> Box:
        """A box of it, as a box of the tensor of the checkpoint."""
        return Box((*self.at, *box.origin), (*(1 for _ in self.at), *box.shape))


class Parameter(msgspec.Struct):
    """A parameter or buffer of the model.

    Attributes:
        name: as the model calls it.
        model: its own tensor.
        state: its optimizer state, by slot.
        group: what param groups of the checkpoint call it.
    """

    name: str
    model: Source
    state: dict[str, Source]
    group: str


def separate(logical: Logical, spec: str | None = None) -> list[Parameter]:
    """The parameters and buffers of a checkpoint, one for each layer and expert.

    Args:
        logical: the checkpoint.
        spec: one of `SPECS`: how norms are called; None leaves them.

    Raises:
        LayoutError: optimizer state has another shape than its parameter, or no parameter; or two are called the same.
        InvalidInput: there is no model.
    """
    known, _ = parameters(logical)
    made: dict[str, Parameter] = {}
    if not any(parameter.model for parameter in known.values()):
        raise InvalidInput(f"{logical.origin} has no model in it")
    for key, parameter in known.items():
        if parameter.model is None:
            raise LayoutError(f"{logical.origin} has optimizer state of {key}, and no such tensor of the model")
        odd = [m for m in parameter.state.values() if m.shape != parameter.model.shape and prod(m.shape) != 1]
        if odd:
            raise LayoutError(
                f"{logical.origin}: {odd[0].name} {list(odd[0].shape)} has another shape than its parameter"
            )
        for name, index in _members(key, parameter.model.shape):
            called = spelled(name, spec)
            state = {
                slot: Source(meta, index if meta.shape == parameter.model.shape else ())
                for slot, meta in parameter.state.items()
            }
            if called in made:
                raise LayoutError(f"{logical.origin} has two tensors that are called {called}")
            made[called] = Parameter(called, Source(parameter.model, index), state, key)
    return list(made.values())


def stacked(found: Iterable[Parameter]) -> dict[str, list[tuple[tuple[int, ...], Parameter]]]:
    """The keys of `torch_dist`, and the parameters that each is made of with their places in it.

    Layers are stacked if all are alike, as Megatron-Core does it.
    """
    named: dict[str, Parameter] = {}
    layers: dict[str, dict[int, dict[str, Parameter]]] = {}
    for parameter in found:
        layer = _LAYER.fullmatch(parameter.name)
        if layer is None:
            named[parameter.name] = parameter
        else:
            layers.setdefault(layer[1], {}).setdefault(int(layer[2]), {})[layer[3]] = parameter
    made: dict[str, list[tuple[tuple[int, ...], Parameter]]] = {name: [((), p)] for name, p in named.items()}
    for stem, by_layer in layers.items():
        alike = len({tuple((n, p.model.shape) for n, p in sorted(one.items())) for one in by_layer.values()}) == 1
        alike = alike and by_layer.keys() == set(range(len(by_layer)))
        for number, one in sorted(by_layer.items()):
            for inner, parameter in one.items():
                name, index = _with_experts(_fused(inner, one))
                if alike:
                    made.setdefault(f"{stem}.{name}", []).append(((number, *index), parameter))
                else:
                    made.setdefault(f"{stem}.{number}.{name}", []).append((index, parameter))
    return {name: sorted(members, key=lambda member: member[0]) for name, members in made.items()}


def _members(key: str, shape: Shape) -> Iterable[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [(key, ())]
    match = STACKED.match(key)
    if match is not None and shape:
        found = [(f"{match[1]}.{i}.{key[match.end() :]}", (i,)) for i in range(shape[0])]
    for name, index in found:
        expert = _STACKED_EXPERT.fullmatch(name)
        if expert is None or len(shape) <= len(index):
            yield name, index
            continue
        for e in range(shape[len(index)]):
            yield f"{expert[1]}.local_experts.{e}.{expert[2]}", (*index, e)


def spelled(name: str, spec: str | None) -> str:
    """A name of a norm as one of `SPECS` has it; None leaves it."""
    layer = _LAYER.fullmatch(name)
    if layer is None or spec is None:
        return name
    for fused, own in LOCAL.items():
        old, new = (fused, own) if spec == "local" else (own, fused)
        if layer[3].startswith(old):
            return f"{layer[1]}.{layer[2]}.{new}{layer[3].removeprefix(old)}"
    return name


def _fused(inner: str, layer: Mapping[str, Parameter]) -> str:
    """The key of a norm: that of the linear layer after it, if there is one."""
    for fused, own in LOCAL.items():
        if inner.startswith(own) and fused.replace("layer_norm_", "weight") in layer:
            return fused + inner.removeprefix(own)
    return inner


def _with_experts(inner: str) -> tuple[str, tuple[int, ...]]:
    expert = _EXPERT.fullmatch(inner)
    return (inner, ()) if expert is None else (f"{expert[1]}.experts.{expert[3]}", (int(expert[2]),))
