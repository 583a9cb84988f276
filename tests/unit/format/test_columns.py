from __future__ import annotations

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.columns import Columns
from ckptsvc.format.shard import Part, ShardTemplate
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import TensorMeta

ARRAYS = ("name_hash", "name_check", "name_ends", "names", "dtype", "ndim", "shape", "kind", "geometry", "offset")


def same(a, b):
    return (a.objects_offset, a.structure) == (b.objects_offset, b.structure) and all(
        getattr(a, name).dtype == getattr(b, name).dtype and getattr(a, name).tolist() == getattr(b, name).tolist()
        for name in ARRAYS
    )


@given(st.data())
def test_columns_of_any_shard_come_back(kit, data):
    template = ShardTemplate(data.draw(kit.parts_lists()))
    columns = Columns.from_entries(template.entries, template.objects_offset, template.structure)
    assert len(columns) == len(template.entries)
    assert same(Columns.decode(columns.encode()), columns)


SAMPLE_PARTS = [
    Part(TensorMeta("model/w", "bfloat16", (10, 4)), Box((2, 0), (3, 4))),
    Part(TensorMeta("é", "complex128", (7,)), FlatRange(1, 5)),
    Part(TensorMeta("step", "float32", ()), Box((), ())),
]


def sample():
    template = ShardTemplate(SAMPLE_PARTS)
    return Columns.from_entries(template.entries, template.objects_offset, template.structure)


def test_the_columns_say_what_the_entries_say(kit):
    columns = sample()
    assert columns.dtype.tolist() == [10, 21, 11]
    assert columns.ndim.tolist() == [2, 1, 0]
    assert columns.shape.tolist() == [10, 4, 7]
    assert columns.kind.tolist() == [0, 1, 0]
    assert columns.geometry.tolist() == [2, 0, 3, 4, 1, 5]
    assert columns.names.tobytes().decode() == "model/wéstep"
    assert columns.name_ends.tolist() == [7, 9, 13]
    assert columns.name_hash.tolist() == [xxhash.xxh3_64_intdigest(n.encode()) for n in ("model/w", "é", "step")]
    record, _ = kit.shard_record(0, SAMPLE_PARTS)
    assert sorted(record.columns.name_hash.tolist()) == sorted(columns.name_hash.tolist())
    assert record.columns.objects_offset == columns.objects_offset


def changed(name, *edits, cut=False):
    columns = sample()
    array = getattr(columns, name).copy()
    for at, value in edits:
        array[at] = value
    return msgspec.structs.replace(columns, **{name: array[:-1] if cut else array})


@pytest.mark.parametrize(
    "columns",
    [
        *(changed(name, cut=True) for name in ARRAYS),
        changed("dtype", (0, 255)),
        changed("ndim", (0, 3)),
        changed("ndim", (0, 65)),
        changed("ndim", (0, 1), (2, 1)),
        changed("kind", (0, 2)),
        changed("kind", (0, 1)),
        changed("shape", (0, -10)),
        changed("shape", (0, 4)),
        changed("shape", (0, 2**62)),
        changed("geometry", (0, -1)),
        changed("geometry", (0, 8)),
        changed("geometry", (2, 9)),
        changed("geometry", (2, -1)),
        changed("geometry", (0, 2**63 - 1)),
        changed("geometry", (0, 2**63 - 1), (2, 2**63 - 1)),
        changed("geometry", (4, -1)),
        changed("geometry", (5, 7)),
        changed("geometry", (5, -1)),
        changed("offset", (0, 2**64 - 1)),
        changed("offset", (2, 2**63)),
        changed("name_ends", (0, 0)),
        changed("name_ends", (1, 8)),  # inside a character
        changed("names", (0, 0xFF)),
        msgspec.structs.replace(sample(), objects_offset=4096),
    ],
)
def test_columns_that_contradict_themselves_are_damage(columns):
    with pytest.raises(Damaged, match="the columns of r3"):
        Columns.decode(columns.encode(), "the columns of r3")


def test_a_newer_major_version_is_refused():
    newer = sample().encode().replace(b'\\"format\\":\\"1.0\\"', b'\\"format\\":\\"3.0\\"')
    with pytest.raises(IncompatibleVersion):
        Columns.decode(newer)


@given(st.data())
def test_damage_comes_out_as_damage(kit, data):
    kit.survives(Columns.decode, data.draw(kit.damaged(sample().encode())))


@given(st.data())
def test_any_numbers_come_out_as_columns_or_as_damage(kit, data):
    columns = sample()
    name = data.draw(st.sampled_from(ARRAYS))
    array = getattr(columns, name).copy()
    limits = np.iinfo(array.dtype)
    value = data.draw(st.integers(int(limits.min), int(limits.max)) | st.integers(0, 70))
    array[data.draw(st.integers(0, len(array) - 1))] = value % (int(limits.max) + 1)
    kit.survives(Columns.decode, msgspec.structs.replace(columns, **{name: array}).encode())
