"""Checkpoints as DeepSpeed itself writes them, for a number of data-parallel ranks: ZeRO stages 1, 2 and 3.

The format is in `deepspeed_files` and `deepspeed_zero`. Unlike a universal checkpoint, DeepSpeed restores from it
buffers, frozen parameters, every parameter group and every step; but it finds parameters by their places only. The job
that loads it must give its optimizer the parameters in the order of the checkpoint's groups, without round-robin
gradients and without parameter alignment, in one pipeline stage and without tensor parallelism.

Options:
    stage            1 (default), 2 or 3.
    dp               data-parallel ranks. Default 1.
    dtype            what the job computes in: float32, bfloat16 or float16. Default: what the model's tensors are.
    sub_group_size   stage 3: the job's own setting. Default 1000000000, which is DeepSpeed's.
    buffers          PATTERN,...: which tensors without gradients are buffers, not frozen parameters. Needed in stage 3
                     where the checkpoint is not of DeepSpeed. Tensors of integers and bool are buffers anyway.
    tag              the directory; default global_step<N>.
"""

from __future__ import annotations

import fnmatch
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ckptsvc.errors import InvalidInput
from ckptsvc.geometry.box import FlatRange, Region
from ckptsvc.interop.deepspeed.contents import VERSION, Contents, count_of, size_of, stage_of, tag_of
from ckptsvc.interop.deepspeed.document import model_name, state_name
from ckptsvc.interop.deepspeed.pipeline import TIED
from ckptsvc.interop.logical import MASTER, Logical, Note
from ckptsvc.interop.options import choice, known
from ckptsvc.interop.outputs import Output, OutputFile, Small
from ckptsvc.interop.torch_format.write import Call, Global, Inline, Packed, torch_output

OPTIONS = ("stage", "dp", "dtype", "sub_group_size", "buffers", "tag")

SUB_GROUP_SIZE = 1_000_000_000
"""DeepSpeed's own default, in elements of a rank."""

_LOW = {"bfloat16": "bf16_", "float16": "", "float32": ""}
_FRAGMENT = Global("deepspeed.utils.tensor_fragment", "fragment_address")


class _Flat(NamedTuple):
    """A flat group in one rank.

    Attributes:
        size: elements of the rank's partition.
        used: those of them that are not padding at its end.
        parts: (first element of the partition, parameter, range of the parameter).
    """

    size: int
    used: int
    parts: list[tuple[int, str, FlatRange]]


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """Plan a checkpoint of DeepSpeed; see the module for the options.

    Raises:
        InvalidInput: an option is wrong, or the checkpoint has no parameter groups, or not the state of all parameters.
    """
    known(options, OPTIONS)
    choice(options, "dtype", list(_LOW))
    return _Writer(logical, options).output()


