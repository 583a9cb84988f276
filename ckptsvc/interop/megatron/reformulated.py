"""Optimizer state in the form of Megatron-Core up to 0.13 (`fully_sharded_model_space`).

A tensor of shape S that a grid G of ranks divides evenly is stored with the shape (*G, n), n being the elements of one
rank's box: the last dimension is that box, flattened, of which each data-parallel rank has written a range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.geometry.layout import Piece
from ckptsvc.geometry.rules import Local
from ckptsvc.interop.dcp import entries as dcp_entries
from ckptsvc.interop.dcp.metadata import Chunk, Tensor
from ckptsvc.interop.logical import Entry, Foreign
from ckptsvc.interop.megatron.flat import pieces
from ckptsvc.types import DTYPES, TensorMeta


def add_reformulated(foreign: Foreign, name: str, tensor: Tensor, shape: Shape) -> None:
    """Add a tensor to a checkpoint.

    Args:
        foreign: the checkpoint.
        name: its canonical name.
        tensor: as it is stored.
        shape: its own shape.

    Raises:
        LayoutError: it is not stored in this form, or not for this shape.
    """
    grid, extent = tensor.shape[:-1], tensor.shape[-1] if tensor.shape else 0
    even = len(grid) == len(shape) and all(g > 0 and n % g == 0 for g, n in zip(grid, shape, strict=True))
    inner = tuple(n // g for n, g in zip(shape, grid, strict=True)) if even else ()
    if not even or prod(inner) != extent:
        raise LayoutError(
            f"{foreign.origin}: {name} is stored as {list(tensor.shape)}, which is no form of {list(shape)}"
        )
    meta = TensorMeta(name, tensor.dtype, shape)
    itemsize = DTYPES[tensor.dtype].itemsize
    for chunk, (key, at) in located(foreign, tensor, tensor.chunks):
        *ranges, (start, stop) = zip(chunk.box.origin, chunk.box.stop, strict=True)
        for cell in product(*(range(*ends) for ends in ranges)):
            origin = tuple(index * n for index, n in zip(cell, inner, strict=True))
            local = Local(inner, (Piece(Box(origin, inner), Box.full(inner)),))
            for box, first, block in pieces(local, start, stop - start):
                foreign.add(meta, box, (key, at + first * itemsize), block)
            at += (stop - start) * itemsize


def located(foreign: Foreign, tensor: Tensor, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, tuple[str, int]]]:
    """Pieces of a DCP tensor with file and byte where the data of each begins, without gaps.

    Raises:
        InvalidInput: their bytes are compressed.
        Damaged, LayoutError: one is not what it is said to be.
    """
    if any(chunk.place.transforms or chunk.place.raw for chunk in chunks):
        raise InvalidInput(f"{foreign.origin}: flat optimizer state in entries that were transformed is not known")
    entries = [Entry(*chunk.place[:3], dcp_entries.locate) for chunk in chunks]
    for chunk, stored in zip(chunks, dcp_entries.locate(foreign.files, entries), strict=True):
        if stored.dtype != tensor.dtype or prod(stored.shape) != chunk.box.size or not stored.is_contiguous():
            raise LayoutError(
                f"{foreign.origin}: {chunk.place.key} has {stored.dtype}{list(stored.shape)} for {chunk.box}"
            )
        yield chunk, stored.where
