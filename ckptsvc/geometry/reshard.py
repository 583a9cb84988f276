"""From the regions that are stored to the regions that are wanted: which box goes where.

One function, `plan`, serves restore, conversion, and every importer and exporter. It works tensor by tensor;
`ckptsvc.geometry.ranges` does the same for whole tables at once where all regions are contiguous.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import (
    Box,
    FlatRange,
    Region,
    Shape,
    contiguous_spans,
    fits,
    flat_to_boxes,
    is_whole,
)


class Block(msgspec.Struct, frozen=True, gc=False):
    """A box inside a row-major array, its dimensions in another order: how a region is seen in foreign data.

    Fused projections, transposed weights, stacked layers and stacked experts are such views of what is stored.
    In numpy terms: `array[box.slices()].transpose(order + left out).reshape(region.shape)`.

    Attributes:
        shape: shape of the whole stored array.
        box: the part of it that is the region.
        order: for each dimension of the region the dimension of the array it comes from, -1 for a new one of
            extent 1. Dimensions of the array that are left out have extent 1 in `box`.
    """

    shape: Shape
    box: Box
    order: tuple[int, ...]

    @property
    def region_shape(self) -> Shape:
        """The shape of the region it is."""
        return tuple(1 if d < 0 else self.box.shape[d] for d in self.order)

    def inside(self, box: Box) -> Box:
        """A box of the region, in its own coordinates, as a box of the stored array."""
        origin, shape = list(self.box.origin), [1] * self.box.ndim
        for d, low, extent in zip(self.order, box.origin, box.shape, strict=True):
            if d >= 0:
                origin[d] += low
                shape[d] = extent
        return Box(tuple(origin), tuple(shape))

    def is_sound(self) -> bool:
        """Whether box and order go with the shape."""
        taken = [d for d in self.order if d >= 0]
        rest = set(range(len(self.shape))) - set(taken)
        return (
            fits(self.box, self.shape)
            and all(0 <= d < len(self.shape) for d in taken)
            and len(set(taken)) == len(taken)
            and all(self.box.shape[d] == 1 for d in rest)
        )


class StoredRegion(msgspec.Struct, frozen=True, gc=False):
    """A region of a logical tensor and where its data lies: row-major and contiguous, or seen through a `Block`.

    Attributes:
        tensor: the name of the tensor, or its number in a table.
        region: which part of the tensor.
        shard: number of the shard file.
        offset: absolute offset of the data in the shard file, in bytes.
        nbytes: length of the data, in bytes; with a block, of the whole stored array.
        block: only for boxes: what part of the stored array the region is.
    """

    tensor: int | str
    region: Region
    shard: int
    offset: int
    nbytes: int
    block: Block | None = None


class View(msgspec.Struct, frozen=True, gc=False):
    """A box inside the data of a region.

    The data of a `Box` region is one piece: offset 0, the region's shape. A `FlatRange` may be cut into
        n-dimensional pieces
    that follow each other, and a view is inside one of them. In numpy terms, `flat` being the region's
    elements: `flat[offset:offset + prod(shape)].reshape(shape)[(*box.slices(), ...)]`.

    Attributes:
        offset: elements of the region before the piece.
        shape: shape of the piece.
        box: the box, in coordinates of the piece.
    """

    offset: int
    shape: Shape
    box: Box


class Copy(msgspec.Struct, frozen=True, gc=False):
    """One box to copy.

    Attributes:
        stored: position in the list of stored regions given to `plan`.
        source: the box inside the data of that region.
        target_index: position in the list of wanted regions given to `plan`.
        target: the box inside the data of that region, of the same shape as the source's box.
        order: how the source's dimensions become the target's, as in `Block`; None when they are the same.
    """

    stored: int
    source: View
    target_index: int
    target: View
    order: tuple[int, ...] | None = None


def plan(
    stored: Sequence[StoredRegion],
    wanted: Sequence[Region],
    itemsize: int,
    shape: Sequence[int],
    *,
    name: str = "",
) -> list[Copy]:
    """The copies that fill every wanted region of one tensor from its stored regions.

    Every wanted element is copied exactly once. A stored region that equals a wanted one serves it whole;
    otherwise, where stored regions overlap, the first one in the list is used.

    Args:
        stored: the stored regions of the tensor.
        wanted: the wanted regions; they may overlap each other, each is filled.
        itemsize: bytes per element.
        shape: global shape of the tensor.
        name: name of the tensor, for messages.

    Returns:
        The copies in the order of the wanted regions.

    Raises:
        LayoutError: a wanted element is not stored, or a region is not inside the tensor or not as long as it
            says.
    """
    shape = tuple(shape)
    _check_inside("wanted", wanted, shape, name)
    # the first of equal regions wins, so the list is entered from its end
    equal = {stored[i].region: i for i in range(len(stored) - 1, -1, -1)}
    search: _Search | None = None
    copies: list[Copy] = []
    for t, region in enumerate(wanted):
        if region.is_empty:
            continue
        if (i := equal.get(region)) is not None:
            _check_stored(stored[i], itemsize, shape, name)
            view = _whole(region)
            copies.append(_copy(stored[i], i, view, t, view))
            continue
        if search is None:
            for piece in stored:
                _check_stored(piece, itemsize, shape, name)
            search = _Search([piece.region for piece in stored], shape)
        claims, missing = search.cover(region)
        if missing is not None:
            raise LayoutError(f"{_named(name)} of shape {list(shape)}: {missing} is wanted, and is not stored")
        copies.extend(_copy(stored[s.region], s.region, s.view(box), t, target.view(box)) for s, target, box in claims)
    return copies


def _copy(piece: StoredRegion, number: int, source: View, target_index: int, target: View) -> Copy:
    block = piece.block
    if block is None:
        return Copy(number, source, target_index, target)
    return Copy(number, View(0, block.shape, block.inside(source.box)), target_index, target, block.order)


def check_cover(shape: Sequence[int], regions: Sequence[Region], *, name: str = "") -> None:
    """Check that the regions cover a whole tensor; overlaps are allowed.

    Raises:
        LayoutError: names a box or range that no region has, or a region that is not inside the tensor.
    """
    shape = tuple(shape)
    _check_inside("the region", regions, shape, name)
    if math.prod(shape) == 0 or any(is_whole(region, shape) for region in regions):
        return
    flat = all(isinstance(region, FlatRange) for region in regions)
    _, missing = _Search(regions, shape).cover(FlatRange(0, math.prod(shape)) if flat else Box.full(shape))
    if missing is not None:
        raise LayoutError(f"{_named(name)} of shape {list(shape)}: no region has {missing}")


def source_spans(copy: Copy, stored: StoredRegion, itemsize: int) -> tuple[NDArray[np.int64], int]:
    """The bytes of the shard file that a copy needs: (absolute offset of each run, bytes per run)."""
    first, run = contiguous_spans(copy.source.shape, copy.source.box)
    return (first + copy.source.offset) * itemsize + stored.offset, run * itemsize


class _Piece(msgspec.Struct, frozen=True, gc=False):
    """A box of the tensor that is the data of one region, or of a part of it when the region is flat."""

    region: int
    offset: int
    box: Box

    def view(self, box: Box) -> View:
        return View(self.offset, self.box.shape, box.relative_to(self.box.origin))


# from a piece of a stored region, into a piece of the wanted one, this box of the tensor
_Claim = tuple[_Piece, _Piece, Box]


class _Search:
    """Finds what the stored regions of one tensor have of a wanted region."""

    def __init__(self, regions: Sequence[Region], shape: Shape) -> None:
        self._regions = regions
        self._shape = shape
        self._flat = all(isinstance(region, FlatRange) for region in regions)
        self._tables: dict[Shape, _Table] = {}

    def cover(self, wanted: Region) -> tuple[list[_Claim], Region | None]:
        """Boxes that together are `wanted`, each from one stored piece, or something that is missing."""
        # A range wanted from ranges is a matter of one dimension: each copy is one run. All else are boxes.
        ranges = self._flat and isinstance(wanted, FlatRange)
        space = (math.prod(self._shape),) if ranges else self._shape
        if space not in self._tables:
            pieces = (_pieces(i, region, space) for i, region in enumerate(self._regions))
            self._tables[space] = _Table(list(chain.from_iterable(pieces)))
        claims: list[_Claim] = []
        for target in _pieces(0, wanted, space):
            sources, missing = self._tables[space].cover(target.box)
            if missing:
                hole = missing[0]
                return claims, FlatRange(hole.origin[0], hole.shape[0]) if ranges else hole
            claims.extend((source, target, box) for source, box in sources)
        return claims, None


class _Table:
    """Boxes sorted along the dimension that tells them apart best: a wanted box touches neighbours only."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._axis, self._reach = 0, 0
        if pieces and pieces[0].box.ndim:
            extents = [max(n) for n in zip(*(piece.box.shape for piece in pieces), strict=True)]
            stops = [max(n) for n in zip(*(piece.box.stop for piece in pieces), strict=True)]
            self._axis = min(range(len(stops)), key=lambda d: extents[d] / max(stops[d], 1))
            self._reach = extents[self._axis]
        axis = self._axis
        self._pieces = sorted(pieces, key=lambda piece: (piece.box.origin[axis:], piece.box.origin))
        self._starts = [piece.box.origin[axis : axis + 1] for piece in self._pieces]

    def cover(self, wanted: Box) -> tuple[list[tuple[_Piece, Box]], list[Box]]:
        """Disjoint parts of `wanted` with the piece each comes from, and the boxes that no piece has."""
        near = self._pieces
        if wanted.ndim:
            low, high = wanted.origin[self._axis], wanted.stop[self._axis]
            near = near[bisect_right(self._starts, (low - self._reach,)) : bisect_left(self._starts, (high,))]
        parts, missing, overlap = _claim(near, wanted)
        if overlap:
            # only then the order of the list matters; in sorted order what is left to claim stays a few boxes
            parts, missing, _ = _claim(sorted(near, key=attrgetter("region")), wanted)
        return parts, missing


