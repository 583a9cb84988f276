"""Checkpoints of torch.distributed.checkpoint, read and written; torch itself writes and loads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.logicals import compare, render, tensor
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ckptsvc.interop.formats import exporter, open_foreign
from ckptsvc.interop.logical import Logical

REAL = ("dcp-ddp_w4", "dcp-fsdp2_w4", "dcp-tp_w2")


class Model(nn.Module):
    """Tied weights, a frozen parameter, buffers of several types, a 0-d parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(13, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.lm_head = nn.Linear(6, 13, bias=False)
        self.lm_head.weight = self.tok_emb.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(self.tok_emb(tokens)) * self.scale)


def job(seed: int = 0, steps: int = 2) -> tuple[Model, torch.optim.Optimizer]:
    """A model and its optimizer after some steps; none leaves the optimizer empty."""
    torch.manual_seed(seed)
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01
    )
    for _ in range(steps):
        tokens = torch.randint(13, (5,))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state(model: Model, optimizer: torch.optim.Optimizer, *, flat: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optim": moments}


def truth(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Gathered from the live objects, as the fixtures' truth is."""
    names = {id(p): name for name, p in model.named_parameters()}
    params = {
        names[id(p)]: {"param": p.detach(), **{k: float(v) if k == "step" else v for k, v in values.items()}}
        for p, values in optimizer.state.items()
    }
    return {
        "params": params,
        "frozen": {n: p for n, p in model.named_parameters() if not p.requires_grad},
        "buffers": dict(model.named_buffers()),
        "groups": [{**g, "names": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def exported(logical: Logical, folder: Path, **options: str) -> Path:
    render(exporter("dcp")(logical, options), logical, folder)
    return folder


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_are_read_bit_for_bit(foreign: Callable[[str], Path], name: str) -> None:
    folder = foreign(name)
    logical = open_foreign(str(folder / "ckpt"))
    assert compare(logical, torch.load(folder / "truth.pt", weights_only=True)) == {"train/rng"}
    assert logical.aliases == {"model/lm_head.weight": "model/tok_emb.weight"}
    assert logical.step == 5
    assert [note.kind for note in logical.notes] == ["warning"]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("options", [{}, {"flatten": "true", "files": "3", "chunk": "500"}])
def test_what_is_read_is_written_and_read_again(
    foreign: Callable[[str], Path], tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    folder = foreign(name)
    first = open_foreign(f"dcp:{folder / 'ckpt'}")
    second = open_foreign(str(exported(first, tmp_path / "again", **options)))
    assert compare(second, torch.load(folder / "truth.pt", weights_only=True)) == {"train/rng"}
    assert second.aliases == first.aliases
    assert second.notes == []
    assert torch.equal(tensor(first, "train/rng"), tensor(second, "train/rng"))
    assert first.document()["train"] == second.document()["train"]


@pytest.mark.parametrize("flat", [False, True])
def test_torch_loads_what_is_written(tmp_path: Path, flat: bool) -> None:
    model, optimizer = job()
    dcp.save(state(model, optimizer), checkpoint_id=tmp_path / "torch", no_dist=True)
    logical = open_foreign(f"dcp:{tmp_path / 'torch'}")
    compare(logical, truth(model, optimizer))
    exported(logical, tmp_path / "ours", flatten=str(flat).lower(), files="2", chunk="100")
    other, fresh = job(seed=1, steps=1)
    template = state(other, fresh, flat=flat)
    dcp.load(template, checkpoint_id=tmp_path / "ours", no_dist=True)
    set_state_dict(other, fresh, model_state_dict=template["model"], optim_state_dict=template["optim"],
                   options=StateDictOptions(flatten_optimizer_state_dict=flat))  # fmt: skip
    assert equal(state(other, fresh), state(model, optimizer))
    dcp_to_torch_save(tmp_path / "ours", tmp_path / "one.pt")
    assert equal(torch.load(tmp_path / "one.pt", weights_only=True), template)
    assert other.lm_head.weight is other.tok_emb.weight
