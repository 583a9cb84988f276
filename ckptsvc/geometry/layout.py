"""Who holds which part of a tensor: the semantics of a DTensor's mesh and placements, without torch.

A mesh is given by its shape, a rank by its coordinate in the mesh. `placements` has one entry per mesh
dimension and is applied from left to right, as `torch.distributed.tensor` does. Source of the rules: torch
2.13, `torch/distributed/tensor/placement_types.py` (`Shard`, `_StridedShard`) and `_utils.py`
(`compute_local_shape_and_global_offset`); the tests compare with both.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate, product

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, Shape

Ints = Sequence[int]

SMALL_BYTES = 64 * 1024
"""Replicated items below this go whole to one holder: a cut costs more in entries than it gains."""

BALANCE = 100
"""A cut dimension is fine enough when one index of it is at most 1/BALANCE of what a holder stages."""


class Replicate(msgspec.Struct, frozen=True):
    """Every rank along this mesh dimension holds the same."""


class Shard(msgspec.Struct, frozen=True):
    """Tensor dimension `dim` is divided along this mesh dimension as `torch.chunk` divides it.

    The chunks are ceil(size / ranks) long; the last may be shorter and the ones after it are empty.
    """

    dim: int


class StridedShard(msgspec.Struct, frozen=True):
    """torch's `_StridedShard`: each of `split_factor` chunks of `dim` is divided along this mesh dimension.

    A rank holds its part of every chunk, one after the other. FSDP2 over tensor parallelism uses it to say
    that the mesh dimension to the right (TP) was divided first.
    """

    dim: int
    split_factor: int


Placement = Replicate | Shard | StridedShard

Placements = Sequence[Placement]


class Piece(msgspec.Struct, frozen=True):
    """One box of the global tensor and the box of the local tensor that holds it, of the same shape."""

    box: Box
    local: Box


_Interval = tuple[int, int]  # (first, one past the last) index of one tensor dimension


def local_box(global_shape: Ints, mesh_shape: Ints, coordinate: Ints, placements: Placements) -> Box:
    """The box of the global tensor that the rank at `coordinate` holds.

    In a dimension in which the rank holds nothing the origin is the global size, as in torch.

    Raises:
        LayoutError: mesh, coordinate and placements do not go together, or the local part is more than one
            box (use `local_boxes`).
    """
    intervals = _intervals(global_shape, mesh_shape, coordinate, placements)
    if any(len(parts) > 1 for parts in intervals):
        raise LayoutError(f"the part of {list(global_shape)} at mesh coordinate {tuple(coordinate)} is not one box")
    return _box([parts[0] if parts else (n, n) for parts, n in zip(intervals, global_shape, strict=True)])


def local_boxes(global_shape: Ints, mesh_shape: Ints, coordinate: Ints, placements: Placements) -> list[Piece]:
    """The boxes that the rank at `coordinate` holds, each with its place in the local tensor; no empty ones.

    Several boxes come only from `StridedShard`; they follow each other in the local tensor along the sharded
    dimension.

    Raises:
        LayoutError: mesh, coordinate and placements do not go together.
    """
    return _placed(_intervals(global_shape, mesh_shape, coordinate, placements))


def nested_box(global_shape: Ints, mesh_shape: Ints, coordinate: Ints, placements: Placements) -> Box:
    """The box that FSDP2 really puts on the rank at `coordinate` where its placements say `StridedShard`.

    FSDP2 divides the local tensor of the inner parallelism (TP, EP) by `torch.chunk`, that is: the strided
    mesh dimensions come last, as plain shards. On uneven sizes this is not what the placements say when read
    from left to right (9 rows, FSDP 4 x TP 2, coordinate (3, 0): no row here, row 8 there), and it is the
    data that counts.

    Raises:
        LayoutError: mesh, coordinate and placements do not go together, or a `split_factor` is not the number
            of shards that mesh dimensions to the right make of that dimension (then it was not FSDP2 that
            wrote it).
    """
    _check(global_shape, mesh_shape, coordinate, placements)
    for i, placement in enumerate(placements):
        if isinstance(placement, StridedShard) and placement.split_factor != _shards_after(i, mesh_shape, placements):
            raise LayoutError(f"{placement} in mesh dimension {i} does not stand for shards to the right of it")
    order = sorted(range(len(placements)), key=lambda i: isinstance(placements[i], StridedShard))
    plain = [Shard(p.dim) if isinstance(p, StridedShard) else p for p in placements]
    return local_box(
        global_shape,
        [mesh_shape[i] for i in order],
        [coordinate[i] for i in order],
        [plain[i] for i in order],
    )


def held_pieces(
    global_shape: Ints,
    mesh_shape: Ints,
    coordinate: Ints,
    placements: Placements,
    local_shape: Ints,
) -> list[Piece]:
    """What a rank with a local tensor of `local_shape` holds: the one question to ask about a DTensor.

    Answers with `nested_box` where FSDP2 made the strided placements and with `local_boxes` otherwise; no
    empty pieces.

    Raises:
        LayoutError: the local tensor does not have the shape that the layout gives it.
    """
    local_shape = tuple(local_shape)
    if any(isinstance(p, StridedShard) for p in placements):
        try:
            box = nested_box(global_shape, mesh_shape, coordinate, placements)
        except LayoutError:
            box = None
        if box is not None and box.shape == local_shape:
            return [] if box.is_empty else [Piece(box, Box.full(box.shape))]
    intervals = _intervals(global_shape, mesh_shape, coordinate, placements)
    expected = tuple(sum(high - low for low, high in parts) for parts in intervals)
    if expected != local_shape:
        raise LayoutError(
            f"the local tensor at mesh coordinate {tuple(coordinate)} has shape {list(local_shape)}, but "
            f"{list(placements)} on a mesh of shape {list(mesh_shape)} gives it {list(expected)} "
            f"of {list(global_shape)}"
        )
    return _placed(intervals)


def holders(mesh_shape: Ints, placements: Placements) -> list[list[Shape]]:
    """Mesh coordinates in groups that hold the same part; groups and members in row-major order of the mesh.

    Raises:
        LayoutError: there is not one placement per mesh dimension.
    """
    _check_mesh(mesh_shape, placements)
    groups: dict[Shape, list[Shape]] = {}
    for coordinate in product(*map(range, mesh_shape)):
        key = tuple(-1 if isinstance(p, Replicate) else c for c, p in zip(coordinate, placements, strict=True))
        groups.setdefault(key, []).append(coordinate)
    return list(groups.values())


def replica(mesh_shape: Ints, coordinate: Ints, placements: Placements) -> tuple[int, int]:
    """(index, number) of the rank at `coordinate` among those that hold the same part, in order of `holders`.

    Raises:
        LayoutError: mesh, coordinate and placements do not go together.
    """
    _check_mesh(mesh_shape, placements)
    _check_coordinate(mesh_shape, coordinate)
    index, number = 0, 1
    for c, n, placement in zip(coordinate, mesh_shape, placements, strict=True):
        if isinstance(placement, Replicate):
            index, number = index * n + c, number * n
    return index, number


def split_replicated(items: Sequence[tuple[Box, int]], holders: int) -> list[list[tuple[int, Box]]]:
    """Who of `holders` equal holders stages which part of each item.

    A pure function of its arguments, so that every holder comes to the same answer without a message. Items
    below `SMALL_BYTES` (empty ones too) go whole to the holder that has least so far, the largest first. The
    others are laid end to end and cut where a holder is full, along dimension 0 if that is fine enough and
    along the longest otherwise: at most `holders - 1` cuts in all. The holders' bytes differ from their mean
    by at most one small item or one index of the dimension that was cut.

    Args:
        items: (box, bytes per element) of each item.
        holders: how many hold the same items, at least 1.

    Returns:
        For each item its parts as (holder, box), every element exactly once.

    Raises:
        InvalidInput: `holders` is less than 1.
    """
    if holders < 1:
        raise InvalidInput(f"replicated items cannot be divided over {holders} holders")
    if holders == 1:
        return [[(0, box)] for box, _ in items]
    shares: list[list[tuple[int, Box]]] = [[] for _ in items]
    nbytes = [box.size * itemsize for box, itemsize in items]
    large = [i for i, n in enumerate(nbytes) if n >= SMALL_BYTES]
    small = [i for i, n in enumerate(nbytes) if n < SMALL_BYTES]
    loads = [(0, holder) for holder in range(holders)]  # a heap
    for i in sorted(small, key=lambda i: -nbytes[i]):
        load, holder = loads[0]
        shares[i].append((holder, items[i][0]))
        # an empty item counts as a byte, so that thousands of them do not all go to one holder
        heapq.heapreplace(loads, (load + max(nbytes[i], 1), holder))
    bounds = _fill([load for load, _ in sorted(loads, key=lambda entry: entry[1])], sum(nbytes[i] for i in large))
    fine = sum(nbytes) // (holders * BALANCE)
    holder = position = 0
    for i in large:
        box = items[i][0]
        dim = 0 if nbytes[i] // box.shape[0] <= fine else box.shape.index(max(box.shape))
        step, low = nbytes[i] // box.shape[dim], 0
        while low < box.shape[dim]:
            high = min(max((bounds[holder] - position) // step, low), box.shape[dim])
            if high > low:
                shares[i].append((holder, _narrow(box, dim, low, high)))
            if high < box.shape[dim]:
                holder += 1
            low = high
        position += nbytes[i]
    return shares


def _fill(loads: Sequence[int], amount: int) -> list[int]:
    """Pour `amount` bytes over the holders so that all come to one level; the cumulative shares."""
    poured, level = 0, 0
    ascending = sorted(loads)
    for number, load in enumerate(ascending, 1):
        poured += load
        level = (poured + amount) // number
        if number == len(ascending) or level <= ascending[number]:
            break
    bounds, total = [], 0
    for load in loads:
        total = min(total + max(level - load, 0), amount)
        bounds.append(total)
    bounds[-1] = amount  # what the division left over
    return bounds


def _narrow(box: Box, dim: int, low: int, high: int) -> Box:
    """The part of `box` whose index in `dim`, counted from its own origin, is in [low, high)."""
    origin = (*box.origin[:dim], box.origin[dim] + low, *box.origin[dim + 1 :])
    return Box(origin, (*box.shape[:dim], high - low, *box.shape[dim + 1 :]))


def _placed(intervals: Sequence[Sequence[_Interval]]) -> list[Piece]:
    """All combinations of the intervals held in each dimension, each with its place in the local tensor."""
    local = []
    for held in intervals:
        ends = list(accumulate(high - low for low, high in held))
        local.append([(end - (high - low), end) for end, (low, high) in zip(ends, held, strict=True)])
    pairs = zip(product(*intervals), product(*local), strict=True)
    return [Piece(_box(held), _box(place)) for held, place in pairs]


def _box(intervals: Sequence[_Interval]) -> Box:
    return Box(tuple(low for low, _ in intervals), tuple(high - low for low, high in intervals))


def _intervals(global_shape: Ints, mesh_shape: Ints, coordinate: Ints, placements: Placements) -> list[list[_Interval]]:
    """The intervals of global indices that the rank holds in each tensor dimension, in local order."""
    _check(global_shape, mesh_shape, coordinate, placements)
    held = [[(0, n)] if n else [] for n in global_shape]
    for n, c, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            held[placement.dim] = _chunk(held[placement.dim], n, c)
        elif isinstance(placement, StridedShard):
            whole = held[placement.dim]
            chunks = (_chunk(whole, placement.split_factor, j) for j in range(placement.split_factor))
            held[placement.dim] = _joined([part for chunk in chunks for part in _chunk(chunk, n, c)])
    return held


def _chunk(parts: Sequence[_Interval], number: int, index: int) -> list[_Interval]:
    """Chunk `index` of `number` of the concatenated intervals, by the rule of `torch.chunk`."""
    length = -(-sum(high - low for low, high in parts) // number)
    start, stop = index * length, (index + 1) * length
    chosen, position = [], 0
    for low, high in parts:
        first, last = max(low, low + start - position), min(high, low + stop - position)
        if first < last:
            chosen.append((first, last))
        position += high - low
    return chosen


def _joined(parts: Sequence[_Interval]) -> list[_Interval]:
    """The same intervals with neighbours that touch made one."""
    joined: list[_Interval] = []
    for low, high in parts:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _shards_after(index: int, mesh_shape: Ints, placements: Placements) -> int:
    """Into how many parts the mesh dimensions after `index` divide the tensor dimension that it divides."""
    dim = getattr(placements[index], "dim", None)
    after = range(index + 1, len(placements))
    return math.prod(mesh_shape[j] for j in after if getattr(placements[j], "dim", None) == dim)


def _check(global_shape: Ints, mesh_shape: Ints, coordinate: Ints, placements: Placements) -> None:
    _check_mesh(mesh_shape, placements)
    _check_coordinate(mesh_shape, coordinate)
    if any(n < 0 for n in global_shape):
        raise LayoutError(f"a tensor cannot have shape {list(global_shape)}")
    for placement in placements:
        if isinstance(placement, Replicate):
            continue
        if not 0 <= placement.dim < len(global_shape):
            raise LayoutError(f"{placement} does not fit a tensor of shape {list(global_shape)}")
        if isinstance(placement, StridedShard) and placement.split_factor < 1:
            raise LayoutError(f"{placement}: the split factor must be at least 1")


def _check_mesh(mesh_shape: Ints, placements: Placements) -> None:
    if len(mesh_shape) != len(placements):
        raise LayoutError(
            f"{len(placements)} placements for a mesh of shape {list(mesh_shape)}: give one per dimension"
        )
    if any(n < 1 for n in mesh_shape):
        raise LayoutError(f"a mesh cannot have shape {list(mesh_shape)}")


def _check_coordinate(mesh_shape: Ints, coordinate: Ints) -> None:
    inside = len(coordinate) == len(mesh_shape) and all(0 <= c < n for c, n in zip(coordinate, mesh_shape, strict=True))
    if not inside:
        raise LayoutError(f"there is no coordinate {tuple(coordinate)} in a mesh of shape {list(mesh_shape)}")
