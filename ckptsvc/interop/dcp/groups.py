"""Parameter groups of an optimizer, from the forms in which DCP checkpoints have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckptsvc.errors import Damaged
from ckptsvc.interop.logical import Note
from ckptsvc.interop.plain import put

Group = dict[str, Any]
"""Hyper-parameters, and "params": the names of the parameters."""


def by_number(found: Mapping[tuple[str | int, ...], Any], what: str) -> list[Group]:
    """Groups of the default form.

    Args:
        found: values by (number, hyper-parameter); or one value by () that is the whole list (torch before 2.4).
        what: for messages.

    Raises:
        Damaged: a key has no number, or a group is no dict.
    """
    groups: dict[int, Group] = {}
    for path, value in found.items():
        match path:
            case ():
                groups.update(enumerate(value if isinstance(value, list) else ()))
            case (int() as number,) if isinstance(value, dict):
                groups[number] = value
            case (int() as number, _, *_):
                put(groups.setdefault(number, {}), path[1:], value)
            case _:
                raise Damaged(f"{what}: it has a parameter group at {'.'.join(map(str, path))[:200]!r}")
    made = [groups[number] for number in sorted(groups)]
    if not all(isinstance(group, dict) for group in made):
        raise Damaged(f"{what}: its parameter groups are no groups")
    return [{**group, "params": list(group.get("params") or ())} for group in made]


def by_parameter(found: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    """Groups of flatten_optimizer_state_dict, which has none: parameters of equal hyper-parameters are one group.

    Nothing says their order; parameters are sorted by name, numbers in it by value, and groups by their first.

    Args:
        found: hyper-parameters by parameter.
    """
    groups: dict[str, Group] = {}
    for name in sorted(found, key=_natural):
        group = groups.setdefault(repr(sorted(found[name].items())), {**found[name], "params": []})
        group["params"].append(name)
    return list(groups.values())


def uneven(groups: list[Group]) -> list[Note]:
    """What to say of groups that lack hyper-parameters which others have."""
    keys = {key for group in groups for key in group}
    lacking = {key for group in groups for key in keys - group.keys()}
    what = f"some parameter groups have no {', '.join(sorted(lacking))}, which others have"
    return [Note("warning", what)] if lacking else []


def with_all(groups: list[Group], names: Iterable[str], dims: Callable[[str], int]) -> list[Note]:
    """Put parameters that have optimizer state and are in no group into one.

    Jobs with pipeline stages write the groups of one stage only. A parameter belongs where those are that have its name
    but for numbers ("layers.0.norm.weight") and as many dimensions; else where those with as many dimensions are; else
    to the largest group.

    Args:
        groups: changed in place.
        names: the parameters that have optimizer state.
        dims: how many dimensions a parameter has.

    Returns:
        What was done.
    """
    known = {name: i for i, group in enumerate(groups) for name in group["params"]}
    missing = [name for name in names if name not in known]
    if not missing:
        return []
    if not groups:
        return [Note("lost", f"no file has the optimizer's parameter groups; {len(missing)} parameters have state")]
    alike: dict[tuple[str, int], Counter[int]] = {}
    by_dims: dict[int, Counter[int]] = {}
    for name, i in known.items():
        alike.setdefault((_pattern(name), dims(name)), Counter())[i] += 1
        by_dims.setdefault(dims(name), Counter())[i] += 1
    sizes = Counter(known.values()) or Counter({0: 1})
    guessed = []
    for name in missing:
        same = alike.get((_pattern(name), dims(name)))
        if same is None or len(same) > 1:
            guessed.append(name)
        most = (same or by_dims.get(dims(name)) or sizes).most_common(1)
        groups[most[0][0]]["params"].append(name)
    what = f"{len(missing)} of {len(missing) + len(known)} parameters were in no group: one pipeline stage wrote them"
    if len(groups) == 1:
        return [Note("repaired", f"{what}; there is one group")]
    notes = [Note("repaired", f"{what}; they were put where parameters of the same name in other layers are")]
    if guessed:
        notes.append(
            Note("warning", f"{len(guessed)} parameters are in the group of others with as many dimensions, which is a"
                 f" guess: {', '.join(guessed[:5])}")
        )  # fmt: skip
    return notes


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)
