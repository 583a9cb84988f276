"""Plans against dense numpy arrays: the copies are carried out and the result compared with the truth."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.layout import Replicate, Shard, local_box
from ckptsvc.geometry.reshard import Copy, StoredRegion, View, check_cover, plan, source_spans

ITEMSIZE = 8


# half of them small with room inside, so that regions cross rows; half anything, with empty and 0-d ones
shapes = st.one_of(
    st.lists(st.integers(2, 7), min_size=2, max_size=3).map(tuple),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
)
solid_shapes = shapes.filter(lambda shape: math.prod(shape) > 0)


@st.composite
def intervals(draw, n):
    """First index and length inside [0, n); seldom empty, as hypothesis by itself likes it."""
    if n == 0 or draw(st.integers(0, 9)) == 5:
        return draw(st.integers(0, n)), 0
    low = draw(st.integers(0, n - 1))
    return low, draw(st.integers(1, n - low))


@st.composite
def regions_in(draw, shape):
    if draw(st.booleans()):
        return FlatRange(*draw(intervals(math.prod(shape))))
    sides = [draw(intervals(n)) for n in shape]
    return Box(tuple(low for low, _ in sides), tuple(extent for _, extent in sides))


@st.composite
def partitions(draw, shape):
    """Regions that together are the whole tensor: flat ranges, or what a mesh makes of it."""
    size = math.prod(shape)
    if not shape or draw(st.booleans()):
        bounds = sorted(
            {
                0,
                size,
                *draw(st.lists(st.integers(0, size), min_size=draw(st.integers(0, 5)), max_size=5, unique=size > 5)),
            }
        )
        regions = [FlatRange(a, b - a) for a, b in itertools.pairwise(bounds)]
    else:
        mesh = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 1]), min_size=1, max_size=3)))
        placement = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
        placements = [draw(placement) for _ in mesh]
        regions = [local_box(shape, mesh, c, placements) for c in itertools.product(*map(range, mesh))]
    return draw(st.permutations(regions))


def content(array, region):
    """The elements of a region in the order of its data."""
    part = array[region.slices()] if isinstance(region, Box) else array.reshape(-1)[region.start : region.stop]
    return part.reshape(-1)


def store(regions):
    """The regions one after the other in one file, the first byte of which is no data."""
    offsets = itertools.accumulate((region.size * ITEMSIZE for region in regions), initial=1)
    return [
        StoredRegion("w", region, 0, offset, region.size * ITEMSIZE)
        for region, offset in zip(regions, offsets, strict=False)
    ]


def look(flat, view):
    size = math.prod(view.shape)
    return flat[view.offset : view.offset + size].reshape(view.shape)[(*view.box.slices(), ...)]


def carry_out(array, regions, wanted, copies):
    """Every wanted region's elements after the copies; -1 where none went, and never two to one place."""
    sources = [content(array, region) for region in regions]
    results = [np.full(region.size, -1) for region in wanted]
    for copy in copies:
        target = look(results[copy.target_index], copy.target)
        assert target.size
        assert (target == -1).all(), "copied twice"
        target[...] = look(sources[copy.stored], copy.source)
    return results


def numbered(shape):
    return np.arange(math.prod(shape)).reshape(shape)


@settings(max_examples=300)
@given(st.data(), shapes)
def test_any_layout_to_any_layout(data, shape):
    stored, wanted = data.draw(partitions(shape)), data.draw(partitions(shape))
    array = numbered(shape)
    results = carry_out(array, stored, wanted, plan(store(stored), wanted, ITEMSIZE, shape))
    for region, result in zip(wanted, results, strict=True):
        assert np.array_equal(result, content(array, region))


