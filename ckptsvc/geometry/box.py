"""Regions of a tensor: n-dimensional boxes and ranges of the row-major flattened tensor.

Coordinates and lengths count elements. A 0-d tensor has shape () and one element, which is the region Box((),
()). `msgspec.Struct` rather than a dataclass: plans make these by the hundred thousand and a Struct costs a
fifth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from operator import add, le, sub

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput

Shape = tuple[int, ...]


class Box(msgspec.Struct, frozen=True, gc=False):
    """An axis-aligned box of elements: `origin[d] <= index[d] < origin[d] + shape[d]`.

    Attributes:
        origin: first index in each dimension.
        shape: extent in each dimension, not negative; the same number of dimensions as `origin`.
    """

    origin: Shape
    shape: Shape

    @classmethod
    def full(cls, shape: Sequence[int]) -> Box:
        """The box that is the whole tensor of that shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_empty(self) -> bool:
        """True when there is no element inside."""
        return 0 in self.shape

    @property
    def stop(self) -> Shape:
        """One past the last index in each dimension."""
        return tuple(map(add, self.origin, self.shape))

    def intersect(self, other: Box) -> Box | None:
        """The elements both have, or None when they share none. Both must have the same dimensions."""
        origin, shape = [], []
        # the inner loop of every plan: written out it takes a third of the time of map() with max and min
        for a, n, b, m in zip(self.origin, self.shape, other.origin, other.shape, strict=True):
            low = a if a > b else b  # noqa: FURB136
            extent = (a + n if a + n < b + m else b + m) - low  # noqa: FURB136
            if extent <= 0:
                return None
            origin.append(low)
            shape.append(extent)
        return Box(tuple(origin), tuple(shape))

    def contains(self, other: Box) -> bool:
        """True when every element of `other` is inside; an empty box is inside any."""
        if 0 in other.shape:
            return True
        return all(map(le, self.origin, other.origin)) and all(map(le, other.stop, self.stop))

    def relative_to(self, origin: Shape) -> Box:
        """The same box in coordinates that start at `origin`."""
        return Box(tuple(map(sub, self.origin, origin)), self.shape)

    def around(self, part: Box) -> list[Box]:
        """The rest of this box without a non-empty `part` inside it, as at most 2 * ndim disjoint boxes."""
        rest: list[Box] = []
        origin, shape = self.origin, self.shape
        # Peel a slab before and one after the part in each dimension: then only the part is left.
        for d, (low, extent) in enumerate(zip(part.origin, part.shape, strict=True)):
            if shape[d] == extent:
                continue
            end, stop = low + extent, origin[d] + shape[d]
            if origin[d] < low:
                rest.append(Box(origin, (*shape[:d], low - origin[d], *shape[d + 1 :])))
            if end < stop:
                after = (*origin[:d], end, *origin[d + 1 :])
                rest.append(Box(after, (*shape[:d], stop - end, *shape[d + 1 :])))
            origin = (*origin[:d], low, *origin[d + 1 :])
            shape = (*shape[:d], extent, *shape[d + 1 :])
        return rest

    def slices(self) -> tuple[slice, ...]:
        """The index that selects this box from an n-dimensional array."""
        return tuple(map(slice, self.origin, self.stop))

    def __str__(self) -> str:
        return f"[{', '.join(f'{o}:{o + n}' for o, n in zip(self.origin, self.shape, strict=True))}]"


class FlatRange(msgspec.Struct, frozen=True, gc=False):
    """Consecutive elements of the row-major flattened global tensor, as ZeRO and FSDP-1 divide it.

    Attributes:
        start: index of the first element in the flattened tensor.
        length: number of elements, not negative.
    """

    start: int
    length: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.length

    @property
    def is_empty(self) -> bool:
        """True when there is no element inside."""
        return self.length == 0

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.length

    def __str__(self) -> str:
        return f"flat [{self.start}:{self.stop}]"


Region = Box | FlatRange
"""The part of a logical tensor that one holder has. Its data is row-major and contiguous."""


def fits(region: Region, shape: Sequence[int]) -> bool:
    """True when the region is well formed and inside a tensor of that shape."""
    if isinstance(region, FlatRange):
        return region.start >= 0 and region.length >= 0 and region.start + region.length <= math.prod(shape)
    if len(region.origin) != len(shape) or len(region.shape) != len(shape):
        return False
    if region.shape == shape and not any(region.origin):
        return True  # the whole tensor, as most regions are
    for first, extent, n in zip(region.origin, region.shape, shape, strict=True):
        if first < 0 or extent < 0 or first + extent > n:
            return False
    return True


