"""The small languages inside layout rules and name maps: patterns of names, and sizes.

A pattern is a name with holes: `model.layers.{layer}.mlp.{what:gate_proj|up_proj}.weight`

    {layer}, {expert}    a number
    {word}               anything up to the next "."
    {word:a|b}           one of these words
    {word:*}             anything; a name that a pattern without this takes is not taken by one with it

A size is an integer, or arithmetic on variables: `heads * head_dim`, with + - * // and parentheses.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from ckptsvc.errors import InvalidInput, LayoutError

Size = int | str
"""A size as it is written."""

NUMBERS = ("layer", "expert")
"""The holes that are numbers."""

_HOLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]+))?\}")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_MOST_DIGITS = 9
_MOST_CHARACTERS = 500


class Pattern:
    """A name with holes.

    Attributes:
        text: as it is written.
        holes: names of the holes, in order.
        wide: whether one of them takes anything.
    """

    def __init__(self, text: str) -> None:
        """Raises InvalidInput if it is no pattern."""
        if not text or len(text) > _MOST_CHARACTERS:
            raise InvalidInput(f"a pattern of {len(text)} characters: 1 to {_MOST_CHARACTERS} are allowed")
        self.text = text
        self.holes: tuple[str, ...] = tuple(hole[1] for hole in _HOLE.finditer(text))
        self.wide = any(hole[2] == "*" for hole in _HOLE.finditer(text))
        literals = _HOLE.split(text)[::3]
        if any("{" in part or "}" in part for part in literals):
            raise InvalidInput(f"{text!r} is no pattern: holes are {{word}}, {{word:a|b}} or {{word:*}}")
        if len(set(self.holes)) < len(self.holes):
            raise InvalidInput(f"{text!r} has two holes of one name")
        pieces = [re.escape(literals[0])]
        for hole, literal in zip(_HOLE.finditer(text), literals[1:], strict=True):
            pieces += [f"(?P<{hole[1]}>{_allowed(hole[1], hole[2])})", re.escape(literal)]
        self._expression = re.compile("".join(pieces))

    def match(self, name: str) -> dict[str, str] | None:
        """What is in the holes, or None if the name is no such name."""
        found = self._expression.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with these values in the holes."""
        return _HOLE.sub(lambda hole: values[hole[1]], self.text)

    def literal_number(self) -> bool:
        """Whether a number between dots is spelled out."""
        return any(part.isdigit() for part in self.text.split("."))


def skeleton(name: str) -> str:
    """The name with every number that stands between dots replaced: names alike have the same."""
    return ".".join(["#" if part.isdigit() else part for part in name.split(".")])


def texts(value: object, where: str) -> list[str]:
    """A text or a list of texts of a TOML document, as a list.

    Raises:
        InvalidInput: it is something else; `where` says what.
    """
    found = value if isinstance(value, list) else [value]
    wrong = [text for text in found if not isinstance(text, str)]
    if wrong:
        raise InvalidInput(f"{where}: {wrong[0]!r} is no text")
    return [str(text) for text in found]


def sizes(value: Any) -> tuple[Size, ...]:
    """A size or a list of sizes of a TOML document.

    Raises:
        InvalidInput: one is no size.
    """
    found = value if isinstance(value, list) else [value]
    for size in found:
        if isinstance(size, str):
            _parsed(size)
        elif not isinstance(size, int) or isinstance(size, bool):
            raise InvalidInput(f"{size!r} is no size", hint="a size is an integer or as in 'heads * head_dim'")
    return tuple(found)


def evaluate(size: str | int, variables: Mapping[str, int]) -> int:
    """The value of a size.

    Raises:
        InvalidInput: it is not of that form.
        LayoutError: a variable has no value.
    """
    if isinstance(size, int):
        return size
    try:
        return _value(_parsed(size).body, variables)
    except KeyError as missing:
        name = str(missing.args[0])
        raise LayoutError(
            f"{size!r} needs the variable {name!r}, which neither the checkpoint says nor you",
            hint=f"give it, as in --variable {name}=8",
        ) from None
    except ZeroDivisionError:
        raise LayoutError(f"{size!r} divides by zero") from None


@lru_cache(maxsize=4096)
def _parsed(size: str) -> ast.Expression:
    if len(size) > _MOST_CHARACTERS:
        raise InvalidInput(f"a size of {len(size)} characters")
    try:
        tree = ast.parse(size.strip(), mode="eval")
        _check(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InvalidInput(f"{size!r} is no size", hint="a size is as in 'heads * head_dim'") from None
    return tree


def _check(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool) and value < 1 << 62:
            return
        case ast.Name():
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left)
            _check(right)
        case _:
            raise ValueError


def _value(node: ast.expr, variables: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return variables[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, variables), _value(right, variables))
    raise AssertionError


def _allowed(name: str, choices: str | None) -> str:
    if name in NUMBERS:
        if choices is not None:
            raise InvalidInput(f"{{{name}:{choices}}}: {name} is always a number")
        return rf"[0-9]{{1,{_MOST_DIGITS}}}"
    if choices is None:
        return "[^.]+"
    if choices == "*":
        return ".+"
    return "|".join(re.escape(choice) for choice in choices.split("|"))
