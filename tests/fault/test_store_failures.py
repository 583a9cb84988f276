"""A store that is full, read-only, broken or silent: training goes on, what is committed stays, the report says it."""

import contextlib
import errno
import itertools
import json
import os
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.damage import checkpoints, steps
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually, tmpfs

from ckptsvc.errors import CkptsvcError
from ckptsvc.pipeline.catalog import Ref, find, open_checkpoint
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import connect


def assert_intact(store: Path) -> list[int]:
    """Every committed checkpoint verifies; returns their steps, newest first."""
    opened = connect(str(store))
    for ref, commit in find(opened):
        assert not isinstance(commit, Exception), f"{ref}: {commit}"
        assert verify_checkpoint(open_checkpoint(opened, ref, commit)) == []
    return steps(store)


def train_on_orders(rank: Rank, store: str, elements: int) -> list[str]:
    """Steps once for each order of the test, and says how each save ended.

    The order for step n is `go(n)`; after `go("end")` the next one ends the training.
    """
    import ckptsvc
    import torch

    tensor = torch.zeros(elements)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    said = []
    for number in itertools.count(run.steps_done + 1):
        rank.until(str(number))
        if (rank.folder / "go-end").exists():
            break
        tensor += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run.step()
                run.save(wait=True, timeout=20)
                outcome = "committed"
            except CkptsvcError as error:
                outcome = f"{type(error).__name__}: {error}"
        said += [str(w.message) for w in caught]
        rank.report("saved", step=run.steps_done, outcome=outcome, value=tensor[0].item())
    run.close()
    return said


class Training:
    """A job of `train_on_orders`, and how its saves end."""

    def __init__(self, job: Job, step: int = 0) -> None:
        self.job, self._step = job, step

    def save(self) -> str:
        """One step and one save; returns its outcome."""
        self._step += 1
        self.job.go(str(self._step))
        outcome: str = self.job.wait_for("saved", step=self._step)["outcome"]
        return outcome

    def end(self) -> list[str]:
        """Ends the training in good order; returns the warnings the program got."""
        self.job.go("end")
        self.job.go(str(self._step + 1))
        (said,) = self.job.results()
        return list(said)


@contextlib.contextmanager
def training(
    launch: Launch, store: str, elements: int = 1000, *, begins_at: int = 0, **environ: str
) -> Iterator[Training]:
    """A training that is killed if the test fails."""
    with launch.plain(1, train_on_orders, store, elements, **environ) as job:
        yield Training(job, begins_at)


def test_a_full_store_costs_the_save_and_nothing_else(launch: Launch, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "10m") as mount:
        store = mount / "run"
        with training(launch, str(store), 750_000) as job:  # 3 MB
            assert job.save() == "committed"
            assert job.save() == "committed"
            ballast = mount / "ballast"
            free = os.statvfs(mount)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - (1 << 20)))
            outcome = job.save()
            assert outcome.startswith("SaveFailed"), outcome
            assert "space" in outcome
            assert job.save().startswith("SaveFailed")
            assert assert_intact(store) == [2, 1]
            ballast.unlink()
            assert job.save() == "committed"
            assert assert_intact(store)[0] == 5
            job.end()


def test_a_store_that_turns_read_only_costs_the_save_and_nothing_else(launch: Launch, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "10m") as mount:
        store = mount / "run"
        with training(launch, str(store)) as job:
            assert job.save() == "committed"
            subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
            outcome = job.save()
            assert outcome.startswith("SaveFailed"), outcome
            assert os.strerror(errno.EROFS).lower() in outcome.lower()
            assert assert_intact(store) == [1]
            subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
            assert job.save() == "committed"
            assert assert_intact(store) == [3, 1]
            job.end()


def test_a_run_in_a_read_only_store_can_be_restored_and_trained_on(launch: Launch, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "10m") as mount:
        store = mount / "run"
        with training(launch, str(store)) as job:
            assert job.save() == "committed"
            job.end()
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        with training(launch, str(store), begins_at=1) as job:
            outcome = job.save()
            assert outcome.startswith("SaveFailed"), outcome
            assert "read-only" in outcome.lower()
            assert job.job.reports("saved")[-1]["value"] == 2.0  # restored, and one step on
            job.end()
        assert assert_intact(store) == [1]
