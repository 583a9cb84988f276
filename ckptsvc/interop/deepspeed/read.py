"""Checkpoints of DeepSpeed as it writes them: ZeRO stages 0 to 3, pipeline stages, tensor parallelism.

Names are those of the model that DeepSpeed was given; of a pipeline, those of its PipelineModule ("3.ln1.weight",
"tied_modules.embed.weight"). With low precision `model/<name>` is what the ranks computed with, and the fp32 master is
`optimizer/state/<name>/master`; stage 3 keeps masters only, and they are `model/<name>` then.

Options:
    tag        the directory of the checkpoint; else what `latest` says, or the given directory itself.
    weights    "model": as said above. "master": `model/<name>` is the fp32 master everywhere, for a job that trains in
               fp32, or whose optimizer keeps no master of its own.
    tp_dims    PATTERN:DIM,...: the dimension in which tensor-parallel ranks divide the tensors whose names match the
               glob, "-" where each has all of it. Goes before what the checkpoint says.
    names      stage 0: a file with the names of the optimizer's parameters in its order, one a line; an empty line ends
               a group. Without names its state is known by numbers, which a live optimizer explains (`init_from`).
    frozen     stage 0: PATTERN,...: parameters that the optimizer does not have. Often the shapes then say the rest.
    pp         number of pipeline stages, for checkpoints before 0.19 that do not say it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.deepspeed.assemble import Assembly
from ckptsvc.interop.deepspeed.cut import Cuts
from ckptsvc.interop.deepspeed.document import (
    Groups,
    MergedGroups,
    fill_document,
    lose,
    model_name,
    state_name,
    zero_config,
)
from ckptsvc.interop.deepspeed.files import ModelState, Pickled, Tag, find_tag, list_tag, read_model
from ckptsvc.interop.deepspeed.pipeline import read_layers
from ckptsvc.interop.deepspeed.stage0 import optimizer_of_stage0
from ckptsvc.interop.deepspeed.zero import FP32, Share, cut_frozen, read_share
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MASTER, Foreign, Logical, Note
from ckptsvc.interop.options import choice, known
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.types import TensorMeta

OPTIONS = ("tag", "weights", "tp_dims", "names", "frozen", "pp")

WEIGHTS = ("model", "master")


def detect(files: Files) -> bool:
    """Whether there are model states of DeepSpeed, here or in the directory that `latest` names."""
    return bool(list_tag(files, find_tag(files)).models)


def read(files: Files, origin: str, options: Mapping[str, str]) -> Logical:
    """Open a checkpoint of DeepSpeed; see the module for the options.

    Raises:
        InvalidInput: it is none, or of a kind that is not read; or an option is unknown.
        Damaged: files are missing or contradict each other.
        LayoutError: nothing says how tensor-parallel ranks divide a tensor, or a part of one is missing.
    """
    known(options, OPTIONS)
    choice(options, "weights", WEIGHTS)
    tag = list_tag(files, find_tag(files, options.get("tag", "")))
    return _Reader(files, origin, tag, options).read()


class _Reader:
    """Reads the states of all ranks and adds what they have to one `Foreign`."""

    def __init__(self, files: Files, origin: str, tag: Tag, options: Mapping[str, str]) -> None:
        self._files, self._tag, self._options = files, tag, options
        self._foreign = Foreign(origin, files)
        ranks = 1 + max(mp for _, mp in tag.models)
        self._models = [read_model(files, tag.models[0 if tag.is_stage3 else -1, mp]) for mp in range(ranks)]
        self._pp, self._tp = self._degrees()
        cuts = Cuts(self._info(), options.get("tp_dims", ""), f"{files.url}/{tag.name}")
        self._all = Assembly(self._foreign, cuts)
        self._masters_only = options.get("weights") == "master"
        self._dtypes: dict[str, str] = {}
        self._low: set[str] = set()

    def read(self) -> Logical:
        dps = 1 + max((dp for dp, _ in self._tag.optims), default=-1)
        keys = [[self._tag.optims[dp, mp] for dp in range(dps)] for mp in range(len(self._models))] if dps else []
        shares = [read_share(self._files, model, own) for model, own in zip(self._models, keys, strict=False)]
        groups = MergedGroups()
        trainable = {name for share in shares for name in share.shapes}
        if self._tag.layers:
            for name, tensors in read_layers(self._files, self._tag, self._models).items():
                self._weight(0, name, tensors, trainable)
        for stage in range(self._pp):
            ranks = range(stage * self._tp, (stage + 1) * self._tp)
            self._module(stage, [self._models[mp] for mp in ranks], trainable)
            if shares:
                self._optimizer(stage, [shares[mp] for mp in ranks])
                groups.add([(values, self._given_order(names, dps)) for values, names in shares[ranks[0]].groups])
            if self._tag.is_stage3:
                self._frozen(stage, ranks)
        found: Groups | None = groups.merged
        numbered: dict[int, dict[str, Any]] = {}
        if not dps:
            found, numbered = optimizer_of_stage0(self._files, self._foreign, self._models[0], self._options)
        fill_document(self._foreign, self._models, found, self._facts(shares), numbered)
        self._notes()
        return self._foreign.seal()

    def _degrees(self) -> tuple[int, int]:
        """(pipeline stages, tensor-parallel ranks); model-parallel ranks count through the latter first."""
        ranks, first = len(self._models), self._models[0].pickled
        said = Pickled(first.where, first.mapping("checkpoint_parallel_dimensions", optional=True))
        pp, tp = said.number("pp_degree", 0), said.number("tp_degree", 0)
        if "pp" in self._options:
            if not self._options["pp"].isdecimal():
                raise InvalidInput(f"pp={self._options['pp']}: it is a number")
            pp = int(self._options["pp"])
            tp = ranks // max(pp, 1)
        elif not pp or not tp:
            tp = 1 + max(tp for _, tp in self._tag.layers) if self._tag.layers else ranks
            pp = ranks // tp
        if pp * tp != ranks:
            raise Damaged(f"{first.where}: {pp} pipeline stages x {tp} tensor-parallel ranks, and {ranks} files")
        return pp, tp

    def _info(self) -> Mapping[Any, Any]:
        """How parameters are cut, as all ranks of the first stage say together: pattern lists differ by stage."""
        merged: dict[Any, Any] = {}
        for model in self._models[:: self._tp]:
            for key, value in model.info.items():
                known = merged.setdefault(key, value)
                if isinstance(known, list) and isinstance(value, list):
                    merged[key] = known + [item for item in value if item not in known]
                elif key == "affine_map" and isinstance(known, Mapping) and isinstance(value, Mapping):
                    merged[key] = {**known, "params": {**known.get("params", {}), **value.get("params", {})}}
        return merged

    # ---- tensors ------------------------------------------------------------------------------------------------

    def _module(self, stage: int, models: Sequence[ModelState], trainable: set[str]) -> None:
        if any(model.module is None for model in models):
            return
        modules = [model.module or {} for model in models]
        if any(set(module) != set(modules[0]) for module in modules):
            raise Damaged(f"{models[0].pickled.where}: tensor-parallel ranks have different tensors")
        places: dict[Any, str] = {}
        for name, tensor in modules[0].items():
            kept = models[0].shared.get(name, name)
            if kept not in modules[0]:
                kept = name
            is_absent = self._tag.is_stage3 and tensor.shape == (0,) and name not in models[0].buffers
            if kept == name and not is_absent and tensor.nbytes:
                kept = places.setdefault((tensor.where, tensor.shape, tensor.strides), name)
            if kept != name:
                self._foreign.aliases[model_name(name)] = model_name(kept)
            elif not is_absent:
                self._weight(stage, name, [module[name] for module in modules], trainable)
            elif tensor.dtype != "float32":
                self._low.add(tensor.dtype)
        lose(self._foreign, "objects in the module's state that are no tensors", models[0].objects)

    def _weight(self, stage: int, name: str, tensors: Sequence[StoredTensor], trainable: set[str]) -> None:
        if self._masters_only and name in trainable:
            return
        self._dtypes[name] = tensors[0].dtype
        is_buffer = any(name in model.buffers for model in self._models)
        self._all.add_tensors(model_name(name), stage, name, tensors, is_buffer=is_buffer)

    def _optimizer(self, stage: int, shares: Sequence[Share]) -> None:
        first = shares[0]
        if any(set(share.slots) != set(first.slots) for share in shares):
            raise Damaged(f"{self._files.url}/{self._tag.name}: tensor-parallel ranks have different parameters")
        for name, slots in first.slots.items():
            each = [share.slots[name] for share in shares]
            shapes = [share.shapes[name] for share in shares]
            for slot, dtype in slots.dtypes.items():
                logical = state_name(name, slot)
                if slot == FP32:
                    if self._dtypes.get(name) == dtype:
                        continue
                    logical = state_name(name, MASTER) if name in self._dtypes else model_name(name)
                if any(slot not in own.runs for own in each):
                    raise Damaged(f"{self._files.url}/{self._tag.name}: a rank has no {slot} of {name[:200]}")
                self._all.add_runs(logical, stage, name, dtype, shapes, [own.runs[slot] for own in each])
            logical = state_name(name, "step")
            if slots.step is not None and logical not in self._foreign:
                self._foreign.add_value(TensorMeta(logical, "float32", ()), struct.pack("<f", slots.step))

    def _frozen(self, stage: int, ranks: range) -> None:
        """Parameters without gradients in stage 3: each rank has a fragment of them in its model states."""
        first = self._models[ranks[0]]
        if not first.frozen_shapes:
            return
        dps = 1 + max(dp for dp, _ in self._tag.models)
        models = [[self._models[mp], *self._others(mp, dps)] for mp in ranks]
        for name in first.frozen_shapes:
            where = f"{first.pickled.where}: {name[:200]}"
            if any(name not in model.frozen for each in models for model in each):
                raise Damaged(f"{where} is without a fragment in some rank")
            shapes = [each[0].frozen_shapes[name] for each in models]
            pieces = [[model.frozen[name] for model in each] for each in models]
            runs = [cut_frozen(shape, own, where) for shape, own in zip(shapes, pieces, strict=True)]
            self._all.add_runs(model_name(name), stage, name, pieces[0][0].dtype, shapes, runs)

    def _others(self, mp: int, dps: int) -> list[ModelState]:
        return [read_model(self._files, self._tag.models[dp, mp]) for dp in range(1, dps)]

    # ---- plain values -------------------------------------------------------------------------------------------

    def _facts(self, shares: Sequence[Share]) -> dict[str, Any]:
        return {
            "tag": self._tag.name,
            "zero_stage": self._zero_stage(),
            "pp_degree": self._pp,
            "tp_degree": self._tp,
            "loss_scaler": shares[0].loss_scaler if shares else {},
        }

    def _zero_stage(self) -> int:
        said = zero_config(self._models[0]).get("stage")
        return 3 if self._tag.is_stage3 else said if type(said) is int else int(bool(self._tag.optims))

    def _is_round_robin(self) -> bool:
        return bool(zero_config(self._models[0]).get("round_robin_gradients")) and self._zero_stage() in (1, 2)

    def _given_order(self, names: Sequence[str | int], dps: int) -> Sequence[str | int]:
        """The parameters of a group as the job gave them; round-robin gradients deal them to `dps` ranks in turn."""
        if not self._is_round_robin():
            return names
        dealt = [i for rank in range(dps) for i in range(rank, len(names), dps)]
        return [name for _, name in sorted(zip(dealt, names, strict=True), key=itemgetter(0))]

    def _notes(self) -> None:
        for alias, name in list(self._foreign.aliases.items()):
            if name not in self._foreign:
                del self._foreign.aliases[alias]
        if self._low:
            what = f"stage 3 keeps no weights in {', '.join(sorted(self._low))}: model/... are the fp32 masters"
            self._foreign.notes.append(Note("warning", what))
        if self._is_round_robin():
            what = (
                "partitions were read in round-robin order; DeepSpeed's own universal checkpoint of this one is wrong"
            )
            self._foreign.notes.append(Note("repaired", what))
        self._foreign.notes.extend(self._all.compare())
