"""Jobs of several ranks under the launchers people use: DDP, generators of each rank, a rank that is killed."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.damage import checkpoints
from harness.job import Launch
from harness.programs import adam, network, state_digest, train_step
from harness.rank import Rank
from harness.runtime import Runtime
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel

import ckptsvc

STEPS = 9


def train(rank: Rank, store: str, until: int, held_at: int = 0, killed_at: int = 0) -> dict[str, Any]:
    """DDP with dropout; saves every 3 steps.

    In the first attempt all wait before step `held_at`; in the second, rank 1 kills itself after step `killed_at`.
    """
    rank.join()
    torch.manual_seed(rank.number)  # the ranks draw different numbers
    random.seed(rank.number)
    np.random.seed(rank.number)
    generators = torch.get_rng_state()
    model = network()
    torch.set_rng_state(generators)
    ddp = DistributedDataParallel(model)
    optimizer = adam(ddp)
    run = ckptsvc.attach({"model": ddp, "optimizer": optimizer}, store=store, every=3)
    rank.report("attached", step=run.steps_done, came_from=run.restored_from)
    draws, losses = [], []
    for step in range(run.steps_done, until):
        losses.append(train_step(ddp, optimizer, step, rank.number))
        draws.append([torch.rand(()).item(), random.random(), float(np.random.rand())])
        if (step + 1, rank.attempt) == (held_at, 1):
            rank.report("held")
            rank.until("on")
        run.step()
        if (step + 1, rank.attempt, rank.number) == (killed_at, 2, 1):
            os.kill(os.getpid(), signal.SIGKILL)
    run.wait()
    run.close()
    return {"state": state_digest(model, optimizer), "draws": draws, "losses": losses, "from": run.restored_from}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that runs the training without interruption."""
    return {}


def uninterrupted(launch: Launch, tmp_path: Path, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The training in one go, once for all tests."""
    if not truth:
        truth["ranks"] = launch.plain(2, train, str(tmp_path / "whole"), STEPS).results()
    ranks: list[dict[str, Any]] = truth["ranks"]
    return ranks


def test_killed_ranks_cost_nothing_that_was_staged(
    launch: Launch, runtime: Runtime, tmp_path: Path, truth: dict[str, Any]
) -> None:
    store = tmp_path / "run"
    with launch.service(2, train, str(store), STEPS, 6, 7) as job:
        # The first that comes to hand over its snapshot of step 6 is killed there: nobody's is of use.
        for rank in (0, 1):
            job.wait_for("held", rank)
        runtime.arm("before_submit")
        job.go("on")
        os.kill(runtime.reached("before_submit"), signal.SIGKILL)
        ranks = job.results(90)
    attached = [(line["attempt"], line["step"], line["came_from"]) for line in job.reports("attached", 0)]
    assert attached == [(1, 0, None), (2, 3, "memory"), (3, 6, "memory")]
    whole = uninterrupted(launch, tmp_path, truth)
    for rank, (found, expected) in enumerate(zip(ranks, whole, strict=True)):
        assert found["state"] == expected["state"], rank
        assert found["draws"] == expected["draws"][6:], rank
        assert found["losses"] == expected["losses"][6:], rank
    assert ranks[0]["draws"] != ranks[1]["draws"]
    assert "was killed by signal 9" in job.output()
    assert [folder.name for folder in checkpoints(store)] == [
        "step-000000000009.e00003",
        "step-000000000006.e00002",
        "step-000000000003.e00001",
    ]


@pytest.mark.slow
def test_the_same_under_torchrun_from_the_store(launch: Launch, tmp_path: Path, truth: dict[str, Any]) -> None:
    store = tmp_path / "run"
    first = launch.torchrun(2, train, str(store), 6).results(90)
    second = launch.plain(2, train, str(store), STEPS).results()
    whole = uninterrupted(launch, tmp_path, truth)
    for rank in range(2):
        assert second[rank]["from"] == "store"
        assert first[rank]["draws"] + second[rank]["draws"] == whole[rank]["draws"]
        assert second[rank]["state"] == whole[rank]["state"]


def test_what_ranks_hold_in_common_is_written_once(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    launch.plain(2, train, str(store), 3).results()
    (folder,) = checkpoints(store)
    elements: dict[str, int] = {}
    for shard in folder.glob("r*.safetensors"):
        with safe_open(shard, "numpy") as file:
            for key in file.keys():  # noqa: SIM118  it is no mapping
                name = key.split("@")[0]
                elements[name] = elements.get(name, 0) + file.get_tensor(key).size
    assert elements["model/0.weight"] == 7 * 13
    assert elements["optimizer/state/4.weight/exp_avg"] == 13 * 13
    assert elements["model/1.running_mean"] == 13
