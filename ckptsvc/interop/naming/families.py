"""The families of models that ship: their layout rules, their name maps, and what tells them apart.

Each is a TOML file in `maps`: `[[rule]]` (see `geometry.rules`) for its names, `[names]` (see `naming.names`)
for what another framework calls them. `include` takes over all that another family has. A file of the same form can be
given instead.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError, NotFound
from ckptsvc.format.checksum import digest128
from ckptsvc.geometry.box import Shape
from ckptsvc.geometry.patterns import evaluate, skeleton
from ckptsvc.geometry.rules import Rules
from ckptsvc.interop.naming.names import NameMap

_ROOM = resources.files("ckptsvc.interop.naming").joinpath("maps")
_DEPTH = 5
_LARGEST = 1 << 40


class Family(NamedTuple):
    """What a file of `interop/naming/maps` says.

    Attributes:
        name: the file's, without ending.
        title: what people call it.
        rules: its layout rules.
        names: its name map, if it has one.
        digest: of all it says, with what it includes.
    """

    name: str
    title: str
    rules: Rules
    names: NameMap | None
    digest: str


class Guess(NamedTuple):
    """How well a family fits a checkpoint.

    Attributes:
        family: its name.
        taken: parameters that exactly one of its rules takes.
        parameters: how many there are.
        used: the part of its rules that take something; tells apart families that include one another.
    """

    family: str
    taken: int
    parameters: int
    used: float

    @property
    def sure(self) -> float:
        """The part of the parameters that is taken, 0 to 1."""
        return self.taken / self.parameters if self.parameters else 0.0


def families() -> list[str]:
    """Names of the families that ship."""
    return [name for name, whole in _files().items() if whole]


@cache
def family(name: str) -> Family:
    """A family that ships.

    Raises:
        InvalidInput: there is none of that name.
    """
    if name not in families():
        raise InvalidInput(f"{name!r} is no family of models", hint=f"known are {', '.join(families())}")
    return _parsed(name, _shipped(name), name)


def read_family(path: str) -> Family:
    """A family from a file.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is not of the form.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"{path} cannot be read: {error}") from None
    return _parsed(Path(path).stem, text, path)


def guess(parameters: Iterable[str]) -> list[Guess]:
    """The families by how many of the parameters their rules take, the best first."""
    examples: dict[str, tuple[str, int]] = {}  # names that differ in numbers only are counted, not asked about
    for parameter in parameters:
        key = skeleton(parameter)
        examples[key] = (parameter, examples[key][1] + 1 if key in examples else 1)
    total = sum(number for _, number in examples.values())
    found = []
    for name in families():
        rules = family(name).rules
        claims = [(rules.claims(example), number) for example, number in examples.values()]
        taken = [(taken[0].rule.number, number) for taken, number in claims if len(taken) == 1]
        used = len({number for number, _ in taken}) / len(rules.rules)
        found.append(Guess(name, sum(number for _, number in taken), total, used))
    return sorted(found, key=lambda one: (-one.taken, -one.used))


def variables(document: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Values of the variables that rules and maps speak of.

    Args:
        document: the plain values of a checkpoint; a Hugging Face config or Megatron's arguments may be anywhere in it.
        shapes: of the parameters, by name; they decide where they show a size.
    """
    table = _variables()
    config = _config(document, {key for row in table.values() for key in row.get("keys", [])}) or {}
    if config.get("group_query_attention") is False:  # Megatron-LM then leaves its default, 1, in num_query_groups
        config = {key: value for key, value in config.items() if key != "num_query_groups"}
    found = {}
    for name, row in table.items():
        value = next((config[key] for key in row.get("keys", []) if config.get(key) is not None), None)
        if isinstance(value, int) and 0 <= value < _LARGEST:
            found[name] = int(value)
    found |= _measured(shapes)
    for name, row in table.items():
        if name not in found and "default" in row:
            try:
                found[name] = evaluate(row["default"], found)
            except LayoutError:  # what it is worked out from is not known either
                continue
    return found


def _measured(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """What the shapes of a model with Megatron's names show: whether its MLP is gated."""
    for name, shape in shapes.items():
        second = shapes.get(name.replace("linear_fc1", "linear_fc2"))
        if "linear_fc1.weight" in name and second is not None and len(shape) >= 2 and second[-1]:
            return {"gated": int(shape[-2] == 2 * second[-1])}
    return {}


def _config(node: Any, keys: set[str], depth: int = 0) -> dict[str, Any] | None:
    """The first mapping, outermost first, that has at least two of the keys."""
    if not isinstance(node, Mapping) or depth > _DEPTH:
        return None
    if len(keys & node.keys()) >= 2:
        return dict(node)
    return next((found for value in node.values() if (found := _config(value, keys, depth + 1))), None)


@cache
def _variables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_ROOM.joinpath("variables.toml").read_text("utf-8"))


@cache
def _files() -> dict[str, bool]:
    """Names of the files that ship, and whether each is a whole family or a part that others include."""
    names = sorted(file.name.removesuffix(".toml") for file in _ROOM.iterdir() if file.name.endswith(".toml"))
    return {name: "part" not in tomllib.loads(_shipped(name)) for name in names if name != "variables"}


def _shipped(name: str) -> str:
    return _ROOM.joinpath(f"{name}.toml").read_text("utf-8")


def _parsed(name: str, text: str, origin: str) -> Family:
    table = _table(text, origin)
    title = table.get("title", name)
    if not isinstance(title, str) or table.keys() - {"title", "rule", "names"}:
        raise InvalidInput(f"{origin} has a title, include, [[rule]] and [names], and nothing else")
    return Family(
        name,
        title,
        Rules.parse(table, origin=origin),
        NameMap.parse(table, origin=origin) if "names" in table else None,
        digest128(msgspec.json.encode(table)),
    )


def _table(text: str, origin: str, depth: int = 0) -> dict[str, Any]:
    """The TOML document, what it includes in front of its own."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{origin} is no TOML: {error}") from None
    include = table.pop("include", None)
    if include is None:
        return table
    if include not in _files() or depth > _DEPTH:
        raise InvalidInput(
            f"{origin} includes {include!r}, which is no family", hint=f"known are {', '.join(families())}"
        )
    base = _table(_shipped(include), include, depth + 1)
    base.pop("part", None)
    names, base_names = table.get("names"), base.get("names")
    if isinstance(names, dict) and isinstance(base_names, dict):
        if names.get("sides") != base_names.get("sides"):
            raise InvalidInput(f"{origin} and {include}, which it includes, have different sides")
        joined = {key: [*base_names.get(key, []), *_list(names, key, origin)] for key in ("pair", "drop")}
        base_names = {**base_names, **names, **joined}
    rules = [*base.get("rule", []), *_list(table, "rule", origin)]
    return {**base, **table, "rule": rules, **({"names": base_names or names} if base_names or names else {})}


def _list(table: dict[str, Any], key: str, origin: str) -> list[Any]:
    found = table.get(key, [])
    if not isinstance(found, list):
        raise InvalidInput(f"{origin}: {key} is no list")
    return found
