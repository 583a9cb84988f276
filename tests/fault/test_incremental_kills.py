"""SIGKILL at every point of a save that writes only what is new: all that is committed is whole, and stays so."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.damage import assert_intact, steps
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.catalog import find, open_checkpoint
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.storage import connect

FROZEN, TRAINED = 200_000, 20_000
KEEP = 2
LESS = {"CKPTSVC_SAVE_INCREMENTAL": "true", "CKPTSVC_SAVE_FULL_EVERY": "3", "CKPTSVC_SAVE_EXTENT": "16384"}
POINTS = ("before_shard", "in_shard", "after_shard", "before_commit", "before_record", "after_commit", "in_expire")


def train(rank: Rank, store: str) -> None:
    """Steps and saves when the test says so; one tensor never changes, one is full of the step's number."""
    frozen, trained = torch.arange(FROZEN, dtype=torch.float32), torch.zeros(TRAINED)
    run = ckptsvc.attach({"frozen": frozen, "trained": trained}, store=store, every=1, keep=KEEP)
    rank.report("attached", step=run.steps_done, values=[trained.min().item(), trained.max().item()])
    for step in range(run.steps_done + 1, 1000):
        rank.until(str(step))
        if (rank.folder / "go-end").exists():
            break
        trained.fill_(step)
        run.step()
        rank.report("stepped", step=step)
    run.close()


def assert_good(store: Path) -> None:
    """Every committed checkpoint verifies and holds the values of its step."""
    assert assert_intact(store)
    opened = connect(str(store))
    for ref, commit in find(opened):
        assert not isinstance(commit, Exception)
        checkpoint = open_checkpoint(opened, ref, commit)
        wants = [Want(n, "float32", (k,), Box((0,), (k,))) for n, k in (("frozen", FROZEN), ("trained", TRAINED))]
        frozen, trained = read_arrays(checkpoint.index, StoreSource(checkpoint), wants)
        assert frozen.tobytes() == np.arange(FROZEN, dtype=np.float32).tobytes()
        assert set(trained.view(np.float32).tolist()) == {float(ref.step)}


def refers(store: Path, step: int) -> bool:
    """Whether the checkpoint of a step needs files of others."""
    opened = connect(str(store))
    ((_, commit),) = [(ref, commit) for ref, commit in find(opened, step)]
    assert not isinstance(commit, Exception)
    return bool(commit.refers)


def go(job: Job, step: int) -> None:
    """Let a step be done."""
    job.go(str(step))
    job.wait_for("stepped", step=step)


def saving(runtime: Runtime) -> bool:
    """Whether the agent has saves that have not ended."""
    return any(one["running_saves"] for one in runtime.status()["coordinates"])


def await_step(runtime: Runtime, store: Path, step: int) -> None:
    """Wait until a step is committed, old ones are removed, and the agent knows it."""

    def ended() -> bool:
        return step in steps(store) and not saving(runtime)

    eventually(ended, f"step {step} to be committed")


@pytest.mark.parametrize("compression", [pytest.param("off", marks=pytest.mark.slow), "zstd"])
def test_the_worker_is_killed_at_every_point(
    launch: Launch, runtime: Runtime, tmp_path: Path, compression: str
) -> None:
    store, step = tmp_path / "run", 0
    with launch.plain(1, train, str(store), **LESS, CKPTSVC_SAVE_COMPRESSION=compression) as job:
        for point in POINTS:
            # The first of a worker is whole, the second refers to it, and so would the one that is interrupted.
            for _ in range(2):
                step += 1
                go(job, step)
                await_step(runtime, store, step)
            assert refers(store, step), point
            step += 1
            runtime.arm(point)
            go(job, step)
            os.kill(runtime.reached(point), signal.SIGKILL)
            await_step(runtime, store, step)
            assert_good(store)
        job.go("end")
        job.go(str(step + 1))
        job.results()
    assert_good(store)
    # One `gc` finds all that is left, and there is nothing for a second one.
    opened = connect(str(store))
    for garbage in list(find_garbage(opened)):
        assert remove_garbage(opened, garbage)
    assert list(find_garbage(opened)) == []
    assert_good(store)
    (again,) = launch.plain(1, attach_only, str(store), **LESS).results()
    assert again == [step, float(step)]


def test_a_checkpoint_that_somebody_deletes_fails_few_saves(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), **LESS) as job:
        for step in (1, 2):
            go(job, step)
            await_step(runtime, store, step)
        shutil.rmtree(store / "step-000000000001.e00001")
        step = 2
        while steps(store)[0] == 2:
            step += 1
            assert step < 9
            go(job, step)
            eventually(
                lambda: not any(one["running_saves"] for one in runtime.status()["coordinates"]), "the save's end"
            )
        assert not refers(store, step)
        assert "refers to step-000000000001.e00001, which has been deleted meanwhile" in runtime.log()
        job.go("end")
        job.go(str(step + 1))
        job.results()


def attach_only(rank: Rank, store: str) -> list[float]:
    """What a new job finds."""
    frozen, trained = torch.zeros(FROZEN), torch.zeros(TRAINED)
    with ckptsvc.attach({"frozen": frozen, "trained": trained}, store=store, every="off") as run:
        assert torch.equal(frozen, torch.arange(FROZEN, dtype=torch.float32))
        return [run.steps_done, trained.max().item()]
