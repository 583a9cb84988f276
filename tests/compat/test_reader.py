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

from ckptsvc.types import DTYPES

READER = Path(__file__).with_name("reader.py")
FORMAT_MD = Path(__file__).parents[2] / "proto" / "FORMAT.md"


def load_reader():
    spec = importlib.util.spec_from_file_location("independent_reader", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load_reader()


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
    assert third_party == {"numpy", "safetensors", "xxhash", "zstandard"}


def test_it_reads_every_tensor_by_the_index_and_by_the_shards(run, sample):
    (newest,) = reader.committed(run)
    checkpoint = reader.Checkpoint(newest)
    assert checkpoint.names() == sorted([*sample.truth, "model/tied"])
    for name, expected in sample.truth.items():
        tensor = checkpoint.tensor(name)
        assert raw(tensor) == expected.tobytes(), name
        assert raw(checkpoint.tensor_from_shards(name)) == expected.tobytes(), name
        dtype, shape = checkpoint.meta(name)
        assert expected.shape == (*shape, DTYPES[dtype].itemsize)
    assert checkpoint.tensor("model/float32").dtype == np.float32
    assert checkpoint.tensor("model/float32").shape == (6, 5)
    assert raw(checkpoint.tensor("model/tied")) == sample.truth["model/flat"].tobytes()


def test_it_reads_what_is_not_a_tensor(run, sample):
    checkpoint = reader.Checkpoint(reader.committed(run)[0])
    for rank in range(2):
        tree = checkpoint.objects(rank)
        assert tree["rank"] == rank
        assert tree["loader"] == ("tensor", f"@rank/{rank}/loader")
        assert math.isnan(tree["optimizer"].pop("nan"))
        assert tree["optimizer"] == {key: value for key, value in sample.scales.items() if key != "nan"}


def test_it_finds_damage(run):
    folder = reader.committed(run)[0]
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
    command = [sys.executable, "-I", str(READER), str(run)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.startswith("step-000000000100.e00007: step 100, 2 shards\n")
    assert "model/columns  float32 [3, 7]  84 bytes in 2 regions" in output


def test_the_dtypes_of_the_specification_are_those_of_the_product():
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| ([\w-]+) \|$", FORMAT_MD.read_text(), re.MULTILINE)
    specified = {(name, int(code), int(size), tag.replace("-", "")) for name, code, size, tag in rows}
    assert specified == set(map(tuple, DTYPES.values()))
    assert {(name, code, size) for code, (name, size, _) in reader.DTYPES.items()} == {row[:3] for row in specified}
