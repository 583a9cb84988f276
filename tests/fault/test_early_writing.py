"""A large snapshot is written while it is copied; half-way the trainer, worker or agent is killed.

The arena is told to be full up to the second run of the copy when the trainer stops at `in_copy`.
"""

import time
from pathlib import Path

import grpc
import torch
from fault.test_kills import await_step, kill
from harness.damage import assert_intact
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually
from safetensors.numpy import load_file

import ckptsvc
from ckptsvc.client import stage

PARTS, ELEMENTS = 3, 10_000_000  # three tensors of 40 MB: two runs of the copy


def train(rank: Rank, store: str) -> bool:
    """Two steps, each saved when the test says so; returns whether the second was saved."""
    stage.RUN_BYTES = 64 << 20
    tensors = {str(i): torch.zeros(ELEMENTS) for i in range(PARTS)}
    run = ckptsvc.attach({"tensors": tensors}, store=store, every="off")
    saved = False
    for step in (1, 2):
        rank.until(str(step))
        for tensor in tensors.values():
            tensor.fill_(step)
        run.step()
        saved = run.save(timeout=60)
        rank.report("stepped", step=step)
    rank.until("end")
    run.close()
    return saved


def to_the_middle(job: Job, runtime: Runtime, store: Path) -> None:
    """Step 1 is committed, and step 2 half copied: the part of it that was told to be final is being written."""
    job.go("1")
    await_step(runtime, store, 1)
    runtime.arm("in_copy")
    job.go("2")
    runtime.reached("in_copy")
    runtime.let_go("in_copy")
    runtime.arm("in_copy")
    runtime.reached("in_copy")
    eventually(lambda: shards(store, 2), "the shard to be begun")


def shards(store: Path, step: int) -> list[Path]:
    """The shards of a step, complete or not."""
    return list(store.glob(f"step-{step:012d}.*/r*.safetensors"))


def is_registered(runtime: Runtime) -> bool:
    """Whether an agent answers that knows the rank."""
    try:
        return bool(runtime.status()["ranks"])
    except grpc.RpcError:
        return False


def assert_holds(store: Path, step: int) -> None:
    """The newest checkpoint is that step, and whole."""
    assert assert_intact(store)[0] == step
    (shard,) = shards(store, step)
    values = load_file(shard)
    assert [values[f"tensors/{i}"].min() for i in range(PARTS)] == [step] * PARTS
    assert [values[f"tensors/{i}"].max() for i in range(PARTS)] == [step] * PARTS


def test_what_a_killed_trainer_has_begun_is_removed(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), CKPTSVC_SAVE_EARLY_CORES="1") as job:
        to_the_middle(job, runtime, store)
        job.kill()
        runtime.let_go("in_copy")
        eventually(lambda: not shards(store, 2), "the half shard to be removed")
        time.sleep(0.2)
        assert not shards(store, 2)
    assert_holds(store, 1)


def test_the_worker_is_killed_and_another_goes_on(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), CKPTSVC_SAVE_EARLY_CORES="1") as job:
        to_the_middle(job, runtime, store)
        (worker,) = runtime.workers()
        kill(worker.pid)
        eventually(lambda: [w.pid for w in runtime.workers()] not in ([], [worker.pid]), "another worker")
        runtime.let_go("in_copy")
        await_step(runtime, store, 2)
        job.go("end")
        assert job.results() == [True]
    assert assert_intact(store) == [2, 1]


def test_the_agent_is_killed_and_the_training_goes_on(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), CKPTSVC_SAVE_EARLY_CORES="1") as job:
        to_the_middle(job, runtime, store)
        (agent,) = runtime.agents()
        kill(agent.pid)
        eventually(lambda: agent.pid not in [p.pid for p in runtime.processes()], "the agent's end")
        runtime.let_go("in_copy")
        job.wait_for("stepped", step=2)
        eventually(lambda: [a.pid for a in runtime.agents()] not in ([], [agent.pid]), "another agent")
        eventually(lambda: is_registered(runtime), "the rank to register with it")
        job.go("end")
        assert job.results() == [False], "without its agent a snapshot is not taken"
    assert assert_intact(store) == [1]


def test_undisturbed_it_holds_the_values_of_its_step(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), CKPTSVC_SAVE_EARLY_CORES="1") as job:
        to_the_middle(job, runtime, store)
        runtime.let_go("in_copy")
        await_step(runtime, store, 2)
        assert_holds(store, 2)
        job.go("end")
        assert job.results() == [True]
