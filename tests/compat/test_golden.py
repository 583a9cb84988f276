"""What was written once is read for ever: the files below golden/ are never changed.

golden/<version> is a run written by `python tests/compat/conftest.py` when that version was new. If the last test here
fails, the writer no longer writes what it did: that needs a new version of the format, and a new folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptsvc.format import objects
from ckptsvc.format.checksum import check, digest128
from ckptsvc.format.commit import COMMIT, CommitRecord, EpochRecord, epoch_key, parse_checkpoint_name
from ckptsvc.format.compat import FORMAT
from ckptsvc.format.index import Index
from ckptsvc.format.shard import decode_header
from ckptsvc.geometry.box import Box
from ckptsvc.geometry.reshard import plan
from ckptsvc.types import DTYPES

GOLDEN = Path(__file__).with_name("golden")
VERSIONS = ["1.0"]  # a run of 2.0 is read by test_segments


def files_of(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read(version, sample):
    root = GOLDEN / version
    folder = root / "step-000000000100.e00007"
    assert parse_checkpoint_name(folder.name) == (100, 7)
    assert EpochRecord.decode((root / epoch_key(7)).read_bytes()).job == "job"
    commit = CommitRecord.decode((folder / COMMIT).read_bytes())
    image = (folder / commit.index).read_bytes()
    assert (len(image), digest128(image)) == (commit.index_bytes, commit.index_digest)
    index = Index.decode(image)
    shards = [(folder / shard.name).read_bytes() for shard in index.shards]
    for row, shard in enumerate(shards):
        check(shard, index.digests(row), index.shards[row].name, extent=index.info.extent)
        assert decode_header(shard, len(shard)).info.rank == row
    assert set(index.names()) == {*sample.truth, "@rank/0/objects", "@rank/1/objects"}
    assert index.resolve("model/tied") == "model/flat"
    for name, expected in sample.truth.items():
        meta, regions = index.meta(name), index.regions(name)
        found = np.zeros_like(expected)
        itemsize = DTYPES[meta.dtype].itemsize
        for copy in plan(regions, [Box.full(meta.shape)], itemsize, meta.shape):
            region = regions[copy.stored]
            data = np.frombuffer(shards[region.shard], np.uint8, region.nbytes, region.offset).reshape(-1, itemsize)
            size = int(np.prod(copy.source.shape, dtype=int))
            piece = data[copy.source.offset : copy.source.offset + size].reshape(*copy.source.shape, itemsize)
            found[copy.target.box.slices()] = piece[copy.source.box.slices()]
        assert (found == expected).all(), name
    (region,) = index.regions("@rank/1/objects")
    tree = objects.decode(shards[1][region.offset : region.offset + region.nbytes])
    assert tree["rank"] == 1
    assert repr(tree["optimizer"]) == repr(sample.scales)


def test_the_writer_still_writes_this_version_byte_for_byte(tmp_path, sample):
    sample.write_run(tmp_path)
    assert files_of(tmp_path) == files_of(GOLDEN / FORMAT)
