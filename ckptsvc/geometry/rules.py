"""Rules that say, for every tensor of a model, how a parallel layout divides it: a small TOML language.

    [[rule]]
    name = "model.layers.{layer}.self_attn.o_proj.weight"
    cut = 1

    [[rule]]
    name = "model.layers.{layer}.self_attn.qkv_proj.{kind}"
    cut = 0
    sections = ["heads * head_dim", "kv_heads * head_dim", "kv_heads * head_dim"]
    whole = ["heads", "kv_heads", "kv_heads"]

    name      a pattern (`geometry.patterns`), or a list of them
    stage     "layer": the stage that holds layer {layer} (the default where the name has it); "first", "last", "all",
              or a list of these
    cut       the dimension that tensor parallelism divides; without it every rank has the whole
    sections  the cut dimension is these parts one after another, each divided by itself: a number of equal ones, or
              their sizes
    whole     how many units (heads) the dimension, or each section, has: the cut goes between them; where there are
              more ranks than units, through them
    copies    true: where there are more ranks than units, ranks hold copies of a unit and none is cut
    experts   the dimension that is experts, where they are stacked; a name with {expert} has one each
    pad       the dimension is made a multiple of this (padded vocabulary); what is added holds nothing of the tensor
    tied      a name: where no tensor has that name, the last stage holds a copy of this one under it
    uneven    true: cut as `torch.chunk` cuts where it does not divide

A tensor belongs to exactly one rule. Sizes are integers or arithmetic on variables ("heads * head_dim", "128 * tp").
A {layer} beyond the last (the heads of multi-token prediction) is on the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.geometry.layout import Piece
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.patterns import Pattern, Size, evaluate, sizes, skeleton, texts

_MOST_SECTIONS = 1000  # of a dimension that is empty

STAGES = ("layer", "first", "last", "all")


class Rule(msgspec.Struct, frozen=True):
    """One rule; see the module for what its attributes mean.

    Attributes:
        number: its place in the list, from 1.
    """

    number: int
    name: tuple[Pattern, ...]
    stage: tuple[str, ...]
    cut: int | None = None
    sections: tuple[Size, ...] = (1,)
    whole: tuple[Size, ...] = ()
    copies: bool = False
    experts: int | None = None
    pad: Size | None = None
    uneven: bool = False
    tied: str = ""

    def __str__(self) -> str:
        return f"rule {self.number} ({self.name[0].text}{', ...' if len(self.name) > 1 else ''})"

    @property
    def is_expert(self) -> bool:
        """Whether it is about experts."""
        return self.experts is not None or "expert" in self.name[0].holes


class Claim(NamedTuple):
    """A rule has taken a tensor.

    Attributes:
        rule: which.
        pattern: which of its patterns.
        values: what is in the holes of the pattern.
    """

    rule: Rule
    pattern: Pattern
    values: dict[str, str]

    @property
    def layer(self) -> int | None:
        """The layer, if the name has one."""
        return int(self.values["layer"]) if "layer" in self.values else None

    @property
    def expert(self) -> int | None:
        """The expert, if the name has one."""
        return int(self.values["expert"]) if "expert" in self.values else None


class Local(NamedTuple):
    """What a rank holds of one tensor.

    Attributes:
        shape: of the rank's local tensor.
        pieces: boxes of the logical tensor and where they are in the local one. They do not overlap; elements of
            the local tensor that are in none are padding.
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def padding(self) -> int:
        """Elements of the local tensor that are nothing of the logical one."""
        return Box.full(self.shape).size - sum(piece.local.size for piece in self.pieces)


