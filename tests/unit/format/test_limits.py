"""For every limit of the format a file just beyond it: refused, quickly, and without memory being spent on it."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load, save

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format import columnar, index, limits, objects, shard
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import CommitRecord
from ckptsvc.format.extents import ROW, ExtentTable, decode
from ckptsvc.format.header import header_length
from ckptsvc.format.index import Index
from ckptsvc.format.segments import StoredFile
from ckptsvc.format.shard import PAGE, Part, ShardTemplate, decode_header
from ckptsvc.geometry.box import Box
from ckptsvc.types import TensorMeta

FORMAT_MD = Path(__file__).parents[3] / "proto" / "FORMAT.md"
LIMITS = {name: value for name, value in vars(limits).items() if name.startswith("MAX_")}


def canonical(record):
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def shard_with(kit, change, nbytes=0):
    """A shard whose header a function changed, with `nbytes` of data before its (empty) objects document."""
    template = ShardTemplate([])
    header = json.loads(template.header(kit.shard_info(), 0)[8:])
    header["@rank/0/objects"]["data_offsets"] = [nbytes, nbytes]
    change(header)
    body = json.dumps(header).encode()
    body = body.ljust(-(-(len(body) + 8) // PAGE) * PAGE - 8)
    return len(body).to_bytes(8, "little") + body + bytes(nbytes)


def tensor(name, shape, nbytes, listed=None):
    def change(header):
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [0, nbytes]}
        if listed:
            header["__metadata__"]["ckptsvc.parts"] = json.dumps({name: listed})

    return change


def decode_shard(file):
    return decode_header(file, len(file))


def index_with(kit, change=lambda columns: None, **info):
    parts = [Part(TensorMeta("w", "uint8", (4,)), Box((0,), (4,)))]
    file = Index.build(kit.index_info(), [kit.shard_record(0, parts)[0]]).encode()
    columns = {name: column.copy() for name, column in load(file).items()}
    metadata = json.loads(file[8 : 8 + header_length(file)])["__metadata__"]
    change(columns)
    fields = {**json.loads(metadata["ckptsvc"]), **info}
    return save(columns, {"ckptsvc": canonical(fields)})


def commit_with(**changes):
    fields = {
        "step": 1, "epoch": 1, "attempt": 1, "job": "j", "writer": "w", "index": "index-77aa01bc.safetensors",
        "index_bytes": 1, "index_digest": "0" * 32, "shards": 1, "bytes": 1, "world_size": 1, "created": "c",
        "format": "1.0", **changes,
    }  # fmt: skip
    return canonical({**fields, "check": xxhash.xxh3_64_hexdigest(canonical(fields).encode())}).encode()


def columns_with_long_name(kit, length):
    parts = [Part(TensorMeta("w", "uint8", ()), Box((), ()))]
    columns = load(kit.shard_record(0, parts)[0].columns.encode())
    columns["names"] = columns["names"].repeat(length)
    columns["name_ends"] = columns["name_ends"] * length
    return save(columns, {"ckptsvc": '{"format":"1.0","objects_offset":4097,"structure":""}'})


def nested(depth):
    return b'{"format":"1.0","tree":' + b"[" * depth + b"]" * depth + b"}"


def listing(items):
    return b'{"format":"1.0","tree":[' + b",".join([b"0"] * items) + b"]}"


def commit_that_refers_to(count):
    return commit_with(format="2.0", refers=[f"step-{step:012}.e00001" for step in range(count)])


def packed(nbytes):
    """The map of a shard of so many bytes that are compressed as one, and how many they are."""
    rows = np.zeros(1, ROW)
    rows["nbytes"], rows["codec"], rows["base_file"] = 10, 1, -1
    file = StoredFile("step-000000000001.e00001", "r00000-00000000.safetensors", 10)
    columns = {**ExtentTable((file,), rows).segments(10, 10).columns}
    return columnar.encode(columns, b'{"format":"2.0"}') + nbytes.to_bytes(8, "little")


def decode_packed(file):
    nbytes = int.from_bytes(file[-8:], "little")
    return decode(file[:-8], nbytes, nbytes)


# For each limit: a file at it that is read, a file beyond it, and what reads them.
HOSTILE = {
    "MAX_HEADER_BYTES": lambda kit: (
        header_length,
        limits.MAX_HEADER_BYTES.to_bytes(8, "little"),
        (limits.MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
    ),
    "MAX_ENTRY_BYTES": lambda kit: (
        decode_shard,
        shard_with(kit, tensor("w", [1], 1), 1),
        shard_with(kit, tensor("w", [1] * limits.MAX_ENTRY_BYTES, 1), 1),
    ),
    "MAX_NAME_BYTES": lambda kit: (
        decode_shard,
        shard_with(kit, tensor("é" * 2048, [1], 1), 1),
        shard_with(kit, tensor("é" * 2048 + "x", [1], 1), 1),
    ),
    "MAX_NAME_BYTES in columns": lambda kit: (
        Columns.decode,
        columns_with_long_name(kit, 4096),
        columns_with_long_name(kit, 4097),
    ),
    "MAX_NAME_BYTES in an alias": lambda kit: (
        Index.decode,
        index_with(kit, aliases={"a" * 4096: "w"}),
        index_with(kit, aliases={"a" * 4097: "w"}),
    ),
    "MAX_NAME_BYTES in a tree": lambda kit: (
        objects.decode,
        json.dumps({"format": "1.0", "tree": {"!": "tensor", "v": "é" * 2048}}).encode(),
        json.dumps({"format": "1.0", "tree": {"!": "tensor", "v": "é" * 2048 + "x"}}).encode(),
    ),
    "MAX_NDIM": lambda kit: (
        decode_shard,
        shard_with(kit, tensor("w", [1] * 64, 1), 1),
        shard_with(kit, tensor("w", [1] * 65, 1), 1),
    ),
    "MAX_NDIM where it is not stored": lambda kit: (
        decode_shard,
        shard_with(kit, tensor("w", [1], 1, ["w", "uint8", [1] * 64, "flat", [0, 1]]), 1),
        shard_with(kit, tensor("w", [1], 1, ["w", "uint8", [1] * 65, "flat", [0, 1]]), 1),
    ),
    "MAX_TENSOR_BYTES": lambda kit: (
        decode_shard,
        shard_with(kit, tensor("w", [1], 1, ["w", "uint8", [2**62, 1], "flat", [0, 1]]), 1),
        shard_with(kit, tensor("w", [1], 1, ["w", "uint8", [2**62, 2], "flat", [0, 1]]), 1),
    ),
    "MAX_TENSOR_BYTES in an index": lambda kit: (
        Index.decode,
        index_with(kit),
        index_with(kit, lambda columns: columns["shard_nbytes"].put(0, 2**63)),
    ),
    "MAX_ELEMENTS": lambda kit: (
        Index.decode,
        index_with(kit, lambda columns: columns["tensor_shape"].put([0, 1], 2**60)),
        index_with(kit, lambda columns: columns["tensor_shape"].put([0, 1], 2**62)),
    ),
    "MAX_RECORD_BYTES": lambda kit: (
        CommitRecord.decode,
        commit_with(job="j" * (65_536 - len(commit_with(job="")))),
        commit_with(job="j" * (65_537 - len(commit_with(job="")))),
    ),
    "MAX_RECORD_BYTES in a shard": lambda kit: (
        decode_shard,
        shard_with(kit, lambda header: None),
        shard_with(
            kit, lambda header: header["__metadata__"].update(ckptsvc=canonical({"format": "1.0", "x": "y" * 70_000}))
        ),
    ),
    "MAX_INDEX_INFO_BYTES": lambda kit: (
        Index.decode,
        index_with(kit, novelty="x" * 16_000_000),
        index_with(kit, novelty="x" * 17_000_000),
    ),
    "MAX_SHARDS": lambda kit: (CommitRecord.decode, commit_with(shards=2**24), commit_with(shards=2**24 + 1)),
    "MAX_REFERS": lambda kit: (CommitRecord.decode, commit_that_refers_to(1024), commit_that_refers_to(1025)),
    "MAX_SEGMENT_BYTES": lambda kit: (
        decode_packed,
        packed(limits.MAX_SEGMENT_BYTES),
        packed(limits.MAX_SEGMENT_BYTES + 1),
    ),
    "MAX_OBJECTS_BYTES": lambda kit: (objects.decode, nested(1), bytes(limits.MAX_OBJECTS_BYTES + 1)),
    "MAX_OBJECTS_ITEMS": lambda kit: (objects.decode, listing(1000), listing(limits.MAX_OBJECTS_ITEMS)),
    "MAX_OBJECTS_DEPTH": lambda kit: (
        objects.decode,
        nested(limits.MAX_OBJECTS_DEPTH + 1),
        nested(limits.MAX_OBJECTS_DEPTH + 2),
    ),
}


@pytest.mark.parametrize("limit", HOSTILE)
def test_a_file_at_the_limit_is_read_and_one_beyond_it_is_not(kit, limit):
    read, fine, hostile = HOSTILE[limit](kit)
    read(fine)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            read(hostile)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 8 * min(len(hostile), 20_000_000)


def test_an_index_has_a_limited_number_of_shards(kit, monkeypatch):
    file = index_with(kit)
    monkeypatch.setattr(index, "MAX_SHARDS", 0)
    with pytest.raises(Damaged, match="1 shards"):
        Index.decode(file)


def test_the_writer_keeps_the_limits_too(kit, monkeypatch):
    parts = [Part(TensorMeta(f"w{i}", "uint8", ()), Box((), ())) for i in range(200)]
    monkeypatch.setattr(shard, "MAX_HEADER_BYTES", 9_000)
    with pytest.raises(InvalidInput, match="more ranks"):
        ShardTemplate(parts)
    monkeypatch.setattr(objects, "MAX_OBJECTS_ITEMS", 10)
    with pytest.raises(InvalidInput, match="items"):
        objects.encode(list(range(20)))
    monkeypatch.setattr(objects, "MAX_OBJECTS_BYTES", 100)
    with pytest.raises(InvalidInput, match="bytes"):
        objects.encode("x" * 100)


def test_every_limit_has_a_hostile_file():
    assert {name.split(" ")[0] for name in HOSTILE} == set(LIMITS)


def test_the_specification_has_every_limit_with_its_value():
    rows = re.findall(r"^\| `(MAX_\w+)` \| ([0-9,]+) \|", FORMAT_MD.read_text(), re.MULTILINE)
    assert {name: int(value.replace(",", "")) for name, value in rows} == LIMITS