class _Writer:
    """Plans the files of one checkpoint."""

    def __init__(self, logical: Logical, options: Mapping[str, str]) -> None:
        self._all = Contents(logical)
        self._options = options
        self._stage, self._dp = int(choice(options, "stage", ("1", "2", "3"))), count_of(options, "dp")
        self._tag = tag_of(options, f"global_step{logical.step}")
        members = [name for group in self._all.groups for name in group["params"]]
        if not members:
            raise InvalidInput(f"{logical.origin} has no parameter groups, which order DeepSpeed's flat partitions")
        kinds = {logical.meta(model_name(name)).dtype for name in members}
        self._dtype = options.get("dtype") or (kinds.pop() if len(kinds) == 1 else "float32")
        if self._dtype not in _LOW:
            raise InvalidInput(f"the model is {self._dtype}: give dtype as one of {', '.join(_LOW)}")
        self._slots = self._common_slots(members)
        self._groups = self._flat_groups()

    def output(self) -> Output:
        files = [self._optimizer_file(rank) for rank in range(self._dp)]
        if self._stage == 3:
            files.extend(
                self._file(f"zero_pp_rank_{r}_mp_rank_00_model_states.pt", self._model3(r)) for r in range(self._dp)
            )
        else:
            files.append(self._file("mp_rank_00_model_states.pt", self._model()))
        self._all.warn_of_scheduler()
        if any(name.startswith(TIED) for name in self._all.parameters):
            what = (
                "names of a pipeline: DeepSpeed loads these files into a plain model of such names, not into a pipeline"
            )
            self._all.notes.append(Note("warning", what))
        facts = {"stage": self._stage, "dp": self._dp, "dtype": self._dtype, "tag": self._tag}
        return Output(files, lambda _: [Small("latest", self._tag.encode())], self._all.notes, facts)

    def _file(self, key: str, root: Any) -> OutputFile:
        return torch_output(f"{self._tag}/{key}", root)

    # ---- flat groups --------------------------------------------------------------------------------------------

    def _common_slots(self, members: Sequence[str]) -> list[str]:
        """The optimizer state of every parameter; a flat group cannot have it of some only."""
        slots = [slot for slot in self._all.slots.get(members[0], ()) if slot not in ("step", MASTER)]
        for name in members:
            meta = self._all.logical.meta
            own = [slot for slot in self._all.slots.get(name, ()) if slot not in ("step", MASTER)]
            if own != slots or any(meta(state_name(name, slot)).shape != self._all.shape(name) for slot in own):
                raise InvalidInput(
                    f"{name} has the state {own} in {self._all.logical.origin}, and {members[0]} {slots}"
                )
        return slots

    def _flat_groups(self) -> list[tuple[int, list[str]]]:
        """(parameter group, parameters) of each flat group, or sub-group in stage 3."""
        value = self._options.get("sub_group_size", str(SUB_GROUP_SIZE))
        if not value.isdecimal() or not int(value):
            raise InvalidInput(f"sub_group_size={value}: it is a number of elements")
        found: list[tuple[int, list[str]]] = []
        for number, group in enumerate(self._all.groups):
            names = list(group["params"])
            if self._stage != 3:
                found.append((number, names))
                continue
            sizes = [self._per(name) for name in names]
            begun: list[str] = []
            held = 0
            for name, size in zip(names, sizes, strict=True):
                begun.append(name)
                held += size
                if (held >= int(value) < sum(sizes)) or name == names[-1]:
                    found.append((number, begun))
                    begun, held = [], 0
        return found

    def _size(self, name: str) -> int:
        return math.prod(self._all.shape(name))

    def _per(self, name: str) -> int:
        return -(-self._size(name) // self._dp)

    def _partition(self, names: Sequence[str], rank: int) -> _Flat:
        if self._stage == 3:
            starts = [0, *accumulate(self._per(name) for name in names)]
            parts = []
            for at, name in zip(starts, names, strict=False):
                first = min(rank * self._per(name), self._size(name))
                length = min(self._per(name), self._size(name) - first)
                parts.append((at, name, FlatRange(first, length)))
            return _Flat(starts[-1], starts[-1], [part for part in parts if part[2].length])
        starts = [0, *accumulate(self._size(name) for name in names)]
        size = -(-starts[-1] // (2 * self._dp)) * 2
        low, high = min(rank * size, starts[-1]), min((rank + 1) * size, starts[-1])
        parts = []
        number = max(bisect_right(starts, low) - 1, 0)
        while number < len(names) and starts[number] < high:
            first, last = max(starts[number], low), min(starts[number + 1], high)
            if first < last:
                parts.append((first - low, names[number], FlatRange(first - starts[number], last - first)))
            number += 1
        return _Flat(size, high - low if rank == self._dp - 1 else size, parts)

    def _packed(self, flat: _Flat, slot: str, size: int) -> Packed:
        parts: list[tuple[int, str, Region]] = [
            (at, state_name(name, slot) if slot else self._all.master(name), region) for at, name, region in flat.parts
        ]
        return Packed("float32", size, tuple(parts))

    # ---- optimizer states ---------------------------------------------------------------------------------------

    def _optimizer_file(self, rank: int) -> OutputFile:
        flats = [self._partition(names, rank) for _, names in self._groups]
        state = {number: self._state(number, flat) for number, flat in enumerate(flats)}
        members: list[list[int]] = [[] for _ in self._all.groups]
        for number, (group, _) in enumerate(self._groups):
            members[group].append(number)
        groups = [{**values, "params": own} for values, own in zip(self._all.hyper(), members, strict=True)]
        inner = {"state": state, "param_groups": groups}
        saved = self._stage3(inner, flats) if self._stage == 3 else self._stage12(inner, flats, rank)
        root = {"optimizer_state_dict": saved, "ds_config": self._all.config(self._stage)}
        key = f"{_LOW[self._dtype]}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return self._file(key, {**root, "ds_version": VERSION})

    def _state(self, number: int, flat: _Flat) -> dict[str, Any]:
        names = self._groups[number][1]
        found: dict[str, Any] = {}
        step = next((s for name in names if (s := state_name(name, "step")) in self._all.names), None)
        if step is not None:
            found["step"] = self._all.slot(step, "float32")
        return {**found, **{slot: self._packed(flat, slot, flat.size) for slot in self._slots}}

    def _common(self) -> dict[str, Any]:
        return {
            "zero_stage": stage_of(self._stage),
            "loss_scaler": self._all.loss_scaler(),
            "dynamic_loss_scale": bool(self._all.scaler.get("dynamic")),
            "overflow": False,
        }

    def _stage12(self, inner: dict[str, Any], flats: Sequence[_Flat], rank: int) -> dict[str, Any]:
        return {
            **self._common(),
            "base_optimizer_state": inner,
            "single_partition_of_fp32_groups": [self._packed(flat, "", flat.used) for flat in flats],
            "group_paddings": [flat.size - flat.used for flat in flats],
            "param_alignment_paddings": [[0] * len(names) for _, names in self._groups],
            "partition_count": [self._dp] * len(flats),
            "param_slice_mappings": [
                OrderedDict((name, Call(_FRAGMENT, (region.length, at))) for at, name, region in flat.parts)
                for flat in flats
            ],
            "ds_version": VERSION,
        }

    def _stage3(self, inner: dict[str, Any], flats: Sequence[_Flat]) -> dict[str, Any]:
        return {
            **self._common(),
            "partition_count": self._dp,
            "optimizer_state_dict": inner,
            "fp32_flat_groups": [self._packed(flat, "", flat.size) for flat in flats],
        }

    # ---- model states -------------------------------------------------------------------------------------------

    def _kind(self, name: str) -> str:
        """The element type of a tensor in the job: parameters are cast, buffers are not."""
        own = self._all.logical.meta(model_name(name)).dtype
        return own if self._is_buffer(name) else self._dtype

    def _is_buffer(self, name: str) -> bool:
        if name in self._all.trainable:
            return False
        own = self._all.logical.meta(model_name(name)).dtype
        known = self._all.own.get("buffer_names")
        if "float" not in own or name in (known or ()):
            return True
        globs = self._options.get("buffers", "").split(",")
        if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            return True
        if self._stage == 3 and known is None and "buffers" not in self._options:
            raise InvalidInput(
                f"{name} may be a buffer or a frozen parameter: say it by the option buffers=PATTERN,..."
            )
        return False

    def _source(self, name: str) -> str:
        """Where the weights come from: what the job computed with, if there is such a thing."""
        own = model_name(name)
        return own if self._all.logical.meta(own).dtype == self._kind(name) else self._all.master(name)

    def _model(self) -> dict[str, Any]:
        module: dict[str, Any] = {n: self._all.slot(self._source(n), self._kind(n)) for n in self._all.parameters}
        module.update({alias: module[name] for alias, name in self._all.aliases().items() if name in module})
        return self._all.model_state(module, [names for _, names in self._groups], self._dp, self._stage)

    def _model3(self, rank: int) -> dict[str, Any]:
        empty = Inline(self._dtype, (0,), b"")
        module: dict[str, Any] = {}
        fragments: dict[str, Packed] = {}
        for name in self._all.parameters:
            if self._is_buffer(name):
                module[name] = self._all.slot(model_name(name))
                continue
            module[name] = empty
            if name not in self._all.trainable:
                per, size = self._per(name), self._size(name)
                first = min(rank * per, size)
                length = min(per, size - first)
                parts = ((0, self._source(name), FlatRange(first, length)),) if length else ()
                fragments[name] = Packed(self._dtype, per, parts)
        module.update(dict.fromkeys(self._all.aliases(), empty))
        return {
            **self._all.model_state(module, [names for _, names in self._groups], self._dp, self._stage),
            "frozen_param_shapes": OrderedDict((name, size_of(self._all.shape(name))) for name in fragments),
            "frozen_param_fragments": OrderedDict(fragments),
        }