@settings(max_examples=300)
@given(st.data(), shapes)
def test_overlaps_and_holes(data, shape):
    stored = data.draw(st.lists(regions_in(shape), max_size=6))
    wanted = data.draw(st.lists(regions_in(shape), max_size=3))
    array = numbered(shape)
    available = set().union(*(content(array, region).tolist() for region in stored))
    if all(available.issuperset(content(array, region).tolist()) for region in wanted):
        results = carry_out(array, stored, wanted, plan(store(stored), wanted, ITEMSIZE, shape))
        for region, result in zip(wanted, results, strict=True):
            assert np.array_equal(result, content(array, region))
    else:
        with pytest.raises(LayoutError, match="is wanted, and is not stored"):
            plan(store(stored), wanted, ITEMSIZE, shape)


@given(st.data(), solid_shapes)
def test_the_first_of_overlapping_regions_is_used(data, shape):
    stored = data.draw(st.lists(regions_in(shape), max_size=6))
    wanted = data.draw(regions_in(shape))
    stored.append(Box.full(shape))
    if wanted in stored:
        return
    array = numbered(shape)
    first = np.full(array.size, -1)
    for i in reversed(range(len(stored))):
        first[content(array, stored[i])] = i
    places = [np.full(region.size, i) for i, region in enumerate(stored)]
    used = np.full(wanted.size, -1)
    for copy in plan(store(stored), [wanted], ITEMSIZE, shape):
        look(used, copy.target)[...] = look(places[copy.stored], copy.source)
    assert np.array_equal(used, first[content(array, wanted)])


@given(st.data(), solid_shapes)
def test_source_spans_are_the_bytes_of_the_copy(data, shape):
    stored, wanted = data.draw(partitions(shape)), data.draw(regions_in(shape))
    array = numbered(shape)
    file = b"\0" + b"".join(content(array, region).tobytes() for region in stored)
    records = store(stored)
    for copy in plan(records, [wanted], ITEMSIZE, shape):
        starts, run = source_spans(copy, records[copy.stored], ITEMSIZE)
        data_read = b"".join(file[start : start + run] for start in starts.tolist())
        expected = look(content(array, stored[copy.stored]), copy.source)
        assert data_read == np.ascontiguousarray(expected).tobytes()


def test_a_flat_range_is_read_piece_by_piece():
    stored = StoredRegion("w", FlatRange(3, 14), 0, 1000, 14 * ITEMSIZE)
    # rows of five: the range has the end of row 0, rows 1 and 2, and the start of row 3
    (copy,) = plan([stored], [Box((1, 2), (2, 2))], ITEMSIZE, (4, 5))
    assert copy == Copy(0, View(2, (2, 5), Box((0, 2), (2, 2))), 0, View(0, (2, 2), Box.full((2, 2))))
    starts, run = source_spans(copy, stored, ITEMSIZE)
    assert (starts.tolist(), run) == ([1000 + 4 * ITEMSIZE, 1000 + 9 * ITEMSIZE], 2 * ITEMSIZE)


def test_a_region_that_is_stored_as_wanted_is_one_copy_even_where_others_overlap_it():
    box = Box((2, 0), (2, 4))
    copies = plan(store([Box((0, 0), (3, 4)), box]), [box], ITEMSIZE, (4, 4))
    view = View(0, (2, 4), Box.full((2, 4)))
    assert copies == [Copy(1, view, 0, view)]
    copies = plan(store([Box((0, 0), (3, 4)), box, box]), [box], ITEMSIZE, (4, 4))
    assert copies == [Copy(1, view, 0, view)]


def test_flat_to_flat_is_one_run_each():
    copies = plan(store([FlatRange(0, 50), FlatRange(50, 50)]), [FlatRange(13, 74)], ITEMSIZE, (10, 10))
    assert copies == [
        Copy(0, View(0, (50,), Box((13,), (37,))), 0, View(0, (74,), Box((0,), (37,)))),
        Copy(1, View(0, (50,), Box((0,), (37,))), 0, View(0, (74,), Box((37,), (37,)))),
    ]


