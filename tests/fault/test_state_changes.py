"""A state tree that changes between saves, and objects that cannot be stored."""

import warnings
from pathlib import Path
from typing import Any

import torch
from harness.damage import steps
from harness.job import Launch
from harness.programs import adam, network, state_digest, train_step
from harness.rank import Rank

import ckptsvc
from ckptsvc.errors import CkptsvcError


def grow(rank: Rank, store: str) -> list[dict[str, str]]:
    """Saves steps 1 and 2, adds a layer to the model and to the optimizer, saves steps 3 and 4."""
    rank.join()
    model = network()
    optimizer = adam(model)
    states = []
    with ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every=1) as run:
        for step in range(4):
            if step == 2:
                torch.manual_seed(5)
                model.append(torch.nn.Linear(3, 3))
                optimizer.add_param_group({"params": list(model[-1].parameters()), "lr": 0.5})
            train_step(model, optimizer, step)
            run.step()
            assert run.wait()
            states.append(state_digest(model, optimizer))
        assert run.skipped == 0
    return states


def restore_both(rank: Rank, store: str) -> dict[str, Any]:
    """Restores the run into a model without, and into one with the added layer."""
    found: dict[str, Any] = {}
    small = network(seed=1)
    optimizer = adam(small)
    tree = {"model": small, "optimizer": optimizer}
    try:
        ckptsvc.attach(tree, store=store)
    except CkptsvcError as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    with ckptsvc.attach(tree, store=store, resume=False, every="off") as run:
        run.restore(step=2)
        found["small"] = state_digest(small, optimizer)
    large = network(seed=1).append(torch.nn.Linear(3, 3))
    optimizer = adam(large[:-1])
    optimizer.add_param_group({"params": list(large[-1].parameters()), "lr": 0.1})
    with ckptsvc.attach({"model": large, "optimizer": optimizer}, store=store, every="off") as run:
        found["step"] = run.steps_done
        found["large"] = state_digest(large, optimizer)
        found["rates"] = [group["lr"] for group in optimizer.param_groups]
    return found


def test_a_parameter_that_is_added_is_saved_from_then_on(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    states, same = launch.plain(2, grow, str(store)).results()
    assert states == same
    assert steps(store) == [4, 3, 2, 1]
    assert "model/7.weight" in states[2].keys() - states[1].keys()
    (found,) = launch.plain(1, restore_both, str(store)).results()
    assert found["refused"].startswith("LayoutError")
    assert "model/7.weight" in found["refused"]
    assert found["step"] == 4
    assert found["small"] == states[1]
    assert found["large"] == states[3]
    assert found["rates"] == [0.01, 0.5]


class Opaque:
    """An object that nobody can store."""


def meet_opaque(rank: Rank, store: str) -> dict[str, Any]:
    """Trains with a tree that holds an opaque object at the start, and another at step 2 on rank 0."""
    if rank.world > 1:
        rank.join()
    found: dict[str, Any] = {}
    tensor = torch.zeros(100)
    tree: dict[str, Any] = {"tensor": tensor, "extras": {"note": Opaque()}}
    if rank.world == 1:
        try:
            ckptsvc.attach(tree, store=store)
        except CkptsvcError as error:
            found["refused"] = f"{type(error).__name__}: {error}"
    del tree["extras"]["note"]
    with ckptsvc.attach(tree, store=store, every=1) as run:
        for step in range(1, 4):
            tensor += 1
            if rank.number == 0:
                tree["extras"] = {"note": Opaque()} if step == 2 else {}
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                run.step()
                try:
                    run.wait()
                except CkptsvcError as error:
                    found["wait"] = str(error)
            if said:
                found["said"] = [str(w.message) for w in said]
            if step == 2 and rank.world == 1:
                try:
                    run.save()
                except CkptsvcError as error:
                    found["save"] = f"{type(error).__name__}: {error}"
        found["skipped"] = run.skipped
    return found


def test_an_object_that_cannot_be_stored_is_refused_by_path_and_type(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    (found,) = launch.plain(1, meet_opaque, str(store)).results()
    for words in (found["refused"], found["save"], *found["said"]):
        assert "/extras/note" in words
        assert "Opaque" in words
    assert found["refused"].startswith("UnsupportedObject")
    assert found["save"].startswith("UnsupportedObject")
    assert found["skipped"] == 1
    assert steps(store) == [3, 1]


def test_the_other_ranks_do_not_wait_for_the_one_that_cannot_store_its_object(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    first, second = launch.plain(2, meet_opaque, str(store)).results()
    assert (first["skipped"], second["skipped"]) == (1, 0)
    assert any("/extras/note" in message for message in first["said"])
    assert "rank 0" in second["wait"]
    assert "/extras/note" in second["wait"]
    assert steps(store) == [3, 1]
