"""What a person can ask of a session: when to save, to wait, to go back, to keep, to look."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from harness.damage import steps
from harness.job import Launch
from harness.rank import Rank
from harness.runtime import eventually

import ckptsvc
from ckptsvc.errors import CkptsvcError


def save_and_go_back(rank: Rank, store: str) -> dict[str, Any]:
    """Saves at 2 and 4 by hand, goes back to 2 and on to 3, saves there; keeps the values of every stop."""
    tensor = torch.zeros(5)
    tree = {"tensor": tensor, "note": "start", "nested": {"list": [1, 2.5, None, True, "ü", b"\x00"], "pair": (1, 2)}}
    found: dict[str, Any] = {"errors": []}
    with ckptsvc.attach(tree, store=store, every="off") as run:
        found["before"] = (run.committed_step, run.wait())
        for step in range(1, 5):
            tensor += 1
            tree["note"] = f"step {step}"
            run.step()
            if step in (2, 4):
                found[f"saved {step}"] = run.save(wait=True)
                found[f"blocked {step}"] = 0 < run.last_blocked < 5
        found["committed"] = run.committed_step
        found["back to"] = run.restore(step=2)
        found["then"] = (run.steps_done, tensor.tolist(), run.state["note"], run.state["nested"] == tree["nested"])
        tensor += 10
        tree["note"] = "another way"
        run.step()
        run.save(wait=True)
        found["newest"] = (run.restore(), tensor.tolist(), run.state["note"])
        for step in (1, 99):
            try:
                run.restore(step=step)
            except CkptsvcError as error:
                found["errors"].append(type(error).__name__)
    loaded = ckptsvc.load(store)
    found["loaded"] = (loaded["tensor"].tolist(), loaded["note"], loaded["nested"] == tree["nested"])
    found["only"] = ckptsvc.load(store, step=4, only="nothing*")["tensor"]
    with ckptsvc.attach(tree, store=store, resume=False, every="off") as run:
        found["afresh"] = (run.steps_done, run.restored_from)
    try:
        ckptsvc.load(f"{store}-that-is-not-there")
    except CkptsvcError as error:
        found["errors"].append(type(error).__name__)
    return found


def test_saving_and_going_back_by_hand(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    (found,) = launch.plain(1, save_and_go_back, str(store)).results()
    assert found["before"] == [None, False]
    assert found["saved 2"]
    assert found["saved 4"]
    assert found["blocked 2"]
    assert found["committed"] == 4
    assert found["back to"] == 2
    assert found["then"] == [2, [2.0] * 5, "step 2", True]
    # The step that was taken after going back is newer than those of the way that was left.
    assert found["newest"] == [3, [12.0] * 5, "another way"]
    assert found["loaded"] == [[12.0] * 5, "another way", True]
    assert found["only"] is None
    assert found["afresh"] == [0, None]
    assert found["errors"] == ["NoCheckpoint", "NoCheckpoint", "NoCheckpoint"]
    assert sorted(steps(store)) == [2, 3, 4]


def train_by_the_clock(rank: Rank, store: str, seconds: float) -> dict[str, Any]:
    """Saves every second, keeps two; the ranks go at different speeds."""
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(5)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="1s", keep=2)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        while time.monotonic() - began < seconds or run.steps_done % 10:
            tensor += 1
            time.sleep(0.01)
            run.step()
            if rank.world > 1 and run.steps_done % 10 == 0:
                # Ranks of a training are in step with each other.
                enough = torch.tensor([float(time.monotonic() - began < seconds)])
                torch.distributed.broadcast(enough, 0)
                if not enough:
                    break
    eventually(lambda: run.committed_step is not None, "a save by the clock")
    run.close()
    return {"skipped": run.skipped, "said": [str(w.message) for w in said]}


def test_saves_by_the_clock_are_at_the_same_step_on_every_rank(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    job = launch.plain(2, train_by_the_clock, str(store), 5.0)
    for found in job.results():
        assert found == {"skipped": 0, "said": []}
    eventually(lambda: len(steps(store)) == 2, "all but two to be removed")
    assert job.output().strip() == ""
