"""A checkpoint in memory: what all ranks captured, as dense tensors, and written back to any tree."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ckptsvc.client.state import Capture, StateTree
from ckptsvc.format import objects
from ckptsvc.geometry.box import Box
from ckptsvc.types import TensorMeta

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, or as complex128 where there is no such integer: copies keep every bit."""
    return tensor if tensor.element_size() == 16 else tensor.view(INTEGERS[tensor.element_size()])


def raw(tensor: Tensor) -> bytes:
    """All elements in row-major order, bit for bit."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def blank(meta: TensorMeta) -> Tensor:
    """Zeros, also of the types that torch has no zeros of."""
    empty = torch.empty(meta.shape, dtype=getattr(torch, meta.dtype))
    bits(empty).zero_()
    return empty


@dataclass
class Dense:
    """All logical tensors of a checkpoint, and every rank's encoded document."""

    metas: dict[str, TensorMeta]
    tensors: dict[str, Tensor]
    documents: list[bytes]

    def bits(self) -> dict[str, bytes]:
        """Every tensor, to compare."""
        return {name: raw(tensor) for name, tensor in self.tensors.items()}

    def document(self, rank: int) -> dict[str, Any]:
        """That of a rank, or of the one that stands in for it in a larger world."""
        return objects.decode(self.documents[rank % len(self.documents)])


def save(tree: StateTree) -> Dense:
    """Captures the tree, on all ranks together if there is a process group.

    Checks on the way what a store relies on: the pieces of all ranks cover every tensor, copies of a piece
    are equal where a piece may be split, and the holders of a piece are exactly the ranks that have it.
    """
    capture = tree.capture()
    mine = [
        (tuple(p.meta), p.region.origin, p.region.shape, bits(p.tensor).clone(), p.holders.ranks, p.splittable)
        for p in capture.parts
    ]
    for part in capture.parts:
        assert part.tensor.shape == part.region.shape
    told = (mine, capture.aliases, objects.encode(capture.objects))
    everyone: list[Any] = [told]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, told)
    metas: dict[str, TensorMeta] = {}
    tensors: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    having: dict[tuple[Any, ...], set[int]] = {}
    for rank, (pieces, _, _) in enumerate(everyone):
        for meta_of, origin, shape, data, holders, splittable in pieces:
            meta = TensorMeta(*meta_of)
            assert metas.setdefault(meta.name, meta) == meta
            whole = tensors.setdefault(meta.name, blank(meta))
            seen = covered.setdefault(meta.name, torch.zeros(meta.shape, dtype=torch.bool))
            at = Box(tuple(origin), tuple(shape)).slices()
            if splittable and seen[at].any():
                assert raw(bits(whole)[at]) == raw(data), f"{meta.name} differs between its holders"
            if not (seen[at].all() and math.prod(shape)):  # the first holder's value counts
                bits(whole)[at] = data
            seen[at] = True
            if holders is not None:
                assert rank in holders
                having.setdefault((meta.name, tuple(origin), tuple(shape), tuple(holders)), set()).add(rank)
    for name, seen in covered.items():
        assert seen.all(), f"{name} has a hole"
    for (name, *_, holders), ranks in having.items():
        assert set(holders) == ranks, f"holders of {name}"
    for _, aliases, _ in everyone:
        for alias, name in aliases.items():
            metas[alias] = metas[name]._replace(name=alias)
            tensors[alias] = tensors[name]
    return Dense(metas, tensors, [document for _, _, document in everyone])


def restore(tree: StateTree, saved: Dense, rank: int = 0, **options: Any) -> dict[str, Any]:
    """Fills what the tree wants and loads it."""
    document = saved.document(rank)
    wanted = tree.targets(saved.metas, document, **options)
    fill(wanted, saved.tensors)
    return tree.load(document)


def fill(wanted: Capture, tensors: Mapping[str, Tensor]) -> None:
    """Copies every wanted part, bit for bit."""
    for part in wanted.parts:
        bits(part.tensor).copy_(bits(tensors[part.meta.name])[part.region.slices()])
