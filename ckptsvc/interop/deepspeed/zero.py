"""Where ZeRO keeps each parameter: the optimizer's files of one model-parallel rank, as runs of its parameters.

Stages 1 and 2, and BF16_Optimizer. The parameters of a group, flattened, follow each other in the order of
`param_shapes` (which is the order of the flat buffer with round-robin gradients too, unlike `param_slice_mappings`):

    p0 | padding | p1 | padding | ... | tail         the paddings are 0 unless zero_optimization.parameter_alignment
    partition r is [r * P, (r + 1) * P)              dp * P is the length, rounded up to a multiple of 2 * dp

The tail is missing from the last rank's fp32 tensor and present in its exp_avg.

Stage 3. Each parameter is cut on its own: rank r has [r * per, (r + 1) * per), per = ceil(elements / dp), padded with
zeros, and the pieces of a sub-group follow each other. Groups are sub-groups here; `param_groups` says which they are.

Source: DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py` and `stage3.py`, and checkpoints written by it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.deepspeed.files import (
    ModelState,
    Pickled,
    Shape,
    flat,
    groups_of,
    read_pickles,
    scalar,
)
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.types import DTYPES

FP32 = "fp32"
"""The slot of the fp32 masters; the others have the optimizer's own names."""


class Run(NamedTuple):
    """Consecutive elements of a flattened parameter.

    Attributes:
        start: index of the first element.
        length: number of elements.
        where: file and byte of the first element.
    """

    start: int
    length: int
    where: tuple[str, int]


class Slots(msgspec.Struct):
    """The state of one parameter in one model-parallel rank.

    Attributes:
        dtypes, runs: by slot.
        step: number of updates; None if nothing says it.
    """

    dtypes: dict[str, str]
    runs: dict[str, list[Run]]
    step: float | None = None


class Share(msgspec.Struct):
    """What the optimizer's files of one model-parallel rank hold.

    Attributes:
        shapes: parameter -> its shape in this rank.
        slots: parameter -> where its state is.
        groups: hyper-parameters, without "params", and the names of the parameters they are for.
        loss_scaler: attributes of the loss scaler.
    """

    shapes: dict[str, Shape]
    slots: dict[str, Slots]
    groups: list[tuple[dict[str, Any], list[str]]]
    loss_scaler: dict[str, Any]


def read_share(files: Files, model: ModelState, keys: Sequence[str]) -> Share:
    """Find the parameters of a model-parallel rank in its optimizer's files.

    Args:
        files: where they are.
        model: the model states of the rank (of data-parallel rank 0 in stage 3).
        keys: the optimizer's files, by data-parallel rank.

    Raises:
        Damaged: the files contradict each other or the shapes of the parameters.
        InvalidInput: a layout that is not read.
    """
    pickles = read_pickles(files, keys)
    states = [Pickled(p.where, p.mapping("optimizer_state_dict")) for p in pickles]
    for state in states:
        _check_partitions(state, len(keys))
    first = states[0]
    if len(model.shapes) >= 1 << 16:
        raise Damaged(f"{model.pickled.where} has {len(model.shapes)} groups of parameters")
    read = _stage3 if first.number("zero_stage", 1) == 3 else _stage12
    hyper, members, flat_groups = read(files, model, states)
    share = Share({}, {}, [], loss_scaler_of(first))
    for number, shapes in enumerate(model.shapes):
        for name in shapes:
            if name in share.shapes:
                raise Damaged(f"{model.pickled.where}: {name[:200]!r} is in two groups")
            share.shapes[name] = shapes[name]
        share.slots.update(flat_groups[number])
    for values, numbers in zip(hyper, members, strict=True):
        kept = {name: value for name, value in values.items() if name not in ("params", "step")}
        share.groups.append((kept, [name for n in numbers for name in model.shapes[n]]))
    return share


def _check_partitions(state: Pickled, ranks: int) -> None:
    count = state.root.get("partition_count", ranks)
    counts = count if isinstance(count, list | tuple) else [count]
    if any(n != ranks for n in counts):
        raise InvalidInput(
            f"{state.where} says that it is one of {str(count)[:80]} partitions and there are {ranks} such files",
            hint="a file is missing; or sub-groups of ranks divide it among themselves (MiCS, experts): not read",
        )
    if state.root.get("ds_zero_partition_groups"):
        raise InvalidInput(f"{state.where} has experts that are partitioned on their own, which are not read")


def loss_scaler_of(state: Pickled) -> dict[str, Any]:
    """The class and the attributes of the loss scaler in an optimizer's state; empty if there is none."""
    scaler = state.root.get("loss_scaler")
    found = getattr(scaler, "state", None)
    kept = {k: v for k, v in found.items() if type(v) in (bool, int, float)} if isinstance(found, Mapping) else {}
    return {"class": type(scaler).__name__, **kept} if kept else {}


