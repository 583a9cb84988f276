"""Captured and restored on several ranks: DDP, fully_shard, tensor parallel, both, and one layout into another."""

from collections.abc import Callable
from typing import Any

import dense
import pytest
import spawned
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
        shape = (1, size) if layout == "fsdp" else (2, size // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh["shard"] if layout == "fsdp" else mesh
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


def program(layout: str, seed: int = 0) -> tuple[StateTree, Callable[[int], list[float]]]:
    """A state tree, and a function that trains some steps and returns the losses."""
    net = build(layout, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    rank, size = dist.get_rank(), dist.get_world_size()
    # each rank its own batches, but the same within a group of tensor parallel ranks
    torch.manual_seed(100 + {"tp": 0, "fsdp_tp": rank // 2}.get(layout, rank))

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = net(torch.randn(4, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
        return losses

    tree = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "mine": torch.tensor([1.0, seed])}
    return StateTree(tree, rank, size), train


def addresses(tree: StateTree, prefix: str = "") -> dict[str, int]:
    return {p.meta.name: p.tensor.data_ptr() for p in tree.capture().parts if p.meta.name.startswith(prefix)}


def resume(rank: int, layout: str) -> list[str]:
    """Trains, saves, trains on; then the same from what was saved, in new objects with other initial values."""
    tree, train = program(layout)
    train(2)
    saved = dense.save(tree)
    expected = train(3)
    again, train_again = program(layout, seed=1)
    before = addresses(again, "model/")
    dense.restore(again, saved, rank)
    assert addresses(again, "model/") == before, f"{layout}: restored into other memory than the program trains"
    assert dense.save(again).bits() == saved.bits()
    restored = addresses(again)
    assert train_again(3) == expected, layout
    assert dense.save(again).bits() == dense.save(tree).bits()
    assert addresses(again) == restored, "the optimizer does not use what was filled"
    assert again.capture().parts is again.capture().parts, "walked again though nothing changed"
    return sorted(saved.tensors)


def resume_all(rank: int, *layouts: str) -> dict[str, list[str]]:
    return {layout: resume(rank, layout) for layout in layouts}


@pytest.mark.parametrize(
    ("ranks", "layouts"), [(2, ("ddp", "compiled", "fsdp", "tp")), (4, ("fsdp", "hsdp", "fsdp_tp"))]
)
def test_training_goes_on_bit_for_bit(ranks: int, layouts: tuple[str, ...]) -> None:
    told = spawned.run(ranks, resume_all, *layouts)
    assert all(names == told[0] for names in told)
    for names in told[0].values():
        assert "model/blocks.0.up.weight" in names, "prefixes of the wrappers are not part of a name"
        assert "optimizer/state/blocks.1.down.bias/max_exp_avg_sq" in names
        assert len(names) == 14 + 1 + 4 * 14 + 1


def convert(rank: int) -> None:
    """Every layout into every other one."""
    layouts = ["ddp", "fsdp", "hsdp", "fsdp_tp", "tp"]
    for old in layouts:
        tree, train = program(old)
        train(2)
        saved = dense.save(tree)
        truth = full(tree)
        assert {name: saved.tensors[name].tolist() for name in truth} == truth
        for new in layouts:
            other, train_on = program(new, seed=1)
            dense.restore(other, saved, rank)
            assert dense.save(other).bits() == saved.bits(), f"{old} -> {new}"
            train_on(1)


def full(tree: StateTree) -> dict[str, Any]:
    """The parameters as torch itself gathers them."""
    net = tree._tree["model"]
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    return {f"model/{name}": value.tolist() for name, value in state.items()}


def test_any_layout_restores_any_other() -> None:
    spawned.run(4, convert)


def odd(rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    half = DeviceMesh("cpu", [1, 3])
    uneven = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Shard(0)])
    elsewhere = distribute_tensor(torch.arange(6.0), half, [Shard(0)])
    copied = distribute_tensor(torch.arange(4.0), mesh, [Replicate()])
    nothing = distribute_tensor(torch.empty(0, 4), mesh, [Shard(0)])
    tied = distribute_tensor(torch.arange(3.0), mesh, [Shard(0)])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(tied)
            self.second = self.first

    tree = {"a": uneven, "b": elsewhere, "c": [copied], "d": nothing, "tied": Tied()}
    state = StateTree(tree, rank, 4)
    capture = state.capture()
    names = [part.meta.name for part in capture.parts]
    assert ("b" in names) == (rank in (1, 3)), "only the ranks of the mesh hold anything"
    assert ("a" in names) == (rank < 3), "an empty shard is no part"
    assert capture.aliases == ({"tied/second": "tied/first"} if rank < 3 else {})
    holders = {part.meta.name: part.holders.ranks for part in capture.parts}
    assert holders["c/0"] == (0, 1, 2, 3)
    assert holders["d"] == (0, 1, 2, 3)
    saved = dense.save(state)
    assert saved.tensors["a"].tolist() == torch.arange(15.0).reshape(5, 3).tolist()
    assert saved.tensors["b"].tolist() == torch.arange(6.0).tolist()
    with torch.no_grad():
        for tensor in (uneven, elsewhere, copied):
            tensor.zero_()
    restored = dense.restore(state, saved, rank)
    assert restored["a"] is uneven
    assert dense.save(state).bits() == saved.bits()
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(UnsupportedObject, match=r"^/x/y is a DTensor with the placement Partial"):
        StateTree({"x": {"y": partial}}, rank, 4).capture()


def test_shards_that_are_uneven_empty_or_of_another_mesh() -> None:
    spawned.run(4, odd)


class Average:
    """An object of the user's with a sharded, a plain and a growing tensor."""

    def __init__(self, sharded: DTensor, length: int) -> None:
        self.sharded = sharded
        self.history = torch.arange(float(length)) + dist.get_rank()

    def state_dict(self) -> dict[str, Any]:
        return {"sharded": self.sharded, "history": self.history, "rank": dist.get_rank()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        self.saved_by = state["rank"]
        assert state["sharded"] is self.sharded


def per_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    average = Average(distribute_tensor(torch.arange(5.0), mesh, [Shard(0)]), 3 + rank)
    saved = dense.save(StateTree({"average": average}, rank, 2))
    assert {"average/sharded", "@rank/0/average/history", "@rank/1/average/history"} == saved.tensors.keys()
    again = Average(distribute_tensor(torch.zeros(5), mesh, [Shard(0)]), 0)
    dense.restore(StateTree({"average": again}, rank, 2), saved, rank)
    assert again.history.tolist() == average.history.tolist()
    assert again.sharded.full_tensor().tolist() == [0, 1, 2, 3, 4]
    assert again.saved_by == rank

    torch.manual_seed(rank)
    saved = dense.save(StateTree({"x": 1}, rank, 2))
    mine = torch.rand(1).item()
    tree = StateTree({"x": 1}, rank, 2)
    dense.restore(tree, saved, rank)
    assert torch.rand(1).item() == mine
    torch.manual_seed(50)
    expected = torch.rand(1).item()
    torch.manual_seed(50)
    dense.restore(tree, saved, rank + 1)  # another rank stands in: its generators are not for us
    assert torch.rand(1).item() == expected


def test_what_is_a_ranks_own() -> None:
    spawned.run(2, per_rank)


def stages(rank: int) -> None:
    """Each rank has a pipeline stage of its own: other names, other optimizer groups."""
    torch.manual_seed(rank)
    net = nn.Sequential()
    net.add_module(f"stage{rank}", nn.Linear(3, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1 * (rank + 1), momentum=0.9)
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    tree = StateTree({"model": net, "optimizer": optimizer}, rank, 2)
    saved = dense.save(tree)
    both = nn.Sequential()
    for r in range(2):
        both.add_module(f"stage{r}", nn.Linear(3, 3))
    optimizer2 = torch.optim.SGD(both.parameters(), lr=5, momentum=0.9)
    whole = StateTree({"model": both, "optimizer": optimizer2}, rank, 2)
    dense.restore(whole, saved, rank)
    assert dense.save(whole).bits() == saved.bits()
    assert optimizer2.param_groups[0]["lr"] == pytest.approx(0.1 * (rank + 1))
    dense.restore(tree, saved, rank)
    assert tree.unexpected == sorted(n for n in saved.metas if f"stage{1 - rank}" in n)


def test_pipeline_stages_into_one_model() -> None:
    spawned.run(2, stages)


def between(rank: int) -> None:
    """While parameters are gathered for backward, their owner dicts hold other tensors."""
    net = build("fsdp")
    optimizer = torch.optim.Adam(net.parameters())
    tree = StateTree({"model": net, "optimizer": optimizer}, rank, 2)
    saved = dense.save(tree).bits()
    for module in net.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.set_reshard_after_forward(False)
    with torch.no_grad():
        net(torch.ones(2, WIDTH))
    held = net.head.weight
    assert not isinstance(held, DTensor), "the test needs a gathered parameter here"
    now = dense.save(tree).bits()
    assert {n: v for n, v in now.items() if n != "model/seen"} == {n: v for n, v in saved.items() if n != "model/seen"}
    assert now["model/seen"] != saved["model/seen"]


def test_captured_while_parameters_are_gathered() -> None:
    spawned.run(2, between)


def fails(rank: int) -> None:
    assert rank == 0, "this one fails"


def test_a_failing_rank_is_told() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1, exit 1.*this one fails"):
        spawned.run(2, fails, timeout=30)
