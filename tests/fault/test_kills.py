"""SIGKILL at every point of a save: of the training process, of the agent, of both, of the I/O worker.

A process stops at a failpoint (pipeline/failpoint.py), the test kills whom it wants to, and lets the others go on.
Step n's tensor is full of n, so that what a checkpoint holds can be told from its bytes.
"""

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from harness.damage import assert_intact, checkpoints, steps
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually
from safetensors import safe_open

import ckptsvc

ELEMENTS = 3_000_000  # 12 MB: written in several pieces
KEEP = 2

NOT_YET_HANDED_OVER = ("before_copy", "before_submit", "before_label")
HANDED_OVER = (
    "after_label",
    "before_shard",
    "in_shard",
    "after_shard",
    "before_commit",
    "before_record",
    "after_commit",
)
IN_TRAINER = ("before_copy", "before_submit", "after_submit")
IN_WORKER = (*HANDED_OVER[1:], "in_expire", "in_sweep")


def train(rank: Rank, store: str) -> dict[str, Any]:
    """Steps and saves when the test says so, until it says to end."""
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(ELEMENTS)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=1, keep=KEEP)
    rank.report("attached", step=run.steps_done, values=sorted({tensor.min().item(), tensor.max().item()}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(run.steps_done + 1, 1000):
            rank.until(str(step))
            if (rank.folder / "go-end").exists():
                break
            tensor.fill_(step)
            run.step()
            rank.report("stepped", step=step, skipped=run.skipped)
    run.close()
    return {"skipped": run.skipped, "said": [str(w.message) for w in said]}


def assert_good(store: Path) -> None:
    """Every committed checkpoint verifies, and holds the values of its step and of no other."""
    eventually(lambda: len(checkpoints(store)) <= KEEP, "old checkpoints to be removed")
    assert assert_intact(store)
    for folder, step in zip(checkpoints(store), steps(store), strict=True):
        # Rank 0 holds the tensor. An interrupted try may have left another shard: the last one was committed.
        shard = max(folder.glob("r00000-*"), key=lambda path: path.stat().st_mtime_ns)
        with safe_open(shard, "numpy") as file:
            tensor = file.get_tensor("tensor")
            assert (tensor.min(), tensor.max()) == (step, step)


def await_step(runtime: Runtime, store: Path, step: int) -> None:
    """Wait until a step is committed, and the agent knows it: no process is on its way to a failpoint any more."""

    def ended() -> bool:
        if step not in steps(store):
            return False
        try:
            return not any(job["running_saves"] for job in runtime.status()["coordinates"])
        except grpc.RpcError:
            return False  # a new agent is on its way

    eventually(ended, f"step {step} to be committed")


def being_deleted(store: Path) -> set[str]:
    """Checkpoints whose deletion has begun and not ended."""
    return {path.name for path in store.glob("retired/step-*")}


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def to_step(job: Job, runtime: Runtime, step: int, point: str, store: Path) -> int:
    """Bring step - 1 into the store and the next step to a failpoint; returns the process that stands there."""
    for earlier in range(1, step):
        job.go(str(earlier))
        job.wait_for("stepped", step=earlier)
        await_step(runtime, store, earlier)
    runtime.arm(point)
    job.go(str(step))
    return runtime.reached(point)


def go_on_until_saved(job: Job, runtime: Runtime, store: Path, step: int) -> int:
    """Training and service go on: steps until one is committed again; returns the last step."""
    killed_at, deadline = step, time.monotonic() + 30
    while steps(store)[0] <= killed_at:
        assert time.monotonic() < deadline, f"nothing was saved after step {killed_at}\n{job.story()}"
        step += 1
        job.go(str(step))
        job.wait_for("stepped", step=step)
        time.sleep(0.2)
    await_step(runtime, store, step)
    return step


def last_step(point: str) -> int:
    """The step at which the point is reached: old checkpoints are removed only once there are more than to keep."""
    return 3 if point in ("in_expire", "in_sweep") else 2


@pytest.mark.parametrize("point", [*NOT_YET_HANDED_OVER, "after_submit", *HANDED_OVER, "in_expire", "in_sweep"])
def test_the_trainer_is_killed(launch: Launch, runtime: Runtime, tmp_path: Path, point: str) -> None:
    store, step = tmp_path / "run", last_step(point)
    with launch.plain(1, train, str(store)) as job:
        to_step(job, runtime, step, point, store)
        job.kill()
        runtime.let_go(point)
    if point in IN_TRAINER[:2]:
        # Nothing of it was handed over. The agent lets go of everything, and ends.
        eventually(lambda: not runtime.status()["ranks"], "the agent to notice")
        assert steps(store) == [1]
    else:
        await_step(runtime, store, step)
    assert_good(store)


def test_the_agent_is_killed_at_every_point(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    """One training goes through it again and again, with a new agent each time."""
    store = tmp_path / "run"
    points = [*NOT_YET_HANDED_OVER, "after_submit", *HANDED_OVER, "in_expire", "in_sweep"]
    begun: set[str] = set()
    with launch.plain(1, train, str(store)) as job:
        job.go("1")
        await_step(runtime, store, 1)
        step = 1
        for point in points:
            step += 1
            runtime.arm(point)
            job.go(str(step))
            runtime.reached(point)
            (agent,) = runtime.agents()
            kill(agent.pid)
            eventually(lambda pid=agent.pid: pid not in [p.pid for p in runtime.processes()], "the agent's end")
            begun.update(being_deleted(store))
            runtime.let_go(point)
            job.wait_for("stepped", step=step)
            if point in NOT_YET_HANDED_OVER:
                assert step not in steps(store), point
            else:
                await_step(runtime, store, step)
            assert_good(store)
            step = go_on_until_saved(job, runtime, store, step)
            # What a killed worker had begun is left for later; another deletion must not be on its way to a failpoint.
            eventually(lambda: len(checkpoints(store)) <= KEEP and not being_deleted(store) - begun, "old ones to go")
        job.go("end")
        job.go(str(step + 1))
        (result,) = job.results()
    assert result["skipped"] >= len(NOT_YET_HANDED_OVER)
    assert len([m for m in result["said"] if "skipped" in m]) == result["skipped"]


@pytest.mark.parametrize(
    "point",
    ["before_submit", "before_label", "after_label", "in_shard", "after_shard", "before_record", "after_commit"],
)
def test_trainer_and_agent_are_killed_and_an_agent_is_started_by_hand(
    launch: Launch, runtime: Runtime, tmp_path: Path, point: str
) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store)) as job:
        to_step(job, runtime, 2, point, store)
        job.kill()
        runtime.kill_agents()
    # What was not handed over is lost, and the store has no half of it; the rest waits in its arena.
    assert steps(store) == ([2, 1] if point == "after_commit" else [1])
    assert_good(store)
    agent = runtime.start_agent("--linger", "0.3s", directory=runtime.agent_directory())
    assert agent.wait(30) == 0
    assert steps(store) == ([1] if point in NOT_YET_HANDED_OVER else [2, 1])
    assert_good(store)


def test_a_job_that_starts_again_after_both_were_killed_goes_on_from_memory(
    launch: Launch, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), CKPTSVC_JOB="again", CKPTSVC_ATTEMPT="1") as job:
        to_step(job, runtime, 2, "before_shard", store)
        job.kill()
        runtime.kill_agents()
    runtime.let_go("before_shard")
    assert steps(store) == [1]
    with launch.plain(1, train, str(store), CKPTSVC_JOB="again", CKPTSVC_ATTEMPT="2") as job:
        line = job.wait_for("attached")
        assert (line["step"], line["values"]) == (2, [2.0])
        job.go("3")
        job.wait_for("stepped", step=3)
        await_step(runtime, store, 3)
        job.go("end")
        job.go("4")
        job.results()
    assert_good(store)


