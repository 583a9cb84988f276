"""Jobs that begin from another framework's checkpoint, which is read as it lies."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.job import Launch
from harness.programs import adam, differences, network, state_digest, train_step
from harness.rank import Rank
from safetensors.torch import save_model
from torch.distributed.fsdp import fully_shard

import ckptsvc
from ckptsvc.errors import CkptsvcError


def saved_by_torch(path: Path) -> dict[str, Any]:
    """A training of three steps, saved as people do; returns its state and its next losses."""
    model = network()
    optimizer = adam(model)
    for step in range(3):
        train_step(model, optimizer, step)
    torch.save({"step": 3, "net": model.state_dict(), "optimizer": optimizer.state_dict()}, path / "x.pt")
    save_model(model, path / "model.safetensors")
    state = state_digest(model, optimizer)
    torch.manual_seed(7)
    return {"state": state, "losses": [train_step(model, optimizer, step) for step in (3, 4, 5)]}


def begin(rank: Rank, store: str, address: str, sharded: bool) -> dict[str, Any]:
    """Attaches under keys of its own, with things that the foreign checkpoint does not have."""
    if rank.world > 1:
        rank.join()
    model = network(seed=99)
    if sharded:
        fully_shard(model)
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    tree = {"network": model, "adam": optimizer, "scheduler": scheduler, "best": 0.5}
    with ckptsvc.attach(tree, store=store, every="off", init_from=address) as run:
        found: dict[str, Any] = {"state": state_digest(model, optimizer), "step": run.steps_done}
        found["from"] = run.restored_from
        if not sharded:
            torch.manual_seed(7)
            found["losses"] = [train_step(model, optimizer, step) for step in (3, 4, 5)]
        run.step()
        run.save(wait=True)
    return found


def test_a_job_goes_on_from_a_file_of_torch_in_another_layout(launch: Launch, tmp_path: Path) -> None:
    expected = saved_by_torch(tmp_path)
    address = f"torch:{tmp_path / 'x.pt'}?model=net"
    [alone] = launch.plain(1, begin, str(tmp_path / "run1"), address, False).results()
    assert (alone["step"], alone["from"]) == (3, address)
    assert differences(alone["state"], expected["state"]) == []
    # the processes have other numbers of threads
    assert alone["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for rank in launch.plain(2, begin, str(tmp_path / "run2"), address, True).results():
        assert differences(rank["state"], expected["state"]) == []
    [again] = launch.plain(1, begin, str(tmp_path / "run2"), address, False).results()
    assert (again["from"], again["step"]) == ("store", 4)  # the run's own checkpoint comes first


def test_weights_alone_leave_the_optimizer_as_it_is(launch: Launch, tmp_path: Path) -> None:
    expected = saved_by_torch(tmp_path)
    [rank] = launch.plain(1, begin, str(tmp_path / "run"), f"hf:{tmp_path}", False).results()
    wanted = {name: value for name, value in expected["state"].items() if name.startswith("model/")}
    assert differences(rank["state"], wanted) == []
    assert rank["step"] == 0


def attach_others(rank: Rank, folder: str) -> dict[str, Any]:
    """A model in another precision, and models that are not the one that was saved."""
    truth = torch.load(Path(folder) / "x.pt", weights_only=True)["net"]
    low = network(seed=5).to(torch.bfloat16)
    others = {
        "longer": torch.nn.Sequential(*network(), torch.nn.Linear(3, 3)),
        "shorter": torch.nn.Sequential(*list(network())[:-1]),
        "low": low,
    }
    found: dict[str, Any] = {}
    for name, model in others.items():
        for kind in ("hf", "hug"):
            try:
                store = f"{folder}/{name}-{kind}"
                ckptsvc.attach({"model": model}, store=store, every="off", init_from=f"{kind}:{folder}").close()
            except CkptsvcError as error:
                found[f"{name} {kind}"] = f"{error.code}: {error}"
    found["cast"] = all(torch.equal(value, truth[name].to(value.dtype)) for name, value in low.state_dict().items())
    return found


def test_another_precision_is_cast_and_another_model_refused(launch: Launch, tmp_path: Path) -> None:
    saved_by_torch(tmp_path)
    [found] = launch.plain(1, attach_others, str(tmp_path)).results()
    assert found["cast"] is True
    assert "low hf" not in found
    assert re.match(r"layout: .*/model/7.weight.* in the state tree and not in hf:|layout: 2 names", found["longer hf"])
    assert "/model/7.weight" in found["longer hf"]
    assert found["shorter hf"].startswith("layout:")
    assert "not in the state tree: /model/6." in found["shorter hf"]
    assert all("is no format" in found[f"{name} hug"] for name in ("longer", "shorter", "low"))


def test_load_reads_foreign_checkpoints(tmp_path: Path) -> None:
    saved_by_torch(tmp_path)
    saved = tmp_path
    tree = ckptsvc.load(f"torch:{saved / 'x.pt'}?model=net")
    truth = torch.load(saved / "x.pt", weights_only=True)
    assert set(tree["model"]) == set(truth["net"])
    assert all(torch.equal(tree["model"][name], value) for name, value in truth["net"].items())
    assert torch.equal(tree["optimizer"]["state"][0]["exp_avg"], truth["optimizer"]["state"][0]["exp_avg"])
    only = ckptsvc.load(f"hf:{saved}", only="model/0.*")
    assert set(only["model"]) == {"0.weight", "0.bias"}
