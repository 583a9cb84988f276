"""Layouts against torch's own: its layout function, its way of splitting a tensor, and FSDP2 itself."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box
from ckptsvc.geometry.layout import (
    SMALL_BYTES,
    Piece,
    Replicate,
    Shard,
    StridedShard,
    held_pieces,
    holders,
    local_box,
    local_boxes,
    nested_box,
    replica,
    split_replicated,
)

mesh_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
tensor_shapes = st.lists(st.integers(0, 13), min_size=1, max_size=3).map(tuple)


def placements_for(shape, mesh_shape, *, strided):
    dims = st.integers(0, len(shape) - 1)
    choices = [st.just(Replicate()), dims.map(Shard)]
    if strided:
        choices.append(st.builds(StridedShard, dims, st.integers(1, 4)))
    return st.tuples(*(st.one_of(choices) for _ in mesh_shape))


@st.composite
def layouts(draw, *, strided=False):
    shape, mesh_shape = draw(tensor_shapes), draw(mesh_shapes)
    return shape, mesh_shape, draw(placements_for(shape, mesh_shape, strided=strided))


def to_torch(placement):
    if isinstance(placement, Replicate):
        return TorchReplicate()
    if isinstance(placement, Shard):
        return TorchShard(placement.dim)
    return _StridedShard(placement.dim, split_factor=placement.split_factor)


def from_torch(placement):
    if isinstance(placement, _StridedShard):
        return StridedShard(placement.dim, placement.split_factor)
    return Shard(placement.dim) if isinstance(placement, TorchShard) else Replicate()


def numbered(shape):
    return torch.arange(math.prod(shape)).reshape(shape)


def torch_local(tensor, mesh_shape, coordinate, placements):
    """What torch puts on a rank: its own split of the tensor, mesh dimension by mesh dimension."""
    for n, c, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if not isinstance(placement, Replicate):
            tensor = to_torch(placement)._split_tensor(tensor, n, with_padding=False)[0][c]
    return tensor


def assemble(tensor, pieces, local_shape):
    """The local tensor made of pieces; -1 where no piece put anything."""
    local = torch.full(local_shape, -1)
    for piece in pieces:
        assert piece.box.shape == piece.local.shape
        assert not piece.box.is_empty
        assert (local[piece.local.slices()] == -1).all(), "two pieces in one place"
        local[piece.local.slices()] = tensor[piece.box.slices()]
    return local


@given(layouts())
def test_local_box_is_what_torch_computes(layout):
    shape, mesh_shape, placements = layout
    for coordinate in itertools.product(*map(range, mesh_shape)):
        box = local_box(shape, mesh_shape, coordinate, placements)
        expected = _compute_local_shape_and_global_offset(
            shape, mesh_shape, list(coordinate), [to_torch(p) for p in placements]
        )
        assert (box.shape, box.origin) == expected


@given(layouts(strided=True))
def test_local_boxes_make_the_tensor_torch_splits_off(layout):
    shape, mesh_shape, placements = layout
    tensor = numbered(shape)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        expected = torch_local(tensor, mesh_shape, coordinate, placements)
        pieces = local_boxes(shape, mesh_shape, coordinate, placements)
        assert torch.equal(assemble(tensor, pieces, expected.shape), expected)


@given(layouts())
def test_every_element_is_held_as_often_as_the_mesh_replicates_it(layout):
    shape, mesh_shape, placements = layout
    count = np.zeros(shape, int)
    for coordinate in itertools.product(*map(range, mesh_shape)):
        count[local_box(shape, mesh_shape, coordinate, placements).slices()] += 1
    replicas = math.prod(n for n, p in zip(mesh_shape, placements, strict=True) if isinstance(p, Replicate))
    assert (count == replicas).all()


def test_strided_shard_has_one_part_of_each_chunk():
    # nine rows, two chunks of five and four, each divided over four ranks: torch's own example
    rows = [local_boxes((9,), (4,), (rank,), [StridedShard(0, 2)]) for rank in range(4)]
    assert rows[0] == [Piece(Box((0,), (2,)), Box((0,), (2,))), Piece(Box((5,), (1,)), Box((2,), (1,)))]
    assert rows[3] == [Piece(Box((8,), (1,)), Box((0,), (1,)))]
    with pytest.raises(LayoutError, match="not one box"):
        local_box((9,), (4,), (0,), [StridedShard(0, 2)])


def test_parts_that_touch_are_one_box():
    assert local_box((8,), (1,), (0,), [StridedShard(0, 2)]) == Box((0,), (8,))
    # two chunks of four rows over eight ranks: rank 2 has a row of each
    assert len(local_boxes((8,), (8,), (2,), [StridedShard(0, 2)])) == 2
    # the inner shard puts the two halves together again
    assert local_box((8,), (2, 2), (1, 0), [StridedShard(0, 2), Shard(0)]) == Box((2,), (2,))


def test_a_scalar_is_held_whole():
    assert local_box((), (2, 3), (1, 2), [Replicate(), Replicate()]) == Box((), ())
    assert local_boxes((), (2,), (1,), [Replicate()]) == [Piece(Box((), ()), Box((), ()))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), (2,), (0,), []), "0 placements"),
        (((4,), (2,), (2,), [Shard(0)]), "no coordinate"),
        (((4,), (2,), (0, 0), [Shard(0)]), "no coordinate"),
        (((4,), (0,), (0,), [Shard(0)]), "a mesh cannot"),
        (((4,), (2,), (0,), [Shard(1)]), "does not fit"),
        (((4,), (2,), (0,), [Shard(-1)]), "does not fit"),
        (((), (2,), (0,), [Shard(0)]), "does not fit"),
        (((4,), (2,), (0,), [StridedShard(0, 0)]), "split factor"),
        (((-4,), (2,), (0,), [Shard(0)]), "cannot have shape"),
    ],
)
@pytest.mark.parametrize("function", [local_box, local_boxes, nested_box])
def test_what_does_not_go_together_is_refused(function, arguments, message):
    with pytest.raises(LayoutError, match=message):
        function(*arguments)


# FSDP2 over tensor parallelism


def fsdp2_parameter(tensor, mesh_shape, rank, tp_dim):
    """The sharded parameter that FSDP2 over TP makes of a tensor on one rank; no other rank exists."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh_shape), store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
        module = torch.nn.Module()
        inner = distribute_tensor(tensor, mesh["tp"], [TorchShard(tp_dim)], src_data_rank=None)
        module.weight = torch.nn.Parameter(inner)
        fully_shard(module, mesh=mesh["dp"])
        assert isinstance(module.weight, DTensor)
        return module.weight.placements, module.weight.to_local().detach()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 13])
