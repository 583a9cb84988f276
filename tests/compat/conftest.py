"""A small checkpoint of two ranks with every dtype and every kind of region, made of the product's writer pieces."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ckptsvc.format.checksum import digest128, extent_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import COMMIT, CommitRecord, EpochRecord, checkpoint_name, epoch_key, index_name, shard_name
from ckptsvc.format.index import Index, IndexInfo, ShardRecord
from ckptsvc.format.objects import TensorRef, encode
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate, decode_header
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import DTYPES, TensorMeta

EXTENT = 512  # so that the small shards below have many


def values(dtype, shape, seed):
    """The bytes of a tensor, [*shape, itemsize]; a bool is 0 or 1."""
    full = (*shape, DTYPES[dtype].itemsize)
    array = ((np.arange(math.prod(full)) * 7 + seed * 13) % 251).astype(np.uint8).reshape(full)
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


def write_shard(folder, rank):
    parts = []
    for name, (dtype, shape, how) in TENSORS.items():
        region = split(shape, how, rank)
        if region is not None:
            parts.append(Part(TensorMeta(name, dtype, shape), region))
    parts.append(Part(TensorMeta(f"@rank/{rank}/loader", "uint8", (3,)), Box((0,), (3,))))
    template = ShardTemplate(parts)
    document = encode({"optimizer": SCALES, "rank": rank, "loader": TensorRef(f"@rank/{rank}/loader")})
    info = ShardInfo(run="file:///run", job="job", step=100, epoch=7, attempt=1, rank=rank, world_size=2)
    file = bytearray(template.header(info, len(document)).ljust(template.total(len(document)), b"\0"))
    for entry in template.entries:
        file[entry.offset : entry.offset + entry.nbytes] = region_bytes(truth()[entry.meta.name], entry.region)
    file[template.objects_offset :] = document
    name = shard_name(rank, "9f2c01ab")
    (folder / name).write_bytes(file)
    columns = Columns.from_table(decode_header(bytes(file), len(file)))
    return ShardRecord(name, rank, len(file), extent_digests(file, EXTENT), columns)


def truth():
    """The bytes of every tensor, by name."""
    found = {name: values(dtype, shape, i) for i, (name, (dtype, shape, _)) in enumerate(TENSORS.items())}
    return found | {f"@rank/{rank}/loader": values("uint8", (3,), rank) for rank in range(2)}


def write_run(root):
    """A run with one checkpoint of two ranks."""
    folder = root / checkpoint_name(100, 7)
    folder.mkdir(parents=True)
    records = [write_shard(folder, rank) for rank in range(2)]
    same = {"step": 100, "epoch": 7, "attempt": 1, "job": "job", "world_size": 2, "created": "2026-01-02T03:04:05Z"}
    index = Index.build(IndexInfo(**same, extent=EXTENT, aliases={"model/tied": "model/flat"}), records)
    index.check_cover()
    image, name = index.encode(), index_name("77aa01bc")
    (folder / name).write_bytes(image)
    sizes = {"index_bytes": len(image), "shards": 2, "bytes": sum(record.nbytes for record in records)}
    commit = CommitRecord(**same, **sizes, writer="w", index=name, index_digest=digest128(image))
    (folder / COMMIT).write_bytes(commit.encode())
    epoch = EpochRecord(epoch=7, job="job", attempt=1, owner="w", created=same["created"])
    (root / epoch_key(7)).parent.mkdir()
    (root / epoch_key(7)).write_bytes(epoch.encode())


@pytest.fixture(scope="session")
def sample():
    """What the checkpoint holds, and how to write it."""
    return SimpleNamespace(truth=truth(), scales=SCALES, tensors=TENSORS, write_run=write_run)


@pytest.fixture
def run(tmp_path):
    """The folder of such a run."""
    write_run(tmp_path)
    (tmp_path / checkpoint_name(200, 7)).mkdir()  # never committed
    return tmp_path


if __name__ == "__main__":  # `python tests/compat/conftest.py FOLDER` makes the files of tests/compat/golden
    write_run(Path(sys.argv[1]))