class Rules:
    """A list of rules.

    Attributes:
        rules: in the order they were written.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._by_skeleton: dict[str, list[tuple[Rule, Pattern]]] | None = {}
        if any(pattern.literal_number() for rule in self.rules for pattern in rule.name):
            self._by_skeleton = None  # names that differ in a number may belong to different rules

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, origin: str = "the rules") -> Rules:
        """The rules of a TOML document (its `rule` tables).

        Args:
            table: as `tomllib` reads it; other keys than `rule` are left to others.
            origin: the file, for messages.

        Raises:
            InvalidInput: a rule is not of the form that the module describes.
        """
        rows = table.get("rule", [])
        if not isinstance(rows, list) or not rows:
            raise InvalidInput(f"{origin}: there are no rules", hint="each begins with [[rule]]")
        return cls(_rule(number, row, origin) for number, row in enumerate(rows, 1))

    def claims(self, name: str) -> list[Claim]:
        """All rules that take a tensor; it should be one."""
        if self._by_skeleton is None:
            candidates = self._patterns()
        else:
            key = skeleton(name)
            if key not in self._by_skeleton:
                self._by_skeleton[key] = [c for c in self._patterns() if c[1].match(name) is not None]
            candidates = self._by_skeleton[key]
        taken: dict[int, Claim] = {}
        for rule, pattern in candidates:
            values = pattern.match(name)
            if values is not None:
                taken.setdefault(rule.number, Claim(rule, pattern, values))
        narrow = [claim for claim in taken.values() if not claim.pattern.wide]
        return narrow or list(taken.values())

    def _patterns(self) -> list[tuple[Rule, Pattern]]:
        return [(rule, pattern) for rule in self.rules for pattern in rule.name]


def local_part(
    name: str, shape: Shape, rule: Rule, parallel: Parallel, variables: Mapping[str, int], tp: int, ep: int
) -> Local:
    """What the ranks at tensor-parallel rank `tp` and expert-parallel rank `ep` hold of a tensor that their stage has.

    Args:
        name: of the tensor, for messages.
        shape: its global shape.
        rule: the rule that takes it.
        parallel: the layout.
        variables: values of the variables.
        tp: tensor-parallel rank (expert tensor-parallel for experts).
        ep: expert-parallel rank; only stacked experts are divided by it here.

    Raises:
        LayoutError: it does not divide; names tensor, rule and numbers.
    """
    for what, dim in (("cut", rule.cut), ("experts", rule.experts)):
        if dim is not None and dim >= len(shape):
            raise LayoutError(f"{name} {list(shape)} has no dimension {dim}, which {rule} says as {what!r}")
    held: list[list[tuple[int, int]]] = [[(0, n)] for n in shape]
    local = list(shape)
    if rule.experts is not None:
        n = shape[rule.experts]
        if n % parallel.ep:
            raise LayoutError(f"{name}: {n} experts cannot be divided over ep={parallel.ep}, as {rule} says")
        local[rule.experts] = n // parallel.ep
        held[rule.experts] = [(ep * (n // parallel.ep), n // parallel.ep)]
    if rule.cut is not None:
        ranks = parallel.expert_tp if rule.is_expert else parallel.tp
        sized = {"tp": ranks, **variables}
        cutter = _Cutter(name, rule, parallel.uneven or rule.uneven, ranks, tp, sized)
        held[rule.cut], local[rule.cut] = cutter.cut(shape[rule.cut])
    return Local(tuple(local), tuple(_pieces(held)))


class _Cutter(NamedTuple):
    """Divides the cut dimension of one tensor for one rank."""

    name: str
    rule: Rule
    uneven: bool
    ranks: int
    rank: int
    variables: Mapping[str, int]

    def cut(self, size: int) -> tuple[list[tuple[int, int]], int]:
        """The intervals (first, length) that the rank holds, one after another in its tensor, and the local size."""
        if self.rule.pad is not None:
            return self._padded(size)
        if self.ranks == 1:
            return [(0, size)], size
        intervals: list[tuple[int, int]] = []
        first = 0
        sections = self._sections(size)
        wholes = self.rule.whole or (None,) * len(sections)
        if len(wholes) == 1:
            wholes = wholes * len(sections)
        if len(wholes) != len(sections):
            raise LayoutError(f"{self.name}: {self.rule} has {len(wholes)} units for {len(sections)} sections")
        for section, whole in zip(sections, wholes, strict=True):
            low, length = self._chunk(section, whole)
            if intervals and sum(intervals[-1]) == first + low:
                intervals[-1] = (intervals[-1][0], intervals[-1][1] + length)
            elif length:
                intervals.append((first + low, length))
            first += section
        return intervals, sum(length for _, length in intervals)

    def _sections(self, size: int) -> list[int]:
        given = self.rule.sections
        if len(given) == 1:
            number = evaluate(given[0], self.variables)
            if not 1 <= number <= max(size, _MOST_SECTIONS) or size % number:
                raise LayoutError(f"{self.name}: {self.rule} says {number} equal sections, and the dimension is {size}")
            return [size // number] * number
        sizes = [evaluate(item, self.variables) for item in given]
        if sum(sizes) != size or min(sizes) < 0:
            raise LayoutError(
                f"{self.name}: {self.rule} says sections of {' + '.join(map(str, sizes))} = {sum(sizes)},"
                f" and the dimension is {size}"
            )
        return sizes

    def _chunk(self, size: int, whole: Size | None) -> tuple[int, int]:
        """(first, length) of the rank's part of `size`."""
        units = size if whole is None else evaluate(whole, self.variables)
        if units < 1 or size % units:
            if units == size == 0:
                return 0, 0
            raise LayoutError(f"{self.name}: {self.rule} says {units} units, which do not divide {size}")
        ranks, rank = self.ranks, self.rank
        if ranks > units and ranks % units == 0 and size:
            if self.rule.copies:
                ranks, rank = units, rank * units // ranks
            else:
                units = size  # the cut goes through the units
        if units % ranks == 0:
            length = size // ranks
            return rank * length, length
        if not self.uneven:
            unit = "" if units == size else f" ({units} units of {size // units})"
            raise LayoutError(
                f"{self.name}: {size}{unit} cannot be divided over tp={self.ranks}, as {self.rule} says",
                hint="take another degree, or say uneven=1 to cut as torch.chunk does",
            )
        unit_size, chunk = size // units, -(-units // ranks)
        low, high = min(rank * chunk, units), min((rank + 1) * chunk, units)
        return low * unit_size, (high - low) * unit_size

    def _padded(self, size: int) -> tuple[list[tuple[int, int]], int]:
        multiple = 1 if self.rule.pad is None else evaluate(self.rule.pad, self.variables)
        if multiple < 1:
            raise LayoutError(f"{self.name}: {self.rule} pads to a multiple of {multiple}")
        padded = -(-size // multiple) * multiple
        if padded % self.ranks:
            raise LayoutError(
                f"{self.name}: {self.rule} pads {size} to {padded}, which tp={self.ranks} does not divide"
            )
        length = padded // self.ranks
        low = min(self.rank * length, size)
        held = min(length, size - low)
        return ([(low, held)] if held else []), length


def _pieces(held: Sequence[Sequence[tuple[int, int]]]) -> Iterable[Piece]:
    """Every combination of the intervals held in each dimension, with its place in the local tensor."""
    places = [[0, *accumulate(length for _, length in intervals)] for intervals in held]
    numbered = [list(zip(intervals, place, strict=False)) for intervals, place in zip(held, places, strict=True)]
    for chosen in product(*numbered):
        shape = tuple(length for (_, length), _ in chosen)
        if 0 not in shape:
            yield Piece(Box(tuple(low for (low, _), _ in chosen), shape), Box(tuple(at for _, at in chosen), shape))


_KEYS = {"name", "stage", "cut", "sections", "whole", "copies", "experts", "pad", "uneven", "tied"}
_SIZES: dict[str, Any] = {"sections": 1, "whole": [], "pad": []}


def _rule(number: int, row: object, origin: str) -> Rule:
    where = f"{origin}: rule {number}"
    if not isinstance(row, dict) or not isinstance(row.get("name"), str | list) or not row["name"]:
        raise InvalidInput(f"{where} has no name")
    if unknown := row.keys() - _KEYS:
        raise InvalidInput(f"{where} says {min(unknown)!r}", hint=f"known are {', '.join(sorted(_KEYS))}")
    try:
        name = tuple(Pattern(text) for text in texts(row["name"], f"{where}: name"))
        sections, whole, pad = (sizes(row.get(key, default)) for key, default in _SIZES.items())
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error.what}", hint=error.hint) from None
    experts = {"expert" in pattern.holes for pattern in name}
    layers = all("layer" in pattern.holes for pattern in name)
    stage = tuple(texts(row.get("stage", "layer" if layers else []), f"{where}: stage"))
    if not stage or any(s not in STAGES for s in stage) or ("layer" in stage and (not layers or len(stage) > 1)):
        raise InvalidInput(f"{where} ({name[0].text}) needs a stage", hint=f"stage is one of {', '.join(STAGES)}")
    for key, kind in (("cut", int), ("experts", int), ("copies", bool), ("uneven", bool)):
        if key in row and (type(row[key]) is not kind or row[key] < 0):
            raise InvalidInput(f"{where}: {key} = {row[key]!r} is no {'dimension' if kind is int else 'true or false'}")
    if not isinstance(row.get("tied", ""), str):
        raise InvalidInput(f"{where}: tied is no name")
    cut, stacked = row.get("cut"), row.get("experts")
    if cut is None and row.keys() & {"sections", "whole", "copies", "pad", "uneven"}:
        raise InvalidInput(f"{where} says how to cut, but no dimension", hint="cut = 0")
    if len(experts) > 1 or (stacked is not None and (experts == {True} or stacked == cut)):
        raise InvalidInput(f"{where}: {{expert}} is in some of its names only, or experts are named and stacked")
    if isinstance(row.get("pad"), list):
        raise InvalidInput(f"{where}: pad is one size")
    if "pad" in row and row.keys() & {"sections", "whole"}:
        raise InvalidInput(f"{where}: a padded dimension has no sections and no units")
    return Rule(
        number, name, stage, cut, sections, whole,
        row.get("copies", False), stacked, pad[0] if pad else None, row.get("uneven", False), row.get("tied", ""),
    )  # fmt: skip
