"""Options of formats: strings by name, checked so that a misspelt one is never silently ignored."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from ckptsvc.errors import InvalidInput


def known(options: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse options that the format does not have.

    Raises:
        InvalidInput: names the option and the nearest right one.
    """
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(names)) or 'none'}"
            raise InvalidInput(f"this format has no option {name!r}", hint=hint)


def choice(options: Mapping[str, str], name: str, values: Sequence[str]) -> str:
    """The value of an option that is one of a few words; the first of them is the default.

    Raises:
        InvalidInput: it is none of them.
    """
    value = options.get(name, values[0])
    if value not in values:
        raise InvalidInput(f"the option {name} cannot be {value!r}", hint=f"it is one of {', '.join(values)}")
    return value
