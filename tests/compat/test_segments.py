"""Checkpoints whose shards are in segments (format 2.0), read with the independent reader, and those once written.

golden/2.0 was written by `python -m compat.test_segments FOLDER` (with tests/ in PYTHONPATH) when that version was new;
it is never changed. What zstandard makes of the same bytes may change, so it is not written again and compared.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from harness.increments import Saver, assert_holds
from harness.random_run import Held, Run
from safetensors import safe_open

from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.pipeline.catalog import find, open_checkpoint
from ckptsvc.pipeline.increments import Economy
from ckptsvc.storage import connect
from ckptsvc.types import TensorMeta

GOLDEN = Path(__file__).with_name("golden") / "2.0"
STEPS = 4


def load_reader():
    spec = importlib.util.spec_from_file_location("independent_reader", Path(__file__).with_name("reader.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load_reader()


def sample() -> Run:
    """Two ranks with a frozen table, weights in two dtypes, and a counter."""
    rng = np.random.default_rng(20)
    truth = {
        "frozen": rng.integers(0, 2**16, (100, 40), np.uint16),
        "weight": rng.normal(size=(50, 64)).astype(np.float32).view(np.uint32),
        "master": (rng.normal(size=3000).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
        "steps": np.arange(7, dtype=np.uint64),
    }
    dtypes = {"frozen": "float16", "weight": "float32", "master": "bfloat16", "steps": "int64"}
    metas = {name: TensorMeta(name, dtypes[name], array.shape) for name, array in truth.items()}
    held = [Held(metas["frozen"], Box((50 * rank, 0), (50, 40)), rank) for rank in range(2)]
    held += [Held(metas["weight"], Box((0, 32 * rank), (50, 32)), rank) for rank in range(2)]
    held += [Held(metas["master"], FlatRange(1501 * rank, 1501 - 2 * rank), rank) for rank in range(2)]
    held += [Held(metas["steps"], Box.full((7,)), 0)]
    return Run(truth, metas, held, 2, 1024, [b"{}", b"{ }"])


def trained(run: Run, step: int) -> Run:
    """What that run is at a step."""
    rng = np.random.default_rng(step)
    for _ in range(step):
        run.truth["weight"] = run.truth["weight"] ^ rng.integers(0, 64, (50, 64), np.uint32)
        run.truth["master"] = run.truth["master"] ^ rng.integers(0, 2, 3000, np.uint16)
        run.truth["steps"] = run.truth["steps"] + np.uint64(1)
    return run


def write(root: Path) -> None:
    """Save all steps."""
    saver = Saver(connect(f"file://{root}"), Economy(incremental=True, compression="zstd"))
    for step in range(1, STEPS + 1):
        saver.save(trained(sample(), step), step)
    saver.store.close()


def written(root: Path) -> list[tuple[Path, Run]]:
    """Folders and truths, oldest first."""
    return [(root / f"step-{step:012}.e00001", trained(sample(), step)) for step in range(1, STEPS + 1)]


@pytest.fixture(params=["golden", "written now"])
def run(request, tmp_path) -> Path:
    if request.param == "golden":
        shutil.copytree(GOLDEN, tmp_path / "run")
    else:
        write(tmp_path / "run")
    return tmp_path / "run"


def test_the_independent_reader_reads_them(run):
    for folder, truth in written(run):
        checkpoint = reader.Checkpoint(folder)
        assert checkpoint.info["format"] == "2.0"
        assert checkpoint.commit["format"] == ("2.1" if "written" in checkpoint.commit else "2.0")
        for name, array in truth.truth.items():
            assert checkpoint.tensor(name).tobytes() == array.tobytes(), (folder.name, name)
        assert checkpoint.read(1, int(checkpoint.columns["shard_nbytes"][1]) - 3, 3) == b"{ }"
    assert any(segment[3] for shard in checkpoint.segments for segment in shard), "the last has differences"
    assert {path.parent.name for path in checkpoint.files} > {folder.name}


def test_the_product_reads_them(run):
    store = connect(f"file://{run}")
    opened = {ref.step: open_checkpoint(store, ref, commit) for ref, commit in find(store)}
    assert sorted(opened) == [1, 2, 3, 4]
    for step, checkpoint in opened.items():
        assert_holds(checkpoint, trained(sample(), step))
    store.close()


def test_the_safetensors_library_opens_every_file(run):
    paths = sorted(run.glob("step-*/*.safetensors"))
    assert len(paths) == 3 * STEPS
    for path in paths:
        with safe_open(path, "numpy") as file:
            assert file.keys()
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) > 0  # noqa: SIM118  not a dict
            assert "ckptsvc" in file.metadata()


def test_the_independent_reader_finds_damage(run):
    folder, _ = written(run)[-1]

    def read_all():
        checkpoint = reader.Checkpoint(folder)
        return [checkpoint.read(i, 0, int(n)) for i, n in enumerate(checkpoint.columns["shard_nbytes"])]

    before = read_all()
    found = set()
    for path in reader.Checkpoint(folder).files:
        for at in (20, 4096, 5000, -1):
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
            try:
                assert read_all() == before
            except reader.BadCheckpointError:
                found.add((path, at))
            data[at] ^= 1
            path.write_bytes(data)
    own = {(path, at) for path in folder.glob("r*") for at in (20, 4096, 5000, -1)}
    assert own < found  # of other checkpoints' files, not all is in use


if __name__ == "__main__":
    write(Path(sys.argv[1]))
