"""Captured and restored on several ranks: DDP, fully_shard, tensor parallel, both, and one layout into another."""

import json
from typing import Any

import dense
import pytest
import spawned
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptsvc.client.state import StateTree
from ckptsvc.errors import UnsupportedObject

WIDTH = 10  # not divisible by 4: shards are uneven


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)  # dimension 0 is shorter than 4 ranks: one has an empty shard
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(layout: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = Net()
    size = dist.get_world_size()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if layout == "tp":
        mesh = init_device_mesh("cpu", (size,))
        for block in net.blocks:
            parallelize_module(block, mesh, plan)
    if layout in ("fsdp", "hsdp"):
        shape = (size,) if layout == "fsdp" else (2, size // 2)
        mesh = init_device_mesh("cpu", shape)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    if layout == "fsdp_tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in net.blocks:
            parallelize_module(block, mesh["tp"], plan)
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
    if layout == "compiled":
        return torch.compile(nn.parallel.DistributedDataParallel(net), backend="eager")
    return net


def program(layout: str, seed: int = 0) -> tuple[StateTree, Any]:
    """A state tree, and a function that trains some steps and returns the losses."""
    net = build(layout, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    rank = dist.get_rank()

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = torch.randn(4, WIDTH)
            if layout in ("tp", "fsdp_tp"):  # ranks of a tensor parallel group must see the same
                group_rank = rank // 2 if layout == "fsdp_tp" else 0
                x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(group_rank + int(x.sum())))
                x = torch.full((4, WIDTH), 0.1 * (group_rank + 1 + len(losses)))
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
        return losses

    tree = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "mine": torch.tensor([1.0, 2.0])}
    return StateTree(tree, rank, dist.get_world_size()), train


def state(tree: StateTree) -> dict[str, str]:
    return {name: dense.raw(t).hex() for name, t in dense.save(tree).tensors.items()}


def resume(rank: int, layout: str) -> dict[str, Any]:
    """Trains, saves, trains on; and again from what was saved, in new objects with other initial values."""
    tree, train = program(layout)
    train(2)
    saved = dense.save(tree)
    expected = train(3)
    again, train_again = program(layout, seed=1)
    dense.restore(again, saved, rank)
    addresses = [p.tensor.data_ptr() for p in again.capture().parts]
    restored = state(again)
    assert restored == {name: dense.raw(t).hex() for name, t in saved.tensors.items()}
    losses = train_again(3)
    assert losses == expected, f"{losses} {expected}"
    assert state(again) == state(tree)
    assert again.capture().parts is again.capture().parts
    assert [p.tensor.data_ptr() for p in again.capture().parts] == addresses, "training moved something"
    return {"names": sorted(saved.tensors), "shapes": {n: list(m.shape) for n, m in saved.metas.items()}}
