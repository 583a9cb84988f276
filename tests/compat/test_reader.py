"""What the product's writer writes, the independent reader reads."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptsvc.format.checksum import digest128, extent_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import COMMIT, CommitRecord, checkpoint_name, index_name, shard_name
from ckptsvc.format.index import Index, IndexInfo, ShardRecord
from ckptsvc.format.objects import TensorRef, encode
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate, decode_header
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import DTYPES, TensorMeta

READER = Path(__file__).with_name("reader.py")
FORMAT_MD = Path(__file__).parents[2] / "proto" / "FORMAT.md"
EXTENT = 512  # so that the small shards below have many


def load_reader():
    spec = importlib.util.spec_from_file_location("independent_reader", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load_reader()


def values(dtype, shape, seed):
    """Random bytes of a tensor, [*shape, itemsize]; a bool is 0 or 1."""
    array = np.random.default_rng(seed).integers(0, 256, (*shape, DTYPES[dtype].itemsize), np.uint8)
    return array % 2 if dtype == "bool" else array


TENSORS = {
    **{f"model/{dtype}": (dtype, (6, 5), "rows") for dtype in DTYPES},
    "model/columns": ("float32", (3, 7), "columns"),
    "model/flat": ("float16", (5, 4, 3), "flat"),
    "model/whole@0:1": ("int64", (4,), "first"),
    "model/scalar": ("bfloat16", (), "first"),
    "model/empty": ("float64", (0, 3), "first"),
    "optimizer/state/a~1b/exp_avg": ("float32", (1000,), "flat"),
    "gewicht/ß": ("float32", (9, 2), "rows"),
}
SCALES = {"lr": 1e-3, "betas": (0.9, 0.999), "step": 2**80, "nan": math.nan, "seen": {1: {2, 3}}, "none": None}


def split(shape, how, rank):
    if how == "rows":
        half = shape[0] // 2
        return Box((half * rank, *(0 for _ in shape[1:])), ((shape[0] - half) if rank else half, *shape[1:]))
    if how == "columns":
        return Box((0, 3 * rank), (shape[0], 4 if rank else 3))
    if how == "flat":
        size, cut = math.prod(shape), 17
        return FlatRange(cut, size - cut) if rank else FlatRange(0, cut)
    return None if rank else Box.full(shape)


def region_bytes(array, region):
    if isinstance(region, FlatRange):
        return array.reshape(-1, array.shape[-1])[region.start : region.stop].tobytes()
    return array[region.slices()].tobytes()


def write_shard(folder, rank, truth):
    parts = []
    for name, (dtype, shape, how) in TENSORS.items():
        region = split(shape, how, rank)
        if region is not None:
            parts.append(Part(TensorMeta(name, dtype, shape), region))
    parts.append(Part(TensorMeta(f"@rank/{rank}/loader", "uint8", (3,)), Box((0,), (3,))))
    truth[f"@rank/{rank}/loader"] = values("uint8", (3,), rank)
    template = ShardTemplate(parts)
    document = encode({"optimizer": SCALES, "rank": rank, "loader": TensorRef(f"@rank/{rank}/loader")})
    info = ShardInfo(run="file:///run", job="job", step=100, epoch=7, attempt=1, rank=rank, world_size=2)
    file = bytearray(template.header(info, len(document)).ljust(template.total(len(document)), b"\0"))
    for entry in template.entries:
        file[entry.offset : entry.offset + entry.nbytes] = region_bytes(truth[entry.meta.name], entry.region)
    file[template.objects_offset :] = document
    name = shard_name(rank, "9f2c01ab")
    (folder / name).write_bytes(file)
    columns = Columns.from_table(decode_header(bytes(file), len(file)))
    return ShardRecord(name, rank, len(file), extent_digests(file, EXTENT), columns)


@pytest.fixture
def run(tmp_path):
    """A run with one checkpoint of two ranks: (its folder, the bytes of every tensor)."""
    folder = tmp_path / checkpoint_name(100, 7)
    folder.mkdir()
    truth = {name: values(dtype, shape, i) for i, (name, (dtype, shape, _)) in enumerate(TENSORS.items())}
    records = [write_shard(folder, rank, truth) for rank in range(2)]
    info = IndexInfo(
        step=100, epoch=7, attempt=1, job="job", world_size=2, created="now", extent=EXTENT,
        aliases={"model/tied": "model/flat"},
    )  # fmt: skip
    index = Index.build(info, records)
    index.check_cover()
    image, name = index.encode(), index_name("77aa01bc")
    (folder / name).write_bytes(image)
    commit = CommitRecord(
        step=100, epoch=7, attempt=1, job="job", writer="w", index=name, index_bytes=len(image),
        index_digest=digest128(image), shards=2, bytes=sum(record.nbytes for record in records), world_size=2, created="now",
    )  # fmt: skip
    (folder / COMMIT).write_bytes(commit.encode())
    (tmp_path / checkpoint_name(200, 7)).mkdir()  # never committed
    return tmp_path, truth


def raw(array):
    return np.ascontiguousarray(array).tobytes()


def test_the_reader_knows_nothing_of_the_product():
    imports = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(READER.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    third_party = imports - sys.stdlib_module_names
    assert third_party == {"numpy", "safetensors", "xxhash"}


def test_it_reads_every_tensor_by_the_index_and_by_the_shards(run):
    folder, truth = run
    (newest,) = reader.committed(folder)
    checkpoint = reader.Checkpoint(newest)
    assert checkpoint.names() == sorted([*truth, "model/tied"])
    for name, expected in truth.items():
        tensor = checkpoint.tensor(name)
        assert raw(tensor) == expected.tobytes(), name
        assert raw(checkpoint.tensor_from_shards(name)) == expected.tobytes(), name
        dtype, shape = checkpoint.meta(name)
        assert expected.shape == (*shape, DTYPES[dtype].itemsize)
    assert checkpoint.tensor("model/float32").dtype == np.float32
    assert checkpoint.tensor("model/float32").shape == (6, 5)
    assert raw(checkpoint.tensor("model/tied")) == truth["model/flat"].tobytes()


def test_it_reads_what_is_not_a_tensor(run):
    checkpoint = reader.Checkpoint(reader.committed(run[0])[0])
    for rank in range(2):
        tree = checkpoint.objects(rank)
        assert tree["rank"] == rank
        assert tree["loader"] == ("tensor", f"@rank/{rank}/loader")
        assert math.isnan(tree["optimizer"].pop("nan"))
        assert tree["optimizer"] == {key: value for key, value in SCALES.items() if key != "nan"}


def test_it_finds_damage(run):
    folder = reader.committed(run[0])[0]
    region = reader.Checkpoint(folder).regions("model/int64")[0]
    shard = reader.Checkpoint(folder).shards[region[2]]
    data = bytearray(shard.read_bytes())
    data[region[3]] ^= 1
    shard.write_bytes(data)
    checkpoint = reader.Checkpoint(folder)
    with pytest.raises(reader.BadCheckpointError, match="damaged"):
        checkpoint.tensor("model/int64")
    index = folder / "index-77aa01bc.safetensors"
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(reader.BadCheckpointError, match="index"):
        reader.Checkpoint(folder)


def test_it_runs_without_the_product(run):
    command = [sys.executable, "-I", str(READER), str(run[0])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.startswith("step-000000000100.e00007: step 100, 2 shards\n")
    assert "model/columns  float32 [3, 7]  84 bytes in 2 regions" in output


def test_the_dtypes_of_the_specification_are_those_of_the_product():
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| ([\w-]+) \|$", FORMAT_MD.read_text(), re.MULTILINE)
    specified = {(name, int(code), int(size), tag.replace("-", "")) for name, code, size, tag in rows}
    assert specified == set(map(tuple, DTYPES.values()))
    assert {(name, code, size) for code, (name, size, _) in reader.DTYPES.items()} == {row[:3] for row in specified}
