"""Flat buffers of Megatron-Core's distributed optimizer: where each parameter lies in them.

Source: Megatron-Core 0.16 (`distributed/param_and_grad_buffer.py`), confirmed by its checkpoints. A buffer has the
parameters of one element type in reverse order, each beginning at a multiple of 64 elements, in one or more buckets. An
embedding that first and last pipeline stage share is alone in a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, flat_to_boxes
from ckptsvc.geometry.reshard import Block
from ckptsvc.geometry.rules import Local

ALIGNMENT = 64


class Item(NamedTuple):
    """A parameter in a buffer.

    Attributes:
        name: its name.
        numel: elements of the local tensor.
        alone: whether it has a bucket of its own.
    """

    name: str
    numel: int
    alone: bool = False


class Spot(NamedTuple):
    """Where a parameter lies.

    Attributes:
        bucket: number of the bucket.
        start: first element in it.
    """

    bucket: int
    start: int


def spots(items: Sequence[Item], bucket: int = 0) -> tuple[list[Spot], list[int]]:
    """Where parameters lie in a buffer, and the length of each bucket without the padding at its end.

    Args:
        items: in the order of the model.
        bucket: a bucket ends when it has so many elements; 0: only where a parameter is alone.
    """
    found: dict[str, Spot] = {}
    lengths: list[int] = []
    at = 0
    for item in reversed(items):
        start = -(-at // ALIGNMENT) * ALIGNMENT
        if item.alone and at:
            lengths.append(start)
            start = 0
        found[item.name] = Spot(len(lengths), start)
        at = start + item.numel
        if item.alone or (bucket and at >= bucket):
            lengths.append(at)
            at = 0
    if at:
        lengths.append(at)
    return [found[item.name] for item in items], lengths


def spots_in(items: Sequence[Item], lengths: Sequence[int], what: str) -> list[Spot]:
    """Where parameters lie in buckets of known lengths.

    Args:
        items: in the order of the model.
        lengths: of the buckets, without the padding at their ends.
        what: the buffer, for messages.

    Raises:
        LayoutError: the parameters do not fill the buckets.
    """
    found: dict[str, Spot] = {}
    number = at = 0
    for item in reversed(items):
        start = -(-at // ALIGNMENT) * ALIGNMENT
        if number < len(lengths) and at and start + item.numel > lengths[number]:
            if lengths[number] not in (at, start):
                break
            number, start = number + 1, 0
        if number >= len(lengths) or start + item.numel > lengths[number]:
            break
        found[item.name] = Spot(number, start)
        at = start + item.numel
    if len(found) < len(items) or number + 1 != len(lengths) or at != lengths[number]:
        raise LayoutError(
            f"{what} has buckets of {', '.join(map(str, lengths))} elements, which these {len(items)} parameters in"
            " this order do not fill",
            hint="is this the order of the model's parameters?",
        )
    return [found[item.name] for item in items]


def pieces(local: Local, start: int, length: int) -> Iterator[tuple[Box, int, Block | None]]:
    """What a range of a flattened local tensor is of the logical one.

    Args:
        local: what the rank holds.
        start: first element of the range.
        length: elements of the range.

    Yields:
        (box of the logical tensor, first element of its data in the range, how it is seen in that data)
    """
    done = 0
    for part in flat_to_boxes(local.shape, start, length):
        for piece in local.pieces:
            common = part.intersect(piece.local)
            if common is None:
                continue
            moved = zip(piece.box.origin, common.origin, piece.local.origin, strict=True)
            box = Box(tuple(o + c - p for o, c, p in moved), common.shape)
            order = tuple(range(len(part.shape)))
            block = None if common == part else Block(part.shape, common.relative_to(part.origin), order)
            yield box, done, block
        done += part.size
