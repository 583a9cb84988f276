"""What Megatron-Core says by conventions, not in its files: the order of parameters, who is in which param group.

Source: Megatron-Core 0.16 (`optimizer._get_param_groups`, `GPTModel`, `TransformerLayer`); the order is that in which a
model registers its modules, which checkpoints of 0.16 and 0.13 confirm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ckptsvc.interop.logical import MODEL

Group = dict[str, Any]

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

STACKED = re.compile(r"((?:\w+\.)*layers)\.(?!\d)")
"""A name of a tensor that is all layers, stacked in front."""

_EXPERTS = re.compile(r"\.experts\.(?:experts|local_experts|linear_fc)")
_LAYER = re.compile(r"(?:\w+\.)*?layers\.(\d+)\.(.*)")
_ORDER = (
    "embedding.word_embeddings.", "embedding.position_embeddings.", "embedding.", "decoder.layers.",
    "decoder.final_layernorm.", "decoder.", "mtp.", "output_layer.",
)  # fmt: skip
_MODULES = (
    "input_layernorm.", "self_attention.linear_proj.", "self_attention.linear_qkv.", "self_attention.linear_q_proj.",
    "self_attention.linear_q_down_proj.", "self_attention.linear_q_up_proj.", "self_attention.linear_kv_down_proj.",
    "self_attention.linear_kv_up_proj.", "self_attention.q_layernorm.", "self_attention.k_layernorm.",
    "self_attention.kv_layernorm.", "pre_mlp_layernorm.", "mlp.router.", "mlp.experts.", "mlp.shared_experts.",
    "mlp.linear_fc1.", "mlp.linear_fc2.",
)  # fmt: skip
_KINDS = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")


def module_order(name: str) -> tuple[tuple[int | str, ...], ...]:
    """A key that sorts names of parameters as `GPTModel.named_parameters()` has them."""
    layer = _LAYER.fullmatch(name)
    top = next((i for i, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))
    inner = layer[2] if layer else name
    module = next((i for i, start in enumerate(_MODULES) if inner.startswith(start)), len(_MODULES))
    numbers = tuple(int(part) for part in re.findall(r"\d+", inner))
    last = re.sub(r"\d+$", "", inner.rsplit(".", 1)[-1])
    kind = _KINDS.index(last) if last in _KINDS else len(_KINDS)
    stem = re.sub(r"\d+", "", inner.rsplit(".", 1)[0])
    return (top,), (int(layer[1]) if layer else -1,), (module,), _experts(inner, numbers), (stem,), (kind,), numbers


def _experts(inner: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Experts with modules of their own come one after another; grouped ones are parameters of one module."""
    return numbers[:1] if "local_experts" in inner else ()


def is_expert(name: str) -> bool:
    """Whether it is a parameter of an expert that expert parallelism divides."""
    return _EXPERTS.search(name) is not None


def is_decayed(name: str, ndim: int) -> bool:
    """Whether weight decay applies to a parameter, by Megatron-Core's own rule.

    Args:
        name: its name.
        ndim: its dimensions as the model has it, without those of stacked layers and experts.
    """
    return not name.endswith(".bias") and ndim > 1


def unstacked(name: str, ndim: int) -> int:
    """The dimensions that a parameter has in the model, where a checkpoint has `ndim`."""
    experts = ".experts.experts." in name and not re.search(r"\.experts\.experts\.(?:\w+\.)*\d", name)
    return ndim - (STACKED.match(name) is not None) - experts


def of_group(group: Mapping[str, Any], name: str, ndim: int, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a parameter is in a group, by the marks that Megatron-Core puts on groups.

    Args:
        group: one of `groups`.
        name: of the parameter.
        ndim: see `is_decayed`.
        groups: all of them.
    """
    if len(groups) == 1:
        return True
    for key, mine in (
        ("is_expert_parallel", is_expert(name)),
        ("is_decoupled_lr", name.startswith(("embedding.word_embeddings.", "output_layer."))),
    ):
        if any(other.get(key) for other in groups) and bool(group.get(key)) != mine:
            return False
    decays = {_decay(other) for other in groups}
    return len(decays) == 1 or (_decay(group) != 0) == is_decayed(name, ndim)


def shared_out(groups: Sequence[Mapping[str, Any]], ndims: Mapping[str, int]) -> list[list[str]] | None:
    """The parameters of each group, in the order of `ndims`; None if the marks of the groups do not tell.

    Args:
        groups: without their parameters.
        ndims: for every parameter its dimensions (see `is_decayed`).
    """
    if len(groups) > 1 and any(_mark(group) is None or group.get("lr_mult", 1.0) != 1.0 for group in groups):
        return None
    made: list[list[str]] = [[] for _ in groups]
    for name, ndim in ndims.items():
        mine = [i for i, group in enumerate(groups) if of_group(group, name, ndim, groups)]
        if len(mine) != 1:
            return None
        made[mine[0]].append(name)
    return made


def known_groups(optimizers: Any) -> list[Group]:
    """The groups in the state of a Megatron optimizer, of all optimizers where several are chained."""
    if isinstance(optimizers, list | tuple):
        return [group for one in optimizers for group in known_groups(one)]
    if not isinstance(optimizers, Mapping):
        return []
    groups = optimizers.get("param_groups")
    if isinstance(groups, list):
        return [dict(group) for group in groups if isinstance(group, Mapping)]
    inner = optimizers.get("optimizer", optimizers.get("optimizer_state_dict"))
    if inner is not None:
        return known_groups(inner)
    return [group for key in sorted(k for k in optimizers if type(k) is int) for group in known_groups(optimizers[key])]


def tied(names: Collection[str]) -> dict[str, str]:
    """The output layer as another canonical name of the embedding, if these are of a GPT without one of its own."""
    whole = EMBEDDING in names and "decoder.final_layernorm.weight" in names
    return {MODEL + OUTPUT: MODEL + EMBEDDING} if whole and OUTPUT not in names else {}


def _decay(group: Mapping[str, Any]) -> float:
    mult = group.get("wd_mult", group.get("pre_wd_mult"))
    return float(mult) if type(mult) in (int, float) else -1.0


def _mark(group: Mapping[str, Any]) -> float | None:
    decay = _decay(group)
    return decay if decay in (0.0, 1.0) else None
