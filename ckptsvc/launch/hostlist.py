"""Slurm's short form of many node names: "n[1-3,7],gpu[01-16],login" (scontrol(1), show hostnames).

names = item *("," item)     item = 1*(text / "[" range *("," range) "]")     range = number ["-" number]

A number keeps the zeros that the first number of its range is written with: [08-10] is 08, 09, 10. Several brackets in
one item give every combination, the last one changing fastest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from ckptsvc.errors import InvalidInput

MAX_HOSTS = 1 << 16
"""Names in one list; the largest machines have about ten thousand nodes."""

MAX_TEXT = 1 << 20
"""Characters in one list."""

_ITEM = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9,-]+\])+")
_PART = re.compile(r"\[([^\]]*)\]|([^\[]+)")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def expand(text: str) -> list[str]:
    """The names, in order; one that is listed twice comes twice.

    Raises:
        InvalidInput: not such a list, or more than `MAX_HOSTS` names.
    """
    if len(text) > MAX_TEXT:
        raise InvalidInput(f"a list of nodes has {len(text)} characters; {MAX_TEXT} are allowed")
    names: list[str] = []
    for item in _items(text):
        names += _names(item, MAX_HOSTS - len(names))
    return names


def _items(text: str) -> Iterator[str]:
    """Split at the commas that are not in brackets."""
    at = 0
    while True:
        match = _ITEM.match(text, at)
        if match is None or text[match.end() : match.end() + 1] not in ("", ","):
            raise InvalidInput(f"{_short(text)} is not a list of nodes", hint='for example "n[1-3,7],login"')
        yield match[0]
        at = match.end() + 1
        if match.end() == len(text):
            return


def _names(item: str, most: int) -> list[str]:
    """The names of one item, at most so many."""
    parts: list[list[str]] = []
    count = 1
    for brackets, plain in _PART.findall(item):
        part = [plain] if plain else _numbers(brackets, most)
        count *= len(part)
        if count > most:
            raise InvalidInput(f"{_short(item)} stands for more than {MAX_HOSTS} nodes")
        parts.append(part)
    return ["".join(name) for name in itertools.product(*parts)]


def _numbers(brackets: str, most: int) -> list[str]:
    found: list[str] = []
    for part in brackets.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or last < first:
            raise InvalidInput(f"[{_short(brackets)}] in a list of nodes: {part!r} is not a range")
        if len(found) + last - first >= most:
            raise InvalidInput(f"[{_short(brackets)}] stands for more than {MAX_HOSTS} nodes")
        width = len(match[1])
        found += [str(number).zfill(width) for number in range(first, last + 1)]
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
