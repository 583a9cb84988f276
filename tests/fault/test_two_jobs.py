"""Two jobs on one run: the second is refused, or the first is fenced; what they save is never mixed."""

from pathlib import Path
from typing import Any

import torch
from harness.damage import assert_intact, checkpoints
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime

import ckptsvc
from ckptsvc.errors import CkptsvcError
from ckptsvc.pipeline.catalog import find
from ckptsvc.storage import connect


def save_on_orders(rank: Rank, store: str, value: float) -> list[str]:
    """Attaches and saves a tensor full of `value`, once for each order; says how each went."""
    tensor = torch.full((1000,), value)
    try:
        run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    except CkptsvcError as error:
        rank.report("refused", why=f"{type(error).__name__}: {error}")
        return []
    rank.report("attached", step=run.steps_done, value=tensor[0].item())
    outcomes = []
    for number in range(1, 100):
        rank.until(str(number))
        if (rank.folder / "go-end").exists():
            break
        tensor.fill_(value)
        run.step()
        try:
            run.save(wait=True)
            outcomes.append("committed")
        except CkptsvcError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        rank.report("saved", number=number, outcome=outcomes[-1])
    run.close()
    return outcomes


def test_on_one_agent_the_second_job_is_refused(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = str(tmp_path / "run")
    agent = runtime.start_agent()
    with launch.plain(1, save_on_orders, store, 1.0, CKPTSVC_JOB="first") as first:
        first.go("1")
        first.wait_for("saved", number=1)
        with launch.plain(1, save_on_orders, store, 2.0, CKPTSVC_JOB="second") as second:
            why = second.wait_for("refused")["why"]
            assert why.startswith("RunBusy")
            assert "first" in why
            second.wait()
        first.go("2")
        assert first.wait_for("saved", number=2)["outcome"] == "committed"
        first.go("end")
        first.go("3")
        first.results()
    with launch.plain(1, save_on_orders, store, 2.0, CKPTSVC_JOB="second") as second:
        assert second.wait_for("attached")["step"] == 2
        second.go("end")
        second.go("1")
        second.results()
    agent.terminate()
    assert agent.wait(10) == 0


def test_on_two_agents_the_older_job_is_fenced(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with (
        launch.plain(1, save_on_orders, str(store), 1.0) as older,
        launch.plain(1, idle, str(store)) as waiting,
    ):
        older.go("1")
        older.wait_for("saved", number=1)
        waiting.go("begin")
        with launch.plain(1, save_on_orders, str(store), 2.0) as newer:
            assert newer.wait_for("attached") | {"step": 1, "value": 1.0} == newer.wait_for("attached")
            for number in (2, 3):
                older.go(str(number))
                outcome = older.wait_for("saved", number=number)["outcome"]
                assert outcome.startswith("Fenced"), outcome
            newer.go("1")
            assert newer.wait_for("saved", number=1)["outcome"] == "committed"
            newer.go("end")
            newer.go("2")
            newer.results()
        older.go("end")
        older.go("4")
        older.results()
        waiting.results()
    assert [folder.name for folder in checkpoints(store)] == ["step-000000000002.e00002", "step-000000000001.e00001"]
    assert assert_intact(store) == [2, 1]
    opened = connect(str(store))
    jobs: dict[int, Any] = {}
    for ref, commit in find(opened):
        assert not isinstance(commit, Exception)
        jobs[ref.epoch] = commit.job
    assert len(set(jobs.values())) == 2


def idle(rank: Rank, store: str) -> None:
    """Only looks: a reader neither takes an epoch nor fences anybody."""
    rank.until("begin")
    assert ckptsvc.load(store)["tensor"][0] == 1.0