@pytest.mark.parametrize("mesh_shape", [(4, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("tp_dim", [0, 1])
def test_held_pieces_are_what_fsdp2_over_tp_holds(rows, mesh_shape, tp_dim):
    tensor = torch.arange(rows * 5.0).reshape(rows, 5)
    held = torch.zeros(rows, 5)
    for rank, coordinate in enumerate(itertools.product(*map(range, mesh_shape))):
        torch_placements, local = fsdp2_parameter(tensor, mesh_shape, rank, tp_dim)
        placements = [from_torch(p) for p in torch_placements]
        pieces = held_pieces(tensor.shape, mesh_shape, coordinate, placements, local.shape)
        assert torch.equal(assemble(tensor, pieces, local.shape), local.to(torch.int64))
        for piece in pieces:
            held[piece.box.slices()] += 1
    assert (held == 1).all()


def test_uneven_fsdp2_is_not_what_its_placements_say():
    # Nine rows, FSDP 4 x TP 2: TP gives rows 5..8 to tp 1, FSDP the last to dp 3; tp 0 has none for dp 3.
    placements = [StridedShard(0, 2), Shard(0)]
    assert nested_box((9, 5), (4, 2), (3, 1), placements) == Box((8, 0), (1, 5))
    assert held_pieces((9, 5), (4, 2), (3, 0), placements, (0, 5)) == []
    # read from left to right the row belongs to (3, 0): so it is for a tensor that was distributed like this
    assert local_box((9, 5), (4, 2), (3, 0), placements) == Box((8, 0), (1, 5))
    assert [p.box for p in held_pieces((9, 5), (4, 2), (3, 0), placements, (1, 5))] == [Box((8, 0), (1, 5))]


def test_nested_box_refuses_a_strided_shard_that_fsdp2_does_not_make():
    with pytest.raises(LayoutError, match="does not stand for"):
        nested_box((8,), (2, 2), (0, 0), [StridedShard(0, 4), Shard(0)])
    pieces = held_pieces((8,), (2, 2), (0, 0), [StridedShard(0, 4), Replicate()], (4,))
    assert [p.box.origin for p in pieces] == [(0,), (2,), (4,), (6,)]


@given(layouts(strided=True))
def test_held_pieces_of_a_distributed_tensor_have_its_local_shape(layout):
    shape, mesh_shape, placements = layout
    for coordinate in itertools.product(*map(range, mesh_shape)):
        local = torch_local(numbered(shape), mesh_shape, coordinate, placements)
        pieces = held_pieces(shape, mesh_shape, coordinate, placements, local.shape)
        assert sum(piece.box.size for piece in pieces) == local.numel()


def test_a_local_tensor_of_another_shape_is_refused():
    with pytest.raises(LayoutError, match=r"has shape \[3, 8\].*gives it \[4, 8\]"):
        held_pieces((8, 8), (2,), (0,), [Shard(0)], (3, 8))


# Replicas


@given(layouts(strided=True))
def test_holders_hold_the_same_and_replica_counts_them(layout):
    shape, mesh_shape, placements = layout
    groups = holders(mesh_shape, placements)
    assert sorted(itertools.chain(*groups)) == list(itertools.product(*map(range, mesh_shape)))
    for group in groups:
        parts = [local_boxes(shape, mesh_shape, coordinate, placements) for coordinate in group]
        assert all(part == parts[0] for part in parts)
        for index, coordinate in enumerate(group):
            assert replica(mesh_shape, coordinate, placements) == (index, len(group))


def test_replica_refuses_a_coordinate_outside():
    with pytest.raises(LayoutError, match="no coordinate"):
        replica((2, 2), (0, 2), [Replicate(), Shard(0)])


@st.composite
def replicated_items(draw):
    sizes = st.one_of(st.integers(0, 4), st.integers(1, 60), st.sampled_from([1000, 65536, 300_000]))
    items = []
    for _ in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(sizes, max_size=2)))
        origin = tuple(draw(st.integers(0, 9)) for _ in shape)
        items.append((Box(origin, shape), draw(st.sampled_from([1, 2, 4, 16]))))
    return items


@settings(max_examples=200)
@given(replicated_items(), st.integers(1, 9))
def test_split_replicated_gives_every_element_to_one_holder(items, number):
    shares = split_replicated(items, number)
    assert shares == split_replicated(list(items), number)
    assert len(shares) == len(items)
    cuts = 0
    for (box, itemsize), parts in zip(items, shares, strict=True):
        assert all(0 <= holder < number for holder, _ in parts)
        assert all(box.contains(part) for _, part in parts)
        assert sum(part.size for _, part in parts) == box.size
        assert all(a.intersect(b) is None for (_, a), (_, b) in itertools.combinations(parts, 2))
        if box.size * itemsize < SMALL_BYTES:
            assert [part for _, part in parts] == [box]
        cuts += len(parts) - 1
    assert cuts <= number - 1


def loads_of(items, shares, number):
    loads = [0] * number
    for (_, itemsize), parts in zip(items, shares, strict=True):
        for holder, box in parts:
            loads[holder] += box.size * itemsize
    return loads


@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(64, 4000)), min_size=1, max_size=20),
    st.integers(2, 16),
)
def test_split_replicated_balances_within_one_percent(shapes, number):
    # enough rows that one is under a percent of a holder's share; small tensors to go with them
    items = [(Box.full(shape), 4) for shape in shapes] + [(Box.full((7,)), 4)] * 50 + [(Box.full((9000, 4000)), 4)]
    loads = loads_of(items, split_replicated(items, number), number)
    assert max(loads) <= 1.01 * sum(loads) / number
    assert min(loads) >= 0.99 * sum(loads) / number