# ---- stages 1 and 2 ---------------------------------------------------------------------------------------------

_Read = tuple[list[dict[str, Any]], list[list[int]], list[dict[str, Slots]]]
"""Hyper-parameters of each param group, the flat groups each has, and the state of each flat group's parameters."""


def _stage12(files: Files, model: ModelState, states: Sequence[Pickled]) -> _Read:
    base = [_base_state(state) for state in states]
    masters = [state.sequence("single_partition_of_fp32_groups") for state in states]
    paddings = states[0].sequence("param_alignment_paddings")
    hyper = base[0][1]
    count = len(model.shapes)
    if any(len(tensors) != count for tensors in masters) or (hyper and len(hyper) != count):
        raise Damaged(
            f"{states[0].where}: {len(hyper)} groups, {len(masters[0])} flat tensors, {count} lists of shapes"
        )
    found = []
    for number, shapes in enumerate(model.shapes):
        where = f"{states[0].where}: flat group {number}"
        each = [(b[0].get(number, {}), m[number]) for b, m in zip(base, masters, strict=True)]
        pads = _paddings(paddings[number] if number < len(paddings) else None, len(shapes), where)
        step = _step(files, each[0][0], hyper[number] if hyper else {}, base[0][2], where)
        found.append(cut_flat(_tensors(each, where), step, shapes, pads, where))
    return hyper or [{} for _ in range(count)], [[n] for n in range(count)], found


def _base_state(state: Pickled) -> tuple[dict[int, Mapping[Any, Any]], list[dict[str, Any]], Any]:
    """(state by flat group, groups of hyper-parameters, a step for all) of the optimizer that ZeRO wraps."""
    base = state.root.get("base_optimizer_state")
    groups: list[dict[str, Any]] = []
    if isinstance(base, Mapping):
        groups = groups_of(base.get("param_groups", []), state.where)
        base = base.get("state")
    numbered = dict(enumerate(base)) if isinstance(base, list | tuple) else base
    if not isinstance(numbered, Mapping) or not all(isinstance(slots, Mapping) for slots in numbered.values()):
        raise Damaged(f"{state.where}: the base optimizer's state is no dict of dicts")
    return dict(numbered), groups, state.root.get("base_optimizer_state_step")


def _paddings(value: Any, count: int, where: str) -> list[int]:
    if value is None:
        return [0] * count
    if not isinstance(value, list | tuple) or not all(type(n) is int and 0 <= n < 1 << 20 for n in value):
        raise Damaged(f"{where}: its paddings are {str(value)[:80]!r}")
    if len(value) != count:
        raise Damaged(f"{where} has {count} parameters and {len(value)} paddings")
    return list(value)


def _step(files: Files, slots: Mapping[Any, Any], hyper: dict[str, Any], common: Any, where: str) -> float | None:
    for value in (slots.get("step"), hyper.get("step"), common):
        if value is not None:
            return scalar(files, value, where)
    return None


def _tensors(each: Sequence[tuple[Mapping[Any, Any], Any]], where: str) -> dict[str, list[StoredTensor]]:
    """The flat tensors of every slot, one for each rank."""
    names = [n for n, t in each[0][0].items() if isinstance(n, str) and isinstance(t, StoredTensor) and t.shape]
    slots = {name: [flat(state.get(name), f"{where}: {name[:80]}") for state, _ in each] for name in names}
    slots[FP32] = [flat(master, f"{where}: fp32") for _, master in each]
    for name, tensors in slots.items():
        if len({t.dtype for t in tensors}) != 1:
            raise Damaged(f"{where}: the partitions of {name[:80]} have different element types")
    return slots


