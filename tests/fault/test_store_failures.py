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
import torch
from harness.damage import assert_intact, steps
from harness.job import Job, Launch
from harness.programs import adam, network, save_three, state_digest
from harness.rank import Rank
from harness.runtime import Runtime, eventually, tmpfs

import ckptsvc
from ckptsvc.errors import CkptsvcError


def train_on_orders(rank: Rank, store: str, elements: int) -> list[str]:
    """Steps once for each order of the test, and says how each save ended.

    The order for step n is `go(n)`; after `go("end")` the next one ends the training.
    """
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


# ---- errors at every operation


class FaultyStore:
    """A store with a plan of faults (see harness/faulty_store)."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, f"faulty+file://{path}"

    def plan(self, *faults: dict[str, Any]) -> None:
        """From now on, these faults, counted anew."""
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.write_text(json.dumps(faults))
        fresh.rename(f"{self.path}.plan")

    def calls(self) -> list[str]:
        """Every call so far: "operation key"."""
        log = Path(f"{self.path}.calls")
        return [line.split(" ", 1)[1] for line in log.read_text().splitlines()] if log.exists() else []


VARIANTS: dict[str, dict[str, Any]] = {
    "fails once": {"error": "store", "retryable": False},
    "fails from here on": {"error": "store", "retryable": True, "times": 0},
    "passes when tried again": {"error": "store", "retryable": True},
    "is done and its answer lost": {"error": "store-unavailable", "lost": True},
}


def save_with_faults(rank: Rank, path: str) -> dict[str, Any]:
    """Saves once for each call of a save and each kind of fault in it; says how each save ended."""
    store = FaultyStore(Path(path))
    tensor = torch.zeros(1000)
    run = ckptsvc.attach({"tensor": tensor}, store=store.url, every="off", keep=2)

    def save() -> str:
        tensor.add_(1)
        run.step()
        try:
            run.save(wait=True)
        except CkptsvcError as error:
            return str(error)
        return ""

    for _ in range(3):
        assert save() == ""
    before = len(store.calls())
    assert save() == ""
    calls = store.calls()[before:]
    outcomes = []
    for variant, fault in VARIANTS.items():
        for number in range(1, len(calls) + 1):
            store.plan({**fault, "nth": number})
            why = save()
            committed = run.committed_step == run.steps_done
            store.plan()
            good = assert_intact(store.path)
            outcomes.append(
                {
                    "variant": variant,
                    "call": calls[number - 1],
                    "why": why,
                    "committed": committed,
                    "there": run.steps_done in good,
                    "older": bool(good),
                }
            )
        assert save() == ""
    run.close()
    return {"calls": calls, "outcomes": outcomes, "skipped": run.skipped}


def test_an_error_at_any_call_of_a_save_costs_at_most_that_save(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "run"
    (found,) = launch.plain(1, save_with_faults, str(path), CKPTSVC_STORE_RETRIES="1").results(120)
    kinds = {call.split()[0] for call in found["calls"]}
    assert kinds >= {"write", "put_if_absent", "read", "children", "list", "delete"}
    for outcome in found["outcomes"]:
        assert outcome["older"], outcome
        assert outcome["committed"] == outcome["there"], outcome
        assert outcome["committed"] != bool(outcome["why"]), outcome
        if outcome["why"]:
            assert "injected" in outcome["why"], outcome
        if "again" in outcome["variant"] or "lost" in outcome["variant"]:
            assert outcome["committed"], outcome
    assert found["skipped"] == 0
    assert any(outcome["why"] for outcome in found["outcomes"])


def restore_with_faults(rank: Rank, path: str) -> dict[str, Any]:
    """Restores once for each call of a restore and each kind of fault in it."""
    store = FaultyStore(Path(path))
    model = network(seed=1)
    optimizer = adam(model)
    run = ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store.url, every="off", resume=False)
    before = len(store.calls())
    assert run.restore() == 3
    calls = store.calls()[before:]
    outcomes = []
    for variant, fault in VARIANTS.items():
        for number in range(1, len(calls) + 1):
            store.plan({**fault, "nth": number})
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    restored: int | str = run.restore()
                except CkptsvcError as error:
                    restored = f"{type(error).__name__}: {error}"
            store.plan()
            outcomes.append(
                {
                    "variant": variant,
                    "call": calls[number - 1],
                    "restored": restored,
                    "said": [str(w.message) for w in said],
                    "state": state_digest(model, optimizer),
                }
            )
    assert run.restore() == 3
    run.close()
    return {"calls": calls, "outcomes": outcomes}


def test_an_error_at_any_call_of_a_restore_is_passed_over_or_said(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "run"
    (states,) = launch.plain(1, save_three, str(path)).results()
    (found,) = launch.plain(1, restore_with_faults, str(path), CKPTSVC_STORE_RETRIES="1").results(120)
    assert {call.split()[0] for call in found["calls"]} >= {"children", "read", "size", "read_into"}
    for outcome in found["outcomes"]:
        restored = outcome["restored"]
        if "again" in outcome["variant"] or "lost" in outcome["variant"]:
            assert (restored, outcome["said"]) == (3, []), outcome
        if isinstance(restored, int):
            assert outcome["state"] == states[restored - 1], outcome
            assert (restored == 3) == (outcome["said"] == []), outcome
        else:
            assert "injected" in restored, outcome
    assert {o["restored"] for o in found["outcomes"]} >= {2, 3}


def attach_and_look(rank: Rank, url: str) -> list[Any]:
    """Restores what can be restored: the step, and the state."""
    rank.join()
    model = network(seed=1)
    optimizer = adam(model)
    with ckptsvc.attach({"model": model, "optimizer": optimizer}, store=url, every="off") as run:
        return [run.steps_done, state_digest(model, optimizer)]


@pytest.mark.parametrize("fault", [{"op": "read_into", "nth": 2}, {"op": "size"}], ids=["shards", "index"])
def test_ranks_pass_over_what_one_of_them_cannot_read(launch: Launch, tmp_path: Path, fault: dict[str, Any]) -> None:
    store = FaultyStore(tmp_path / "run")
    states, _ = launch.plain(2, save_three, str(store.path)).results()
    store.plan({**fault, "key": "step-000000000003*", "error": "store", "retryable": False, "times": 0})
    job = launch.plain(2, attach_and_look, store.url)
    assert job.results() == [[2, states[1]]] * 2
    assert "cannot restore step 3" in job.output()


# ---- silence


def test_a_store_that_hangs_holds_up_neither_the_agent_nor_the_training(
    launch: Launch, runtime: Runtime, tmp_path: Path
) -> None:
    store = FaultyStore(tmp_path / "run")
    with launch.plain(1, train_beside_a_hang, store.url) as job:
        job.wait_for("saved", step=1)
        store.plan({"op": "write", "hang": True, "times": 0})
        job.go("hang")
        # With two arenas, steps 2 and 3 are staged; step 4 finds none free and is skipped; the loop goes on.
        line = job.wait_for("stepped", step=4)
        assert line["skipped"] == 1
        began = time.monotonic()
        status = runtime.status()
        assert time.monotonic() - began < 2
        assert {a["state"] for a in status["arenas"]} == {"staged"}
        assert status["coordinates"][0]["running_saves"] == [2, 3]
        assert steps(store.path) == [1]
        Path(f"{store.path}.release").touch()
        job.go("released")
        (result,) = job.results()
    assert result["skipped"] == 1
    assert any("step 4 skipped" in message for message in result["said"])
    assert assert_intact(store.path) == [5, 3, 2, 1]


def train_beside_a_hang(rank: Rank, url: str) -> dict[str, Any]:
    """Saves at every step, of which three come while the store hangs."""
    tensor = torch.zeros(1000)
    run = ckptsvc.attach({"tensor": tensor}, store=url, every=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(1, 6):
            if step == 2:
                rank.until("hang")
            if step == 5:
                rank.until("released")
                eventually(lambda: run.committed_step == 3, "the saves that hung to be committed")
            tensor += 1
            run.step()
            if step == 1:
                run.wait()
                rank.report("saved", step=1)
            rank.report("stepped", step=step, skipped=run.skipped)
    run.wait()
    run.close()
    return {"skipped": run.skipped, "said": [str(w.message) for w in said]}
