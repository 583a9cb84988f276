"""Boxes and flat ranges against dense numpy arrays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import InvalidInput
from ckptsvc.geometry.box import Box, FlatRange, as_flat, contiguous_spans, cut, fits, flat_to_boxes, is_whole

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
solid_shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    origin = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(origin, tuple(draw(st.integers(0, n - o)) for o, n in zip(origin, shape, strict=True)))


@st.composite
def ranges_in(draw, shape):
    start = draw(st.integers(0, math.prod(shape)))
    return FlatRange(start, draw(st.integers(0, math.prod(shape) - start)))


def numbered(shape):
    return np.arange(math.prod(shape)).reshape(shape)


def mask(shape, box):
    array = np.zeros(shape, bool)
    array[box.slices()] = True
    return array


@given(st.data(), shapes)
def test_intersect_and_contains_are_those_of_the_element_sets(data, shape):
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    both = mask(shape, a) & mask(shape, b)
    common = a.intersect(b)
    assert (common is None) == (not both.any())
    if common is not None:
        assert (mask(shape, common) == both).all()
        assert common.size == both.sum()
    assert a.contains(b) == (both.sum() == mask(shape, b).sum())


@given(st.data(), solid_shapes)
def test_around_is_the_rest_in_disjoint_boxes(data, shape):
    box = data.draw(boxes_in(shape))
    part = box.intersect(data.draw(boxes_in(shape)))
    if part is None:
        return
    rest = box.around(part)
    assert len(rest) <= 2 * len(shape)
    count = np.zeros(shape, int)
    for piece in rest:
        assert not piece.is_empty
        count[piece.slices()] += 1
    assert (count == (mask(shape, box) & ~mask(shape, part))).all()


@given(st.data(), shapes)
def test_relative_to_selects_the_same_elements_of_a_sub_array(data, shape):
    outer = data.draw(boxes_in(shape))
    inner = outer.intersect(data.draw(boxes_in(shape)))
    if inner is None:
        return
    array = numbered(shape)
    local = array[outer.slices()]
    assert np.array_equal(local[inner.relative_to(outer.origin).slices()], array[inner.slices()])


def test_properties():
    box = Box((1, 2), (3, 4))
    assert (box.size, box.ndim, box.stop, box.is_empty) == (12, 2, (4, 6), False)
    assert Box((1, 2), (3, 0)).is_empty
    assert str(box) == "[1:4, 2:6]"
    scalar = Box.full(())
    assert (scalar, scalar.size, scalar.is_empty, scalar.slices()) == (Box((), ()), 1, False, ())
    assert scalar.intersect(scalar) == scalar
    flat = FlatRange(3, 4)
    assert (flat.size, flat.stop, flat.is_empty, str(flat)) == (4, 7, False, "flat [3:7]")


@pytest.mark.parametrize(
    ("region", "shape", "inside"),
    [
        (Box((0, 0), (2, 3)), (2, 3), True),
        (Box((1, 1), (1, 2)), (2, 3), True),
        (Box((1, 1), (1, 3)), (2, 3), False),
        (Box((2, 0), (0, 3)), (2, 3), True),
        (Box((3, 0), (0, 3)), (2, 3), False),
        (Box((-1, 0), (1, 3)), (2, 3), False),
        (Box((1, 0), (-1, 3)), (2, 3), False),
        (Box((0,), (2,)), (2, 3), False),
        (Box((0, 0), (2,)), (2, 3), False),
        (Box((0,), (2, 3)), (2, 3), False),
        (Box((), ()), (), True),
        (FlatRange(0, 6), (2, 3), True),
        (FlatRange(6, 0), (2, 3), True),
        (FlatRange(1, 6), (2, 3), False),
        (FlatRange(-1, 2), (2, 3), False),
        (FlatRange(1, -1), (2, 3), False),
    ],
)
def test_fits(region, shape, inside):
    assert fits(region, shape) is inside
    assert fits(region, list(shape)) is inside


@given(st.data(), shapes)
def test_is_whole(data, shape):
    region = data.draw(st.one_of(boxes_in(shape), ranges_in(shape), st.just(Box.full(shape))))
    array = numbered(shape)
    content = array[region.slices()] if isinstance(region, Box) else array.reshape(-1)[region.start : region.stop]
    if math.prod(shape):
        assert is_whole(region, shape) == (content.size == array.size)


@given(st.data(), shapes)
def test_flat_to_boxes_follow_each_other_in_flat_order(data, shape):
    flat = data.draw(ranges_in(shape))
    boxes = flat_to_boxes(shape, flat.start, flat.length)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)
    assert all(fits(box, shape) and not box.is_empty for box in boxes)
    parts = [numbered(shape)[box.slices()].reshape(-1) for box in boxes]
    assert list(itertools.chain.from_iterable(parts)) == list(range(flat.start, flat.stop))


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 7), (7, 0), (2, -1)])
def test_flat_to_boxes_refuses_a_range_outside(start, length):
    with pytest.raises(InvalidInput, match="not inside"):
        flat_to_boxes((2, 3), start, length)


@given(st.data(), shapes)
def test_as_flat_is_the_range_or_none(data, shape):
    box = data.draw(boxes_in(shape))
    content = numbered(shape)[box.slices()].reshape(-1)
    flat = as_flat(shape, box)
    if flat is None:
        assert (np.diff(content) != 1).any()
    else:
        assert list(content) == list(range(flat.start, flat.stop))


@given(st.data(), shapes)
def test_contiguous_spans_are_the_longest_runs_in_order(data, shape):
    box = data.draw(boxes_in(shape))
    starts, run = contiguous_spans(shape, box)
    content = [i for start in starts.tolist() for i in range(start, start + run)]
    assert content == numbered(shape)[box.slices()].reshape(-1).tolist()
    assert all(first + run < second for first, second in itertools.pairwise(starts.tolist()))


def test_contiguous_spans_refuses_a_box_outside():
    with pytest.raises(InvalidInput, match="not inside"):
        contiguous_spans((4, 4), Box((3, 0), (2, 4)))


@given(st.data(), shapes, st.integers(1, 40))
def test_cut_gives_consecutive_contiguous_boxes(data, shape, limit):
    box = data.draw(boxes_in(shape))
    content = numbered(box.shape)
    position = 0
    for piece in cut(box, limit):
        assert 0 < piece.size <= limit
        assert piece.ndim == box.ndim
        local = content[piece.relative_to(box.origin).slices()].reshape(-1)
        assert local.tolist() == list(range(position, position + piece.size))
        position += piece.size
    assert position == box.size


@given(st.integers(1, 1000), st.integers(1, 50))
def test_cut_makes_as_few_pieces_as_possible(size, limit):
    assert len(list(cut(Box.full((size,)), limit))) == -(-size // limit)


def test_cut_refuses_pieces_of_nothing():
    with pytest.raises(InvalidInput, match="0 elements"):
        list(cut(Box.full((4,)), 0))
