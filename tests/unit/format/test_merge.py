from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.index import Index
from ckptsvc.format.merge import merge
from ckptsvc.format.shard import Part
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import TensorMeta


def slab(rank, name="w", dtype="float32", shape=(8, 2), rows=2):
    return Part(TensorMeta(name, dtype, shape), Box((rank * rows, *(0 for _ in shape[1:])), (rows, *shape[1:])))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (slab(1, dtype="float16"), "dtypes"),
        (slab(1, shape=(8, 2, 1)), "numbers of dimensions"),
        (slab(1, shape=(8, 3)), "global extents in dimension 1"),
        (slab(1, shape=(9, 2)), "global extents in dimension 0"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_shards_that_disagree_are_both_named(kit, other, message, swap):
    parts = [[slab(0), slab(0, "fine")], [slab(1, "fine"), other]]
    records = [kit.shard_record(rank, own)[0] for rank, own in enumerate(reversed(parts) if swap else parts)]
    with pytest.raises(LayoutError, match=rf"'w' in r0000.*'w' in r0000.*{message}") as caught:
        merge(records)
    assert all(record.name in str(caught.value) for record in records)


def test_two_names_with_one_hash_are_refused(kit):
    first, _ = kit.shard_record(0, [slab(0, "a")])
    second, _ = kit.shard_record(1, [slab(1, "b")])
    forged = msgspec.structs.replace(second.columns, name_hash=first.columns.name_hash)
    with pytest.raises(LayoutError, match=r"'a' in r00000.* and 'b' in r00001.* the same hash and different names"):
        merge([first, msgspec.structs.replace(second, columns=forged)])


@pytest.mark.parametrize(
    "changes",
    [{"name": "r00001-9f2c01ab.safetensors"}, {"name": "../x"}, {"rank": 1}, {"nbytes": 10}],
)
def test_impossible_records_are_refused(kit, changes):
    record, _ = kit.shard_record(0, [slab(0)])
    with pytest.raises(InvalidInput):
        merge([msgspec.structs.replace(record, **changes)])


def test_regions_are_ordered_by_where_they_are_in_the_tensor(kit):
    # Rank 0 holds the last rows: the order of ranks is not that of the regions.
    places = [3, 1, 0, 2]
    records = [kit.shard_record(rank, [slab(place), slab(place, "v")])[0] for rank, place in enumerate(places)]
    index = Index.build(kit.index_info(), records)
    for name in ("w", "v"):
        assert [region.region.origin[0] for region in index.regions(name)] == [0, 2, 4, 6]
        assert [region.shard for region in index.regions(name)] == [2, 1, 3, 0]


def test_nothing_merges_to_nothing():
    columns = merge([])
    assert {len(column) for column in columns.values()} == {0}


def test_a_table_without_regions_is_no_trouble(kit):
    records = [kit.shard_record(rank, parts)[0] for rank, parts in enumerate([[], [slab(0, rows=8)], []])]
    index = Index.build(kit.index_info(), records)
    assert index.names() == ["@rank/0/objects", "@rank/1/objects", "@rank/2/objects", "w"]
    assert index.meta("w").shape == (8, 2)


def test_boxes_and_ranges_of_one_tensor_may_be_mixed(kit):
    flat = Part(TensorMeta("w", "float32", (8, 2)), FlatRange(4, 12))
    index = Index.build(kit.index_info(), [kit.shard_record(0, [slab(0)])[0], kit.shard_record(1, [flat])[0]])
    assert [region.region for region in index.regions("w")] == [slab(0).region, flat.region]
    assert np.array_equal(index.region_nbytes[index.region_rows(index.row("w"))], [16, 48])
