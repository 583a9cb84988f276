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

    A box is a cell of the grid that the origins of all boxes make if, in each dimension, it ends where the
    next
    origin begins. Boxes that are cells and have different origins are disjoint; if their volumes add up,
    too, they
    are the tensor.
    """
    proven = some.copy()
    wanted = some[regions.tensor]
    proven[regions.tensor[wanted & (regions.kind == KIND_FLAT)]] = False
    for ndim in np.unique(regions.tensors.ndim[some]).tolist():
        rows = np.flatnonzero(
            (wanted & (regions.kind != KIND_FLAT)) & (regions.tensors.ndim[regions.tensor] == ndim)
        )
        tensor = regions.tensor[rows]
        shape, origin, extent = regions.box_columns(rows, ndim)
        for d in range(ndim):
            order = np.lexsort((origin[:, d], tensor))
            sorted_tensor, at = tensor[order], origin[order, d]
            last = np.append(
                np.flatnonzero((sorted_tensor[1:] != sorted_tensor[:-1]) | (at[1:] != at[:-1])), len(at) - 1
            )
            same = np.append(sorted_tensor[last[1:]] == sorted_tensor[last[:-1]], False)
            stop = np.where(same, np.append(at[last[1:]], 0), shape[order[last], d])
            cell_stop = np.repeat(stop, np.diff(last, prepend=-1))
            proven[sorted_tensor[at + extent[order, d] != cell_stop]] = False
        keys = np.lexsort((*origin.T[::-1], tensor))
        twice = (tensor[keys][1:] == tensor[keys][:-1]) & (origin[keys][1:] == origin[keys][:-1]).all(axis=1)
        proven[tensor[keys][1:][twice]] = False
        volume = np.zeros(len(some), np.int64)
        np.add.at(volume, tensor, extent.prod(axis=1))
        proven[tensor] &= volume[tensor] == regions.tensors.size[tensor]
    return proven
