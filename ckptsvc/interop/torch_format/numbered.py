"""Optimizer state under numbers: `torch.optim` counts parameters through its groups, and names them only if told.

State dicts of optimizers made from `model.named_parameters()` have `param_names` in their groups. For others the user
must say the names: shapes do not tell which is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptsvc.errors import InvalidInput
from ckptsvc.format.document import join, split
from ckptsvc.interop.logical import STATE, Foreign, Note


def names_of(groups: Sequence[dict[str, Any]], option: str | None, what: str) -> list[str] | None:
    """The parameters' names in the order of their numbers; None if the state is to be left out.

    Args:
        groups: the parameter groups.
        option: a file with a name in each line; "no": leave it out; None: the groups say the names.
        what: the checkpoint, for messages.

    Raises:
        InvalidInput: neither the groups nor the user say them, or not as many as there are parameters.
    """
    if option == "no":
        return None
    names = [str(name) for group in groups for name in group.get("param_names") or ()]
    if option is not None:
        try:
            names = Path(option).read_text().split()
        except (OSError, ValueError) as error:
            raise InvalidInput(f"names={option}: the file cannot be read: {error}") from None
    count = sum(len(group["params"]) for group in groups)
    if len(names) != count or len(set(names)) != count:
        raise InvalidInput(
            f"{what}: its optimizer knows {count} parameters by number, and {len(set(names))} names are known",
            hint="names=FILE gives them, one in each line, in the order of optimizer.param_groups; names=no leaves the"
            " optimizer's state out",
        )
    return names


def give_names(foreign: Foreign, groups: list[dict[str, Any]], option: str | None) -> None:
    """Call state by the names of parameters; the groups are changed in place.

    Args:
        foreign: its optimizer's state is under numbers.
        groups: the parameter groups, whose "params" are numbers.
        option: see `names_of`.

    Raises:
        InvalidInput: as `names_of`; or there is state of a number that is in no group.
    """
    state = [name for name in foreign.names() if name.startswith(STATE)]
    names = names_of(groups, option, foreign.origin)
    if names is None:
        for name in state:
            foreign.drop(name)
        groups.clear()
        foreign.notes.append(Note("lost", "the optimizer's state, whose parameters have numbers and no names"))
        return
    numbers = [str(number) for group in groups for number in group["params"]]
    known = dict(zip(numbers, names, strict=True))
    for name in state:
        _, _, number, *slot = split(name)
        if number not in known:
            raise InvalidInput(f"{foreign.origin}: there is optimizer state of parameter {number}, which no group has")
        foreign.rename(name, join(STATE[:-1], known[number], *slot))
    for group in groups:
        group["params"] = [known[str(number)] for number in group["params"]]
        group.pop("param_names", None)
