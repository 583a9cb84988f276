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
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptsvc.errors import InvalidInput
from ckptsvc.interop.deepspeed.contents import MAX_FILES, VERSION, Contents, count_of, tag_of
from ckptsvc.interop.deepspeed.cut import parse_dims
from ckptsvc.interop.deepspeed.document import model_name, state_name
from ckptsvc.interop.deepspeed.universal import LATEST
from ckptsvc.interop.logical import MASTER, Logical, Note
from ckptsvc.interop.options import choice, known
from ckptsvc.interop.outputs import Output, OutputFile, Small
from ckptsvc.interop.torch_format.write import Call, Global, torch_output

OPTIONS = ("stage", "dp", "tp", "pp", "tag", "tp_dims")

_MOMENTS = ("exp_avg", "exp_avg_sq")


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """Plan a universal checkpoint; see the module for the options.

    Raises:
        InvalidInput: an option is wrong, or stage 3 is wanted and there is no Adam state to load.
    """
    known(options, OPTIONS)
    return _Writer(logical, options).output()


class _Writer:
    """Plans the files of one universal checkpoint."""

    def __init__(self, logical: Logical, options: Mapping[str, str]) -> None:
        self._all = Contents(logical)
        self._stage = choice(options, "stage", ("any", "1", "2", "3"))
        self._dp, self._mp = count_of(options, "dp"), count_of(options, "tp") * count_of(options, "pp")
        self._degrees = {"pp_degree": count_of(options, "pp"), "tp_degree": count_of(options, "tp")}
        if self._dp * self._mp > MAX_FILES:
            raise InvalidInput(f"{self._dp} x {self._mp} files of model states; {MAX_FILES} are allowed")
        self._tag = tag_of(options, f"global_step{logical.step}_universal")
        self._dims = list(parse_dims(options.get("tp_dims", "")))
        info = self._all.own.get("universal_checkpoint_info")
        self._info: dict[str, Any] = info if isinstance(info, dict) else {}

    def output(self) -> Output:
        files = [file for name in self._all.parameters for file in self._parameter(name)]
        files.append(self._file("zero/optimizer_state.pt", self._optimizer_state()))
        root = self._model_state()
        files.extend(self._file(key, root) for key in self._model_files())
        self._say()
        return Output(
            files,
            lambda _: [Small(LATEST, self._tag.encode())],
            self._all.notes,
            {"stage": self._stage, "tag": self._tag, "files": len(files)},
        )

    # ---- tensors ------------------------------------------------------------------------------------------------

    def _parameter(self, name: str) -> Iterator[OutputFile]:
        master = self._all.master(name)
        dtype = "float32" if name in self._all.trainable else self._all.logical.meta(master).dtype
        yield self._tensor(name, "fp32", master, dtype)
        for slot in self._all.slots.get(name, ()):
            source = state_name(name, slot)
            if slot == "step" and self._stage != "3":
                yield self._file(f"zero/{name}/step.pt", self._all.slot(source, "float32"))
            elif slot not in ("step", MASTER):
                if self._all.logical.meta(source).shape != self._all.shape(name) or "/" in slot:
                    self._all.notes.append(Note("lost", f"{source}: DeepSpeed keeps no state of another shape"))
                else:
                    yield self._tensor(name, slot, source, "float32")

    def _tensor(self, name: str, slot: str, source: str, dtype: str) -> OutputFile:
        key = f"zero/{name}/{slot}.pt"
        if self._stage == "3":
            return self._file(key, self._all.slot(source, dtype, flat=True))
        return self._file(key, {**self._cut(name), "param": self._all.slot(source, dtype)})

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

    def _optimizer_state(self) -> dict[str, Any]:
        groups = [{**values, "params": [i]} for i, values in enumerate(self._all.hyper())]
        state: dict[str, Any] = {
            "ds_version": VERSION,
            "zero_stage": {"2": 2, "3": 3}.get(self._stage, 1),
            "dynamic_loss_scale": bool(self._all.scaler.get("dynamic")),
            "overflow": False,
            "param_groups": groups,
        }
        if self._all.scaler:
            state["loss_scaler"] = self._all.loss_scaler()
        if self._stage in ("any", "3"):
            state["optimizer_state_dict"] = {"state": self._steps(), "param_groups": groups}
        return state

    def _steps(self) -> dict[int, dict[str, Any]]:
        """What stage 3 reads of the state: the step of the first group."""
        found = {}
        for number, group in enumerate(self._all.groups):
            names = [state_name(name, "step") for name in group["params"]]
            if step := next((name for name in names if name in self._all.names), None):
                found[number] = {"step": self._all.slot(step, "float32")}
        members = [name for group in self._all.groups for name in group["params"]]
        adam = all(set(_MOMENTS) <= set(self._all.slots.get(name, ())) for name in members)
        if self._stage == "3" and (0 not in found or not adam):
            origin = self._all.logical.origin
            raise InvalidInput(f"{origin} has no complete state of Adam, without which stage 3 loads nothing")
        return found

    def _model_state(self) -> dict[str, Any]:
        rest = [name for name in self._all.parameters if name not in self._all.trainable]
        stage = int(self._stage) if self._stage.isdecimal() else None
        groups = [[n for n in group["params"] if model_name(n) in self._all.names] for group in self._all.groups]
        return {
            **self._all.model_state({n: self._all.slot(model_name(n)) for n in rest}, groups, self._dp, stage),
            "mp_world_size": self._mp,
            "checkpoint_parallel_dimensions": self._degrees,
            "universal_checkpoint_info": {
                "universal_checkpoint_version": 0.4,
                **self._all.plain(self._info),
            },
        }

    # ---- files --------------------------------------------------------------------------------------------------

    def _model_files(self) -> list[str]:
        ranks = [(dp, mp) for dp in range(self._dp) for mp in range(self._mp)]
        low = [f"mp_rank_{mp:02d}_model_states.pt" for mp in range(self._mp)]
        three = [f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt" for dp, mp in ranks]
        return {"any": [*low, *three], "3": three}.get(self._stage, low)

    def _file(self, key: str, root: Any) -> OutputFile:
        return torch_output(f"{self._tag}/{key}", root)

    def _say(self) -> None:
        rest = [name for name in self._all.parameters if name not in self._all.trainable]
        if rest and self._all.trainable:
            what = (
                f"DeepSpeed restores neither buffers nor frozen parameters ({len(rest)} here) of a universal form: load"
                ' them from "module" of the model states before deepspeed.initialize, or write format deepspeed'
            )
            self._all.notes.append(Note("warning", what))
        if self._stage in ("any", "3") and len(self._all.groups) > 1:
            what = (
                "stage 3 of DeepSpeed 0.19.8 gives every parameter group of a universal form the values of the first,"
                " and all one step: write format deepspeed for it; stages 1 and 2 load this one right"
            )
            self._all.notes.append(Note("warning", what))
        self._all.warn_of_scheduler()
