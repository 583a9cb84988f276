"""What a store says of the layout of its shards reaches the agent: its metrics, and its log once."""

from pathlib import Path

import pytest
import torch
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime

import ckptsvc


def train(rank: Rank, store: str, saves: int) -> None:
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(500_000)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    for _ in range(saves):
        tensor += 1
        run.step()
        run.save(wait=True, timeout=60)
    rank.report("saved")
    rank.until("end")
    run.close()


def test_a_store_that_is_no_lustre_is_told_of_once(runtime: Runtime, launch: Launch, tmp_path: Path) -> None:
    agent = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
    with launch.plain(1, train, f"lustre://{tmp_path}/run", 3) as job:
        job.wait_for("saved")
        metrics = runtime.metrics()
        job.go("end")
        job.results()
    agent.terminate()
    assert agent.wait(10) == 0
    assert 'ckptsvc_layouts_missed_total{scheme="lustre"} 3.0\n' in metrics
    assert 'ckptsvc_shard_stripes{scheme="lustre"} 0.0\n' in metrics
    assert runtime.log().count(f"shards are not striped as asked: {tmp_path}/run is not on Lustre") == 1
    assert len(list(tmp_path.glob("run/step-*/COMMIT*"))) == 3


@pytest.mark.parametrize("tier", ["memory", pytest.param("local", marks=pytest.mark.slow)])
def test_how_many_write_reaches_the_driver_and_the_layout_the_metrics(
    runtime: Runtime, launch: Launch, tmp_path: Path, tier: str
) -> None:
    """Straight from memory, and from a local disk."""
    if tier == "local":
        runtime.environ["CKPTSVC_TIERS_LOCAL"] = str(tmp_path / "disk")
    agent = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
    with launch.plain(2, train, f"striped+file://{tmp_path}/run", 1) as job:
        job.wait_for("saved")
        metrics = runtime.metrics()
        job.go("end")
        job.results()
    agent.terminate()
    assert agent.wait(10) == 0
    assert 'ckptsvc_shard_stripes{scheme="striped+file"} 2.0\n' in metrics
    assert 'ckptsvc_shard_stripe_bytes{scheme="striped+file"} 1.048576e+06\n' in metrics
    assert 'ckptsvc_layouts_missed_total{scheme="striped+file"} 0.0\n' in metrics
