from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput, LayoutError
from ckptsvc.format.header import header_length
from ckptsvc.format.index import Index, ShardEntry
from ckptsvc.format.shard import Part
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.ranges import plan_ranges
from ckptsvc.geometry.reshard import StoredRegion, plan
from ckptsvc.types import DTYPES, TensorMeta


@given(st.data())
def test_any_job_comes_back(kit, data):
    job = data.draw(kit.jobs())
    ranks = data.draw(st.permutations(range(len(job))))
    records = [kit.shard_record(rank, job[rank], data.draw(st.binary(max_size=3)), 512)[0] for rank in ranks]
    index = Index.build(kit.index_info(extent=512), records)
    found = Index.decode(index.encode())
    assert found.encode() == index.encode()
    assert found.info == kit.index_info(extent=512)
    records.sort(key=lambda record: record.rank)
    assert found.shards == [ShardEntry(record.name, record.rank, record.nbytes) for record in records]
    for row, record in enumerate(records):
        assert found.digests(row).tolist() == record.digests.tolist()

    stored: dict[str, list] = {}
    metas = {}
    for rank, parts in enumerate(job):
        template = kit.shard_record(rank, parts)[0].columns
        for i, entry in enumerate(kit.entries_of(rank, parts)):
            metas[entry.meta.name] = entry.meta
            region = StoredRegion(entry.meta.name, entry.region, rank, entry.offset, entry.nbytes)
            stored.setdefault(entry.meta.name, []).append(region)
            assert int(template.offset[i]) == entry.offset
    own = [f"@rank/{rank}/objects" for rank in range(len(job))]
    assert found.names() == sorted([*stored, *own])
    for name, regions in stored.items():
        assert found.meta(name) == metas[name]
        assert sorted(found.regions(name), key=repr) == sorted(regions, key=repr)
    for rank, name in enumerate(own):
        (region,) = found.regions(name)
        assert region.shard == rank
        assert region.offset + region.nbytes == records[rank].nbytes
        assert found.meta(name) == TensorMeta(name, "uint8", (region.nbytes,))


PARTS = [
    [
        Part(TensorMeta("model/w", "bfloat16", (10, 4)), Box((5 * rank, 0), (5, 4))),
        Part(TensorMeta("model/é", "float32", (7,)), FlatRange(4 * rank, 4 - rank)),
        Part(TensorMeta(f"@rank/{rank}/rng", "uint8", (3,)), Box((0,), (3,))),
    ]
    for rank in range(2)
]


def sample(kit, **info):
    records = [kit.shard_record(rank, parts, extent=4096)[0] for rank, parts in enumerate(PARTS)]
    return Index.build(kit.index_info(extent=4096, **info), records)


def test_an_alias_is_another_name(kit):
    index = Index.decode(sample(kit, aliases={"model/tied": "model/w"}).encode())
    assert index.resolve("model/tied") == "model/w" == index.resolve("model/w")
    assert index.meta("model/tied").name == "model/w"
    assert index.regions("model/tied") == index.regions("model/w")
    assert "model/tied" in index
    assert "model/tied" not in index.names()
    assert index.find(["model/tied", "model/é", "x"]).tolist() == [index.row("model/w"), index.row("model/é"), -1]


def test_what_is_not_there_is_named(kit):
    index = sample(kit)
    assert "model/v" not in index
    assert 3 not in index
    for call in (index.row, index.meta, index.regions, index.resolve, lambda name: index.touching(name, [])):
        with pytest.raises(LayoutError, match=r"step 7 has no tensor 'model/v'"):
            call("model/v")


@pytest.mark.parametrize(
    "aliases", [{"a": "model/v"}, {"model/w": "model/é"}, {"": "model/w"}, {"a" * 4097: "model/w"}]
)
def test_impossible_aliases_are_refused(kit, aliases):
    with pytest.raises(InvalidInput, match="alias"):
        sample(kit, aliases=aliases)


