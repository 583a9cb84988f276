"""A job that is asked to stop saves first: its ranks at the same step, and `ckptsvc run` ends with status 85."""

import signal
import time
from pathlib import Path

import pytest
import torch
from harness.damage import steps
from harness.job import Launch
from harness.rank import Rank

import ckptsvc
from ckptsvc.errors import EXIT_STATUS


def train_for_ever(rank: Rank, store: str) -> None:
    """Steps at its own pace until `step` ends the process."""
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(100)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    rank.report("attached", step=run.steps_done, value=tensor[0].item())
    while True:
        tensor += 1
        time.sleep(0.005 * (rank.number + 1))  # the ranks are not in step with each other
        try:
            run.step()
        except SystemExit:
            rank.report("stopped", step=run.steps_done, value=tensor[0].item())
            raise
        if run.steps_done % 50 == 0:
            rank.report("stepped", step=run.steps_done)


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
    assert status == EXIT_STATUS["interrupted"] == 85
    stopped = job.reports("stopped")
    assert len(stopped) == world
    (step,) = {line["step"] for line in stopped}
    assert all(line["value"] == step for line in stopped)
    assert steps(store) == [step]
    assert number.name in job.output()