def _claim(pieces: Iterable[_Piece], wanted: Box) -> tuple[list[tuple[_Piece, Box]], list[Box], bool]:
    """Give each element of `wanted` to the first piece that has it: (parts, missing, did pieces overlap?)."""
    parts: list[tuple[_Piece, Box]] = []
    missing, overlap = [wanted], False
    for piece in pieces:
        common = piece.box.intersect(wanted)
        if common is None:
            continue
        left: list[Box] = []
        claimed = 0
        for box in missing:
            part = box.intersect(common)
            if part is None:
                left.append(box)
                continue
            parts.append((piece, part))
            claimed += part.size
            left.extend(box.around(part))
        missing = left
        overlap = overlap or claimed != common.size
    return parts, missing, overlap


def _pieces(index: int, region: Region, shape: Shape) -> list[_Piece]:
    """The boxes that a region's data consists of, in the order of the data."""
    if isinstance(region, Box):
        return [_Piece(index, 0, region)]
    pieces, offset = [], 0
    for box in flat_to_boxes(shape, region.start, region.length):
        pieces.append(_Piece(index, offset, box))
        offset += box.size
    return pieces


def _whole(region: Region) -> View:
    """The view of all the data of a region."""
    shape = region.shape if isinstance(region, Box) else (region.length,)
    return View(0, shape, Box.full(shape))


def _check_inside(what: str, regions: Iterable[Region], shape: Shape, name: str) -> None:
    for region in regions:
        if not fits(region, shape):
            raise LayoutError(f"{_named(name)}: {what} {region} is not inside its shape {list(shape)}")


def _check_stored(piece: StoredRegion, itemsize: int, shape: Shape, name: str) -> None:
    size = piece.region.size
    sound = fits(piece.region, shape)
    if (block := piece.block) is not None:
        size = math.prod(block.shape)
        sound = (
            sound and isinstance(piece.region, Box) and block.is_sound() and block.region_shape == piece.region.shape
        )
    if not sound or size * itemsize != piece.nbytes:
        raise LayoutError(
            f"{_named(name)} of shape {list(shape)}: stored {piece.region} does not fit, or is not {piece.nbytes} bytes"
        )


def _named(name: str) -> str:
    return f"tensor {name!r}" if name else "a tensor"
