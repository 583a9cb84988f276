"""Ranks that hang, in real processes: seen, the right one named, killed where that is sure, and stepping again."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime

import ckptsvc

QUICK = {
    "CKPTSVC_HEALTH_FLOOR": "500ms",
    "CKPTSVC_HEALTH_CONFIRM": "300ms",
    "CKPTSVC_HEALTH_STARTUP": "60s",
}
"""Settings under which a hang is noticed within a second."""

WARM = 40
"""Steps after which the job has a history."""


def train(rank: Rank, store: str, faults: dict[str, str]) -> int:
    """Steps in lockstep until the test says to end; in attempt n, rank 1 does faults[n] after some steps."""
    rank.join()
    tensor = torch.zeros(10)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=10)
    rank.report("attached", step=run.steps_done)
    fault = faults.get(str(rank.attempt), "") if rank.number == 1 else ""
    ends = torch.zeros(1)
    for step in range(1, 100_000):
        if fault and step == WARM:
            rank.report("fault", fault=fault)
            FAULTS[fault](rank, run)
        ends.fill_((rank.folder / "go-end").exists())
        dist.all_reduce(ends)
        if ends:
            break
        time.sleep(0.01)
        run.step()
        if step % 10 == 0:
            rank.report("stepped", count=step)
    run.close()
    return run.steps_done


def loop_with_the_interpreter_lock(rank: Rank, run: ckptsvc.Session) -> None:
    """One bytecode after the other, in one C call that never lets go of the lock."""
    sum(iter(int, 1))


def wait_for_nothing(rank: Rank, run: ckptsvc.Session) -> None:
    """As a data loader whose workers are gone."""
    read, _ = os.pipe()
    os.read(read, 1)


def hang_in_an_evaluation(rank: Rank, run: ckptsvc.Session) -> None:
    with run.phase("evaluation"):
        wait_for_nothing(rank, run)


def be_stopped(rank: Rank, run: ckptsvc.Session) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {f.__name__: f for f in (loop_with_the_interpreter_lock, wait_for_nothing, hang_in_an_evaluation, be_stopped)}


def test_a_stopped_rank(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    with launch.service(
        2, train, str(tmp_path / "run"), {"1": "be_stopped", "2": "loop_with_the_interpreter_lock"}, **QUICK
    ) as job:
        job.wait_for("fault", 1, fault="be_stopped")
        t = time.time()
        job.wait_for("stepped", 1, attempt=2)
        print("stepping after", time.time() - t)
        job.wait_for("fault", 1, fault="loop_with_the_interpreter_lock")
        t = time.time()
        job.wait_for("stepped", 1, attempt=3)
        print("stepping after", time.time() - t)
        job.go("end")
        job.results()
    print(job.output())
    print(runtime.log())
