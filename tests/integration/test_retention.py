"""Retention of a real job: values that the training gives, rules from its settings, deletion behind its back."""

import json
import math
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from harness.damage import assert_intact, steps
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually
from harness.stored import Run, Tensor, cli

import ckptsvc
from ckptsvc.format.commit import CommitRecord
from ckptsvc.format.objects import TensorRef
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.pipeline.pins import pin
from ckptsvc.storage import connect


def save_once(rank: Rank, store: str) -> None:
    """A save behind what is there."""
    with ckptsvc.attach({"tensor": torch.zeros(1000)}, store=store, every="off", keep=1) as run:
        assert run.steps_done == 2
        run.step()
        run.save(wait=True)


LOSSES = {1: 5.0, 2: 1.0, 3: 4.0, 4: math.nan, 5: 0.5, 6: 3.0, 7: 2.0}


def train(rank: Rank, store: str, until: int) -> dict[str, Any]:
    """A save at every step, with a loss that only rank 0 gets right; pins step 1 once it is there."""
    if rank.world > 1:
        rank.join()
    run = ckptsvc.attach({"tensor": torch.zeros(1000)}, store=store, every="off", keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while run.steps_done < until:
            loss = LOSSES[run.steps_done + 1]
            run.step(
                metrics={"loss": torch.tensor(loss, requires_grad=True) if rank.number == 0 else -1.0, "bad": "word"}
            )
            run.save(wait=True, metrics={"lr": 0.1})
            if rank.number == 0 and run.steps_done == 1:
                pin(connect(store), Ref(1, 1))
    run.close()
    return {"committed": run.committed_step}


def test_the_rules_of_a_job_and_its_values(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    rules = {"CKPTSVC_RETENTION_BEST": "2", "CKPTSVC_RETENTION_METRIC": "loss", "CKPTSVC_RETENTION_EVERY": "3"}
    launch.plain(2, train, str(store), 7, **rules).results()
    # 7 is the newest, 6, 3 and 1 begin their three steps (1 is pinned, too), 5 and 2 are the best
    eventually(lambda: steps(store) == [7, 6, 5, 3, 2, 1], "the other one to go")
    assert assert_intact(store)
    listed = json.loads(cli("ls", store, "--json").out)["checkpoints"]
    assert [c["metrics"] for c in listed] == [{"loss": LOSSES[c["step"]], "lr": 0.1} for c in listed]
    assert [c["step"] for c in listed if c["pinned"]] == [1]
    assert [p.name for p in (store / "retired").glob("*")] == []


def test_a_job_keeps_what_is_young_enough(launch: Launch, tmp_path: Path) -> None:
    store, run = tmp_path / "run", Run(f"file://{tmp_path}/run")
    for step in (1, 2):
        run.save(step, {"tensor": Tensor(np.zeros(1000, np.float32))}, values={"tensor": TensorRef("tensor")})
    record = store / Ref(1, 1).name / "COMMIT"
    two_days_ago = (datetime.now(UTC) - timedelta(days=2)).isoformat()
    record.write_bytes(msgspec.structs.replace(CommitRecord.decode(record.read_bytes()), created=two_days_ago).encode())
    launch.plain(1, save_once, str(store), CKPTSVC_RETENTION_AGE="1d").results()
    eventually(lambda: steps(store) == [3, 2], "the old one to go")
    assert assert_intact(store)


def save_when_told(rank: Rank, store: str) -> None:
    """Saves until told to end."""
    run = ckptsvc.attach({"tensor": torch.zeros(1000)}, store=store, every=1, keep=1)
    while not (rank.folder / "go-end").exists():
        rank.until(str(run.steps_done + 1))
        run.step()
        rank.report("stepped", step=run.steps_done)
        run.wait()
    run.close()


def test_a_worker_that_is_killed_in_mid_deletion_leaves_what_gc_finds(
    launch: Launch, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with launch.plain(1, save_when_told, str(store)) as job:
        job.go("1")
        job.wait_for("stepped", step=1)
        eventually(lambda: steps(store) == [1], "the first checkpoint")
        runtime.arm("in_sweep")
        job.go("2")
        job.wait_for("stepped", step=2)
        runtime.reached("in_sweep")  # the worker has deleted one of the first one's files
        assert steps(store) == [2]
        job.kill()
        runtime.kill_agents()
        runtime.let_go("in_sweep")
    agent = runtime.start_agent("--linger", "0.3s", directory=runtime.agent_directory())  # it lets the arenas go
    assert agent.wait(30) == 0
    found = json.loads(cli("gc", store, "--json", "--delete", "--older-than", "0").out)["garbage"]
    assert [(g["folder"], g["why"], g["fate"]) for g in found] == [
        (Ref(1, 1).name, "its deletion was interrupted", "removed")
    ]
    assert json.loads(cli("gc", store, "--json").out)["garbage"] == []
    assert assert_intact(store)
    assert steps(store) == [2]
