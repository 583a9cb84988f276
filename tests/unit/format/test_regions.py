from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged
from ckptsvc.format import columnar
from ckptsvc.format.regions import KIND_BOX, KIND_FLAT, Regions, Tensors
from ckptsvc.geometry.box import Box, FlatRange, fits
from ckptsvc.types import DTYPES


def tensors_of(shapes, dtype="float16"):
    return Tensors.checked(
        np.full(len(shapes), DTYPES[dtype].code, np.uint8),
        np.array([len(shape) for shape in shapes], np.uint8),
        np.array([n for shape in shapes for n in shape], np.int64),
        "the table",
    )


def regions_of(shapes, regions):
    """`regions`: (row of the tensor, region)."""
    numbers = [(r.start, r.length) if isinstance(r, FlatRange) else (*r.origin, *r.shape) for _, r in regions]
    return Regions.checked(
        tensors_of(shapes),
        np.array([row for row, _ in regions], np.int64),
        np.array([KIND_FLAT if isinstance(r, FlatRange) else KIND_BOX for _, r in regions], np.uint8),
        np.array([n for each in numbers for n in each], np.int64),
        "the table",
    )


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(columnar, "CHUNK", 3)


@pytest.mark.usefixtures("_small_chunks")
@given(st.data())
def test_regions_come_back_as_objects(kit, data):
    shapes = data.draw(st.lists(kit.shapes, max_size=4))
    regions = [
        (row, r) for row, shape in enumerate(shapes) for r in data.draw(st.lists(kit.regions_in(shape), max_size=6))
    ]
    table = regions_of(shapes, regions)
    assert [table.tensors.shape_of(row) for row in range(len(shapes))] == shapes
    assert table.tensors.size.tolist() == [math.prod(shape) for shape in shapes]
    assert table.nbytes.tolist() == [2 * region.size for _, region in regions]
    for row in range(len(shapes)):
        own = np.flatnonzero(table.tensor == row)
        assert table.objects(own) == [region for at, region in regions if at == row]
        if len(own):
            assert table.objects(slice(int(own[0]), int(own[-1]) + 1)) == table.objects(own)
    assert table.objects(slice(0, 0)) == []


@pytest.mark.usefixtures("_small_chunks")
@given(st.data())
def test_near_has_all_regions_that_share_an_element(kit, data):
    shape = data.draw(kit.shapes)
    stored = [(0, r) for r in data.draw(st.lists(kit.regions_in(shape), min_size=1, max_size=8))]
    wanted = data.draw(st.lists(kit.regions_in(shape), min_size=1, max_size=3))
    table = regions_of([shape], stored)
    near = set(np.arange(len(stored))[table.near(slice(0, len(stored)), wanted)].tolist())

    def elements(region):
        array = np.zeros(shape, bool)
        if isinstance(region, FlatRange):
            array.reshape(-1)[region.start : region.stop] = True
        else:
            array[region.slices()] = True
        return array

    for i, (_, region) in enumerate(stored):
        if any((elements(region) & elements(other)).any() for other in wanted):
            assert i in near


def test_near_leaves_out_the_others():
    slabs = [(0, Box((i, 0), (1, 4))) for i in range(10)]
    assert regions_of([(10, 4)], slabs).near(slice(0, 10), [Box((3, 1), (2, 2))]).tolist() == [3, 4]
    ranges = [(0, FlatRange(i * 4, 4)) for i in range(10)]
    assert regions_of([(10, 4)], ranges).near(slice(0, 10), [Box((3, 0), (2, 4))]).tolist() == [3, 4]
    assert regions_of([(10, 4)], ranges).near(slice(0, 10), [FlatRange(7, 2)]).tolist() == [1, 2]


@given(st.data())
def test_a_region_is_inside_exactly_if_it_fits(kit, data):
    shape = data.draw(kit.shapes)
    numbers = st.integers(-2, 6) | st.sampled_from([2**63 - 1, -(2**63), 2**62])
    if data.draw(st.booleans()):
        region = FlatRange(data.draw(numbers), data.draw(numbers))
    else:
        region = Box(tuple(data.draw(numbers) for _ in shape), tuple(data.draw(numbers) for _ in shape))
    inside = fits(region, shape)
    assert (kit.survives(lambda _: regions_of([shape], [(0, region)]), b"") is not None) == inside


@pytest.mark.parametrize(
    "shape",
    [(-1,), (2**62, 4), (2**63 - 1,), (2**31, 2**32), (2**40, 0, 2**40), (1,) * 65],
)
def test_impossible_shapes_are_damage(shape):
    with pytest.raises(Damaged, match="the table"):
        tensors_of([(3,), shape, ()])


def test_the_largest_shapes_are_possible():
    assert tensors_of([(2**61, 1), (0, 2**61), (1,) * 64]).size.tolist() == [2**61, 0, 1]


def test_unknown_dtypes_are_damage():
    with pytest.raises(Damaged, match="dtype"):
        Tensors.checked(np.array([99], np.uint8), np.zeros(1, np.uint8), np.empty(0, np.int64), "x")


@pytest.mark.parametrize(
    ("offset", "size", "fits_in"),
    [
        (90, 100, True),
        (91, 100, False),
        (100, 100, False),
        (0, 9, False),
        (2**64 - 10, 2**63 - 1, False),
        (0, 10, True),
    ],
)
def test_places_are_inside_their_files(kit, offset, size, fits_in):
    table = regions_of([(5,)], [(0, FlatRange(0, 5))])
    places = np.array([offset], np.uint64), np.array([3, size], np.int64)
    found = kit.survives(lambda _: table.check_places(np.array([1]), *places, "x") is None, b"")
    assert (found is True) == fits_in
