"""Name maps: one framework's names and shapes of a model's tensors, seen as another's, both ways.

A map is a list of pairs, in TOML, each of a left and a right side that hold the same elements:

    [names]
    sides = ["hf", "megatron"]
    # keep = true: what no pair takes keeps its name

    [[names.pair]]
    hf = ["model.layers.{layer}.self_attn.q_proj.weight", "...k_proj.weight", "...v_proj.weight"]
    megatron = "decoder.layers.{layer}.self_attention.linear_qkv.weight"
    sections = ["heads * head_dim", "kv_heads * head_dim", "kv_heads * head_dim"]
    groups = "kv_heads"

    (a side)   the name: a pattern (`geometry.patterns`); on the left also several, which are one after another, along
               dimension 0, in the right one
    sections   sizes of the parts that are joined, where they differ or one left tensor has several; or their number
    groups     the joined parts are interleaved: the first of so many equal shares of each, then the second of each, ...
    transpose  true: matrices of the left side are transposed (GPT-2's Conv1D)
    rows       how many rows there really are: the right side may have more, which are padding (vocabulary)
    form       {side = word}: a spelling of that side that is always understood, but written only on request (`forms`),
               or where there is no other
    when       {side = pattern}: read from that side only where a tensor so called exists
    unless     ... where it does not

`{layer}` or `{expert}` on one side only: on the other side that dimension is stacked, in front. `[[names.drop]]` lists
names of a side that have no counterpart, and why that is no loss.

Optimizer state goes the way of its parameter, its param groups too. The step of a joined tensor is that of its parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.patterns import NUMBERS, Pattern, Size, sizes, skeleton, texts

_KEYS = {"sections", "groups", "transpose", "rows", "form", "when", "unless"}
_SIZES: dict[str, Any] = {"sections": [], "groups": [], "rows": []}


class Pair(msgspec.Struct, frozen=True):
    """One pair; see the module.

    Attributes:
        number: its place in the list, from 1.
        left, right: the patterns.
    """

    number: int
    left: tuple[Pattern, ...]
    right: Pattern
    sections: tuple[Size, ...] = ()
    groups: Size = 1
    transpose: bool = False
    rows: Size | None = None
    form: tuple[str, str] = ("", "")
    when: tuple[Pattern | None, Pattern | None] = (None, None)
    unless: tuple[Pattern | None, Pattern | None] = (None, None)

    def __str__(self) -> str:
        return f"pair {self.number} ({self.left[0].text} = {self.right.text})"

    @property
    def stacked_right(self) -> tuple[str, ...]:
        """The holes of the left that are dimensions of the right."""
        return tuple(hole for hole in self.left[0].holes if hole not in self.right.holes)

    @property
    def stacked_left(self) -> tuple[str, ...]:
        """The holes of the right that are dimensions of the left."""
        return tuple(hole for hole in self.right.holes if hole not in self.left[0].holes)


class Drop(NamedTuple):
    """A name without a counterpart.

    Attributes:
        side: 0 left, 1 right.
        pattern: the name.
        why: the reason, for the output.
    """

    side: int
    pattern: Pattern
    why: str


class Match(NamedTuple):
    """A name that a pair takes.

    Attributes:
        pair: which.
        part: which of the patterns of the left side; 0 on the right.
        values: what is in the holes.
    """

    pair: Pair
    part: int
    values: dict[str, str]


class NameMap:
    """A list of pairs.

    Attributes:
        sides: names of the two sides.
        pairs: the pairs.
        drops: names that are left out.
        keep: whether names that no pair takes stay as they are; otherwise they are an error.
    """

    def __init__(
        self, sides: tuple[str, str], pairs: Sequence[Pair], drops: Sequence[Drop] = (), *, keep: bool = False
    ) -> None:
        self.sides = sides
        self.pairs = tuple(pairs)
        self.drops = tuple(drops)
        self.keep = keep
        self._known: tuple[dict[str, list[tuple[Pair, int, Pattern]]], ...] = ({}, {})
        patterns = [p for pair in pairs for p in (*pair.left, pair.right)]
        self._by_skeleton = not any(pattern.literal_number() for pattern in patterns)

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, origin: str = "the map") -> NameMap:
        """The map in a TOML document (its `names` table).

        Args:
            table: as `tomllib` reads it; other keys than `names` are left to others.
            origin: the file, for messages.

        Raises:
            InvalidInput: it is not of the form that the module describes.
        """
        names = table.get("names")
        sides = names.get("sides") if isinstance(names, dict) else None
        if not (isinstance(names, dict) and isinstance(sides, list) and len(sides) == 2 and sides[0] != sides[1]):
            raise InvalidInput(f"{origin} has no names with two sides", hint='sides = ["hf", "megatron"] under [names]')
        if not all(isinstance(side, str) and side not in _KEYS for side in sides):
            raise InvalidInput(f"{origin}: {sides} are no names of sides")
        both = (sides[0], sides[1])
        rows = [names.get(key, []) for key in ("pair", "drop")]
        if not all(isinstance(tables, list) and all(isinstance(row, dict) for row in tables) for tables in rows):
            raise InvalidInput(f"{origin}: pair and drop are lists of tables", hint="[[names.pair]]")
        if not rows[0]:
            raise InvalidInput(f"{origin} has no pairs", hint="each begins with [[names.pair]]")
        pairs = [_pair(number, row, both, f"{origin}: pair {number}") for number, row in enumerate(rows[0], 1)]
        drops = [drop for row in rows[1] for drop in _drops(row, both, f"{origin}: drop")]
        return cls(both, pairs, drops, keep=names.get("keep", False) is True)

    def match(self, name: str, side: int, existing: Collection[str] = (), forms: Collection[str] = ()) -> Match | None:
        """The pair that takes a name on a side (0 left, 1 right); None if there is none.

        Args:
            name: of the parameter.
            side: on which side the name is.
            existing: all names of that side, for `when` and `unless`.
            forms: forms of pairs that are wanted on the other side.

        Raises:
            LayoutError: several pairs take it.
        """
        found = []
        for pair, part, pattern in self._candidates(name, side):
            values = pattern.match(name)
            if values is not None and _applies(pair, side, values, existing):
                found.append(Match(pair, part, values))
        if len(found) > 1:
            written = [(m, m.pair.form[1 - side]) for m in found]
            found = [m for m, form in written if form in forms] or [m for m, form in written if not form] or found
            found = [m for m in found if not _pattern(m, side).wide] or found
        if len(found) > 1:
            raise LayoutError(f"{name} is taken by {found[0].pair} and by {found[1].pair}")
        return found[0] if found else None

    def dropped(self, name: str, side: int) -> Drop | None:
        """Whether a name is one that has no counterpart."""
        return next((drop for drop in self.drops if drop.side == side and drop.pattern.match(name) is not None), None)

    def _candidates(self, name: str, side: int) -> list[tuple[Pair, int, Pattern]]:
        key = skeleton(name) if self._by_skeleton else name
        known = self._known[side]
        if key not in known:
            known[key] = [c for c in self._patterns(side) if c[2].match(name) is not None]
        return known[key]

    def _patterns(self, side: int) -> Iterable[tuple[Pair, int, Pattern]]:
        for pair in self.pairs:
            for part, pattern in enumerate((pair.right,) if side else pair.left):
                yield pair, part, pattern


class Bound(NamedTuple):
    """A pair with values in the holes that both sides have: a set of left tensors and a set of right tensors.

    Attributes:
        pair: which.
        members: (part, values of all holes) -> name, on the side that is read.
    """

    pair: Pair
    members: dict[tuple[int, tuple[tuple[str, str], ...]], str]


def bind(
    names: Iterable[str], table: NameMap, side: int, forms: Collection[str] = ()
) -> tuple[list[Bound], list[str], list[tuple[str, Drop]]]:
    """Sort names by the pair that takes them: (bound pairs, names nobody takes, names that are left out).

    Raises:
        LayoutError: several pairs take a name, or two names are the same thing.
    """
    existing = dict.fromkeys(names)
    bound: dict[tuple[int, tuple[tuple[str, str], ...]], Bound] = {}
    unknown, dropped = [], []
    for name in existing:
        match = table.match(name, side, existing, forms)
        if match is None:
            drop = table.dropped(name, side)
            if drop is not None:
                dropped.append((name, drop))
            else:
                unknown.append(name)
            continue
        pair = match.pair
        shared = tuple((hole, match.values[hole]) for hole in pair.right.holes if hole in pair.left[0].holes)
        entry = bound.setdefault((pair.number, shared), Bound(pair, {}))
        key = match.part, tuple(sorted(match.values.items()))
        if key in entry.members:
            raise LayoutError(f"{entry.members[key]} and {name} are the same tensor by {pair}")
        entry.members[key] = name
    return list(bound.values()), unknown, dropped


def _pattern(match: Match, side: int) -> Pattern:
    return match.pair.right if side else match.pair.left[match.part]


def _applies(pair: Pair, side: int, values: Mapping[str, str], existing: Collection[str]) -> bool:
    when, unless = pair.when[side], pair.unless[side]
    if when is not None and when.fill(values) not in existing:
        return False
    return unless is None or unless.fill(values) not in existing


def _pair(number: int, row: dict[str, Any], sides: tuple[str, str], where: str) -> Pair:
    if unknown := row.keys() - _KEYS - set(sides):
        allowed = ", ".join([*sides, *sorted(_KEYS)])
        raise InvalidInput(f"{where} says {min(unknown)!r}", hint=f"known are {allowed}")
    if not all(row.get(side) for side in sides) or not isinstance(row[sides[1]], str):
        raise InvalidInput(f"{where} needs a name for {sides[0]} and one for {sides[1]}")
    if isinstance(row.get("groups"), list) or isinstance(row.get("rows"), list):
        raise InvalidInput(f"{where}: groups and rows are one size each")
    if not isinstance(row.get("transpose", False), bool):
        raise InvalidInput(f"{where}: transpose is true or false")
    try:
        left = tuple(Pattern(text) for text in texts(row[sides[0]], sides[0]))
        right = Pattern(row[sides[1]])
        form, when, unless = (_by_side(row, key, sides) for key in ("form", "when", "unless"))
        conditions = [tuple(Pattern(text) if text else None for text in both) for both in (when, unless)]
        sections, groups, rows = (sizes(row.get(key, default)) for key, default in _SIZES.items())
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error.what}", hint=error.hint) from None
    holes = set(left[0].holes)
    if any(set(pattern.holes) != holes for pattern in left):
        raise InvalidInput(f"{where}: the names of {sides[0]} have different holes")
    if alone := (holes ^ set(right.holes)) - set(NUMBERS):
        raise InvalidInput(f"{where}: {{{min(alone)}}} is on one side only")
    for both in conditions:
        if any(c is not None and set(c.holes) - h for c, h in zip(both, (holes, set(right.holes)), strict=True)):
            raise InvalidInput(f"{where}: a condition has a hole that its side has not")
    if len(left) > 1 and sections and len(sections) != len(left):
        raise InvalidInput(f"{where} has {len(sections)} sections for {len(left)} names")
    return Pair(
        number, left, right, sections, groups[0] if groups else 1, row.get("transpose", False),
        rows[0] if rows else None, form, (conditions[0][0], conditions[0][1]), (conditions[1][0], conditions[1][1]),
    )  # fmt: skip


def _by_side(row: dict[str, Any], key: str, sides: tuple[str, str]) -> tuple[str, str]:
    said = row.get(key, {})
    if not isinstance(said, dict) or any(side not in sides or not isinstance(said[side], str) for side in said):
        raise InvalidInput(f"{key} = {said!r} does not say a side and a text", hint=f'{key} = {{{sides[0]} = "..."}}')
    return said.get(sides[0], ""), said.get(sides[1], "")


def _drops(row: dict[str, Any], sides: tuple[str, str], where: str) -> Iterable[Drop]:
    why = row.get("why")
    if not isinstance(why, str) or row.keys() - {*sides, "why"}:
        raise InvalidInput(f"{where} is a side, and why")
    for side, key in enumerate(sides):
        for text in texts(row.get(key, []), f"{where}: {key}"):
            yield Drop(side, Pattern(text), why)