def is_whole(region: Region, shape: Sequence[int]) -> bool:
    """True when the region is the whole tensor, element for element in the same order."""
    if isinstance(region, FlatRange):
        return region.start == 0 and region.length == math.prod(shape)
    return region.shape == tuple(shape)


def as_flat(shape: Sequence[int], box: Box) -> FlatRange | None:
    """The flat range with the elements of `box` in a tensor of `shape`, or None where there is none.

    Whole tensors, slabs of dimension 0 and single rows are flat ranges; a block of columns is not.
    """
    if box.is_empty:
        return FlatRange(0, 0)
    start, full = 0, True
    stride = 1
    for origin, extent, n in zip(reversed(box.origin), reversed(box.shape), reversed(shape), strict=True):
        if not full and extent != 1:
            return None
        full = full and extent == n
        start += origin * stride
        stride *= n
    return FlatRange(start, box.size)


def flat_to_boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """The boxes that make up a range of the flattened tensor, in flat order; at most 2 * ndim - 1 of them.

    Args:
        shape: shape of the tensor.
        start: index of the first element in the flattened tensor.
        length: number of elements.

    Raises:
        InvalidInput: the range is not inside the tensor.
    """
    shape = tuple(shape)
    if not fits(FlatRange(start, length), shape):
        raise InvalidInput(f"{FlatRange(start, length)} is not inside a tensor of shape {list(shape)}")
    if length == 0:
        return []
    if not shape:
        return [Box((), ())]
    strides = _strides(shape)
    boxes = []
    position, stop = start, start + length
    while position < stop:
        # The outermost dimension in which a whole step starts here and fits: partial rows at both ends, whole
        # ones between.
        d = next(i for i, s in enumerate(strides) if position % s == 0 and position + s <= stop)
        index = [position // s % n for s, n in zip(strides[: d + 1], shape, strict=False)]
        steps = min((stop - position) // strides[d], shape[d] - index[d])
        inner = shape[d + 1 :]
        boxes.append(Box((*index, *(0 for _ in inner)), (*(1 for _ in index[:-1]), steps, *inner)))
        position += steps * strides[d]
    return boxes


def contiguous_spans(outer: Sequence[int], box: Box) -> tuple[NDArray[np.int64], int]:
    """Where the elements of `box` lie in a row-major array of shape `outer`: (first of each run, run length).

    The runs are in row-major order of the box, as long as they can be, and all of the same length. An empty
    box has no runs.

    Raises:
        InvalidInput: the box is not inside the array.
    """
    outer = tuple(outer)
    if not fits(box, outer):
        raise InvalidInput(f"{box} is not inside an array of shape {list(outer)}")
    if box.is_empty:
        return np.empty(0, np.int64), 0
    strides = _strides(outer)
    d = box.ndim  # dimensions from d on are one run
    while d > 0 and (d == box.ndim or box.shape[d] == outer[d]):
        d -= 1
    starts = np.full(1, sum(map(int.__mul__, box.origin, strides)), np.int64)
    for extent, stride in zip(box.shape[:d], strides[:d], strict=True):
        starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
    return starts, math.prod(box.shape[d:])


def cut(box: Box, max_elements: int) -> Iterator[Box]:
    """Cut a box into consecutive boxes of at most `max_elements`, each contiguous in its row-major data.

    An empty box yields nothing.

    Raises:
        InvalidInput: `max_elements` is less than 1.
    """
    if max_elements < 1:
        raise InvalidInput(f"cannot cut a box into pieces of {max_elements} elements")
    if box.is_empty:
        return
    if box.size <= max_elements:
        yield box
        return
    strides = _strides(box.shape)
    d = next(i for i, s in enumerate(strides) if s <= max_elements)
    step = max_elements // strides[d]
    inner_origin, inner_shape = box.origin[d + 1 :], box.shape[d + 1 :]
    for index in product(*map(range, box.origin[:d], box.stop[:d])):
        for first in range(0, box.shape[d], step):
            extent = min(step, box.shape[d] - first)
            yield Box((*index, box.origin[d] + first, *inner_origin), (*(1 for _ in index), extent, *inner_shape))


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements between neighbours in each dimension of a row-major array."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides
