"""Whether regions cover their tensors, for a whole index at once.

Two kinds of layout are proven by NumPy: ranges of the flattened tensors without a gap, and grids of boxes.
They are what training frameworks write; what remains goes to `ckptsvc.geometry.reshard.check_cover`, tensor
by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ckptsvc.format.columnar import Bool, Int64
from ckptsvc.format.regions import KIND_FLAT, Regions
from ckptsvc.geometry.ranges import box_ranges, first_gap


class Line(NamedTuple):
    """All tensors laid end to end, and the regions as ranges of that line (see `ckptsvc.geometry.ranges`).

    Attributes:
        base: [tensors] where each tensor begins, in elements.
        start: [regions] where each region begins on the line.
        length: [regions] its number of elements.
        contiguous: [regions] whether it is a range at all; where not, `start` and `length` mean nothing.
    """

    base: Int64
    start: Int64
    length: Int64
    contiguous: Bool


def line(regions: Regions) -> Line:
    """The regions as ranges of the line."""
    base = np.concatenate((np.zeros(1, np.int64), np.cumsum(regions.tensors.size)))[:-1]
    n = len(regions.tensor)
    start, length, contiguous = np.empty(n, np.int64), np.empty(n, np.int64), np.ones(n, np.bool_)
    flat = np.flatnonzero(regions.kind == KIND_FLAT)
    start[flat] = regions.geometry[regions.first[flat]]
    length[flat] = regions.geometry[regions.first[flat] + 1]
    for rows, ndim in regions.boxes():
        start[rows], length[rows], contiguous[rows] = box_ranges(*regions.box_columns(rows, ndim))
    start += base[regions.tensor]
    return Line(base, start, length, contiguous)


def doubtful(regions: Regions) -> Iterator[int]:
    """Rows of tensors that may have a hole; all others have none.

    Where a range of the line is missing, only the first tensor it concerns is named.
    """
    base, start, length, contiguous = line(regions)
    scattered = np.zeros(len(base), np.bool_)
    scattered[regions.tensor[~contiguous]] = True
    if scattered.any():
        proven = _grids(regions, scattered)
        yield from np.flatnonzero(scattered & ~proven).tolist()
        rows = np.flatnonzero(~scattered[regions.tensor])
        whole = np.flatnonzero(scattered)  # as good as present, here
        start = np.concatenate((start[rows], base[whole]))
        length = np.concatenate((length[rows], regions.tensors.size[whole]))
    gap = first_gap(start, length, int(regions.tensors.size.sum()))
    if gap is not None:
        yield int(np.searchsorted(base, gap, "right")) - 1


def _grids(regions: Regions, some: Bool) -> Bool:
    """Which of some tensors are cut into a grid of boxes, each cell there exactly once.

    Boxes that are cells of the grid that the origins of all boxes make, and have different origins, are disjoint.
    If their volumes add up, too, they are the tensor.
    """
    proven = some.copy()
    wanted, is_flat = some[regions.tensor], regions.kind == KIND_FLAT
    proven[regions.tensor[wanted & is_flat]] = False
    for ndim in np.unique(regions.tensors.ndim[some]).tolist():
        rows = np.flatnonzero(wanted & ~is_flat & (regions.tensors.ndim[regions.tensor] == ndim))
        tensor = regions.tensor[rows]
        shape, origin, extent = regions.box_columns(rows, ndim)
        for d in range(ndim):
            proven[tensor[~_fill_gaps(tensor, origin[:, d], extent[:, d], shape[:, d])]] = False
        order = np.lexsort((*origin.T[::-1], tensor))
        same = (origin[order[1:]] == origin[order[:-1]]).all(axis=1) & (tensor[order[1:]] == tensor[order[:-1]])
        proven[tensor[order[1:][same]]] = False
        volume = np.zeros(len(some), np.int64)
        np.add.at(volume, tensor, extent.prod(axis=1))
        proven[tensor] &= volume[tensor] == regions.tensors.size[tensor]
    return proven


def _fill_gaps(tensor: Int64, origin: Int64, extent: Int64, full: Int64) -> Bool:
    """Whether each box ends, in one dimension, where the next origin in its tensor begins or the tensor ends.

    Args:
        tensor: [n] the tensor of each box.
        origin: [n] where the box begins in that dimension.
        extent: [n] how far it goes.
        full: [n] how far the tensor goes.
    """
    order = np.lexsort((origin, tensor))
    tensors, origins = tensor[order], origin[order]
    # The last of the boxes of a tensor that have the same origin; the next origin, if any, comes after it.
    last = np.flatnonzero(np.append((tensors[1:] != tensors[:-1]) | (origins[1:] != origins[:-1]), True))
    has_next = np.append(tensors[last[1:]] == tensors[last[:-1]], False)
    stop = np.where(has_next, np.append(origins[last[1:]], 0), full[order[last]])
    fills = np.empty(len(tensor), np.bool_)
    fills[order] = origins + extent[order] == np.repeat(stop, np.diff(last, prepend=-1))
    return fills
