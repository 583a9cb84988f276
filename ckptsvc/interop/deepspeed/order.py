"""Which parameters the numbers of an optimizer's state stand for, where nothing in the file says it.

The numbers count through the groups in the order in which the job gave its parameters to the optimizer. Three things
can say which that was: a list of names from the user, names that the optimizer kept (`param_names`), or the shapes, if
the parameters of each group are in the order of the module and there is only one way to deal them out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ckptsvc.errors import InvalidInput
from ckptsvc.interop.deepspeed.files import ModelState, Shape
from ckptsvc.interop.naming.options import listed

MAX_STATES = 100_000
"""Where the shapes leave more open than this, they are taken as ambiguous."""


class Naming(msgspec.Struct, frozen=True):
    """The names of each group's parameters.

    Attributes:
        names: by group.
        is_concluded: whether they were concluded from the shapes.
    """

    names: list[list[str]]
    is_concluded: bool = False


def name_parameters(
    model: ModelState,
    groups: Sequence[Mapping[str, Any]],
    shapes: Sequence[Sequence[Shape | None]] | None,
    options: Mapping[str, str],
) -> Naming | None:
    """Name the parameters of an optimizer.

    Args:
        model: the model states.
        groups: the optimizer's groups.
        shapes: of the numbered parameters, by group; None if they are not known.
        options: `names`, the path of a file with the names of each group's parameters (see `naming`); `frozen`, globs
            of names that the optimizer has not.

    Returns:
        the names, or None if nothing says them.

    Raises:
        InvalidInput: the list cannot be read, or does not fit.
    """
    given = options.get("names", "")
    if given or (groups and all(group.get("param_names") for group in groups)):
        names = listed(given) if given else [[str(n) for n in group["param_names"]] for group in groups]
        found, expected = [len(own) for own in names], None if shapes is None else [len(own) for own in shapes]
        if len(names) != len(groups) or (expected is not None and found != expected):
            raise InvalidInput(
                f"{given or model.pickled.where} names {found} parameters; the {len(groups)} groups have {expected}"
            )
        unknown = next((n for own in names for n in own if n not in (model.module or {})), None)
        if unknown is not None:
            raise InvalidInput(
                f"{given or model.pickled.where} names {unknown[:200]!r}, which is no tensor of the module"
            )
        return Naming(names)
    frozen = options.get("frozen", "").split(",")
    known = [(n, s) for n, s in _parameters(model) if not any(fnmatch.fnmatchcase(n, glob) for glob in frozen)]
    dealt = _dealt(known, shapes) if shapes is not None else None
    return None if dealt is None else Naming(dealt, is_concluded=True)


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
