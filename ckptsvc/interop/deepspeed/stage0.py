"""Stage 0: the optimizer's state is in the model states, numbered.

    fp32           {state {number: {step, exp_avg, ...}}, param_groups}: the optimizer's own
    low precision  {optimizer_state_dict: that, fp32_groups [[master, ...], ...]}               FP16_UnfusedOptimizer
                   {optimizer_state_dict: of flat groups, fp32_groups_flat [masters, ...]}      FP16_Optimizer

Source: DeepSpeed 0.19.8, `runtime/fp16/{fused,unfused}_optimizer.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ckptsvc.errors import Damaged
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.deepspeed.document import Groups, model_name, state_name
from ckptsvc.interop.deepspeed.files import ModelState, Shape, flat, groups_of, scalar
from ckptsvc.interop.deepspeed.order import name_parameters
from ckptsvc.interop.deepspeed.zero import FP32, cut_flat
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MASTER, Foreign, Note
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.types import TensorMeta


def optimizer_of_stage0(
    files: Files, foreign: Foreign, model: ModelState, options: Mapping[str, str]
) -> tuple[Groups | None, dict[int, dict[str, Any]]]:
    """Add the optimizer's state under the names of its parameters, or their numbers if nothing says the names.

    Args:
        files: of the checkpoint.
        foreign: has the model's tensors already; takes the optimizer's, and notes.
        model: the model states.
        options: `names` and `frozen`, see `deepspeed_order`; `weights`.

    Returns:
        the groups, None if there is no optimizer that can be read; and references to numbered state.

    Raises:
        InvalidInput: the names that the user gave do not fit.
        Damaged: the state contradicts the module.
    """
    reader = _Stage0(files, foreign, model, options)
    return reader.read(), reader.numbered


class _Stage0:
    def __init__(self, files: Files, foreign: Foreign, model: ModelState, options: Mapping[str, str]) -> None:
        self._files, self._foreign, self._model, self._options = files, foreign, model, options
        self._where = f"{model.pickled.where}: the optimizer's state"
        self.numbered: dict[int, dict[str, Any]] = {}

    def read(self) -> Groups | None:
        outer = self._model.pickled.mapping("optimizer", optional=True)
        inner = outer.get("optimizer_state_dict", outer)
        states = inner.get("state") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(states, Mapping):
            self._foreign.notes.append(Note("lost", f"{self._where}: there is none that is understood"))
            return None
        groups = groups_of(inner.get("param_groups"), self._where)
        numbers = [self._numbers(group.get("params")) for group in groups]
        flats, masters = outer.get("fp32_groups_flat"), outer.get("fp32_groups")
        shapes = None if flats else [[_shape(states.get(n)) for n in own] for own in numbers]
        naming = name_parameters(self._model, groups, shapes, self._options)
        drop = ("params", "param_names", "step")
        kept = [{key: value for key, value in group.items() if key not in drop} for group in groups]
        if naming is None and flats:
            what = f"{self._where}: its groups are flat, and nothing names their parameters; give names=FILE"
            self._foreign.notes.append(Note("lost", what))
            return None
        if naming is None:
            what = (
                f"{self._where}: its parameters are numbered, and nothing names them; give names=FILE, or"
                " frozen=PATTERN,... if some are, or attach to the optimizer itself"
            )
            self._foreign.notes.append(Note("warning", what))
            for own, group in zip(numbers, masters or [()] * len(numbers), strict=False):
                for j, number in enumerate(own):
                    self._add_number(number, states.get(number, {}), _item(group, j, self._where) if masters else None)
            return list(zip(kept, numbers, strict=True))
        if naming.is_concluded:
            what = "parameters were named by their shapes and the module's order, which fit in one way only"
            self._foreign.notes.append(Note("warning", f"{self._where}: {what}"))
        for i, (own, names) in enumerate(zip(numbers, naming.names, strict=True)):
            if flats:
                self._add_flat(states.get(own[0] if own else 0, {}), _item(flats, i, self._where), names)
                continue
            for j, (number, name) in enumerate(zip(own, names, strict=True)):
                master = _item(_item(masters, i, self._where), j, self._where) if masters else None
                self._add(name, states.get(number, {}), master)
        return list(zip(kept, naming.names, strict=True))

    def _numbers(self, value: Any) -> list[int]:
        if not isinstance(value, list | tuple) or not all(type(n) is int for n in value):
            raise Damaged(f"{self._where}: the parameters of a group are {str(value)[:80]!r}")
        return list(value)

    def _add_number(self, number: int, state: Any, master: Any) -> None:
        """The state of a parameter without a name; the document refers to it."""
        slots = dict(state) if isinstance(state, Mapping) else {}
        self._step(str(number), slots.pop("step", None))
        refs = {"step": TensorRef(state_name(str(number), "step"))}
        for slot, tensor in {**slots, **({MASTER: master} if master is not None else {})}.items():
            if isinstance(tensor, StoredTensor):
                path = state_name(str(number), str(slot))
                meta = TensorMeta(path, tensor.dtype, tensor.shape)
                self._foreign.add(meta, Box.full(tensor.shape), tensor.where, tensor.block())
                refs[str(slot)] = TensorRef(path)
        self.numbered[number] = {slot: ref for slot, ref in refs.items() if ref.name in self._foreign}

    def _add(self, name: str, state: Any, master: Any) -> None:
        """The state of one parameter."""
        shape = self._foreign.meta(model_name(name)).shape
        slots = dict(state) if isinstance(state, Mapping) else {}
        self._step(name, slots.pop("step", None))
        for slot, tensor in {**slots, **({FP32: master} if master is not None else {})}.items():
            if isinstance(tensor, StoredTensor):
                if tensor.shape != shape:
                    raise Damaged(f"{self._where}: {slot} of {name[:200]} is {list(tensor.shape)}, not {list(shape)}")
                meta = TensorMeta(self._slot(name, str(slot)), tensor.dtype, shape)
                self._foreign.add(meta, Box.full(shape), tensor.where, tensor.block())

    def _add_flat(self, state: Any, master: Any, names: Sequence[str]) -> None:
        """The state of a group whose parameters are one flat tensor."""
        slots = {n: [flat(t, self._where)] for n, t in state.items() if isinstance(t, StoredTensor) and t.shape}
        slots[FP32] = [flat(master, self._where)]
        shapes = {name: self._foreign.meta(model_name(name)).shape for name in names}
        step = scalar(self._files, state.get("step"), self._where)
        for name, found in cut_flat(slots, step, shapes, [0] * len(names), self._where).items():
            self._step(name, found.step)
            for slot, runs in found.runs.items():
                meta = TensorMeta(self._slot(name, slot), found.dtypes[slot], shapes[name])
                for run in runs:
                    self._foreign.add(meta, FlatRange(run.start, run.length), run.where)

    def _slot(self, name: str, slot: str) -> str:
        """The canonical name of a slot; with weights=master the masters take the place of the weights."""
        if slot != FP32:
            return state_name(name, slot)
        if self._options.get("weights") != "master":
            return state_name(name, MASTER)
        if self._foreign.meta(model_name(name)).dtype != "float32":
            self._foreign.drop(model_name(name))
        return model_name(name)

    def _step(self, name: str, value: Any) -> None:
        if value is not None and (step := scalar(self._files, value, self._where)) is not None:
            self._foreign.add_value(TensorMeta(state_name(name, "step"), "float32", ()), struct.pack("<f", step))


def _item(value: Any, number: int, where: str) -> Any:
    if not isinstance(value, list | tuple) or number >= len(value):
        raise Damaged(f"{where}: the masters are not as many as the parameters")
    return value[number]


def _shape(state: Any) -> Shape | None:
    """The shape of a parameter as its state has it."""
    tensors = [t for t in state.values() if isinstance(t, StoredTensor)] if isinstance(state, Mapping) else []
    return max((t.shape for t in tensors), key=lambda shape: (len(shape), math.prod(shape)), default=None)
