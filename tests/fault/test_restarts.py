"""Ranks that are killed under `ckptsvc run`: the next attempt is forked from the warm interpreter, and restores."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.job import Job, Launch
from harness.rank import Rank

import ckptsvc

KILLS = 100


def train(rank: Rank, store: str) -> dict[str, Any]:
    """Steps with a collective each, and a snapshot after every other one, until the test says to end."""
    opened: list[str] = []
    sys.addaudithook(lambda event, found: opened.append(str(found[0])) if event == "open" else None)
    rank.join()
    tensor, end = torch.zeros(1000), torch.zeros(1)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=2, keep=2)
    restored = {"step": run.steps_done, "value": tensor[0].item(), "tier": run.restored_from}
    modules = sum(name.endswith((".py", ".pyc", ".so")) for name in opened)
    rank.report("attached", **restored, parent=os.getppid(), modules=modules)
    while not end.item():
        torch.distributed.all_reduce(tensor)
        tensor.fill_(run.steps_done + 1)
        run.step()
        time.sleep(0.03)  # a save takes as long here
        rank.report("stepped", step=run.steps_done)
        end.fill_((rank.folder / "go-end").exists())
        torch.distributed.all_reduce(end)
    steps = run.steps_done
    run.close()
    return {"steps": steps}


def killed(job: Job, attempt: int) -> int:
    """Let an attempt make a few steps, kill one of its ranks; returns the step it certainly had come to."""
    ranks = [job.wait_for("attached", rank, attempt=attempt) for rank in (0, 1)]
    step = ranks[0]["step"] + 4
    for rank in (0, 1):
        job.wait_for("stepped", rank, attempt=attempt, step=step)
    job.kill(attempt % 2)
    return step


def finish(job: Job) -> None:
    """Check that every attempt went on from where an earlier one had been, and let the last one end."""
    began = job.reports("attached", 0)
    assert [line["attempt"] for line in began] == list(range(1, len(began) + 1))
    assert [line["value"] for line in began] == [line["step"] for line in began]
    # What was being staged is lost with the rank; what was staged before is not: no step is lost twice.
    assert all(later["step"] > earlier["step"] for earlier, later in itertools.pairwise(began))
    # Where a rank has had to give up the newest complete snapshot for the next one, the store has it already.
    assert [line["tier"] for line in began[1:]].count("memory") > 0.9 * (len(began) - 1) - 1
    assert len({line["parent"] for line in job.reports("attached")}) == 1  # the keeper
    # Of 1,900 files of modules that a rank by itself would open, the warm interpreter has read all but one or two.
    assert max(line["modules"] for line in job.reports("attached")) <= 2
    job.go("end")
    job.results()
    assert "standby: a warm interpreter" in job.output()


def test_a_killed_rank_is_back_from_memory(launch: Launch, tmp_path: Path) -> None:
    with launch.service(2, train, str(tmp_path / "run"), options=["--max-restarts", "9"]) as job:
        for attempt in (1, 2):
            killed(job, attempt)
        job.wait_for("stepped", attempt=3)
        finish(job)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_storm_of_kills_is_survived(launch: Launch, tmp_path: Path) -> None:
    with launch.service(2, train, str(tmp_path / "run"), options=["--max-restarts", str(KILLS)]) as job:
        for attempt in range(1, KILLS + 1):
            killed(job, attempt)
        job.wait_for("stepped", attempt=KILLS + 1)
        finish(job)
