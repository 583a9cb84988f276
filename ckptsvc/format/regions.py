"""Tensors and their regions as columns: checked as a whole, made objects a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from ckptsvc.errors import Damaged
from ckptsvc.format.columnar import Bool, Int64, UInt8, UInt64, chunks, starts
from ckptsvc.format.limits import MAX_NDIM, MAX_TENSOR_BYTES
from ckptsvc.geometry.box import Box, FlatRange, Region, as_flat
from ckptsvc.geometry.ranges import touching
from ckptsvc.types import DTYPE_BY_CODE, DTYPES

KIND_BOX: Final = 0
KIND_FLAT: Final = 1

Selection = slice | Int64

_ITEMSIZE: Final[Int64] = np.zeros(256, np.int64)
"""Bytes per element by the code of a dtype; 0 where there is none."""
_ITEMSIZE[[dtype.code for dtype in DTYPES.values()]] = [dtype.itemsize for dtype in DTYPES.values()]


class Tensors(NamedTuple):
    """Shapes and dtypes of n tensors.

    Attributes:
        dtype: [n] code of the dtype.
        ndim: [n] number of dimensions.
        shape: flat, `ndim` numbers a tensor.
        first: [n] where a tensor's shape begins in `shape`.
        size: [n] number of elements.
    """

    dtype: UInt8
    ndim: UInt8
    shape: Int64
    first: Int64
    size: Int64

    @classmethod
    def checked(cls, dtype: UInt8, ndim: UInt8, shape: Int64, what: str) -> Tensors:
        """The table of these columns. Raises Damaged for unknown dtypes and impossible shapes."""
        if int(ndim.sum(dtype=np.int64)) != len(shape) or (ndim > MAX_NDIM).any():
            raise Damaged(f"the shapes of {what} do not add up")
        itemsize = _ITEMSIZE[dtype]
        if (itemsize == 0).any():
            raise Damaged(f"{what} has a tensor of an unknown dtype")
        # What may still follow: bytes without the zeros among the extents, so that no product can overflow.
        room = MAX_TENSOR_BYTES // itemsize
        first, size = starts(ndim), np.ones(len(dtype), np.int64)
        for d in range(int(ndim.max(initial=0))):
            rows = np.flatnonzero(ndim > d)
            extent = shape[first[rows] + d]
            room[rows] //= np.maximum(extent, 1)
            if (extent < 0).any() or (room[rows] == 0).any():
                raise Damaged(f"{what} has a tensor of an impossible shape")
            size[rows] *= extent
        return cls(dtype, ndim, shape, first, size)

    def shape_of(self, row: int) -> tuple[int, ...]:
        """The global shape of a tensor."""
        first = self.first.item(row)
        return tuple(self.shape[first : first + self.ndim.item(row)].tolist())

    def dtype_of(self, row: int) -> str:
        """The name of the dtype of a tensor."""
        return DTYPE_BY_CODE[self.dtype.item(row)].name


class Regions(NamedTuple):
    """Regions of tensors.

    Attributes:
        tensors: the tensors.
        tensor: [n] row of the tensor of each region.
        kind: [n] `KIND_BOX` or `KIND_FLAT`.
        geometry: flat: origin and shape of a box, start and length of a flat range.
        first: [n] where the numbers of a region begin in `geometry`.
        nbytes: [n] bytes of each region.
    """

    tensors: Tensors
    tensor: Int64
    kind: UInt8
    geometry: Int64
    first: Int64
    nbytes: Int64

    @classmethod
    def checked(cls, tensors: Tensors, tensor: Int64, kind: UInt8, geometry: Int64, what: str) -> Regions:
        """The table of these columns. Raises Damaged for a region that is not inside its tensor."""
        counts = numbers_per_region(kind, tensors.ndim[tensor])
        if (kind > KIND_FLAT).any() or int(counts.sum(dtype=np.int64)) != len(geometry):
            raise Damaged(f"the regions of {what} do not add up")
        regions = cls(tensors, tensor, kind, geometry, starts(counts), np.empty(len(tensor), np.int64))
        for rows in chunks(len(tensor)):
            if not regions._measure(rows):
                raise Damaged(f"{what} has a region that is not inside its tensor")
        return regions

    def check_places(self, shard: Int64, offset: UInt64, size: Int64, what: str) -> None:
        """Raises Damaged unless each region is inside its file.

        Args:
            shard: [n] row of the file of each region.
            offset: [n] where it begins in the file.
            size: [files] bytes of each file that regions may use.
            what: the name of the table, for messages.
        """
        for rows in chunks(len(self.tensor)):
            nbytes, end = self.nbytes[rows], size[shard[rows]]
            if not ((nbytes <= end) & (offset[rows] <= (end - nbytes).astype(np.uint64))).all():
                raise Damaged(f"{what} has a region that is not inside its shard")

    def objects(self, rows: Selection) -> list[Region]:
        """Some regions, all of one tensor, as objects."""
        first, flat = self.first[rows], self.kind[rows] == KIND_FLAT
        if not len(first):
            return []
        if flat.all():
            return [FlatRange(start, length) for start, length in self._numbers(first, 2).tolist()]
        if flat.any():
            each = np.arange(len(self.first))[rows]
            return [region for row in each for region in self.objects(row[None])]
        ndim = self.tensors.ndim.item(self.tensor[rows].item(0))
        numbers = self._numbers(first, 2 * ndim)
        return list(map(Box, map(tuple, numbers[:, :ndim].tolist()), map(tuple, numbers[:, ndim:].tolist())))

    def near(self, rows: slice, wanted: Sequence[Region]) -> Selection:
        """Those regions of a tensor that share elements with wanted ones; all, where that is not easy to say.

        Args:
            rows: the regions of one tensor.
            wanted: regions of the same tensor.
        """
        flat = self.kind[rows] == KIND_FLAT
        row = self.tensor.item(rows.start)
        if flat.all():
            shape, width = self.tensors.shape_of(row), 1
            ranges = [region if isinstance(region, FlatRange) else as_flat(shape, region) for region in wanted]
            boxes = [Box((r.start,), (r.length,)) for r in ranges if r is not None]
        else:
            width = self.tensors.ndim.item(row)
            boxes = [region for region in wanted if isinstance(region, Box)]
        if flat.any() != flat.all() or len(boxes) != len(wanted):
            return rows
        numbers = self._numbers(self.first[rows], 2 * width)
        hit: Int64 = touching(numbers[:, :width], numbers[:, width:], boxes) + rows.start
        return hit

    def boxes(self) -> Iterator[tuple[Int64, int]]:
        """The rows of all boxes, some at a time, with their number of dimensions."""
        ndim = np.where(self.kind == KIND_FLAT, -1, self.tensors.ndim[self.tensor].astype(np.int16))
        for n in np.unique(ndim[ndim >= 0]).tolist():
            rows = np.flatnonzero(ndim == n)
            for part in chunks(len(rows)):
                yield rows[part], n

    def box_columns(self, rows: Int64, ndim: int) -> tuple[Int64, Int64, Int64]:
        """[rows, ndim] each: the tensor's shape, the box's origin, the box's shape."""
        first = self.tensors.first[self.tensor[rows]]
        shape = np.take(self.tensors.shape, first[:, None] + np.arange(ndim))
        numbers = self._numbers(self.first[rows], 2 * ndim)
        return shape, numbers[:, :ndim], numbers[:, ndim:]

    def _numbers(self, first: Int64, width: int) -> Int64:
        """[rows, width] the geometry of regions that have `width` numbers each."""
        if len(first) == 1:  # by far the most frequent
            return self.geometry[None, first.item() : first.item() + width]
        return np.take(self.geometry, first[:, None] + np.arange(width))

    def _measure(self, rows: slice) -> bool:
        """Fills in `nbytes`; False when a region is not inside its tensor."""
        tensors, geometry = self.tensors, self.geometry
        of, at = self.tensor[rows], self.first[rows]
        flat, ndim = self.kind[rows] == KIND_FLAT, tensors.ndim[of].astype(np.int64)
        elements, inside = np.ones(len(of), np.int64), np.ones(len(of), np.bool_)
        for d in range(int(ndim.max(initial=0))):
            i = np.flatnonzero((ndim > d) & ~flat)
            origin, extent = geometry[at[i] + d], geometry[at[i] + ndim[i] + d]
            inside[i] &= _inside(origin, extent, tensors.shape[tensors.first[of[i]] + d])
            elements[i] *= extent
        i = np.flatnonzero(flat)
        start, length = geometry[at[i]], geometry[at[i] + 1]
        inside[i] = _inside(start, length, tensors.size[of[i]])
        elements[i] = length
        self.nbytes[rows] = elements * _ITEMSIZE[tensors.dtype[of]]
        return bool(inside.all())


def numbers_per_region(kind: UInt8, ndim: UInt8) -> UInt8:
    """[n] how many numbers of geometry regions have: 2 * ndim for a box, 2 for a flat range."""
    return np.where(kind == KIND_FLAT, np.uint8(2), 2 * ndim)


def _inside(start: Int64, length: Int64, extent: Int64) -> Bool:
    # `extent - length` may overflow only where a comparison before it has failed.
    return (start >= 0) & (length >= 0) & (length <= extent) & (start <= extent - length)
