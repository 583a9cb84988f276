"""How ZeRO divides what a model-parallel rank holds over its data-parallel ranks, padding and all.

Source: DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`), as its files show it.

Stage 1 and 2: the tensors of a parameter group, flattened, one after another, zeros up to a multiple of
`alignment` x ranks, cut into equal partitions: a tensor may begin in one rank and end in the next. Stage 3: every
tensor by itself, each rank ceil(elements / ranks) of it, zeros after the end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, FlatRange, Region, Shape, as_flat, flat_to_boxes
from ckptsvc.geometry.rules import Local

ALIGNMENT = 2
"""DeepSpeed's `nccl_start_alignment_factor`."""


class Share(NamedTuple):
    """A part of one tensor in a rank's partition.

    Attributes:
        tensor: its place in the list of tensors.
        start: the first element, of the flattened (local) tensor.
        length: how many.
        at: where they begin in the partition.
    """

    tensor: int
    start: int
    length: int
    at: int


class Flat:
    """The flat buffer of one parameter group, for ZeRO stage 1 and 2.

    Attributes:
        starts: where each tensor begins in the buffer, in elements.
        total: length of the buffer with its padding.
        partition: length of a rank's partition.
    """

    def __init__(
        self, numels: Sequence[int], ranks: int, *, alignment: int = ALIGNMENT, parameter_alignment: int = 1
    ) -> None:
        """Lay out a buffer.

        Args:
            numels: elements of each tensor, in the order of the group.
            ranks: data-parallel ranks.
            alignment: the buffer is a multiple of this many elements times `ranks`.
            parameter_alignment: every tensor but the first begins at a multiple of this many elements (DeepSpeed's
                `parameter_alignment`: 16 bytes).

        Raises:
            LayoutError: a number is negative, or less than 1 where it must be.
        """
        if min(ranks, alignment, parameter_alignment) < 1 or min(numels, default=0) < 0:
            raise LayoutError(f"no flat buffer for {ranks} ranks, alignment {alignment} and {parameter_alignment}")
        self._numels = numels
        step = parameter_alignment
        ends = [0, *accumulate(-(-n // step) * step for n in numels)]
        self.starts = ends[:-1]
        used = self.starts[-1] + numels[-1] if numels else 0
        self.total = -(-used // (alignment * ranks)) * alignment * ranks
        self.partition = self.total // ranks

    def shares(self, rank: int) -> list[Share]:
        """What is in the partition of a data-parallel rank; what is between and after is padding."""
        low, high = rank * self.partition, (rank + 1) * self.partition
        shares = []
        first = max(bisect_right(self.starts, low) - 1, 0)
        for tensor in range(first, len(self.starts)):
            start = self.starts[tensor]
            if start >= high:
                break
            begin, end = max(low, start), min(high, start + self._numels[tensor])
            if begin < end:
                shares.append(Share(tensor, begin - start, end - begin, begin - low))
        return shares

    def padding(self, rank: int) -> int:
        """Elements at the end of a rank's partition that are after the last tensor."""
        used = self.starts[-1] + self._numels[-1] if self.starts else 0
        return min(max((rank + 1) * self.partition - used, 0), self.partition)


def fragment(numel: int, ranks: int, rank: int) -> tuple[int, FlatRange]:
    """(elements of a rank's fragment with padding, what of the tensor it is), for ZeRO stage 3."""
    length = -(-numel // ranks)
    start = min(rank * length, numel)
    return length, FlatRange(start, min(length, numel - start))


def logical_regions(shape: Shape, local: Local, start: int, length: int) -> Iterable[Region]:
    """The regions of the logical tensor that a range of a rank's flattened local tensor is; padding has none.

    Their data follow each other in the range only if there is one region; otherwise each region says which elements,
    not their order in the partition.

    Args:
        shape: of the logical tensor.
        local: what the rank holds of it.
        start: first element of the range in the flattened local tensor.
        length: elements.
    """
    pieces = local.pieces
    if len(pieces) == 1 and pieces[0].box.shape == local.shape:
        box = pieces[0].box
        if length == box.size:
            return [box]
        if (flat := as_flat(shape, box)) is not None:
            return [FlatRange(flat.start + start, length)]
    found = []
    for part in flat_to_boxes(local.shape, start, length):
        for piece in pieces:
            if (common := part.intersect(piece.local)) is not None:
                moved = zip(piece.box.origin, common.origin, piece.local.origin, strict=True)
                found.append(Box(tuple(o + c - p for o, c, p in moved), common.shape))
    return found
