"""Single files: plain, DDP, legacy, Lightning, an optimizer of a trainer; read, written, and read by torch."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.truth import check_model, check_optimizer, load, same, tensor, written

from ckptsvc.errors import CkptsvcError, InvalidInput, LayoutError
from ckptsvc.interop.formats import exporter, open_foreign

Foreign = Callable[[str], Path]


@pytest.fixture
def names(foreign: Foreign, tmp_path: Path) -> Path:
    groups = load(foreign("ddp_plain-w2"))["groups"]
    path = tmp_path / "names"
    path.write_text("\n\n".join("\n".join(group["names"]) for group in groups))
    return path


@pytest.mark.parametrize(
    ("fixture", "file"),
    [("ddp_plain-w2", "checkpoint.pth"), ("ddp_plain-w2", "checkpoint_legacy.pth"), ("oracle", "ckpt.pt")],
)
def test_a_file_of_torch_save_holds_the_truth(foreign: Foreign, names: Path, fixture: str, file: str) -> None:
    logical = open_foreign(f"torch:{foreign(fixture) / file}", {"names": str(names)})
    check_model(logical, load(foreign(fixture)))
    check_optimizer(logical, load(foreign(fixture)))
    assert logical.step == 5
    assert logical.aliases == {"model/lm_head.weight": "model/tok_emb.weight"}


def test_a_lightning_file_holds_the_truth(foreign: Foreign, names: Path) -> None:
    path = foreign("lightning-ddp_w2")
    logical = open_foreign(str(path / "last.ckpt"), {"names": str(names), "strip": "net."})
    check_model(logical, load(path))
    check_optimizer(logical, load(path))
    assert logical.document()["hyper_parameters"] == {"d": 18, "note": "tiny"}


def test_without_names_the_state_keeps_its_numbers_and_says_so(foreign: Foreign) -> None:
    logical = open_foreign(f"torch:{foreign('ddp_plain-w2') / 'checkpoint.pth'}")
    assert "optimizer/state/0/exp_avg" in logical.names()
    assert any("names=FILE" in note.what for note in logical.notes)


def test_names_in_another_order_are_refused_by_shape(foreign: Foreign, names: Path) -> None:
    lines = names.read_text().splitlines()
    shuffled = [line for line in lines if line]
    random.Random(1).shuffle(shuffled)
    names.write_text("\n".join(shuffled))
    with pytest.raises(LayoutError, match="another order"):
        open_foreign(f"torch:{foreign('ddp_plain-w2') / 'checkpoint.pth'}", {"names": str(names)})
    names.write_text("\n".join(shuffled[:-1]))
    with pytest.raises(LayoutError, match="53 parameters"):
        open_foreign(f"torch:{foreign('ddp_plain-w2') / 'checkpoint.pth'}", {"names": str(names)})


def test_torch_loads_what_was_written_from_what_torch_wrote(foreign: Foreign, names: Path, tmp_path: Path) -> None:
    source = foreign("ddp_plain-w2") / "checkpoint.pth"
    logical = open_foreign(f"torch:{source}", {"names": str(names)})
    output = exporter("torch")(logical, {})
    back = torch.load(written(output, logical, tmp_path / "out") / "checkpoint.pt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        original = torch.load(source, weights_only=True)
    assert {f"module.{name}" for name in back["model"]} == set(original["model"])
    assert all(same(value, original["model"][f"module.{name}"]) for name, value in back["model"].items())
    assert back["model"]["lm_head.weight"].data_ptr() == back["model"]["tok_emb.weight"].data_ptr()
    assert set(back["optimizer"]["state"]) == set(original["optimizer"]["state"])
    for number, entries in original["optimizer"]["state"].items():
        assert all(same(back["optimizer"]["state"][number][slot], value) for slot, value in entries.items())
    for ours, theirs in zip(back["optimizer"]["param_groups"], original["optimizer"]["param_groups"], strict=True):
        assert {k: v for k, v in ours.items() if k != "param_names"} == theirs
    assert back["scheduler"] == original["scheduler"]


def test_a_lightning_file_goes_round(foreign: Foreign, tmp_path: Path) -> None:
    logical = open_foreign(f"torch:{foreign('lightning-ddp_w2') / 'last.ckpt'}")
    output = exporter("torch")(logical, {"form": "lightning", "file": "last.ckpt"})
    back = torch.load(written(output, logical, tmp_path) / "last.ckpt", weights_only=True)
    original = torch.load(foreign("lightning-ddp_w2") / "last.ckpt", weights_only=True)
    assert set(back) == set(original)
    assert back["global_step"] == 5
    assert {f"net.{n}" for n in load(foreign("lightning-ddp_w2"))["params"]} <= set(back["state_dict"])
    assert set(back["state_dict"]) == set(original["state_dict"])
    assert back["loops"] == original["loops"]


def test_bare_state_dicts_and_odd_keys(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "bare.pt")
    assert open_foreign(f"torch:{tmp_path / 'bare.pt'}").names() == ["model/w"]
    torch.save({"net": {"w": torch.ones(2)}, "ema": [torch.zeros(3)]}, tmp_path / "odd.pt")
    with pytest.raises(InvalidInput, match="model=KEY"):
        open_foreign(f"torch:{tmp_path / 'odd.pt'}")
    logical = open_foreign(f"torch:{tmp_path / 'odd.pt'}", {"model": "net"})
    assert logical.names() == ["ema/0", "model/w"]
    assert torch.equal(tensor(logical, "ema/0"), torch.zeros(3))
    with pytest.raises(InvalidInput, match="did you mean 'model'"):
        open_foreign(f"torch:{tmp_path / 'odd.pt'}", {"mode": "net"})


def test_an_optimizer_that_names_its_parameters_needs_no_list(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    logical = open_foreign(f"torch:{tmp_path / 'x.pt'}")
    assert same(tensor(logical, "optimizer/state/1.weight/exp_avg"), optimizer.state[model[1].weight]["exp_avg"])


def test_broken_files_raise_errors_of_ours_only(foreign: Foreign, tmp_path: Path) -> None:
    whole = (foreign("ddp_plain-w2") / "checkpoint.pth").read_bytes()
    rng = random.Random(5)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(40_000) % len(data)] ^= (
                rng.randrange(1, 256)
            )
        (tmp_path / "x.pt").write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            logical: Any = open_foreign(f"torch:{tmp_path / 'x.pt'}")
            for name in logical.names():
                tensor(logical, name)
        except CkptsvcError:
            pass
