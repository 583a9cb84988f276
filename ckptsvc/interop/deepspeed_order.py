"""Stage 0: the optimizer's state is numbered, and nothing in the file says which parameter a number is.

The numbers count through the groups in the order in which the job gave its parameters to the optimizer. Three things
can say which that was: a list of names from the user, names that the optimizer kept (`param_names`), or the shapes, if
the parameters of each group are in the order of the module and there is only one way to deal them out.
"""

from __future__ import annotations

import fnmatch
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format.document import join
from ckptsvc.geometry.box import Box
from ckptsvc.interop.deepspeed_document import Groups
from ckptsvc.interop.deepspeed_files import ModelState, Shape, groups_of, scalar
from ckptsvc.interop.files import Files, LocalFiles
from ckptsvc.interop.logical import MODEL, STATE, Foreign, Note
from ckptsvc.interop.torch_file import StoredTensor
from ckptsvc.types import TensorMeta

MAX_STATES = 100_000
"""Where the shapes leave more open than this, they are taken as ambiguous."""


def optimizer_of_stage0(files: Files, foreign: Foreign, model: ModelState, options: Mapping[str, str]) -> Groups | None:
    """Add the optimizer's state under the names of its parameters.

    Args:
        files: of the checkpoint.
        foreign: has the model's tensors already; takes the optimizer's, and notes.
        model: the model states.
        options: `params`, the path of a JSON file with the names of each group's parameters; `frozen`, globs of names
            that the optimizer has not.

    Returns:
        the groups, or None if there is no optimizer or its parameters cannot be named.

    Raises:
        InvalidInput: the list cannot be read, or does not fit.
        Damaged: the state contradicts the module.
    """
    where = model.pickled.where
    optimizer = model.pickled.mapping("optimizer", optional=True)
    states = optimizer.get("state")
    if not isinstance(states, Mapping):
        foreign.notes.append(Note("lost", f"{where} has no optimizer state that is understood"))
        return None
    groups = groups_of(optimizer.get("param_groups"), where)
    numbers = [_numbers(group.get("params"), where) for group in groups]
    names = _names(foreign, model, states, groups, numbers, options)
    if names is None:
        what = (
            "the optimizer's state: its parameters are numbered, and nothing says which they are;"
            " give params=FILE, a JSON list of names for each group; or frozen=PATTERN,..., if some are"
        )
        foreign.notes.append(Note("lost", what))
        return None
    for ids, own in zip(numbers, names, strict=True):
        for number, name in zip(ids, own, strict=True):
            _add_state(files, foreign, name, states.get(number, {}), f"{where}: optimizer state {number}")
    return [
        ({key: value for key, value in group.items() if key not in ("params", "param_names")}, own)
        for group, own in zip(groups, names, strict=True)
    ]


def _numbers(value: Any, where: str) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(n) is int for n in value):
        raise Damaged(f"{where}: the parameters of a group are {str(value)[:80]!r}")
    return list(value)


def _names(
    foreign: Foreign,
    model: ModelState,
    states: Mapping[Any, Any],
    groups: Sequence[Mapping[str, Any]],
    numbers: Sequence[Sequence[int]],
    options: Mapping[str, str],
) -> list[list[str]] | None:
    if listed := options.get("params", ""):
        names = _read_list(listed)
    elif all(group.get("param_names") for group in groups):
        names = [[str(name) for name in group["param_names"]] for group in groups]
    else:
        shapes = [[_shape(states.get(n)) for n in ids] for ids in numbers]
        frozen = options.get("frozen", "").split(",")
        known = [(n, s) for n, s in _parameters(model) if not any(fnmatch.fnmatchcase(n, p) for p in frozen)]
        found = _dealt(known, shapes)
        if found is None:
            return None
        what = (
            "parameters of the optimizer were named by their shapes and the module's order, which fit in one way only"
        )
        foreign.notes.append(Note("warning", what))
        names = found
    if [len(own) for own in names] != [len(ids) for ids in numbers]:
        raise InvalidInput(
            f"{listed or model.pickled.where} names {[len(own) for own in names]} parameters, and the optimizer's"
            f" groups have {[len(ids) for ids in numbers]}"
        )
    return names