def test_too_many_aliases_are_refused(kit):
    index = sample(kit, aliases={f"{i:04000d}": "model/w" for i in range(4200)})
    with pytest.raises(InvalidInput, match="aliases"):
        index.encode()


def test_two_shards_of_one_rank_are_refused(kit):
    record, _ = kit.shard_record(0, PARTS[0])
    other = msgspec.structs.replace(record, name="r00000-00000000.safetensors")
    with pytest.raises(InvalidInput, match="1 ranks"):
        Index.build(kit.index_info(), [record, other])


def test_a_rank_beyond_the_world_is_refused(kit):
    record, _ = kit.shard_record(2, PARTS[0])
    with pytest.raises(InvalidInput, match="rank 2"):
        Index.build(kit.index_info(world_size=2), [record])


def test_regions_fetch_the_bytes_that_were_stored(kit):
    records, files = zip(*(kit.shard_record(rank, parts) for rank, parts in enumerate(PARTS)), strict=True)
    index = Index.build(kit.index_info(), records)
    for rank, parts in enumerate(PARTS):
        for entry in kit.entries_of(rank, parts):
            (region,) = [r for r in index.regions(entry.meta.name) if r.shard == rank]
            data = files[rank][region.offset : region.offset + region.nbytes]
            assert data == files[rank][entry.offset : entry.offset + entry.nbytes]


def test_touching_leaves_out_what_no_plan_can_use(kit):
    meta = TensorMeta("w", "int16", (40, 6))
    parts = [[Part(meta, Box((2 * rank, 0), (2, 6)))] for rank in range(20)]
    index = Index.build(kit.index_info(world_size=20), [kit.shard_record(r, own)[0] for r, own in enumerate(parts)])
    wanted = [Box((3, 1), (4, 2))]
    near = index.touching("w", wanted)
    assert [region.shard for region in near] == [1, 2, 3]
    everything = index.regions("w")
    copies = [(everything[c.stored], c.source, c.target) for c in plan(everything, wanted, 2, meta.shape)]
    assert [(near[c.stored], c.source, c.target) for c in plan(near, wanted, 2, meta.shape)] == copies


def test_the_whole_checkpoint_is_planned_on_the_line(kit):
    index = sample(kit)
    line = index.line
    assert line.contiguous.all()
    sizes = np.diff(line.base, append=line.start[-1] + line.length[-1])
    copies = plan_ranges(line.start, line.length, line.base, sizes)
    assert copies.length.sum() == sizes.sum()
    itemsize = [DTYPES[index.meta_at(row).dtype].itemsize for row in index.region_tensor.tolist()]
    assert (line.length * itemsize == index.region_nbytes).all()


# Damage


def rewritten(kit, change=lambda columns: None, info=None):
    """The index with its columns changed; safetensors writes the file, so that it is sound as such."""
    file = sample(kit, aliases={"tied": "model/w"}).encode()
    columns = {name: column.copy() for name, column in load(file).items()}
    metadata = json.loads(file[8 : 8 + header_length(file)])["__metadata__"]
    change(columns)
    if info:
        fields = {**json.loads(metadata["ckptsvc"]), **info}
        metadata["ckptsvc"] = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return save(columns, metadata)


COLUMNS = {
    "tensor_hash", "tensor_dtype", "tensor_ndim", "tensor_shape", "tensor_name_ends", "tensor_names",
    "tensor_region_ends", "region_kind", "region_shard", "region_offset", "region_geometry",
    "shard_rank", "shard_nbytes", "shard_name_ends", "shard_names", "shard_digest_ends", "shard_digests",
}  # fmt: skip


def put(name, at, value):
    def change(columns):
        columns[name][at] = value

    return change


def cut(name):
    return lambda columns: columns.update({name: columns[name][:-1]})


