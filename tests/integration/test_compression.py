"""Whether a real job's saves are compressed: decided by what its store takes, said, and so also over a local disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.damage import assert_intact
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime
from harness.stored import cli

import ckptsvc
from ckptsvc.pipeline.catalog import find, open_checkpoint
from ckptsvc.storage import connect

ELEMENTS = 750_000  # 3 MB: enough to tell how fast a store is


def save(rank: Rank, store: str) -> None:
    """Two saves, of values that compress well."""
    tensor = torch.arange(ELEMENTS, dtype=torch.int32).float()
    with ckptsvc.attach({"tensor": tensor}, store=store, every="off") as run:
        for _ in range(2):
            run.step()
            run.save(wait=True)
        rank.report("saved")
        rank.until("end")


def compressed(store: Path) -> list[bool]:
    """Of each checkpoint, the oldest first, whether something in it is compressed."""
    opened, done = connect(str(store)), []
    for ref, commit in reversed(find(opened)):
        assert not isinstance(commit, Exception), commit
        segments = open_checkpoint(opened, ref, commit).index.segments
        done.append(segments is not None and segments.stored(ref.name)["compressed"] > 0)
    return done


@pytest.mark.parametrize("over", ["a local disk", pytest.param("memory", marks=pytest.mark.slow)])
def test_saves_to_a_slow_store_are_compressed_once_it_is_known_to_be(
    launch: Launch, runtime: Runtime, tmp_path: Path, over: str
) -> None:
    store = tmp_path / "run"
    environ = {"CKPTSVC_SAVE_COMPRESSION": "auto", "CKPTSVC_STORE_MAX_WRITE_RATE": "6MB/s"}
    if over == "a local disk":
        environ["CKPTSVC_TIERS_LOCAL"] = str(tmp_path / "disk")
    with launch.plain(1, save, str(store), **environ) as job:
        job.wait_for("saved")
        (told,) = runtime.status()["compression"]
        assert told["compressed"]
        assert "the store takes" in told["why"]
        assert "    compressed: the store takes" in cli("status", "--dir", runtime.agent_directory()).out
        job.go("end")
        job.results()
    assert compressed(store) == [False, True]
    assert runtime.log().count("shards are compressed: the store takes") == 1
    assert assert_intact(store) == [2, 1]


def test_saves_to_a_fast_store_are_not_compressed(launch: Launch, runtime: Runtime) -> None:
    """It is in memory, and compression is made slow: whatever this machine does meanwhile."""
    store = runtime.arenas / "run"
    environ = {"CKPTSVC_SAVE_COMPRESSION": "auto", "CKPTSVC_SAVE_COMPRESSION_LEVEL": "19"}
    with launch.plain(1, save, str(store), CKPTSVC_SAVE_EXTENT="65536", **environ) as job:
        job.wait_for("saved")
        (told,) = runtime.status()["compression"]
        assert not told["compressed"]
        job.go("end")
        job.results()
    assert compressed(store) == [False, False]
    assert runtime.log().count("shards are not compressed: the store takes") == 1
