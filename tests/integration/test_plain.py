"""`python train.py`: one process, a private agent, and no more than the two calls."""

from pathlib import Path
from typing import Any

import torch
from harness.job import Launch
from harness.programs import adam, differences, network, state_digest, train_step
from harness.rank import Rank

import ckptsvc


def train(rank: Rank, store: str, until: int) -> dict[str, Any]:
    model = network()
    optimizer = adam(model)
    scheduler = torch_scheduler(optimizer)
    tree = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "best": 0.0}
    run = ckptsvc.attach(tree, store=store, every=5)
    losses = []
    for step in range(run.steps_done, until):
        losses.append(train_step(model, optimizer, step))
        scheduler.step()
        tree["best"] = min(losses)
        run.step()
    if run.steps_done % 5 == 0:
        run.wait()
    run.close()
    return {
        "started": run.steps_done - len(losses),
        "from": run.restored_from,
        "losses": losses,
        "state": state_digest(model, optimizer),
        "rate": scheduler.get_last_lr(),
        "best": run.state["best"],
        "skipped": run.skipped,
    }


def torch_scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 4)


def test_two_processes_one_after_the_other_are_one_training(launch: Launch, tmp_path: Path) -> None:
    (whole,) = launch.plain(1, train, str(tmp_path / "whole"), 20).results()
    (first,) = launch.plain(1, train, str(tmp_path / "cut"), 10).results()
    (second,) = launch.plain(1, train, str(tmp_path / "cut"), 20).results()
    assert (whole["from"], first["from"], second["from"]) == (None, None, "store")
    assert (first["started"], second["started"]) == (0, 10)
    assert first["losses"] + second["losses"] == whole["losses"]  # dropout too: the generators went on
    assert differences(second["state"], whole["state"]) == []
    assert second["rate"] == whole["rate"]
    assert second["best"] == min(first["losses"])
    assert whole["skipped"] == first["skipped"] == second["skipped"] == 0
