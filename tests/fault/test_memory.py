"""No shared memory for a snapshot: it is skipped, counted and reported, and the training goes on."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.damage import steps
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import Runtime, tmpfs

import ckptsvc
from ckptsvc.errors import CkptsvcError


def train_with_little_memory(rank: Rank, store: str) -> dict[str, Any]:
    """Needs 12 MB of arena at first, and next to none after step 2."""
    tree = {"tensor": torch.zeros(3_000_000)}
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = ckptsvc.attach(tree, store=store, every=1)
        for step in range(1, 4):
            if step == 3:
                found["skipped"] = run.skipped
                try:
                    run.save(wait=True, timeout=1.0)
                except CkptsvcError as error:
                    found["save"] = f"{type(error).__name__}: {error}"
                tree["tensor"] = torch.zeros(10)
            tree["tensor"] += 1
            run.step()
        found["small"] = run.wait()
        found["skipped in all"] = run.skipped
        run.close()
    found["said"] = [str(w.message) for w in said]
    return found


@pytest.mark.parametrize("scarce", ["limit", "file system"])
def test_a_snapshot_without_memory_is_skipped(launch: Launch, runtime: Runtime, tmp_path: Path, scarce: str) -> None:
    store = tmp_path / "run"
    if scarce == "limit":
        (found,) = launch.plain(1, train_with_little_memory, str(store), CKPTSVC_ARENA_LIMIT="8MiB").results()
    else:
        with tmpfs(tmp_path / "shm", "8m") as mount:
            environ = {"CKPTSVC_ARENA_DIR": str(mount), "CKPTSVC_ARENA_LIMIT": "1GiB"}
            (found,) = launch.plain(1, train_with_little_memory, str(store), **environ).results()
            for agent in runtime.agents():
                runtime.stop(agent)
    assert found["skipped"] == found["skipped in all"] == 2
    for step in (1, 2):
        assert any(f"step {step} skipped" in message and "arena" in message for message in found["said"])
    assert found["save"].startswith("SaveFailed")
    assert "arena" in found["save"]
    assert found["small"]
    assert steps(store) == [3]
