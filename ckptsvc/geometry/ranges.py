"""The same for whole tables at once, as numpy columns: a million regions cost a fraction of a second.

A region that is contiguous in its row-major flattened tensor (a whole tensor, a slab of dimension 0, a flat
range) is a range of elements. Lay all tensors of a checkpoint end to end on one line, and regions of all of
them are ranges of that line: what `ckptsvc.geometry.reshard` does tensor by tensor becomes one merge of two
sorted lists. `box_ranges` finds the regions this is true for; the others (blocks of columns) go through
`touching` and `reshard.plan`.

All columns are int64. n, m, k are numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box

Column = NDArray[np.int64]


class RangeCopies(NamedTuple):
    """Copies as columns [k]: `length` elements from `source` in a stored range to `target` in a wanted one.

    Attributes:
        stored: row of the stored range.
        wanted: row of the wanted range, ascending.
        source: first element, counted from the start of the stored range.
        target: first element, counted from the start of the wanted range; ascending within one wanted range.
        length: number of elements, at least 1.
    """

    stored: Column
    wanted: Column
    source: Column
    target: Column
    length: Column


class Runs(NamedTuple):
    """Byte ranges grouped into runs to read at once.

    Attributes:
        order: [n] rows of the input in the order of reading.
        first: [k + 1] run i is made of the rows `order[first[i]:first[i + 1]]`.
        shard: [k] shard file of each run.
        start: [k] first byte of each run.
        stop: [k] one past its last byte.
    """

    order: Column
    first: Column
    shard: Column
    start: Column
    stop: Column


def box_ranges(shape: Column, origin: Column, extent: Column) -> tuple[Column, Column, NDArray[np.bool_]]:
    """Boxes as ranges of their flattened tensors.

    Args:
        shape: [n, ndim] global shape of the tensor each box is part of.
        origin: [n, ndim] origins of the boxes.
        extent: [n, ndim] shapes of the boxes.

    Returns:
        (first element [n], number of elements [n], is it contiguous [n]); the first two hold where the third
        is true.
    """
    n, ndim = shape.shape
    start, length, stride = np.zeros(n, np.int64), np.ones(n, np.int64), np.ones(n, np.int64)
    contiguous, full = np.ones(n, np.bool_), np.ones(n, np.bool_)
    for d in reversed(range(ndim)):
        # once a dimension is not full, those outside it must have one index
        contiguous &= full | (extent[:, d] == 1)
        full &= extent[:, d] == shape[:, d]
        start += origin[:, d] * stride
        length *= extent[:, d]
        stride *= shape[:, d]
    return start, length, contiguous | (length == 0)


def plan_ranges(
    stored_start: Column,
    stored_length: Column,
    wanted_start: Column,
    wanted_length: Column,
    *,
    name: Callable[[int], str] = "row {}".format,
) -> RangeCopies:
    """The copies that fill every wanted range from stored ranges of one line; every element exactly once.

    Where stored ranges overlap the one that starts first is used, of those that start together the first in
    the table.

    Args:
        stored_start: [n] first elements of the stored ranges, in any order; sorted ones are faster.
        stored_length: [n] their numbers of elements.
        wanted_start: [m] first elements of the wanted ranges, in any order.
        wanted_length: [m] their numbers of elements.
        name: names a row of the wanted ranges for the message.

    Raises:
        LayoutError: names the first wanted range of which something is not stored.
    """
    order, starts, stops = _disjoint(stored_start, stored_length)
    wanted_stop = wanted_start + wanted_length
    first = np.searchsorted(stops, wanted_start, "right")
    number = np.searchsorted(starts, wanted_stop, "left") - first
    number[wanted_length == 0] = 0
    wanted = np.repeat(np.arange(len(number)), number)
    # rows first[i], first[i] + 1, ... for each wanted range i
    ends = np.cumsum(number)
    hit = np.arange(len(wanted)) + np.repeat(first - ends + number, number)
    low = np.maximum(starts[hit], wanted_start[wanted])
    length = np.minimum(stops[hit], wanted_stop[wanted]) - low
    found = np.diff(np.concatenate(([0], np.cumsum(length)))[np.concatenate(([0], ends))])
    if (found != wanted_length).any():
        i = int(np.argmax(found != wanted_length))
        raise LayoutError(f"{name(i)}: {wanted_length[i] - found[i]} of {wanted_length[i]} elements are not stored")
    stored = order[hit]
    return RangeCopies(stored, wanted, low - stored_start[stored], low - wanted_start[wanted], length)


def first_gap(start: Column, length: Column, size: int) -> int | None:
    """The first of `size` elements of a line that no range [n] has, or None when all are covered."""
    _, starts, stops = _disjoint(start, length)
    # disjoint and sorted: the line is covered when each range starts where the one before it stops
    before, after = np.concatenate(([0], stops)), np.concatenate((starts, [size]))
    gaps = np.flatnonzero(before < after)
    return int(before[gaps[0]]) if len(gaps) else None


def touching(origin: Column, extent: Column, wanted: Sequence[Box]) -> Column:
    """Rows of the boxes of one tensor that share an element with a wanted box, ascending.

    Args:
        origin: [n, ndim] origins of the boxes.
        extent: [n, ndim] their shapes.
        wanted: boxes of the same number of dimensions.
    """
    hit = np.zeros(len(origin), np.bool_)
    stop = origin + extent
    for box in wanted:
        low = np.maximum(origin, np.array(box.origin, np.int64))
        hit |= (low < np.minimum(stop, np.array(box.stop, np.int64))).all(axis=1)
    return np.flatnonzero(hit)


def coalesce(shard: Column, offset: Column, nbytes: Column, *, gap: int = 0) -> Runs:
    """Group byte ranges of shard files into runs to read at once, in the order of files and offsets.

    Ranges join a run when at most `gap` bytes lie between them; ranges that overlap are in one run. Empty
    ranges count as points.

    Args:
        shard: [n] number of the shard file of each range.
        offset: [n] first byte.
        nbytes: [n] length in bytes.
        gap: bytes it is cheaper to read than to skip.
    """
    order = np.lexsort((offset, shard))
    shards, starts = shard[order], offset[order]
    stops = starts + nbytes[order]
    if not len(order):
        return Runs(order, np.zeros(1, np.int64), shards, starts, stops)
    # the furthest byte so far in its file: each file is lifted above all offsets of the one before
    lift = (np.cumsum(np.diff(shards, prepend=shards[0]) != 0)) * (int(stops.max()) + gap + 1)
    reach = np.maximum.accumulate(stops + lift)
    new = np.concatenate(([True], (starts + lift)[1:] > reach[:-1] + gap))
    first = np.flatnonzero(new)
    last = np.concatenate((first[1:], [len(order)]))
    return Runs(order, np.concatenate((first, last[-1:])), shards[first], starts[first], (reach - lift)[last - 1])


def _disjoint(start: Column, length: Column) -> tuple[Column, Column, Column]:
    """Ranges sorted and cut so that none overlaps: (rows, starts, stops) of what is left of them."""
    order = np.arange(len(start)) if (start[1:] >= start[:-1]).all() else np.argsort(start, kind="stable")
    starts = start[order]
    stops = starts + length[order]
    np.maximum(starts[1:], np.maximum.accumulate(stops)[:-1], out=starts[1:])
    keep = starts < stops
    return (order, starts, stops) if keep.all() else (order[keep], starts[keep], stops[keep])
