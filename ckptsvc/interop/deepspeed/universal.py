"""Universal checkpoints of DeepSpeed: a directory for each parameter, a file for each of its tensors.

    latest_universal                              text: the tag
    <tag>/..._model_states.pt                     copies of the model states it was made from
    <tag>/zero/optimizer_state.pt                 parameter groups; in stage 3 also the steps
    <tag>/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt
        stages 1 and 2: {"param": tensor, "cat_dim": ...} of the full shape, step a tensor
        stage 3: the flat tensor, no step

Source: DeepSpeed 0.19.8, `checkpoint/ds_to_universal.py` and `universal_checkpoint.py`, and checkpoints made by it.
DeepSpeed's converter leaves buffers and frozen parameters out, casts them to float32 or drops them; what of them is in
the copies of the model states is read from there.

Options:
    tag        the directory of the checkpoint; else what `latest_universal` says, or the given directory itself.
    weights    "model": where the model states have a weight in low precision that is `model/<name>`, and the fp32 one
               its master; else the fp32 one. "master": always the fp32 one.
    trust      "yes" reads a checkpoint that DeepSpeed's converter made of round-robin gradients: most of it is wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.deepspeed.document import Groups, MergedGroups, fill_document, model_name, state_name, zero_config
from ckptsvc.interop.deepspeed.files import (
    ALLOWED,
    READERS,
    ModelState,
    Pickled,
    Shape,
    find_tag,
    groups_of,
    list_tag,
    read_model,
    read_pickle,
    scalar,
)
from ckptsvc.interop.deepspeed.read import WEIGHTS
from ckptsvc.interop.deepspeed.zero import FP32, cut_frozen, loss_scaler_of
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MASTER, Foreign, Logical, Note
from ckptsvc.interop.options import choice, known
from ckptsvc.interop.torch_format.file import StoredTensor, read_torch
from ckptsvc.types import TensorMeta

LATEST = "latest_universal"

OPTIONS = ("tag", "weights", "trust")


def detect(files: Files) -> bool:
    """Whether it is the directory of a universal checkpoint, or one that holds nothing else."""
    names = files.children()
    if "latest" in names:
        return False
    tag = find_tag(files, latest=LATEST)
    return "optimizer_state.pt" in files.children(f"{tag}/zero" if tag else "zero")


def read(files: Files, origin: str, options: Mapping[str, str]) -> Logical:
    """Open a universal checkpoint; see the module for the options.

    Raises:
        InvalidInput: it is none, or one that DeepSpeed's converter made wrong; or an option is unknown.
        Damaged: files are missing or contradict each other.
    """
    known(options, OPTIONS)
    choice(options, "weights", WEIGHTS)
    return _Reader(files, origin, options).read()


class _Reader:
    """Adds the tensors of all directories to one `Foreign`."""

    def __init__(self, files: Files, origin: str, options: Mapping[str, str]) -> None:
        self._files, self._options = files, options
        self._foreign = Foreign(origin, files)
        tag = find_tag(files, options.get("tag", ""), LATEST)
        self._tag = list_tag(files, tag)
        self._zero = f"{tag}/zero" if tag else "zero"
        ranks = 1 + max(mp for _, mp in self._tag.models)
        first = 0 if self._tag.is_stage3 else -1
        self._models = [read_model(files, self._tag.models[first, mp]) for mp in range(ranks)]
        self._shapes = {n: s for model in self._models for group in model.shapes for n, s in group.items()}
        self._module = self._models[0].module or {} if ranks == 1 else {}
        self._steps: dict[str, float] = {}
        self._scaler: dict[str, Any] = {}

    def read(self) -> Logical:
        self._refuse_wrong()
        groups = self._groups()
        present = sorted(set(self._files.children(self._zero)) - {"optimizer_state.pt"})
        with ThreadPoolExecutor(READERS) as pool:
            roots = dict(zip(present, pool.map(self._opened, present), strict=True))
        trainable = {name for _, names in groups for name in names}
        shared = self._models[0].shared
        for name, slots in roots.items():
            if name in trainable or "exp_avg" in slots:
                self._parameter(name, slots)
            elif name not in shared and name not in self._module and FP32 in slots:
                self._tensor(model_name(name), name, FP32, slots[FP32])
        if missing := sorted(trainable - set(present)):
            raise Damaged(f"{self._files.url}/{self._zero}/{missing[0]} is missing ({len(missing)} such parameters)")
        self._rest()
        stage = 3 if self._tag.is_stage3 else zero_config(self._models[0]).get("stage")
        facts = {"tag": self._tag.name, "zero_stage": stage, "loss_scaler": self._scaler}
        fill_document(self._foreign, self._models, groups, facts)
        return self._foreign.seal()

    def _refuse_wrong(self) -> None:
        zero = zero_config(self._models[0])
        wrong = zero.get("round_robin_gradients") and zero.get("stage") in (1, 2)
        if wrong and self._models[0].pickled.number("dp_world_size", 2) > 1:
            what = "made of round-robin gradients by DeepSpeed's converter, which mixes the parameters up"
            if self._options.get("trust") != "yes":
                hint = "convert the checkpoint it was made from; the option trust=yes reads it as it is"
                raise InvalidInput(f"{self._foreign.origin} was {what}", hint=hint)
            self._foreign.notes.append(Note("warning", f"it was {what}: most of its values are wrong"))

    # ---- parameter groups ---------------------------------------------------------------------------------------

    def _groups(self) -> Groups:
        state = read_pickle(self._files, f"{self._zero}/optimizer_state.pt")
        inner = Pickled(state.where, state.mapping("optimizer_state_dict", optional=True))
        self._scaler = loss_scaler_of(state)
        hyper = groups_of(state.root.get("param_groups") or inner.root.get("param_groups") or [], state.where)
        merged = MergedGroups()
        for model in self._models:
            merged.add(self._members(model, hyper, inner))
        if not merged.merged and hyper:
            self._foreign.notes.append(Note("lost", f"{state.where}: nothing says which parameters its groups have"))
        return merged.merged

    def _members(self, model: ModelState, hyper: Sequence[Mapping[str, Any]], inner: Pickled) -> Groups:
        """The groups of one model-parallel rank. Lists of shapes are groups, in stage 3 sub-groups of them."""
        count = len(model.shapes)
        numbers = [group.get("params") for group in hyper]
        states = inner.mapping("state", optional=True)
        if not states and count == len(hyper):
            numbers = [[n] for n in range(count)]
        flat = [n for own in numbers if isinstance(own, list | tuple) for n in own]
        if sorted(flat, key=repr) != sorted(range(count), key=repr):
            what = f"{model.pickled.where} has {count} groups of parameters, and the optimizer {len(hyper)}"
            self._foreign.notes.append(Note("lost", f"parameter groups: {what}"))
            return []
        for number, shapes in enumerate(model.shapes):
            own = states.get(number, states.get(0))
            step = scalar(self._files, own.get("step"), inner.where) if isinstance(own, Mapping) else None
            if step is not None:
                self._steps.update(dict.fromkeys(shapes, step))
        return [
            (
                {key: value for key, value in group.items() if key not in ("params", "step")},
                [name for n in own or () for name in model.shapes[n]],
            )
            for group, own in zip(hyper, numbers, strict=True)
        ]

    # ---- tensors ------------------------------------------------------------------------------------------------

    def _opened(self, name: str) -> dict[str, Any]:
        """What the files in the directory of a parameter hold, by slot."""
        found = {}
        for file in self._files.children(f"{self._zero}/{name}"):
            slot, dot, suffix = file.rpartition(".")
            if dot and suffix == "pt":
                found[slot] = read_torch(self._files, f"{self._zero}/{name}/{file}", allowed=ALLOWED).root
        return found

    def _parameter(self, name: str, slots: Mapping[str, Any]) -> None:
        logical = model_name(name)
        low = self._module.get(name)
        if low is not None and low.dtype != "float32" and low.nbytes and self._options.get("weights") != "master":
            self._add(logical, low.shape, low)
            logical = state_name(name, MASTER)
        for slot, root in slots.items():
            if slot != "step":
                self._tensor(logical if slot == FP32 else state_name(name, slot), name, slot, root)
        step = self._steps.get(name)
        if "step" in slots:
            step = scalar(self._files, slots["step"], f"{self._files.url}/{self._zero}/{name}/step.pt")
        if step is not None:
            self._foreign.add_value(TensorMeta(state_name(name, "step"), "float32", ()), struct.pack("<f", step))

    def _tensor(self, logical: str, name: str, slot: str, root: Any) -> None:
        found = root.get("param") if isinstance(root, Mapping) else root
        if not isinstance(found, StoredTensor):
            raise Damaged(f"{self._files.url}/{self._zero}/{name}/{slot}.pt holds no tensor")
        # a tensor alone is flat, and its shape is in the model states
        self._add(logical, found.shape if isinstance(root, Mapping) else self._shapes.get(name, found.shape), found)

    def _add(self, logical: str, shape: Shape, tensor: StoredTensor) -> None:
        """A stored tensor of that shape, or flat."""
        size = math.prod(shape)
        if math.prod(tensor.shape) != size:
            raise Damaged(f"{self._foreign.origin}: {logical} is {list(shape)}, and {list(tensor.shape)} in its file")
        meta = TensorMeta(logical, tensor.dtype, shape)
        block = tensor.block()
        if block is not None and tensor.shape != shape:
            raise Damaged(f"{self._foreign.origin}: {logical} is flat in its file, and has gaps there")
        self._foreign.add(meta, FlatRange(0, size) if block is None else Box.full(shape), tensor.where, block)

    def _rest(self) -> None:
        """Buffers, frozen parameters, further names of tied ones: in the copies of the model states, if anywhere."""
        shared, first = self._models[0].shared, self._models[0]
        for alias, name in shared.items():
            if model_name(name) in self._foreign and model_name(alias) not in self._foreign:
                self._foreign.aliases[model_name(alias)] = model_name(name)
        for name, tensor in (first.module or {}).items():
            is_own = len(self._models) == 1 or name in first.buffers
            logical = model_name(name)
            known = logical in self._foreign or (name in first.frozen_shapes and self._tag.is_stage3)
            if is_own and not known and (tensor.nbytes or name in first.buffers):
                self._add(logical, tensor.shape, tensor)
        if self._tag.is_stage3 and first.frozen_shapes and len(self._models) == 1:
            self._frozen(first)
        expected = {name for model in self._models for name in (*model.buffers, *model.frozen_shapes)}
        if lost := sorted(name for name in expected if model_name(name) not in self._foreign):
            some = ", ".join(lost[:5])
            what = f"{len(lost)} buffers and frozen parameters, which DeepSpeed's converter leaves out: {some}"
            self._foreign.notes.append(Note("lost", what))

    def _frozen(self, first: ModelState) -> None:
        """Frozen parameters of stage 3: the copies of all ranks' model states have the fragments."""
        models = [first, *(read_model(self._files, key) for (dp, _), key in sorted(self._tag.models.items()) if dp)]
        for name, shape in first.frozen_shapes.items():
            if model_name(name) in self._foreign or any(name not in model.frozen for model in models):
                continue
            pieces = [model.frozen[name] for model in models]
            meta = TensorMeta(model_name(name), pieces[0].dtype, shape)
            for run in cut_frozen(shape, pieces, f"{first.pickled.where}: {name[:200]}"):
                self._foreign.add(meta, FlatRange(run.start, run.length), run.where)
