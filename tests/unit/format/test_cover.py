from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import LayoutError
from ckptsvc.format.cover import doubtful, line
from ckptsvc.format.index import Index
from ckptsvc.format.regions import Regions, Tensors
from ckptsvc.format.shard import Part
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import TensorMeta


def table(tensors):
    """`tensors`: (shape, regions) each."""
    shapes = [shape for shape, _ in tensors]
    regions = [(row, region) for row, (_, own) in enumerate(tensors) for region in own]
    numbers = [(r.start, r.length) if isinstance(r, FlatRange) else (*r.origin, *r.shape) for _, r in regions]
    return Regions.checked(
        Tensors.checked(
            np.ones(len(shapes), np.uint8),
            np.array([len(shape) for shape in shapes], np.uint8),
            np.array([n for shape in shapes for n in shape], np.int64),
            "x",
        ),
        np.array([row for row, _ in regions], np.int64),
        np.array([isinstance(region, FlatRange) for _, region in regions], np.uint8),
        np.array([n for each in numbers for n in each], np.int64),
        "x",
    )


def covered(shape, regions):
    array = np.zeros(shape, bool)
    for region in regions:
        if isinstance(region, FlatRange):
            array.reshape(-1)[region.start : region.stop] = True
        else:
            array[region.slices()] = True
    return bool(array.all())


@given(st.data())
def test_no_hole_is_overlooked(kit, data):
    tensors = []
    for _ in range(data.draw(st.integers(0, 4))):
        shape = data.draw(kit.shapes)
        tensors.append((shape, data.draw(st.lists(kit.regions_in(shape), min_size=1, max_size=4))))
    found = set(doubtful(table(tensors)))
    holes = {row for row, tensor in enumerate(tensors) if not covered(*tensor)}
    assert bool(holes) <= bool(found)
    # Of the tensors cut in ranges only the first with a hole is named.
    regions = table(tensors)
    scattered = {int(row) for row in regions.tensor[~line(regions).contiguous]}
    assert holes & scattered <= found
    ranges = holes - scattered
    assert not ranges or min(ranges) in found


def grid(shape, cuts):
    """All cells of a tensor cut at the given places in each dimension."""
    bounds = [sorted({0, *cut, n}) for n, cut in zip(shape, cuts, strict=True)]
    cells = [Box((), ())]
    for edges in bounds:
        pairs = list(itertools.pairwise(edges)) or [(0, 0)]
        cells = [Box((*c.origin, a), (*c.shape, b - a)) for c in cells for a, b in pairs]
    return cells


@given(st.data())
def test_grids_and_ranges_are_never_in_doubt(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cuts = [data.draw(st.lists(st.integers(0, n), max_size=3)) for n in shape]
    size = math.prod(shape)
    edges = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    ranges = [FlatRange(a, b - a) for a, b in itertools.pairwise(edges)]
    cells = data.draw(st.permutations(grid(shape, cuts)))
    assert list(doubtful(table([(shape, cells), (shape, ranges), ((), [Box((), ())])]))) == []


@given(st.data())
def test_a_missing_cell_is_found(data):
    shape = tuple(data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)))
    cells = grid(shape, [[1] for _ in shape])
    missing = data.draw(st.sampled_from(cells))
    spoiled = [cell for cell in cells if cell != missing]
    if data.draw(st.booleans()):
        spoiled.append(spoiled[0])  # the number of regions is right again
    whole = [Box.full(shape)]
    assert list(doubtful(table([(shape, whole), (shape, spoiled), (shape, whole)]))) == [1]


def test_boxes_whose_volumes_add_up_but_overlap_are_in_doubt():
    # 16 of 16 elements, all origins different: two boxes overlap and a corner is missing.
    boxes = [Box((0, 0), (2, 2)), Box((0, 2), (2, 2)), Box((2, 0), (2, 2)), Box((2, 1), (2, 2))]
    assert not covered((4, 4), boxes)
    assert list(doubtful(table([((4, 4), boxes)]))) == [0]


def test_the_line_lays_tensors_end_to_end():
    found = line(
        table(
            [
                ((4, 3), [Box((1, 0), (2, 3)), FlatRange(2, 5), Box((0, 1), (2, 2))]),
                ((0,), [Box((0,), (0,))]),
                ((), [Box((), ())]),
            ]
        )
    )
    assert found.base.tolist() == [0, 12, 12]
    assert found.contiguous.tolist() == [True, True, False, True, True]
    assert found.start[found.contiguous].tolist() == [3, 2, 12, 12]
    assert found.length[found.contiguous].tolist() == [6, 5, 0, 1]


def part(name, region, shape=(4, 4)):
    return Part(TensorMeta(name, "int8", shape), region)


@pytest.mark.parametrize(
    ("regions", "hole"),
    [
        ([Box((0, 0), (2, 4)), Box((3, 0), (1, 4))], r"\[2:3, 0:4\]"),
        ([Box((0, 0), (4, 2)), Box((0, 3), (4, 1))], r"\[0:4, 2:3\]"),
        ([FlatRange(0, 15)], r"flat \[15:16\]"),
        ([Box((0, 0), (2, 4)), FlatRange(9, 7)], r"\[2:3, 0:1\]"),
    ],
)
def test_an_index_names_the_tensor_with_a_hole(kit, regions, hole):
    whole = [part(name, Box.full((4, 4))) for name in ("a", "b", "c")]
    records = [kit.shard_record(rank, [part("holey", region)])[0] for rank, region in enumerate(regions)]
    records.append(kit.shard_record(7, whole)[0])
    with pytest.raises(LayoutError, match=rf"'holey'.*{hole}"):
        Index.build(kit.index_info(), records).check_cover()


def test_an_index_without_holes_passes(kit):
    parts = [
        [part("a", Box((0, i), (4, 1))), part("b", FlatRange(4 * i, 4)), part("c", Box.full((4, 4)))] for i in range(4)
    ]
    records = [kit.shard_record(rank, own)[0] for rank, own in enumerate(parts)]
    Index.build(kit.index_info(), records).check_cover()