def test_the_number_of_copies_is_that_of_the_pairs_that_touch():
    rows = [Box((i * 4, 0), (4, 64)) for i in range(16)]
    columns = [Box((0, j * 4), (64, 4)) for j in range(16)]
    assert len(plan(store(rows), columns, ITEMSIZE, (64, 64))) == 256
    tiles = [Box((i * 8, j * 8), (8, 8)) for i in range(8) for j in range(8)]
    random.Random(1).shuffle(tiles)
    assert len(plan(store(tiles), [Box.full((64, 64))], ITEMSIZE, (64, 64))) == 64
    assert len(plan(store(tiles), rows, ITEMSIZE, (64, 64))) == 128


def test_empty_wanted_regions_need_nothing():
    assert plan([], [Box((4, 0), (0, 4)), FlatRange(0, 0)], ITEMSIZE, (4, 4)) == []
    assert plan([], [Box.full((0, 4))], ITEMSIZE, (0, 4)) == []


def test_a_hole_is_named_with_the_tensor():
    stored = store([Box((0, 0), (4, 3)), Box((0, 3), (3, 1))])
    with pytest.raises(LayoutError, match=r"tensor 'model/w' of shape \[4, 4\]: \[3:4, 3:4\] is wanted"):
        plan(stored, [Box.full((4, 4))], ITEMSIZE, (4, 4), name="model/w")
    with pytest.raises(LayoutError, match=r"flat \[5:7\] is wanted"):
        plan(store([FlatRange(0, 5), FlatRange(7, 9)]), [FlatRange(2, 10)], ITEMSIZE, (4, 4))
    with pytest.raises(LayoutError, match=r"a tensor of shape \[\]: \[\] is wanted"):
        plan([], [Box((), ())], ITEMSIZE, ())


@pytest.mark.parametrize("region", [Box((0,), (4,)), Box((0, 0), (5, 4)), Box((0, -1), (4, 4)), FlatRange(10, 7)])
def test_regions_outside_the_tensor_are_refused(region):
    with pytest.raises(LayoutError, match=r"wanted .* is not inside"):
        plan(store([Box.full((4, 4))]), [region], ITEMSIZE, (4, 4))
    with pytest.raises(LayoutError, match=r"stored .* does not fit"):
        plan(store([region, Box.full((4, 3))]), [Box.full((4, 4))], ITEMSIZE, (4, 4))
    with pytest.raises(LayoutError, match="is not inside"):
        check_cover((4, 4), [region])


@pytest.mark.parametrize("wanted", [Box.full((4, 4)), Box.full((2, 4))])
def test_a_stored_region_of_another_length_is_refused(wanted):
    stored = StoredRegion("w", Box.full((4, 4)), 0, 0, 4 * 4 * ITEMSIZE - 1)
    with pytest.raises(LayoutError, match="is not 127 bytes"):
        plan([stored], [wanted], ITEMSIZE, (4, 4))


@given(st.data(), shapes)
def test_check_cover_finds_every_hole(data, shape):
    regions = data.draw(st.one_of(partitions(shape), st.lists(regions_in(shape), max_size=6)))
    array = numbered(shape)
    missing = set(range(array.size)).difference(*(content(array, region).tolist() for region in regions))
    if not missing:
        check_cover(shape, regions)
        return
    with pytest.raises(LayoutError, match="no region has") as caught:
        check_cover(shape, regions, name="w")
    # what it names is a hole, all of it
    kind, numbers = caught.value.what.rsplit("no region has ", 1)[1].rstrip("]").split("[")
    slices = tuple(slice(*map(int, part.split(":"))) for part in numbers.split(", ") if part)
    named = array.reshape(-1)[slices] if kind else array[slices]
    assert named.size
    assert missing.issuperset(named.reshape(-1).tolist())


def test_check_cover_of_a_thousand_tiles():
    tiles = [Box((i * 4, j * 4), (4, 4)) for i in range(32) for j in range(32)]
    random.Random(2).shuffle(tiles)
    check_cover((128, 128), tiles)
    hole = tiles.pop()
    with pytest.raises(LayoutError, match="no region has") as caught:
        check_cover((128, 128), tiles)
    assert str(hole) in str(caught.value)
