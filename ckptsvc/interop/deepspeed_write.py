"""Universal checkpoints that DeepSpeed loads (`"checkpoint": {"load_universal": true}`).

The format is in `deepspeed_universal`. What DeepSpeed 0.19.8 reads of it, `runtime/base_optimizer.py`,
`runtime/zero/stage3.py`, `checkpoint/universal_checkpoint.py`:
- stages 1 and 2: mp_rank_*_model_states.pt, zero/<name>/*.pt as dicts, `param_groups` by their order;
- stage 3: zero_pp_rank_0_mp_rank_*_model_states.pt, zero/<name>/{fp32,exp_avg,exp_avg_sq}.pt, dicts or flat tensors,
  the step of `optimizer_state_dict` and of its groups the first.

Each step is a tensor of its own, each parameter is fp32 in full precision, buffers and frozen parameters are there in
their own element types.

Options:
    stage      "any": loaded by stages 1, 2 and 3 (default). "1", "2", "3": as DeepSpeed's own converter writes it.
    dp, tp, pp the ranks of the job that is to load it: how many files of model states there are. Default 1; recent
               versions of DeepSpeed ask for one only.
    tag        the directory; default global_step<N>_universal.
    tp_dims    PATTERN:DIM,...: the dimension in which tensor-parallel ranks divide tensors; "-" replicated. Default:
               what the checkpoint says (`universal_checkpoint_info`), else 0.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptsvc.errors import InvalidInput
from ckptsvc.format.document import split
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.deepspeed import check_options
from ckptsvc.interop.deepspeed_cut import parse_dims
from ckptsvc.interop.deepspeed_document import model_name, state_name
from ckptsvc.interop.deepspeed_universal import LATEST, WRITER
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Logical, Note
from ckptsvc.interop.outputs import Output, OutputFile, Small
from ckptsvc.interop.torch_write import Call, Global, Slot, torch_output

OPTIONS = ("stage", "dp", "tp", "pp", "tag", "tp_dims")

VERSION = "0.19.8"
"""The version of DeepSpeed whose format this is; its loader wants one."""

MAX_FILES = 1 << 16
"""Most files of model states."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """Plan a universal checkpoint; see the module for the options.

    Raises:
        InvalidInput: an option is wrong, or stage 3 is wanted and there is no Adam state to load.
    """
    check_options(options, OPTIONS)
    if options.get("stage", "any") not in ("any", "1", "2", "3"):
        raise InvalidInput(f"stage={options['stage']}: it is any, 1, 2 or 3")
    return _Writer(logical, options).output()


class _Writer:
    """Plans the files of one universal checkpoint."""

    def __init__(self, logical: Logical, options: Mapping[str, str]) -> None:
        self._logical, self._options = logical, options
        self._document = logical.document(0)
        framework = self._document.get("deepspeed")
        self._own: dict[str, Any] = framework if isinstance(framework, dict) else {}
        info = self._own.get("universal_checkpoint_info")
        self._info: dict[str, Any] = info if isinstance(info, dict) else {}
        self._stage = options.get("stage", "any")
        self._tag = options.get("tag") or f"global_step{logical.step}_universal"
        if "/" in self._tag or self._tag.startswith("."):
            raise InvalidInput(f"tag={self._tag}: it is the name of a directory")
        self._dims = list(parse_dims(options.get("tp_dims", "")))
        self._notes: list[Note] = []
        self._groups = self._param_groups()
        self._slots = self._slots_by_name()
        self._names = set(logical.names())
        self._trainable = {name for group in self._groups for name in group["params"]} | set(self._slots)

    def output(self) -> Output:
        names = [split(name)[1] for name in self._logical.names() if name.startswith(MODEL)]
        files = [file for name in names for file in self._parameter(name)]
        files.append(self._file("zero/optimizer_state.pt", self._optimizer_state()))
        root = self._model_state(names)
        files.extend(self._file(key, root) for key in self._model_files())
        self._say()
        return Output(
            files,
            lambda _: [Small(LATEST, self._tag.encode())],
            self._notes,
            {"stage": self._stage, "tag": self._tag, "files": len(files)},
        )

    # ---- tensors ------------------------------------------------------------------------------------------------

    def _slots_by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._logical.names():
            if name.startswith(STATE):
                parts = split(name)
                if len(parts) == 4:
                    found.setdefault(parts[2], []).append(parts[3])
        return found

    def _parameter(self, name: str) -> Iterator[OutputFile]:
        slots = self._slots.get(name, [])
        shape = self._logical.meta(model_name(name)).shape
        master = state_name(name, MASTER) if MASTER in slots else model_name(name)
        dtype = "float32" if name in self._trainable else self._logical.meta(master).dtype
        yield self._tensor(name, "fp32", master, dtype)
        for slot in slots:
            source = state_name(name, slot)
            if slot == "step" and self._stage != "3":
                yield self._file(f"zero/{name}/step.pt", self._slot(source, "float32"))
            elif slot not in ("step", MASTER):
                if self._logical.meta(source).shape != shape or "/" in slot:
                    self._notes.append(Note("lost", f"{source}: DeepSpeed keeps no state of another shape"))
                else:
                    yield self._tensor(name, slot, source, "float32")

    def _tensor(self, name: str, slot: str, source: str, dtype: str) -> OutputFile:
        key = f"zero/{name}/{slot}.pt"
        if self._stage == "3":
            return self._file(key, self._slot(source, dtype, flat=True))
        return self._file(key, {**self._cut(name), "param": self._slot(source, dtype)})

    def _slot(self, source: str, dtype: str, *, flat: bool = False) -> Slot:
        shape = self._logical.meta(source).shape
        size = math.prod(shape)
        return Slot(source, FlatRange(0, size) if flat else Box.full(shape), dtype, (size,) if flat else shape)

    def _cut(self, name: str) -> dict[str, Any]:
        """How tensor-parallel ranks are to divide a parameter."""
        for pattern, dim in self._dims:
            if fnmatch.fnmatchcase(name, pattern):
                return {} if dim is None else {"cat_dim": dim}
        says: dict[str, Any] = {}
        if self._matches(name, "vocabulary_parameter_patterns"):
            says["vocab_tensor"] = True
        if self._matches(name, "tp_replicated_parameter_patterns", "parameter_to_average_patterns"):
            return says
        if self._matches(name, "parameter_with_2_sub_params_cat_dim_0"):
            return {**says, "cat_dim": 0, "param_n_sub_params": 2}
        for entry in self._info.get("parameter_with_sub_params") or ():
            patterns = entry.get("patterns", ())
            if any(re.match(pattern, name) for pattern in patterns):
                made = Global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")
                spec = tuple(tuple(n) if isinstance(n, list) else n for n in entry["shape"])
                return {**says, "sub_param_shape": Call(made, (list(patterns), spec, entry["partition_dim"]))}
        return {**says, "cat_dim": 1 if self._matches(name, "parameter_with_row_parallelism_patterns") else 0}

    def _matches(self, name: str, *keys: str) -> bool:
        return any(re.match(pattern, name) for key in keys for pattern in self._info.get(key) or ())

    # ---- plain values -------------------------------------------------------------------------------------------

    def _param_groups(self) -> list[dict[str, Any]]:
        optimizer = self._document.get("optimizer")
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        return [dict(group) for group in groups or ()]

    def _optimizer_state(self) -> dict[str, Any]:
        groups = [{**self._plain(group), "params": [i]} for i, group in enumerate(self._groups)]
        state: dict[str, Any] = {
            "ds_version": VERSION,
            "zero_stage": 3 if self._stage == "3" else 2 if self._stage == "2" else 1,
            "dynamic_loss_scale": bool(self._scaler().get("dynamic")),
            "overflow": False,
            "param_groups": groups,
        }
        if self._scaler():
            state["loss_scaler"] = self._loss_scaler()
        if self._stage in ("any", "3"):
            state["optimizer_state_dict"] = {"state": self._steps(), "param_groups": groups}
        return state

    def _steps(self) -> dict[int, dict[str, Any]]:
        """What stage 3 reads of the state: the step of the first group."""
        found = {}
        for number, group in enumerate(self._groups):
            names = [state_name(name, "step") for name in group["params"]]
            if step := next((name for name in names if name in self._names), None):
                found[number] = {"step": self._slot(step, "float32")}
        adam = all(
            set(_MOMENTS) <= set(self._slots.get(name, ())) for group in self._groups for name in group["params"]
        )
        if self._stage == "3" and (0 not in found or not adam):
            raise InvalidInput(
                f"{self._logical.origin} has no complete state of Adam, without which stage 3 loads nothing"
            )
        return found

    def _scaler(self) -> dict[str, Any]:
        scaler = self._own.get("loss_scaler")
        return scaler if isinstance(scaler, dict) else {}

    def _loss_scaler(self) -> Call:
        kind = "DynamicLossScaler" if self._scaler().get("class") == "DynamicLossScaler" else "LossScaler"
        state = {key: value for key, value in self._scaler().items() if key != "class"}
        args = (1.0,) if kind == "LossScaler" else ()
        return Call(Global("deepspeed.runtime.fp16.loss_scaler", kind), args, state)

    def _model_state(self, names: Sequence[str]) -> dict[str, Any]:
        rest = [name for name in names if name not in self._trainable]
        own = self._own
        buffers = set(own.get("buffer_names") or ())
        kept = ("lr_scheduler", "data_sampler", "random_ltd", "ds_config")
        client = own.get("client_state")
        shapes = [
            OrderedDict((n, self._size(n)) for n in group["params"] if model_name(n) in self._names)
            for group in self._groups
        ]
        return {
            **(self._plain(client) if isinstance(client, dict) else {}),
            "module": OrderedDict(
                (n, self._slot(model_name(n), self._logical.meta(model_name(n)).dtype)) for n in rest
            ),
            "buffer_names": [name for name in rest if name in buffers],
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": None,
            "shared_params": self._aliases(),
            "frozen_param_fragments": None,
            **{key: self._plain(own.get(key)) for key in kept},
            "skipped_steps": int(own.get("skipped_steps") or 0),
            "global_steps": self._logical.step,
            "global_samples": int(own.get("global_samples") or 0),
            "dp_world_size": self._count("dp"),
            "mp_world_size": self._count("tp") * self._count("pp"),
            "checkpoint_parallel_dimensions": {"pp_degree": self._count("pp"), "tp_degree": self._count("tp")},
            "ds_version": VERSION,
            "universal_checkpoint_info": {
                "universal_checkpoint_version": 0.4,
                **self._plain(self._info),
                WRITER: "ckptsvc",
            },
        }

    def _aliases(self) -> dict[str, str]:
        return {split(a)[1]: split(n)[1] for a, n in self._logical.aliases.items() if a.startswith(MODEL)}

    def _size(self, name: str) -> Call:
        return Call(Global("torch", "Size"), (tuple(self._logical.meta(model_name(name)).shape),))

    def _plain(self, value: Any) -> Any:
        """A value of the document as torch.load(weights_only=True) takes it; what it does not take becomes None."""
        if isinstance(value, TensorRef):
            return self._slot(value.name, self._logical.meta(value.name).dtype) if value.name in self._names else None
        if isinstance(value, Mapping):
            return {key: self._plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self._plain(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if value is None or type(value) in (bool, int, float, str):
            return value
        self._notes.append(Note("lost", f"a value of type {type(value).__name__} in the document"))
        return None

    # ---- files --------------------------------------------------------------------------------------------------

    def _model_files(self) -> list[str]:
        dp, mp = self._count("dp"), self._count("tp") * self._count("pp")
        if dp * mp > MAX_FILES:
            raise InvalidInput(f"{dp} x {mp} files of model states; {MAX_FILES} are allowed")
        low = [f"mp_rank_{m:02d}_model_states.pt" for m in range(mp)]
        three = [f"zero_pp_rank_{d}_mp_rank_{m:02d}_model_states.pt" for d in range(dp) for m in range(mp)]
        return {"any": [*low, *three], "3": three}.get(self._stage, low)

    def _count(self, option: str) -> int:
        value = self._options.get(option, "1")
        if not value.isdecimal() or not 1 <= int(value) <= MAX_FILES:
            raise InvalidInput(f"{option}={value}: it is a number of ranks")
        return int(value)

    def _file(self, key: str, root: Any) -> OutputFile:
        return torch_output(f"{self._tag}/{key}", root)

    def _say(self) -> None:
        rest = [
            name for name in self._logical.names() if name.startswith(MODEL) and split(name)[1] not in self._trainable
        ]
        if rest and self._trainable:
            what = (
                f"DeepSpeed restores neither buffers nor frozen parameters ({len(rest)} here) of a universal form:"
                ' load them from "module" of the model states before deepspeed.initialize'
            )
            self._notes.append(Note("warning", what))
        if self._stage in ("any", "3") and len(self._groups) > 1:
            what = (
                "stage 3 of DeepSpeed 0.19.8 gives every parameter group the values of the first, and all one step"
                " tensor: set the groups again after loading; stages 1 and 2 load them right"
            )
            self._notes.append(Note("warning", what))
        if not self._own.get("lr_scheduler"):
            self._notes.append(Note("warning", "no state of a learning rate scheduler: load_lr_scheduler_states=False"))
