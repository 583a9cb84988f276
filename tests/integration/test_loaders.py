"""Data loaders with worker processes in the loop, while a session with its threads and channels is open."""

from pathlib import Path
from typing import Any

import torch
from harness.damage import steps
from harness.job import Launch
from harness.rank import Rank
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckptsvc


class Numbers(Dataset[int]):
    """The numbers below 40."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


def train(rank: Rank, store: str, batches: int) -> dict[str, Any]:
    """Reads shuffled batches through forked workers; saves at every step. The loader's position is in the state."""
    loader = StatefulDataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=2, multiprocessing_context="fork")
    tensor = torch.zeros(3)
    seen = []
    with ckptsvc.attach({"loader": loader, "tensor": tensor}, store=store, every=1) as run:
        for batch in loader:
            seen.append(batch.tolist())
            tensor += 1
            run.step()
            assert run.wait()
            if run.steps_done == batches:
                break
    return {"seen": seen, "skipped": run.skipped}


def plain_loader(rank: Rank, store: str) -> dict[str, Any]:
    """A plain DataLoader whose workers are forked anew for every epoch, in a fresh interpreter."""
    loader = DataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context="fork")
    tensor = torch.zeros(3)
    count = 0
    with ckptsvc.attach({"tensor": tensor}, store=store, every=2) as run:
        for _ in range(4):
            for batch in loader:
                count += len(batch)
                run.step()
        assert run.wait()
    return {"count": count, "skipped": run.skipped}


def test_a_loader_with_workers_goes_on_where_it_was(launch: Launch, tmp_path: Path) -> None:
    (whole,) = launch.plain(1, train, str(tmp_path / "whole"), 12).results()
    (first,) = launch.plain(1, train, str(tmp_path / "cut"), 5).results()
    (second,) = launch.plain(1, train, str(tmp_path / "cut"), 12).results()
    assert len(whole["seen"]) == 12
    assert sorted(map(str, first["seen"] + second["seen"])) != sorted(map(str, range(40)))
    assert first["seen"] + second["seen"] == whole["seen"]
    assert whole["skipped"] == first["skipped"] == second["skipped"] == 0


def test_forked_workers_disturb_neither_the_session_nor_the_agent(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    job = launch.service(1, plain_loader, str(store))
    (found,) = job.results()
    assert found == {"count": 160, "skipped": 0}
    assert steps(store)[0] == 20
    said = [line for line in job.output().lower().splitlines() if "warm interpreter" not in line]
    assert not [line for line in said if "fork" in line]
