"""DCP checkpoints of jobs of several ranks, written by torch in every way it has, and ours loaded by such jobs.

The truth is gathered with DTensor.full_tensor() from the live job, which knows nothing of DCP. No dimension divides
evenly everywhere: there are uneven, empty and interleaved shards.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.job import Launch
from harness.logicals import compare, render, tensor
from harness.rank import Rank
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptsvc.errors import LayoutError
from ckptsvc.interop.formats import exporter, open_foreign

MATRICES = {"0.weight", "2.weight", "4.weight"}
WRAPPER = "_fsdp_wrapped_module."
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build(layout: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model in a layout, and its optimizer with two groups."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 14), nn.ReLU(), nn.Linear(14, 5), nn.LayerNorm(5), nn.Linear(5, 1))
    model.register_buffer("seen", torch.arange(3))
    world = torch.distributed.get_world_size()
    if layout == "fsdp":
        fully_shard(model[0])
        fully_shard(model)
    elif layout == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        model = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, sharding_strategy=ShardingStrategy.FULL_SHARD
        )
    elif layout in {"tp", "2d"}:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if layout == "2d":  # dimension 0 of the first layer is cut twice: interleaved shards
            fully_shard(model, mesh=mesh["dp"])
    groups = [{"params": [p for name, p in model.named_parameters() if (name[-8:] in MATRICES) is matrix],
               "weight_decay": 0.1 if matrix else 0.0} for matrix in (True, False)]  # fmt: skip
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_first(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same for FSDP-1, where every rank has a flat part of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    mine = {names[id(p)]: {key: v.reshape(-1) for key, v in s.items()} for p, s in optimizer.state.items()}
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    found: dict[str, Any] = {"frozen": {}, "buffers": dict(model.module.named_buffers()), "params": {}}
    found["groups"] = [
        {**g, "names": [names[id(p)].removeprefix(WRAPPER) for p in g["params"]], "params": ()}
        for g in optimizer.param_groups
    ]
    with model.summon_full_params(model):
        for name, p in model.module.named_parameters():
            of = [part[WRAPPER + name] for part in parts if WRAPPER + name in part]
            found["params"][name] = {"param": p.detach().clone(), "step": float(of[0]["step"])}
            for key in ("exp_avg", "exp_avg_sq"):
                found["params"][name][key] = torch.cat([part[key] for part in of]).reshape(p.shape)
    return found


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "params": {
            names[id(p)]: {
                "param": whole(p.detach()),
                **{k: float(v) if k == "step" else whole(v) for k, v in s.items()},
            }
            for p, s in optimizer.state.items()
        },
        "frozen": {},
        "buffers": dict(model.named_buffers()),
        "groups": [
            {"names": [names[id(p)] for p in g["params"]], **{k: g[k] for k in ("lr", "weight_decay", "betas")}}
            for g in optimizer.param_groups
        ],
    }


def save(rank: Rank, folder: str, layout: str, variants: list[str]) -> None:
    """Trains and saves in every one of the variants."""
    rank.join()
    model, optimizer = build(layout)
    train(model, optimizer, 3)
    truth = (gather_first if layout == "fsdp1" else gather)(model, optimizer)
    if rank.number == 0:
        torch.save(truth, f"{folder}/truth.pt")
    for variant in variants:
        options = FLAT if variant == "flat" else None
        weights, moments = get_state_dict(model, optimizer, options=options)
        state, target, how = {"model": weights, "optim": moments, "at": {"step": 3}}, f"{folder}/{variant}", {}
        if variant == "local":
            how = {"use_collectives": False}
        elif variant == "safetensors":
            how["storage_writer"] = dcp.FileSystemWriter(
                target, serialization_format=dcp.filesystem.SerializationFormat.SAFETENSORS
            )
        elif variant == "huggingface":
            state, how["storage_writer"] = weights, dcp.HuggingFaceStorageWriter(target, save_distributed=True)
        elif variant == "many":
            how["storage_writer"] = dcp.FileSystemWriter(target, single_file_per_rank=False)
        dcp.save(state, **how if "storage_writer" in how else {"checkpoint_id": target, **how})


def load(rank: Rank, folder: str, layout: str, flat: bool) -> bool:
    """Loads a checkpoint with dcp.load into a job; whether everything is as it was saved."""
    rank.join()
    model, optimizer = build(layout, seed=1)
    train(model, optimizer, 1)
    options = FLAT if flat else StateDictOptions()
    weights, moments = get_state_dict(model, optimizer, options=options)
    state = {"model": weights, "optim": moments, "at": {"step": 0}}
    dcp.load(state, checkpoint_id=f"{folder}/ours")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    truth, found = torch.load(f"{folder}/truth.pt", weights_only=True), gather(model, optimizer)
    for name, values in truth["params"].items():
        assert found["params"][name].keys() == values.keys()
        assert all(
            torch.equal(torch.as_tensor(found["params"][name][k]), torch.as_tensor(v)) for k, v in values.items()
        )
    assert found["groups"] == truth["groups"]
    assert torch.equal(found["buffers"]["seen"], truth["buffers"]["seen"])
    return bool(state["at"] == {"step": 3})


def test_every_way_to_write_fully_sharded_state_is_read(launch: Launch, tmp_path: Path) -> None:
    variants = ["plain", "flat", "local", "safetensors", "many", "huggingface"]
    launch.plain(4, save, str(tmp_path), "fsdp", variants).results()
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)
    for variant in variants[:-1]:
        logical = open_foreign(str(tmp_path / variant))
        assert compare(logical, truth) == set(), variant
        assert (logical.origin.split(":")[0], logical.step) == ("dcp", 3)
    shards = open_foreign(str(tmp_path / "huggingface"))
    for name, values in truth["params"].items():
        assert torch.equal(tensor(shards, f"model/{name}"), values["param"])
    logical = open_foreign(str(tmp_path / "plain"))
    for flat in (False, True):
        render(
            exporter("dcp")(logical, {"flatten": str(flat).lower(), "files": "3", "chunk": "64"}),
            logical,
            tmp_path / "ours",
        )
        assert launch.plain(2, load, str(tmp_path), "fsdp", flat).results() == [True] * 2

    (tmp_path / "local" / "__2.metadata").unlink()
    with pytest.raises(LayoutError, match=r"no region has .*missing"):
        open_foreign(str(tmp_path / "local"))


@pytest.mark.slow
def test_interleaved_shards_of_two_dimensions_are_read(launch: Launch, tmp_path: Path) -> None:
    launch.plain(4, save, str(tmp_path), "2d", ["plain"]).results()
    logical = open_foreign(str(tmp_path / "plain"))
    assert compare(logical, torch.load(tmp_path / "truth.pt", weights_only=True)) == set()
    render(exporter("dcp")(logical, {}), logical, tmp_path / "ours")
    assert launch.plain(2, load, str(tmp_path), "tp", False).results() == [True] * 2


def test_state_of_the_first_fsdp_is_read(launch: Launch, tmp_path: Path) -> None:
    launch.plain(2, save, str(tmp_path), "fsdp1", ["plain"]).results()
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)
    assert compare(open_foreign(str(tmp_path / "plain")), truth) == set()


def pipeline(rank: Rank, folder: str) -> None:
    """Each rank has some layers of its own, and one of them writes the parameter groups."""
    rank.join()
    torch.manual_seed(rank.number)
    layers = [0, 1] if rank.number == 0 else [2, 3, 4]
    model = nn.Sequential(OrderedDict((str(i), nn.Linear(3, 3) if i < 4 else nn.LayerNorm(3)) for i in layers))
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is matrix], "lr": 0.1 if matrix else 0.2}
              for matrix in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        model(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
    truth = gather(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    torch.save(truth, f"{folder}/truth{rank.number}.pt")
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=f"{folder}/plain")


def test_groups_that_one_stage_wrote_are_made_whole(launch: Launch, tmp_path: Path) -> None:
    launch.plain(2, pipeline, str(tmp_path)).results()
    first, second = (torch.load(tmp_path / f"truth{i}.pt", weights_only=True) for i in range(2))
    truth = {
        "params": first["params"] | second["params"],
        "frozen": {},
        "buffers": {},
        "groups": [
            {**a, "names": a["names"] + b["names"]} for a, b in zip(first["groups"], second["groups"], strict=True)
        ],
    }
    logical = open_foreign(str(tmp_path / "plain"))
    assert compare(logical, truth) == set()
    assert [note.kind for note in logical.notes] == ["repaired"]
