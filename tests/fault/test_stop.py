"""A job that is asked to stop saves first, its ranks at the same step, and ends with status 85: continue me.

Whoever asks: a signal to `ckptsvc run`, a signal to the training process, the end of the time the scheduler gives.
"""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from harness.damage import steps
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime

import ckptsvc
from ckptsvc.errors import EXIT_STATUS

STOPPED = EXIT_STATUS["interrupted"]


def train_for_ever(rank: Rank, store: str, pause: float = 0.005) -> None:
    """Steps at its own pace until `step` ends the process."""
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(100)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    rank.report("attached", step=run.steps_done, value=tensor[0].item())
    while True:
        tensor += 1
        time.sleep(pause * (rank.number + 1))  # the ranks are not in step with each other
        try:
            run.step()
        except SystemExit:
            rank.report("stopped", step=run.steps_done, value=tensor[0].item())
            raise
        if run.steps_done % 50 == 0:
            rank.report("stepped", step=run.steps_done)


def saved_by(job: Job, world: int, store: Path) -> int:
    """The step at which all ranks have stopped and saved."""
    stopped = job.reports("stopped")
    assert len(stopped) == world
    (step,) = {line["step"] for line in stopped}
    assert all(line["value"] == step for line in stopped)
    assert steps(store) == [step]
    return int(step)


@pytest.mark.parametrize(("world", "number"), [(2, signal.SIGTERM), (1, signal.SIGUSR1)], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_launcher_saves_and_stops(
    launch: Launch, tmp_path: Path, world: int, number: signal.Signals
) -> None:
    store = tmp_path / "run"
    with launch.service(world, train_for_ever, str(store)) as job:
        for rank in range(world):
            job.wait_for("stepped", rank)
        job.signal(number)
        (status,) = job.wait()
    assert status == STOPPED == 85
    step = saved_by(job, world, store)
    assert f"stopped on request ({number.name} to ckptsvc run on" in job.output()
    assert f"step {step} is committed in file://{store}" in job.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_lone_process_saves_and_stops_by_itself(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train_for_ever, str(store)) as job:
        job.wait_for("stepped")
        job.signal(number)
        assert job.wait() == [STOPPED]
    step = saved_by(job, 1, store)
    assert f"{number.name}: process" in job.output()
    assert f"stopped on request at step {step}, which is committed" in job.output()


def test_a_signal_to_one_of_several_ranks_stops_all_at_the_same_step(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(2, train_for_ever, str(store)) as job:
        for rank in range(2):
            job.wait_for("stepped", rank)
        os.kill(job.processes[1].pid, signal.SIGTERM)
        assert job.wait() == [STOPPED] * 2
    saved_by(job, 2, store)


def test_a_second_sigterm_ends_a_process_at_once(launch: Launch, tmp_path: Path) -> None:
    with launch.plain(1, train_for_ever, str(tmp_path / "run"), 30.0) as job:  # a step takes longer than the patience
        job.wait_for("attached")
        job.signal(signal.SIGTERM)
        time.sleep(0.5)
        assert job.processes[0].poll() is None
        job.signal(signal.SIGTERM)
        assert job.wait(timeout=20) == [-signal.SIGTERM]


@pytest.mark.slow
def test_the_job_stops_before_the_scheduler_ends_it(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    environ = {"CKPTSVC_DEADLINE": str(time.time() + 12.0), "CKPTSVC_SCHEDULER_MARGIN": "1s"}
    with launch.plain(2, train_for_ever, str(store), **environ) as job:
        assert job.wait() == [STOPPED] * 2
    saved_by(job, 2, store)
    assert "the scheduler ends the job in" in runtime.log()


def handlers(rank: Rank, store: str) -> None:
    """What attach does to signals that others use."""
    said = []
    signal.signal(signal.SIGUSR1, lambda number, frame: said.append(number))
    run = ckptsvc.attach({"tensor": torch.zeros(10)}, store=store, every="off")
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)  # as a data loader ends its workers
    _, status = os.waitpid(child, 0)
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(10):
        time.sleep(0.1)
        run.step()  # neither of them has asked for a stop
    run.close()
    rank.report("handled", child=os.waitstatus_to_exitcode(status), said=said, after=signal.getsignal(signal.SIGTERM))


def test_signals_of_others_stay_theirs(launch: Launch, tmp_path: Path) -> None:
    with launch.plain(1, handlers, str(tmp_path / "run")) as job:
        line = job.wait_for("handled")
        assert job.wait() == [0]
    assert line["child"] == -signal.SIGTERM
    assert line["said"] == [signal.SIGUSR1]
    assert line["after"] == signal.SIG_DFL