def test_the_columns_are_those_of_the_specification(kit):
    assert set(load(rewritten(kit))) == COLUMNS
    assert Index.decode(rewritten(kit)).encode() == sample(kit, aliases={"tied": "model/w"}).encode()


@pytest.mark.parametrize("change", [cut(name) for name in sorted(COLUMNS)], ids=sorted(COLUMNS))
def test_a_column_that_is_too_short_is_damage(kit, change):
    with pytest.raises(Damaged, match="index-1"):
        Index.decode(rewritten(kit, change), "index-1")


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_a_missing_column_is_damage(kit, name):
    with pytest.raises(Damaged, match=name):
        Index.decode(rewritten(kit, lambda columns: columns.pop(name)))


@pytest.mark.parametrize(
    "change",
    [
        put("tensor_hash", 0, 1),
        put("tensor_dtype", 0, 200),
        put("tensor_ndim", 0, 99),
        put("tensor_shape", 0, -1),
        put("tensor_shape", slice(None), 2**62),
        put("tensor_name_ends", 0, 0),
        put("tensor_name_ends", 0, 2**64 - 1),
        put("tensor_names", 0, 0xFF),
        put("tensor_names", 0, ord("?")),
        put("tensor_region_ends", 0, 0),
        put("tensor_region_ends", -1, 2**40),
        put("region_kind", 0, 7),
        put("region_shard", 0, 2),
        put("region_shard", 0, 2**32 - 1),
        put("region_offset", 0, 2**64 - 1),
        put("region_geometry", 0, -1),
        put("region_geometry", 0, 2**63 - 1),
        put("shard_rank", 0, 1),
        put("shard_rank", 0, 8),
        put("shard_nbytes", 0, 2**64 - 1),
        put("shard_nbytes", 0, 1),
        put("shard_name_ends", 0, 1),
        put("shard_names", 0, ord("/")),
        put("shard_names", 0, 0xFF),
        put("shard_digest_ends", 0, 0),
        put("shard_digest_ends", 0, 2**64 - 1),
    ],
)
def test_an_index_that_contradicts_itself_is_damage(kit, change):
    with pytest.raises(Damaged, match="index-1"):
        Index.decode(rewritten(kit, change), "index-1")


@pytest.mark.parametrize(
    "info",
    [
        {"extent": 0},
        {"extent": 1},
        {"extent": 2**63},
        {"step": -1},
        {"world_size": 1},
        {"aliases": {"a": "nothing"}},
        {"aliases": {"model/é": "model/w"}},
        {"aliases": {"": "model/w"}},
        {"aliases": ["a"]},
        {"job": 3},
    ],
)
def test_an_impossible_info_record_is_damage(kit, info):
    with pytest.raises(Damaged):
        Index.decode(rewritten(kit, info=info))


def test_versions(kit):
    assert Index.decode(rewritten(kit, info={"format": "1.5", "novelty": "x"})).info.step == 7
    with pytest.raises(IncompatibleVersion, match=r"index-1.*3\.0"):
        Index.decode(rewritten(kit, info={"format": "3.0"}), "index-1")


def look_at_everything(data):
    index = Index.decode(data)
    for name in index.names():
        index.meta(name)
        index.regions(name)
    for row in range(len(index.shards)):
        index.digests(row)
    return index


@given(st.data())
def test_damage_comes_out_as_damage(kit, data):
    kit.survives(look_at_everything, data.draw(kit.damaged(sample(kit).encode())))


@given(st.data())
def test_any_numbers_come_out_as_an_index_or_as_damage(kit, data):
    def change(columns):
        for _ in range(data.draw(st.integers(1, 2))):
            column = columns[data.draw(st.sampled_from(sorted(COLUMNS)))]
            limits = np.iinfo(column.dtype)
            value = data.draw(st.integers(0, 20) | st.integers(int(limits.min), int(limits.max)))
            column[data.draw(st.integers(0, len(column) - 1))] = min(value, int(limits.max))

    kit.survives(look_at_everything, rewritten(kit, change))
