"""The plain values of a DeepSpeed checkpoint: parameter groups, schedule, counters, what the job itself put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptsvc.format.document import join
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box
from ckptsvc.interop.deepspeed.files import ModelState, plain
from ckptsvc.interop.logical import MODEL, STATE, Foreign, Note
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.types import TensorMeta

Groups = Sequence[tuple[dict[str, Any], Sequence[str | int]]]
"""Hyper-parameters of each group and its parameters: names, or numbers where nothing names them."""

CARRIED = ("ds_version", "ds_config", "global_steps", "global_samples", "skipped_steps", "dp_world_size",
           "mp_world_size", "lr_scheduler", "data_sampler", "random_ltd", "universal_checkpoint_info",
           "buffer_names")  # fmt: skip
"""What DeepSpeed writes into model states and is kept as it is, under "deepspeed" in the document."""

KNOWN = frozenset((
    *CARRIED, "module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
    "sparse_tensor_module_names", "checkpoint_parallel_dimensions", "num_experts", "ds_autoep_layers",
))  # fmt: skip
"""What DeepSpeed writes into model states; everything else there is the job's own, its client state."""


def fill_document(
    foreign: Foreign,
    models: Sequence[ModelState],
    groups: Groups | None,
    facts: Mapping[str, Any],
    state: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Make the document, and find the step; tensors in the client state become tensors of the checkpoint.

    Args:
        foreign: whose document.
        models: the model states of all model-parallel ranks.
        groups: the optimizer's groups; None if it has none that can be named.
        facts: further entries below "deepspeed".
        state: references to the optimizer's state where it is numbered.
    """
    left_out: list[str] = []

    def keep(path: str, tensor: StoredTensor) -> TensorRef:
        meta = TensorMeta(path, tensor.dtype, tensor.shape)
        foreign.add(meta, Box.full(tensor.shape), tensor.where, tensor.block())
        return TensorRef(path)

    root = models[0].pickled.root
    own = {
        **{name: root[name] for name in CARRIED if root.get(name) is not None},
        "buffer_names": list(dict.fromkeys(name for model in models for name in model.buffers)),
        **facts,
        "client_state": {name: value for name, value in root.items() if name not in KNOWN},
    }
    foreign.step = models[0].pickled.number("global_steps", 0)
    foreign.plain = {"deepspeed": plain(own, "deepspeed", keep, left_out)}
    if groups is not None:
        made = [{**plain(v, "optimizer/param_groups", keep, left_out), "params": list(own)} for v, own in groups]
        foreign.plain["optimizer"] = {"state": state or {}, "param_groups": made}
    lose(foreign, "values that are neither plain nor tensors", left_out)


def lose(foreign: Foreign, what: str, names: Sequence[str]) -> None:
    """Note what is not carried over, if there is any."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        foreign.notes.append(Note("lost", f"{what}: {', '.join(names[:5])}{more}"))


def zero_config(model: ModelState) -> Mapping[str, Any]:
    """The part of DeepSpeed's configuration that is about ZeRO; empty if it was not kept."""
    zero = model.pickled.mapping("ds_config", optional=True).get("zero_optimization")
    return zero if isinstance(zero, Mapping) else {}


class MergedGroups:
    """The parameter groups of all stages.

    Groups of two stages are one if their hyper-parameters are: a stage without parameters of a group does not have
    the group, so that its number says nothing.
    """

    def __init__(self) -> None:
        self._merged: dict[tuple[str, int], tuple[dict[str, Any], dict[str | int, None]]] = {}

    def add(self, groups: Groups) -> None:
        """Those of one more stage."""
        seen: dict[str, int] = {}
        for values, names in groups:
            said = repr(sorted(values.items()))
            key = (said, seen.setdefault(said, 0))
            seen[said] += 1
            self._merged.setdefault(key, (values, {}))[1].update(dict.fromkeys(names))

    @property
    def merged(self) -> Groups:
        """Hyper-parameters and names of the parameters."""
        return [(values, list(names)) for values, names in self._merged.values()]


def model_name(name: str) -> str:
    """The canonical name of a tensor of the model."""
    return join(MODEL.rstrip("/"), name)


def state_name(name: str, slot: str) -> str:
    """The canonical name of a tensor of the optimizer's state of a parameter."""
    return join(STATE.rstrip("/"), name, slot)
