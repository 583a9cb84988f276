"""Param groups, steps and arguments as Megatron's checkpoints have them, from those of any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckptsvc.errors import InvalidInput
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box
from ckptsvc.interop.logical import Logical, Note
from ckptsvc.interop.megatron.layers import Parameter
from ckptsvc.interop.megatron.names import Group, module_order, shared_out
from ckptsvc.interop.naming.families import variables
from ckptsvc.interop.torch_format.write import Call, Global, Inline, torch_dtype
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import DTYPES

MARKS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""By these Megatron-Core finds the group of a checkpoint that one of its own is."""

PARALLEL = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "expert_tp",
}

_APART = ("params", "param_names", "step")
_KEPT = ("optimizer", "megatron", "step", "global_step", "iteration")


CONFIG = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "ffn": "ffn_hidden_size",
    "experts": "num_moe_experts",
    "vocab": "vocab_size",
}
"""Sizes of a model as Megatron-Core calls them, by the variables of rules and name maps."""


class Groups:
    """The param groups of a checkpoint, made Megatron's.

    Attributes:
        groups: with Megatron's marks, without parameters.
        members: the parameters of each, in the order of the model.
        step: the step of all parameters; None if there is no optimizer state.
        notes: what was added, and what Megatron will do otherwise.
    """

    def __init__(self, logical: Logical, found: Sequence[Parameter]) -> None:
        """Raises InvalidInput if parameters have different steps, or there is state and there are no groups."""
        self.notes: list[Note] = []
        optimizer = logical.document().get("optimizer")
        listed = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
        given = [g for g in listed if isinstance(g, Mapping)] if isinstance(listed, list) else []
        trained = sorted((p for p in found if p.state), key=lambda p: module_order(p.name))
        if trained and not given:
            raise InvalidInput(
                f"{logical.origin} has optimizer state and no param groups, which Megatron cannot do without",
                hint="leave the optimizer out (--only 'model.*')",
            )
        self.step = _step(logical, trained)
        self.groups = [_marked(group) for group in given]
        if trained and any(mark not in group for group in given for mark in MARKS):
            self.notes.append(
                Note(
                    "warning", "the param groups have no marks of Megatron-Core: they got wd_mult by their weight decay"
                )
            )
        if len({repr([group[mark] for mark in MARKS]) for group in self.groups}) < len(self.groups):
            self.notes.append(
                Note("warning", "some param groups are alike to Megatron-Core, which takes the last of them")
            )
        self.members = self._shared_out(given, trained)

    def _shared_out(self, given: Sequence[Mapping[str, Any]], trained: Sequence[Parameter]) -> list[list[str]]:
        of = {
            name: i
            for i, group in enumerate(given)
            if isinstance(group.get("params"), list)
            for name in group["params"]
            if isinstance(name, str)
        }
        mine: list[list[str]] = [[] for _ in given]
        missing = [p.name for p in trained if p.group not in of]
        for parameter in trained:
            if parameter.group in of:
                mine[of[parameter.group]].append(parameter.name)
        rules = shared_out(self.groups, {p.name: len(p.model.shape) for p in trained})
        if missing and rules is None:
            raise InvalidInput(
                f"no param group has {missing[0]}, and {len(missing) - 1} more, which have optimizer state"
            )
        if rules is not None and rules != mine:
            if sum(map(len, mine)):
                self.notes.append(
                    Note("warning", "by Megatron-Core's rules some parameters are in another param group than here")
                )
            return rules if missing else mine
        return mine


def _marked(group: Mapping[str, Any]) -> Group:
    decays = group.get("weight_decay") not in (0, 0.0)
    marks = {
        "wd_mult": 1.0 if decays else 0.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False,
        "default_config": True, "max_lr": group.get("lr"), "min_lr": None,
    }  # fmt: skip
    kept = {key: value for key, value in group.items() if key not in _APART and not isinstance(value, TensorRef)}
    return {**kept, **{key: value for key, value in marks.items() if key not in kept}}


def _step(logical: Logical, trained: Sequence[Parameter]) -> float | None:
    """The step that all parameters have."""
    metas = {p.state["step"].meta for p in trained if "step" in p.state}
    if not metas:
        return float(logical.step) if trained else None
    wants = [Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape)) for meta in sorted(metas)]
    arrays = read_arrays(logical, logical.source, wants)
    steps = {float(np.frombuffer(array.tobytes(), want.dtype)[0]) for array, want in zip(arrays, wants, strict=True)}
    if len(steps) > 1:
        raise InvalidInput(
            f"{logical.origin}: parameters have different steps ({', '.join(map(str, sorted(steps)[:5]))}), and"
            " Megatron keeps one for all"
        )
    return steps.pop()


def step_tensor(step: float) -> Inline:
    """A step as torch's optimizers keep it."""
    return Inline("float32", (), np.float32(step).tobytes())


def rest_of(logical: Logical, degrees: Mapping[str, int], notes: list[Note]) -> dict[str, Any]:
    """What Megatron keeps beside model and optimizer: iteration, arguments, the schedule of learning rates.

    Where there are no arguments, the sizes that the checkpoint says are kept as `model_config`, for who converts it on.

    Args:
        logical: the checkpoint.
        degrees: of parallelism, by their short names; arguments that say them are set to these.
        notes: what has no place is added.
    """
    document = logical.document()
    own = document.get("megatron")
    rest = {k: v for k, v in own.items() if k not in {"optimizer", "state"}} if isinstance(own, Mapping) else {}
    args = rest.pop("args", None)
    made: dict[str, Any] = {"checkpoint_version": 3.0, **_storable(rest, notes, "megatron"), "iteration": logical.step}
    if isinstance(args, Mapping):
        changed = {name: degrees[short] for name, short in PARALLEL.items() if name in args and short in degrees}
        state = {str(k): _typed(v) for k, v in _storable(args, notes, "megatron/args").items()} | changed
        made = {"args": Call(Global("argparse", "Namespace"), (), state), **made}
    elif "model_config" not in made:  # not as arguments: Megatron-LM compares all that it knows if there are any
        sizes = variables(document, {})
        made["model_config"] = {name: sizes[short] for short, name in CONFIG.items() if short in sizes}
    others = sorted(str(key) for key in document if key not in _KEPT)
    if others:
        notes.append(Note("lost", f"plain values that Megatron has no place for: {', '.join(others[:10])}"))
    return made


def _typed(value: Any) -> Any:
    """An element type that is text ("torch.bfloat16") as torch's own."""
    name = value.removeprefix("torch.") if isinstance(value, str) and value.startswith("torch.") else ""
    return torch_dtype(name) if name in DTYPES else value


def _storable(value: Any, notes: list[Note], path: str) -> Any:
    """A plain value as a file of torch.save can have it; tensors in it are left out."""
    if isinstance(value, Mapping):
        return {k: _storable(v, notes, f"{path}/{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_storable(item, notes, f"{path}/{i}") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    notes.append(Note("lost", f"{path}: {type(value).__name__} has no place in a file of Megatron"))
    return None
