"""The arithmetic of name maps: which box of which tensor is which box of its counterpart, in either direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.geometry.patterns import evaluate
from ckptsvc.interop.naming.names import Bound, Pair

MOST = 1 << 20
"""A stacked tensor of more than so many is refused: its shape is damaged."""


class Source(NamedTuple):
    """A box of a wanted tensor and the box of the tensor it is; see `interop.views.Part`."""

    box: Box
    name: str
    base: Box
    order: tuple[int, ...] | None


class Recipe(NamedTuple):
    """What a tensor of the other side is made of.

    Attributes:
        name: its name.
        shape: its shape.
        sources: its parts.
        left_out: rows of the tensors it is made of that are in no tensor of this side (padding of a vocabulary).
            None: there may be some, and nobody says how many.
    """

    name: str
    shape: Shape
    sources: tuple[Source, ...]
    left_out: int | None = 0

    @property
    def made_of(self) -> list[str]:
        """Names of the tensors it is made of, each once."""
        return list(dict.fromkeys(source.name for source in self.sources))


class _Link(NamedTuple):
    """A box of the left tensor of a part and the box of the right tensor that it is, without stacked dimensions."""

    part: int
    left: Box
    right: Box


class _Sizes(NamedTuple):
    """Shapes without stacked dimensions: of the left tensors, of the right; and rows of padding of the right."""

    left: tuple[Shape, ...]
    right: Shape
    left_out: int | None


def recipes(bound: Bound, side: int, shapes: Mapping[str, Shape], variables: Mapping[str, int]) -> list[Recipe]:
    """The tensors of the other side that a bound pair makes.

    Args:
        bound: from `names.bind`.
        side: the side that is read: 0 left, 1 right.
        shapes: of the tensors of that side.
        variables: sizes that the map speaks of.

    Raises:
        LayoutError: a part is missing, or sizes contradict the map; names tensors, pair and numbers.
    """
    pair = bound.pair
    # Holes of the names that are read only are dimensions of what is made, and the other way round.
    inward, outward = pair.stacked_right, pair.stacked_left
    if side:
        inward, outward = outward, inward
    members = _arranged(bound, side, inward)
    indices = sorted({index for _, index in members})
    inner = {part: _same([shapes[members[part, i]] for i in indices], bound, len(outward)) for part, _ in members}
    depth = tuple(map(len, map(set, zip(*indices, strict=True)))) if inward else ()
    outer = next(shapes[name] for name in members.values())[: len(outward)]
    if prod(outer) > MOST:
        raise LayoutError(f"{next(iter(members.values()))}: {pair} would make {prod(outer):,} tensors of it")
    sizes = _resolve(bound, side, [inner[part] for part in sorted(inner)], variables)
    links = _links(pair, sizes, variables)
    shared = dict(next(iter(bound.members))[1])
    made = []
    for part, pattern in enumerate(pair.left if side else (pair.right,)):
        mine = [link for link in links if not side or link.part == part]
        shape = sizes.left[part] if side else sizes.right
        flipped = pair.transpose and len(shape) == 2
        order = (*(-1 for _ in depth), *(len(outer) + d for d in ((1, 0) if flipped else range(len(shape)))))
        plain = order == tuple(range(len(outer) + len(shape)))
        for place in product(*map(range, outer)):
            filled = shared | {hole: str(i) for hole, i in zip(outward, place, strict=True)}
            sources = []
            for index in indices:
                for link in mine:
                    target, source = (link.left, link.right) if side else (link.right, link.left)
                    name = members[0 if side else link.part, index]
                    box, base = _deep(index, target), _deep(place, source)
                    sources.append(Source(box, name, base, None if plain else order))
            made.append(Recipe(pattern.fill(filled), (*depth, *shape), tuple(sources), sizes.left_out))
    return made


def _deep(index: tuple[int, ...], box: Box) -> Box:
    return Box((*index, *box.origin), (*(1 for _ in index), *box.shape))


def _arranged(bound: Bound, side: int, inward: Sequence[str]) -> dict[tuple[int, tuple[int, ...]], str]:
    """(part, numbers in the holes that become dimensions) -> name; nothing is missing."""
    members = {
        (part, tuple(int(dict(values)[hole]) for hole in inward)): name
        for (part, values), name in bound.members.items()
    }
    known = next(iter(bound.members.values()))
    extents = [max(index[d] for _, index in members) + 1 for d in range(len(inward))]
    wanted = 1 if side else len(bound.pair.left)
    if prod(extents) * wanted == len(members):
        return members
    if prod(extents) > len(bound.members) * 1000:
        raise LayoutError(f"{known}: numbers up to {max(extents):,}, and {len(members):,} tensors: some are missing")
    values = dict(next(iter(bound.members))[1])
    for part, index in product(range(wanted), product(*map(range, extents))):
        if (part, index) not in members:
            pattern = bound.pair.right if side else bound.pair.left[part]
            name = pattern.fill(values | {hole: str(i) for hole, i in zip(inward, index, strict=True)})
            raise LayoutError(f"{name} is missing: {bound.pair} makes one tensor of it and of {known}")
    raise AssertionError


def _same(shapes: Sequence[Shape], bound: Bound, skipped: int) -> Shape:
    name = next(iter(bound.members.values()))
    if len(set(shapes)) > 1:
        raise LayoutError(f"{name} and others that {bound.pair} stacks have different shapes: {sorted(set(shapes))}")
    if len(shapes[0]) < skipped:
        raise LayoutError(f"{name} {list(shapes[0])} has fewer dimensions than {bound.pair} says")
    return shapes[0][skipped:]


def _resolve(bound: Bound, side: int, inner: Sequence[Shape], variables: Mapping[str, int]) -> _Sizes:
    pair, name = bound.pair, next(iter(bound.members.values()))
    if any(not shape for shape in inner):
        if len(pair.left) > 1 or pair.sections:
            raise LayoutError(f"{name} is a number: {pair} cannot join or split it")
        return _Sizes((inner[0],), inner[0], 0)
    shapes = [_turned(pair, shape) for shape in inner] if side == 0 else list(inner)
    if side == 0:
        if len({shape[1:] for shape in shapes}) > 1:
            raise LayoutError(f"{name}: {pair} joins tensors of shapes {', '.join(map(str, map(list, inner)))}")
        _sections(bound, [shape[0] for shape in shapes], sum(shape[0] for shape in shapes), variables)
        return _Sizes(tuple(inner), (sum(shape[0] for shape in shapes), *shapes[0][1:]), 0)
    right = shapes[0]
    real, rest = _rows(name, pair, right[0], variables), right[1:]
    rows = right[0] if real is None else real
    parts = _sections(bound, None, rows, variables)
    heads = parts if len(pair.left) > 1 else [rows]
    return _Sizes(
        tuple(_turned(pair, (n, *rest)) for n in heads), (rows, *rest), None if real is None else right[0] - rows
    )


def _rows(name: str, pair: Pair, rows: int, variables: Mapping[str, int]) -> int | None:
    """How many rows of the right tensor are no padding; None if nobody has said."""
    if pair.rows is None:
        return rows
    if isinstance(pair.rows, str) and pair.rows.isidentifier() and pair.rows not in variables:
        return None
    real = evaluate(pair.rows, variables)
    if not 0 < real <= rows:
        raise LayoutError(f"{name} has {rows} rows, and {pair.rows} is {real} ({pair})")
    return real


def _sections(bound: Bound, given: list[int] | None, total: int, variables: Mapping[str, int]) -> list[int]:
    """Sizes of what is joined along dimension 0 of the right tensor, `given` or as the pair says."""
    pair, name = bound.pair, next(iter(bound.members.values()))
    if pair.sections:
        said = [evaluate(size, variables) for size in pair.sections]
        if len(said) == 1:
            number = said[0]
            said = [total // number] * number if 0 < number <= total and total % number == 0 else []
        if (
            sum(said) != total
            or not said
            or min(said, default=-1) < 0
            or (given is not None and len(given) > 1 and given != said)
        ):
            there = f"{total}" if given is None else " + ".join(map(str, given))
            raise LayoutError(
                f"{name}: {pair} says {' + '.join(map(str, said)) or pair.sections}, and there are {there} rows",
                hint="are heads, kv_heads and head_dim those of the model?",
            )
        sizes = said
    elif given is not None:
        sizes = given
    elif total % len(pair.left):
        raise LayoutError(f"{name}: {pair} splits {total} rows in {len(pair.left)} equal parts")
    else:
        sizes = [total // len(pair.left)] * len(pair.left)
    return sizes


def _links(pair: Pair, sizes: _Sizes, variables: Mapping[str, int]) -> list[_Link]:
    if not sizes.right:
        return [_Link(0, Box((), ()), Box((), ()))]
    rest = sizes.right[1:]
    heads = [_turned(pair, shape)[0] for shape in sizes.left]
    sections = heads
    if pair.sections and len(pair.left) == 1:
        said = [evaluate(size, variables) for size in pair.sections]
        sections = said if len(said) > 1 else [heads[0] // said[0]] * said[0]
    groups = evaluate(pair.groups, variables) if any(sections) else 1
    if groups < 1 or any(size % groups for size in sections):
        raise LayoutError(f"{pair}: {groups} groups do not divide {' + '.join(map(str, sections))} rows")
    links = []
    before = [0, *accumulate(sections)]
    for group in range(groups):
        at = group * (before[-1] // groups)
        for k, size in enumerate(sections):
            length = size // groups
            part, first = (k, 0) if len(pair.left) > 1 else (0, before[k])
            left = _turned_box(pair, Box((first + group * length, *(0 for _ in rest)), (length, *rest)))
            links.append(_Link(part, left, Box((at, *(0 for _ in rest)), (length, *rest))))
            at += length
    return links


def _turned(pair: Pair, shape: Shape) -> Shape:
    return shape[::-1] if pair.transpose and len(shape) == 2 else shape


def _turned_box(pair: Pair, box: Box) -> Box:
    return Box(_turned(pair, box.origin), _turned(pair, box.shape))