def test_another_worker_finishes_what_a_killed_one_began(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store)) as job:
        for step, point in enumerate(("before_shard", *IN_WORKER), 1):
            runtime.arm(point)
            job.go(str(step))
            job.wait_for("stepped", step=step)
            worker = runtime.reached(point)
            assert [worker] == [w.pid for w in runtime.workers()]
            kill(worker)
            await_step(runtime, store, step)
            assert_good(store)
        job.go("end")
        job.go(str(step + 1))
        (result,) = job.results()
    assert result == {"skipped": 0, "said": []}


@pytest.mark.parametrize(
    "point",
    # before_record: under load it failed twice; why is not known yet
    ["before_submit", "after_label", "before_record"],
)
def test_the_agent_of_two_ranks_is_killed(launch: Launch, runtime: Runtime, tmp_path: Path, point: str) -> None:
    """At before_submit one rank's snapshot is with the agent and the other's is not: that step can never be whole."""
    store = tmp_path / "run"
    with launch.plain(2, train, str(store)) as job:
        job.go("1")
        await_step(runtime, store, 1)
        runtime.arm(point)
        job.go("2")
        runtime.reached(point)
        time.sleep(0.3)  # the other rank has handed over
        (agent,) = runtime.agents()
        kill(agent.pid)
        eventually(lambda: agent not in runtime.processes(), "the agent's end")
        runtime.let_go(point)
        for rank in (0, 1):
            job.wait_for("stepped", rank, step=2)
        if point == "before_record":
            await_step(runtime, store, 2)
        step = go_on_until_saved(job, runtime, store, 2)
        # No arena is lost to a save that will never end: what comes now is saved without a gap.
        for following in range(step + 1, step + 5):
            job.go(str(following))
            for rank in (0, 1):
                job.wait_for("stepped", rank, step=following)
            await_step(runtime, store, following)
        assert_good(store)
        job.go("end")
        job.go(str(step + 5))
        job.results()


def test_the_agent_of_a_launched_job_is_killed(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.service(2, train, str(store)) as job:
        job.go("1")
        await_step(runtime, store, 1)
        runtime.arm("before_shard")
        job.go("2")
        runtime.reached("before_shard")
        for rank in (0, 1):
            job.wait_for("stepped", rank, step=2)
        (agent,) = runtime.agents()
        kill(agent.pid)
        eventually(lambda: agent not in runtime.processes(), "the agent's end")
        await_step(runtime, store, 2)
        step = go_on_until_saved(job, runtime, store, 2)
        assert_good(store)
        job.go("end")
        job.go(str(step + 1))
        job.results()
    assert "lost the agent" in job.output()
    assert [line["attempt"] for line in job.reports("attached", 0)] == [1]


def test_an_agent_that_stands_still_holds_the_training_up_once(
    launch: Launch, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store)) as job:
        job.go("1")
        await_step(runtime, store, 1)
        (agent,) = runtime.agents()
        os.kill(agent.pid, signal.SIGSTOP)
        waits = []
        for step in (2, 3, 4):
            began = time.monotonic()
            job.go(str(step))
            line = job.wait_for("stepped", step=step)
            waits.append(time.monotonic() - began)
        assert line["skipped"] == 3
        assert waits[0] < 8  # save.deadline and the time an answer may take
        assert max(waits[1:]) < 2
        os.kill(agent.pid, signal.SIGCONT)
        step = go_on_until_saved(job, runtime, store, 4)
        assert runtime.agents() == [agent]
        assert_good(store)
        job.go("end")
        job.go(str(step + 1))
        job.results()
