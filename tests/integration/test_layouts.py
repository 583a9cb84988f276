"""One training that changes its layout at every stop: what is restored is bit for bit what was gathered before.

The truth is gathered with DTensor.full_tensor(), which knows nothing of ckptsvc. No dimension divides evenly by 3 or 4
everywhere: there are uneven and empty shards.
"""

from pathlib import Path
from typing import Any

import torch
from harness.job import Launch
from harness.programs import differences, digest, state_digest, train_step
from harness.rank import Rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptsvc


def build(layout: str) -> tuple[Any, Any, int]:
    """The model in a layout, its optimizer, and which share of the batch this rank trains on."""
    torch.manual_seed(len(layout))
    model = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    model.register_buffer("seen", torch.zeros(3))
    data = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if layout.startswith("fsdp"):
        size = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
        for part in (model[0], model[2]):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout in ("2d", "tp"):
        size = torch.distributed.get_world_size() // 2
        mesh = init_device_mesh("cpu", (size, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if size > 1:
            fully_shard(model, mesh=mesh["dp"])
        data //= 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, data


def go_on(rank: Rank, store: str, layout: str, steps: int) -> dict[str, Any]:
    """Restores what is there, trains some steps, saves; returns the whole state at both ends."""
    if rank.world > 1:
        rank.join()
    model, optimizer, data = build(layout)
    with ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every="off") as run:
        found: dict[str, Any] = {"restored": state_digest(model, optimizer), "begun": run.steps_done}
        for step in range(run.steps_done, run.steps_done + steps):
            train_step(model, optimizer, step, data)
            model.seen += 1
            run.step()
        found["saved"] = state_digest(model, optimizer)
        run.save(wait=True)
    return found


def load_whole(rank: Rank, store: str, steps: list[int]) -> list[dict[str, str]]:
    """What `ckptsvc.load` gives for each step, with no process group and no model."""

    def flat(tree: Any, path: str) -> dict[str, torch.Tensor]:
        if isinstance(tree, torch.Tensor):
            return {path: tree}
        items = tree.items() if isinstance(tree, dict) else ()
        return {k: v for name, value in items for k, v in flat(value, f"{path}/{name}" if path else name).items()}

    return [digest(flat(ckptsvc.load(store, step), "")) for step in steps]


CHAIN = [("fsdp2", 2), ("fsdp3", 3), ("fsdp4", 4), ("2d", 4), ("tp", 2), ("plain", 1), ("2d", 4), ("fsdp2", 2)]


def test_a_training_goes_on_in_any_layout(launch: Launch, tmp_path: Path) -> None:
    store = str(tmp_path / "run")
    truths: list[dict[str, str]] = []
    for place, (layout, world) in enumerate(CHAIN):
        ranks = launch.plain(world, go_on, store, layout, 2).results(110)
        for found in ranks:
            assert found["begun"] == 2 * place
            assert found["saved"] == ranks[0]["saved"], layout  # gathered everywhere alike
            if truths:
                assert differences(found["restored"], truths[-1]) == [], f"{CHAIN[place - 1]} -> {CHAIN[place]}"
        truths.append(ranks[0]["saved"])
        assert len(truths[-1]) == 8 + 1 + 3 * 8
    assert len({truth["model/0.weight"] for truth in truths}) == len(CHAIN)
    (loaded,) = launch.plain(1, load_whole, store, [2 * place + 2 for place in range(len(CHAIN))]).results()
    for (layout, _), truth, whole in zip(CHAIN, truths, loaded, strict=True):
        assert differences(whole, truth) == [], layout
