"""What a checkpoint of any format gives to a file of DeepSpeed: groups, state by parameter, plain values."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ckptsvc.errors import InvalidInput
from ckptsvc.format.document import split
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.deepspeed.document import model_name, state_name
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Logical, Note
from ckptsvc.interop.torch_format.write import Call, Global, Slot

VERSION = "0.19.8"
"""The version of DeepSpeed whose formats are written; its loader wants one."""

MAX_FILES = 1 << 16
"""Most files of one kind."""


class Contents:
    """A checkpoint as DeepSpeed sees it.

    Attributes:
        logical: the checkpoint.
        own: what its document has of DeepSpeed; empty if it comes from elsewhere.
        groups: the parameter groups, "params" being names.
        slots: parameter -> names of its optimizer state.
        names: all tensors.
        parameters: names of the model's tensors, without "model/".
        trainable: those of them that the optimizer has.
        notes: what is lost.
    """

    def __init__(self, logical: Logical) -> None:
        self.logical = logical
        document = logical.document(0)
        own, optimizer = document.get("deepspeed"), document.get("optimizer")
        self.own: dict[str, Any] = own if isinstance(own, dict) else {}
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        self.groups: list[dict[str, Any]] = [dict(group) for group in groups or ()]
        self.slots: dict[str, list[str]] = {}
        self.names = set(logical.names())
        self.notes: list[Note] = []
        for name in logical.names():
            if name.startswith(STATE) and len(parts := split(name)) == 4:
                self.slots.setdefault(parts[2], []).append(parts[3])
        self.parameters = [split(name)[1] for name in logical.names() if name.startswith(MODEL)]
        self.trainable = {name for group in self.groups for name in group["params"]} | set(self.slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self.logical.meta(model_name(name)).shape

    def master(self, name: str) -> str:
        """The tensor that has a parameter in its best precision."""
        return state_name(name, MASTER) if MASTER in self.slots.get(name, ()) else model_name(name)

    def slot(self, source: str, dtype: str = "", *, flat: bool = False) -> Slot:
        """A tensor as a whole in a file, in its own element type or another, flattened or not."""
        meta = self.logical.meta(source)
        size = math.prod(meta.shape)
        region = FlatRange(0, size) if flat else Box.full(meta.shape)
        return Slot(source, region, dtype or meta.dtype, (size,) if flat else meta.shape)

    def plain(self, value: Any) -> Any:
        """A value of the document as torch.load(weights_only=True) takes it; what it does not take becomes None."""
        if isinstance(value, TensorRef):
            return self.slot(value.name) if value.name in self.names else None
        if isinstance(value, Mapping):
            return {key: self.plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self.plain(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if value is None or type(value) in (bool, int, float, str):
            return value
        self.notes.append(Note("lost", f"a value of type {type(value).__name__} in the document"))
        return None

    def hyper(self) -> list[dict[str, Any]]:
        """The hyper-parameters of the groups, without their parameters."""
        return [{key: self.plain(v) for key, v in group.items() if key != "params"} for group in self.groups]

    @property
    def scaler(self) -> dict[str, Any]:
        """The attributes of the loss scaler, where it is known."""
        scaler = self.own.get("loss_scaler")
        return scaler if isinstance(scaler, dict) else {}

    def loss_scaler(self) -> Call:
        """The loss scaler as an object."""
        kind = "DynamicLossScaler" if self.scaler.get("class") == "DynamicLossScaler" else "LossScaler"
        state = {key: value for key, value in self.scaler.items() if key != "class"}
        args = (1.0,) if kind == "LossScaler" else ()
        return Call(Global("deepspeed.runtime.fp16.loss_scaler", kind), args, state or None)

    def aliases(self) -> dict[str, str]:
        """Further names of the model's tensors."""
        return {split(a)[1]: split(n)[1] for a, n in self.logical.aliases.items() if a.startswith(MODEL)}

    def config(self, stage: int | None) -> dict[str, Any]:
        """DeepSpeed's configuration, true of what is written: its stage, and nothing in round-robin order."""
        found = self.plain(self.own.get("ds_config"))
        config = found if isinstance(found, dict) else {}
        known = config.get("zero_optimization")
        zero = {**(known if isinstance(known, dict) else {}), "round_robin_gradients": False}
        return {**config, "zero_optimization": zero if stage is None else {**zero, "stage": stage}}

    def model_state(
        self, module: Mapping[str, Any], groups: Sequence[Sequence[str]], dp: int, stage: int | None
    ) -> dict[str, Any]:
        """The object of a file of model states.

        Args:
            module: the state dict in it.
            groups: the parameters of each flat group, in order.
            dp: number of data-parallel ranks.
            stage: of ZeRO, if it is one.
        """
        own, client = self.own, self.own.get("client_state")
        buffers = set(own.get("buffer_names") or ())
        return {
            **(self.plain(client) if isinstance(client, dict) else {}),
            "module": OrderedDict(module),
            "buffer_names": [name for name in module if name in buffers],
            "optimizer": None,
            "param_shapes": [OrderedDict((n, size_of(self.shape(n))) for n in names) for names in groups],
            "frozen_param_shapes": None,
            "shared_params": self.aliases(),
            "frozen_param_fragments": None,
            **{key: self.plain(own.get(key)) for key in ("lr_scheduler", "data_sampler", "random_ltd")},
            "ds_config": self.config(stage),
            "skipped_steps": int(own.get("skipped_steps") or 0),
            "global_steps": self.logical.step,
            "global_samples": int(own.get("global_samples") or 0),
            "dp_world_size": dp,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_version": VERSION,
        }

    def warn_of_scheduler(self) -> None:
        """Note where there is no state for a scheduler to load."""
        if not self.own.get("lr_scheduler"):
            self.notes.append(Note("warning", "no state of a learning rate scheduler: load_lr_scheduler_states=False"))


def size_of(shape: Sequence[int]) -> Call:
    """A torch.Size."""
    return Call(Global("torch", "Size"), (tuple(shape),))


def stage_of(number: int) -> Call:
    """A stage as DeepSpeed's enumeration has it."""
    return Call(Global("deepspeed.runtime.zero.config", "ZeroStageEnum"), (number,))


def count_of(options: Mapping[str, str], option: str) -> int:
    """An option that is a number of ranks, 1 if it is not given."""
    value = options.get(option, "1")
    if not value.isdecimal() or not 1 <= int(value) <= MAX_FILES:
        raise InvalidInput(f"{option}={value}: it is a number of ranks")
    return int(value)


def tag_of(options: Mapping[str, str], default: str) -> str:
    """The name of the directory."""
    tag = options.get("tag") or default
    if "/" in tag or tag.startswith("."):
        raise InvalidInput(f"tag={tag}: it is the name of a directory")
    return tag
