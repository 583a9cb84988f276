"""`--max-write-rate`: what it holds back is told in seconds that follow from the bytes, whatever the machine does."""

from pathlib import Path

import pytest
import torch
from harness.damage import assert_intact
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime

import ckptsvc

NBYTES = 12_000_000
RATE = 24_000_000


def save_twice(rank: Rank, store: str) -> bool:
    tensor = torch.ones(NBYTES // 4)
    with ckptsvc.attach({"tensor": tensor}, store=store, every="off") as run:
        for _ in range(2):
            run.step()
            run.save(wait=True)
        rank.report("saved")
        rank.until("end")
    return True


def held_back(runtime: Runtime) -> float:
    lines = runtime.metrics().splitlines()
    return float(next(line for line in lines if line.startswith("ckptsvc_write_held_back_seconds_total ")).split()[1])


@pytest.mark.parametrize(
    "tiers",
    [
        pytest.param({}, id="direct", marks=pytest.mark.slow),
        pytest.param({"CKPTSVC_TIERS_LOCAL": "disk"}, id="drained"),
    ],
)
def test_the_store_gets_no_more_than_the_limit(
    launch: Launch, runtime: Runtime, tmp_path: Path, tiers: dict[str, str]
) -> None:
    environ = {key: str(tmp_path / value) for key, value in tiers.items()}
    environ |= {"CKPTSVC_AGENT_METRICS_LISTEN": "127.0.0.1:0", "CKPTSVC_LAUNCH_STANDBY": "false"}
    options = ("--max-write-rate", "24MB/s", "--no-preflight")
    with launch.service(1, save_twice, str(tmp_path / "run"), options=options, **environ) as job:
        job.wait_for("saved")
        assert runtime.status()["max_write_rate"] == RATE
        assert held_back(runtime) >= 0.99 * 2 * NBYTES / RATE
        job.go("end")
        assert job.wait() == [0]
    assert assert_intact(tmp_path / "run") == [2, 1]