def _read_list(path: str) -> list[list[str]]:
    files = LocalFiles(Path(path).absolute())
    try:
        return msgspec.json.decode(files.read(files.only, 1 << 28), type=list[list[str]])
    except msgspec.MsgspecError as error:
        raise InvalidInput(f"{path} is not a JSON list of lists of names: {error}") from None
    finally:
        files.close()


def _shape(state: Any) -> Shape | None:
    """The shape of a parameter as its state has it."""
    tensors = [t for t in state.values() if isinstance(t, StoredTensor)] if isinstance(state, Mapping) else []
    return max((t.shape for t in tensors), key=lambda shape: (len(shape), math.prod(shape)), default=None)


def _parameters(model: ModelState) -> list[tuple[str, Shape]]:
    """What may be parameters: the module's tensors without buffers, tied ones once."""
    seen = set()
    found = []
    for name, tensor in (model.module or {}).items():
        place = (*tensor.where, tensor.shape, tensor.strides)
        if name not in model.buffers and name not in model.shared and place not in seen:
            seen.add(place)
            found.append((name, tensor.shape))
    return found


def _dealt(parameters: Sequence[tuple[str, Shape]], groups: Sequence[Sequence[Shape | None]]) -> list[list[str]] | None:
    """Deal the parameters out to the groups in order, leaving frozen ones out; None unless there is just one way."""
    spare = len(parameters) - sum(map(len, groups))
    if spare < 0 or any(shape is None for group in groups for shape in group):
        return None
    start = (0,) * len(groups)
    ways: list[dict[tuple[int, ...], tuple[int, int]]] = [{start: (1, -1)}]  # positions -> (ways to get there, last)
    for seen, (_, shape) in enumerate(parameters):
        following: dict[tuple[int, ...], tuple[int, int]] = {}
        for at, (count, _) in ways[-1].items():
            choices = [g for g, i in enumerate(at) if i < len(groups[g]) and groups[g][i] == shape]
            if seen - sum(at) < spare:
                choices.append(-1)
            for g in choices:
                after = at if g < 0 else (*at[:g], at[g] + 1, *at[g + 1 :])
                following[after] = (count + following.get(after, (0, g))[0], g)
        if len(following) > MAX_STATES:
            return None
        ways.append(following)
    end = tuple(map(len, groups))
    if ways[-1].get(end, (0, 0))[0] != 1:
        return None
    names: list[list[str]] = [[] for _ in groups]
    for (name, _), reached in zip(reversed(parameters), reversed(ways), strict=False):
        g = reached[end][1]
        if g >= 0:
            names[g].append(name)
            end = (*end[:g], end[g] - 1, *end[g + 1 :])
    return [own[::-1] for own in names]


def _add_state(files: Files, foreign: Foreign, name: str, state: Any, where: str) -> None:
    model = join(MODEL.rstrip("/"), name)
    if model not in foreign:
        raise InvalidInput(f"{where} is said to be that of {name[:200]!r}, which is no tensor of the module")
    shape = foreign.meta(model).shape
    for slot, value in state.items() if isinstance(state, Mapping) else ():
        logical = join(STATE.rstrip("/"), name, slot)
        if slot == "step":
            if (step := scalar(files, value, where)) is not None:
                foreign.add_value(TensorMeta(logical, "float32", ()), struct.pack("<f", step))
        elif isinstance(value, StoredTensor):
            if value.shape != shape:
                raise Damaged(f"{where} has {list(value.shape)} elements of {slot}; {name[:200]} is {list(shape)}")
            foreign.add(TensorMeta(logical, value.dtype, shape), Box.full(shape), value.where, value.block())
