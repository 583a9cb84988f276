"""From the regions that are stored to the regions that are wanted: which box goes where.

One function, `plan`, serves restore, conversion, and every importer and exporter. It works tensor by tensor;
`ckptsvc.geometry.ranges` does the same for whole tables at once where all regions are contiguous.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, FlatRange, Region, Shape, contiguous_spans, fits, flat_to_boxes


class StoredRegion(msgspec.Struct, frozen=True, gc=False):
    """A region of a logical tensor and where its data lies, row-major and contiguous.

    Attributes:
        tensor: the name of the tensor, or its number in a table.
        region: which part of the tensor.
        shard: number of the shard file.
        offset: absolute offset of the data in the shard file, in bytes.
        nbytes: length of the data, in bytes.
    """

    tensor: int | str
    region: Region
    shard: int
    offset: int
    nbytes: int


class View(msgspec.Struct, frozen=True, gc=False):
    """A box inside the data of a region.

    The data of a `Box` region is one piece: offset 0, the region's shape. A `FlatRange` may be cut into n-dimensional pieces
    that follow each other, and a view is inside one of them. In numpy terms, `flat` being the region's elements:
    `flat[offset:offset + prod(shape)].reshape(shape)[box.slices()]`.

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
    """

    stored: int
    source: View
    target_index: int
    target: View


def plan(
    stored: Sequence[StoredRegion], wanted: Sequence[Region], itemsize: int, shape: Sequence[int], *, name: str = ""
) -> list[Copy]:
    """The copies that fill every wanted region of one tensor from its stored regions.

    Every wanted element is copied exactly once. A stored region that equals a wanted one serves it whole; otherwise,
    where stored regions overlap, the first one in the list is used.

    Args:
        stored: the stored regions of the tensor.
        wanted: the wanted regions; they may overlap each other, each is filled.
        itemsize: bytes per element.
        shape: global shape of the tensor.
        name: name of the tensor, for messages.

    Returns:
        The copies in the order of the wanted regions.

    Raises:
        LayoutError: a wanted element is not stored, or a region is not inside the tensor or not as long as it says.
    """
    shape = tuple(shape)
    _check_inside("wanted", wanted, shape, name)
    for piece in stored:
        if not fits(piece.region, shape) or piece.region.size * itemsize != piece.nbytes:
            raise LayoutError(
                f"{_named(name)} of shape {list(shape)}: stored {piece.region} does not fit, or is not {piece.nbytes} bytes"
            )
    # the first of equal regions wins, so the list is entered from its end
    equal = {stored[i].region: i for i in range(len(stored) - 1, -1, -1)}
    table: _Table | None = None
    copies: list[Copy] = []
    for t, region in enumerate(wanted):
        if region.is_empty:
            continue
        if (i := equal.get(region)) is not None:
            view = _whole(region)
            copies.append(Copy(i, view, t, view))
            continue
        if table is None:
            table = _Table([piece.region for piece in stored], shape)
        claims, missing = table.cover(region)
        if missing:
            raise LayoutError(f"{_named(name)} of shape {list(shape)}: {missing[0]} is wanted, and is not stored")
        copies.extend(Copy(source.region, source.view(box), t, target.view(box)) for source, target, box in claims)
    return copies


def check_cover(shape: Sequence[int], regions: Sequence[Region], *, name: str = "") -> None:
    """Check that the regions cover a whole tensor; overlaps are allowed.

    Raises:
        LayoutError: names a box that no region has, or a region that is not inside the tensor.
    """
    shape = tuple(shape)
    _check_inside("region", regions, shape, name)
    whole = Box.full(shape)
    if whole.is_empty or whole in regions:
        return
    _, missing = _Table(regions, shape).cover(whole if Box in map(type, regions) else FlatRange(0, whole.size))
    if missing:
        raise LayoutError(f"{_named(name)} of shape {list(shape)}: no region has {missing[0]}")


def source_spans(copy: Copy, stored: StoredRegion, itemsize: int) -> tuple[NDArray[np.int64], int]:
    """The bytes of the shard file that a copy needs: (absolute offsets of the runs, bytes per run), in order of the box."""
    first, run = contiguous_spans(copy.source.shape, copy.source.box)
    return (first + copy.source.offset) * itemsize + stored.offset, run * itemsize


class _Piece(NamedTuple):
    """A box of the tensor that is a part of a region's data: all of it, unless the region is a flat range."""

    region: int
    offset: int
    box: Box

    def view(self, box: Box) -> View:
        return View(self.offset, self.box.shape, box.relative_to(self.box.origin))


_Claim = tuple[_Piece, _Piece, Box]  # from that piece of a stored region into that of the wanted one


class _Table:
    """The stored regions of a tensor as boxes, in an order in which those that a wanted box may touch are neighbours."""

    def __init__(self, regions: Sequence[Region], shape: Shape) -> None:
        self.shape = shape
        self.regions = regions
        self.flat = all(isinstance(region, FlatRange) for region in regions)