def cut_flat(
    slots: Mapping[str, list[StoredTensor]],
    step: float | None,
    shapes: Mapping[str, Shape],
    pads: Sequence[int],
    where: str,
) -> dict[str, Slots]:
    """Cut the partitions of a flat group where its parameters begin and end.

    Args:
        slots: slot -> the partitions, by rank; `FP32` among them.
        step: number of updates.
        shapes: parameter -> shape, in flat order.
        pads: elements between each parameter and the next.
        where: for messages.

    Raises:
        Damaged: the partitions are longer or shorter than the parameters explain.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    starts = [0, *accumulate(n + pad for n, pad in zip(sizes, pads, strict=True))]
    ranks = len(slots[FP32])
    end = max((s + n for s, n in zip(starts, sizes, strict=False)), default=0)
    part = max(tensors[0].shape[0] for tensors in slots.values())
    if part * ranks < end or (ranks > 1 and part * ranks - starts[-1] >= 2 * ranks + max(pads, default=0)):
        raise Damaged(
            f"{where}: {ranks} partitions of {part} elements; the parameters with their paddings are {starts[-1]}"
        )
    names = list(shapes)
    found = {name: Slots({slot: t[0].dtype for slot, t in slots.items()}, {}, step) for name in names}
    for slot, tensors in slots.items():
        for name in names:
            found[name].runs[slot] = []
        for rank, tensor in enumerate(tensors):
            low, high = min(rank * part, end), min((rank + 1) * part, end)
            if tensor.shape[0] < high - low:
                raise Damaged(f"{where}: rank {rank} has {tensor.shape[0]} elements of {slot[:80]}, not {high - low}")
            number = max(bisect_right(starts, low) - 1, 0)
            while number < len(names) and starts[number] < high:
                first, last = max(starts[number], low), min(starts[number] + sizes[number], high)
                if first < last:
                    place = _place(tensor, first - low)
                    found[names[number]].runs[slot].append(Run(first - starts[number], last - first, place))
                number += 1
    return found


def _place(tensor: StoredTensor, element: int) -> tuple[str, int]:
    key, at = tensor.where
    return key, at + element * DTYPES[tensor.dtype].itemsize


# ---- stage 3 ----------------------------------------------------------------------------------------------------


def _stage3(files: Files, model: ModelState, states: Sequence[Pickled]) -> _Read:
    inner = [Pickled(state.where, state.mapping("optimizer_state_dict")) for state in states]
    masters = [state.sequence("fp32_flat_groups") for state in states]
    hyper = groups_of(inner[0].root.get("param_groups"), inner[0].where)
    count = len(model.shapes)
    if any(len(tensors) != count for tensors in masters):
        raise Damaged(f"{states[0].where} has {len(masters[0])} sub-groups, and there are {count} lists of shapes")
    members = [_members(group.pop("params", None), count, inner[0].where) for group in hyper]
    owner = {number: i for i, numbers in enumerate(members) for number in numbers}
    if sorted(number for numbers in members for number in numbers) != list(range(count)):
        raise Damaged(f"{inner[0].where}: its parameter groups do not have each of {count} sub-groups once")
    found = []
    for number, shapes in enumerate(model.shapes):
        where = f"{states[0].where}: sub-group {number}"
        each = [(_sub_state(s, number), m[number]) for s, m in zip(inner, masters, strict=True)]
        step = _step(files, each[0][0], hyper[owner[number]], None, where)
        found.append(_cut_each(_tensors(each, where), step, shapes, where))
    return hyper, members, found


def _members(value: Any, count: int, where: str) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(n) is int and 0 <= n < count for n in value):
        raise Damaged(f"{where}: a parameter group has the sub-groups {str(value)[:80]!r} of {count}")
    return list(value)


def _sub_state(state: Pickled, number: int) -> Mapping[Any, Any]:
    slots = state.mapping("state").get(number, {})
    if not isinstance(slots, Mapping):
        raise Damaged(f"{state.where}: the state of sub-group {number} is no dict")
    return slots


def _cut_each(
    tensors: Mapping[str, list[StoredTensor]], step: float | None, shapes: Mapping[str, Shape], where: str
) -> dict[str, Slots]:
    """Find each rank's piece of every parameter in the rank's flat tensor."""
    ranks = len(tensors[FP32])
    found = {}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        per = -(-size // ranks)
        slots = Slots({slot: t[0].dtype for slot, t in tensors.items()}, {}, step)
        for slot, parts in tensors.items():
            runs = slots.runs[slot] = []
            for rank, tensor in enumerate(parts):
                real = max(0, min(per, size - rank * per))
                if at + real > tensor.shape[0]:
                    raise Damaged(
                        f"{where}: rank {rank} has {tensor.shape[0]} elements of {slot[:80]}, too few for"
                        f" {name[:200]!r}"
                    )
                if real:
                    runs.append(Run(rank * per, real, _place(tensor, at)))
        found[name] = slots
        at += per
    longest = max((t.shape[0] for t in tensors[FP32]), default=0)
    if longest - at >= max(2 * ranks, 8):
        raise Damaged(f"{where}: a rank has {longest} elements, its parameters are {at}")
    return found


def cut_frozen(shape: Shape, fragments: Sequence[StoredTensor], where: str) -> list[Run]:
    """The runs of a parameter without gradients that stage 3 cut, given every rank's fragment."""
    size, per = math.prod(shape), -(-math.prod(shape) // len(fragments))
    runs = []
    for rank, tensor in enumerate(fragments):
        real = max(0, min(per, size - rank * per))
        if flat(tensor, where).shape[0] < real:
            raise Damaged(f"{where}: rank {rank} has {tensor.shape[0]} elements, not {real}")
        if real:
            runs.append(Run(rank * per, real, _place(tensor, 0)))
    return runs
