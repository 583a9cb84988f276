"""The columnar plans against the plans made tensor by tensor, and against dense arrays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, as_flat
from ckptsvc.geometry.ranges import box_ranges, coalesce, first_gap, plan_ranges, touching

LINE = 60
ranges = st.tuples(st.integers(0, LINE), st.integers(0, 20)).map(lambda r: (r[0], min(r[1], LINE - r[0])))
tables = st.lists(ranges, max_size=10)


def columns(table):
    return tuple(np.array(table, np.int64).reshape(-1, 2).T)


def dense(rows, shape):
    """Rows of one number per dimension as an array, also where there is no row or no dimension."""
    return np.array(rows, np.int64).reshape(len(rows), len(shape))


def elements(table):
    return set(itertools.chain.from_iterable(range(start, start + length) for start, length in table))


@st.composite
def boxes_in(draw, shape):
    origin = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(origin, tuple(draw(st.integers(0, n - o)) for o, n in zip(origin, shape, strict=True)))


@settings(max_examples=300)
@given(tables, tables)
def test_plan_ranges_fills_every_wanted_range_or_names_one_it_cannot(stored, wanted):
    available = elements(stored)
    bad = [i for i, row in enumerate(wanted) if not elements([row]) <= available]
    if bad:
        with pytest.raises(LayoutError, match=f"^tensor {bad[0]}: .* not stored"):
            plan_ranges(*columns(stored), *columns(wanted), name="tensor {}".format)
        return
    copies = plan_ranges(*columns(stored), *columns(wanted))
    results = [[-1] * length for _, length in wanted]
    for s, w, source, target, length in zip(*(column.tolist() for column in copies), strict=True):
        assert length > 0
        assert source + length <= stored[s][1]
        assert results[w][target : target + length] == [-1] * length
        results[w][target : target + length] = range(stored[s][0] + source, stored[s][0] + source + length)
    assert results == [list(range(start, start + length)) for start, length in wanted]
    assert (np.diff(copies.wanted) >= 0).all()


def test_plan_ranges_uses_what_starts_first_and_of_equals_the_first():
    stored = [(4, 6), (0, 6), (0, 6)]
    copies = plan_ranges(*columns(stored), *columns([(0, 10)]))
    assert copies.stored.tolist() == [1, 0]
    assert copies.source.tolist() == [0, 2]
    assert copies.target.tolist() == [0, 6]
    assert copies.length.tolist() == [6, 4]


def test_a_million_whole_tensors_are_one_copy_each():
    length = np.arange(1_000_000) % 977 + 1
    start = np.cumsum(length) - length
    order = np.random.default_rng(0).permutation(len(start))
    copies = plan_ranges(start[order], length[order], start, length)
    assert (order[copies.stored] == np.arange(len(start))).all()
    assert not copies.source.any()
    assert not copies.target.any()
    assert (copies.length == length).all()


@given(tables)
def test_first_gap_is_the_first_element_nobody_has(table):
    missing = set(range(LINE)) - elements(table)
    assert first_gap(*columns(table), LINE) == min(missing, default=None)


def test_first_gap_of_an_empty_line():
    assert first_gap(*columns([]), 0) is None
    assert first_gap(*columns([]), 3) == 0


@given(st.data(), st.lists(st.integers(0, 4), max_size=4).map(tuple), st.integers(0, 6))
def test_box_ranges_agree_with_as_flat(data, shape, number):
    boxes = [data.draw(boxes_in(shape)) for _ in range(number)]
    start, length, contiguous = box_ranges(
        dense([shape] * number, shape),
        dense([b.origin for b in boxes], shape),
        dense([b.shape for b in boxes], shape),
    )
    for i, box in enumerate(boxes):
        flat = as_flat(shape, box)
        assert contiguous[i] == (flat is not None)
        if flat is not None:
            assert length[i] == flat.length
            assert start[i] == flat.start or not flat.length


@given(st.data(), st.lists(st.integers(0, 5), max_size=3).map(tuple), st.integers(0, 6))
def test_touching_are_those_that_intersect(data, shape, number):
    boxes = [data.draw(boxes_in(shape)) for _ in range(number)]
    wanted = [data.draw(boxes_in(shape)) for _ in range(data.draw(st.integers(0, 3)))]
    expected = [i for i, box in enumerate(boxes) if any(box.intersect(w) is not None for w in wanted)]
    assert (
        touching(dense([b.origin for b in boxes], shape), dense([b.shape for b in boxes], shape), wanted).tolist()
        == expected
    )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 8)), max_size=12),
    st.integers(0, 5),
)
def test_coalesce_covers_every_range_with_the_fewest_runs(table, gap):
    shard, offset, nbytes = np.array(table, np.int64).reshape(-1, 3).T
    runs = coalesce(shard, offset, nbytes, gap=gap)
    assert sorted(runs.order.tolist()) == list(range(len(table)))
    assert runs.first[0] == 0
    assert runs.first[-1] == len(table)
    for i, (file, start, stop) in enumerate(zip(runs.shard, runs.start, runs.stop, strict=True)):
        rows = runs.order[runs.first[i] : runs.first[i + 1]]
        assert (shard[rows] == file).all()
        assert offset[rows].min() == start
        assert (offset[rows] + nbytes[rows]).max() == stop
        # inside a run nothing longer than the gap is unused
        used = np.zeros(stop + gap + 1, bool)
        for row in rows:
            used[offset[row] : offset[row] + nbytes[row] + gap] = True
        assert used[start:stop].all()
    for (a, _, a_stop), (b, b_start, _) in itertools.pairwise(zip(runs.shard, runs.start, runs.stop, strict=True)):
        assert a < b or b_start > a_stop + gap


def test_coalesce_reads_a_shard_of_a_thousand_tensors_at_once():
    nbytes = np.full(1000, 64)
    runs = coalesce(np.repeat([7, 3], 500), np.tile(np.arange(500) * 64 + 4096, 2), nbytes)
    assert runs.shard.tolist() == [3, 7]
    assert runs.start.tolist() == [4096, 4096]
    assert runs.stop.tolist() == [4096 + 32000] * 2
    assert math.prod(runs.order.shape) == 1000