def test_split_replicated_cuts_the_longest_dimension_where_the_first_is_too_short():
    shares = split_replicated([(Box((5, 3), (2, 1_000_000)), 4)], 3)
    assert [box.shape[0] for _, box in shares[0]] == [2, 2, 2]
    loads = [box.size for _, box in shares[0]]
    assert max(loads) - min(loads) <= 2


def test_split_replicated_spreads_small_and_empty_items():
    items = [(Box.full(()), 4)] * 100 + [(Box.full((0, 5)), 4)] * 100
    shares = split_replicated(items, 4)
    for kind in (shares[:100], shares[100:]):
        holders_of = [parts[0][0] for parts in kind]
        assert [holders_of.count(holder) for holder in range(4)] == [25, 25, 25, 25]


def test_split_replicated_fills_up_the_holders_that_have_least():
    # three small items go to three of four holders; the large one makes all equal
    items = [(Box.full((60_000,)), 1)] * 3 + [(Box.full((100_000,)), 1)]
    loads = loads_of(items, split_replicated(items, 4), 4)
    assert max(loads) - min(loads) <= 1


def test_split_replicated_needs_a_holder():
    with pytest.raises(InvalidInput, match="0 holders"):
        split_replicated([], 0)


def test_splitting_twenty_thousand_items_is_quick():
    items = [(Box.full((n % 700 + 1, 64)), 4) for n in range(20_000)]
    start = time.process_time()
    split_replicated(items, 64)
    assert time.process_time() - start < 1.0
