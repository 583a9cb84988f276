"""ZeRO's division, against numbers of real DeepSpeed checkpoints and against flat arrays that are really cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.layout import Piece
from ckptsvc.geometry.rules import Local
from ckptsvc.geometry.zero import Flat, fragment, logical_regions

SIZES = st.lists(st.integers(0, 30), max_size=8)


def test_a_group_of_a_real_checkpoint() -> None:
    """DeepSpeed 0.19.8, ZeRO 1 on 4 ranks: 7884 elements, partitions of 1972, and 4 elements of padding on the last."""
    flat = Flat([7000, 884], 4)
    assert (flat.total, flat.partition) == (7888, 1972)
    assert [flat.padding(rank) for rank in range(4)] == [0, 0, 0, 4]


@given(SIZES, st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 4, 8]))
def test_partitions_put_together_are_the_tensors(numels: list[int], ranks: int, alignment: int, each: int) -> None:
    flat = Flat(numels, ranks, alignment=alignment, parameter_alignment=each)
    assert flat.total % (alignment * ranks) == 0
    buffer = np.full(flat.total, -1)
    for tensor, (start, n) in enumerate(zip(flat.starts, numels, strict=True)):
        assert start % each == 0
        assert (buffer[start : start + n] == -1).all()
        buffer[start : start + n] = 1000 * tensor + np.arange(n)
    for rank in range(ranks):
        expected = buffer[rank * flat.partition :][: flat.partition]
        found = np.full(flat.partition, -1)
        for share in flat.shares(rank):
            assert share.length
            found[share.at : share.at + share.length] = 1000 * share.tensor + share.start + np.arange(share.length)
        assert np.array_equal(found, expected)
        used = np.flatnonzero(expected >= 0)
        last = flat.starts[-1] + numels[-1] if numels else 0
        assert flat.padding(rank) == sum(rank * flat.partition + i >= last for i in range(flat.partition))
        assert len(used) == sum(share.length for share in flat.shares(rank))


@given(st.integers(0, 50), st.integers(1, 6))
def test_fragments_of_stage_3_put_together_are_the_tensor(numel: int, ranks: int) -> None:
    parts = [fragment(numel, ranks, rank) for rank in range(ranks)]
    assert {length for length, _ in parts} == {-(-numel // ranks)}
    assert [i for _, part in parts for i in range(part.start, part.stop)] == list(range(numel))


def test_a_scalar_on_four_ranks_is_on_the_first() -> None:
    assert [fragment(1, 4, rank) for rank in range(4)] == [(1, FlatRange(0, 1)), *[(1, FlatRange(1, 0))] * 3]


@given(st.data())
def test_a_range_of_a_local_tensor_is_those_elements_of_the_logical_one(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    array = np.arange(rows * columns).reshape(rows, columns)
    how = data.draw(st.sampled_from(["whole", "rows", "columns", "two", "padded"]))
    if how == "two":
        mid = data.draw(st.integers(0, rows))
        held = [(Box((0, 0), (mid // 2, columns))), Box((mid, 0), (rows - mid, columns))]
        pieces, at = [], 0
        for box in held:
            if not box.is_empty:
                pieces.append(Piece(box, Box((at, 0), box.shape)))
                at += box.shape[0]
        local = Local((at, columns), tuple(pieces))
    else:
        low = {"rows": (rows // 2, 0), "columns": (0, columns // 2)}.get(how, (0, 0))
        box = Box(low, (rows - low[0], columns - low[1]))
        extra = 2 if how == "padded" else 0
        local = Local((box.shape[0] + extra, box.shape[1]), (Piece(box, Box.full(box.shape)),))
    flat = np.full(local.shape, -1)
    for piece in local.pieces:
        flat[piece.local.slices()] = array[piece.box.slices()]
    flat = flat.reshape(-1)
    start = data.draw(st.integers(0, len(flat)))
    length = data.draw(st.integers(0, len(flat) - start))
    found: list[int] = []
    for region in logical_regions(array.shape, local, start, length):
        taken = (
            array.reshape(-1)[region.start : region.stop] if isinstance(region, FlatRange) else array[region.slices()]
        )
        found.extend(taken.reshape(-1).tolist())
    wanted = [value for value in flat[start : start + length].tolist() if value >= 0]
    assert sorted(found) == sorted(wanted)


def test_numbers_that_cannot_be_are_refused() -> None:
    for numels, ranks in (([-1], 2), ([1], 0)):
        with pytest.raises(LayoutError):
            Flat(numels, ranks)
