"""The state trees that benchmarks save: what a training program of that size would hold.

    large   per parameter a bfloat16 weight and two float32 Adam moments; 204 tensors of 4 KiB to 64 MiB for 2 GiB
    small   many float32 parameters of 4 to 64 KiB

Every rank has its own part of each tensor: with several ranks they are DTensors sharded in dimension 0 over all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

Tree = dict[str, Any]
"""What `ckptsvc.attach` takes: nested dicts of tensors, and modules."""

PARAMETERS = 68
"""Parameters in a block of the large state; three tensors each."""

BLOCK_BYTES = 2 << 30
SMALLEST = 2048
LARGEST = 16 << 20
"""Elements of the smallest and the largest parameter: 4 KiB of bfloat16, 64 MiB of float32."""

_PER_ELEMENT = 2 + 4 + 4


def parameter_sizes(nbytes: int) -> list[int]:
    """Elements of each parameter of a large state of about `nbytes` bytes: a few large ones, many small ones."""
    blocks = max(1, round(nbytes / BLOCK_BYTES))
    elements = max(nbytes // blocks // _PER_ELEMENT, PARAMETERS)
    smallest = min(SMALLEST, max(8, elements // (4 * PARAMETERS)))
    largest = max(min(LARGEST, elements // 4), smallest)

    def sizes(bend: float) -> list[int]:
        steps = [(i / (PARAMETERS - 1)) ** bend for i in range(PARAMETERS)]
        return [round(smallest * (largest / smallest) ** step / 8) * 8 for step in steps]  # as real ones are: not odd

    low, high = 0.02, 50.0  # the larger the bend, the fewer are large
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sum(sizes(middle)) > elements else (low, middle)
    return sizes(low) * blocks


def large_state(nbytes: int) -> Tree:
    """A large state of about `nbytes` bytes over all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    sizes = [-(-n // world) * world for n in parameter_sizes(nbytes)]
    make = _Maker()
    return {
        "model": {f"layers.{i:04d}.weight": make(n, torch.bfloat16) for i, n in enumerate(sizes)},
        "optimizer": {
            f"layers.{i:04d}.weight/{moment}": make(n, torch.float32)
            for i, n in enumerate(sizes)
            for moment in ("exp_avg", "exp_avg_sq")
        },
    }


def trained_state(nbytes: int) -> Tree:
    """A module of float32 parameters and its Adam optimizer with its moments, about `nbytes` bytes over all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    make = _Maker()
    module = nn.Module()
    for i, n in enumerate(parameter_sizes(nbytes * _PER_ELEMENT // 12)):
        weight = nn.Parameter(make(-(-n // world) * world, torch.float32))
        module.register_parameter(f"weight{i:04d}", weight)
    optimizer = torch.optim.Adam(module.parameters())
    for weight in module.parameters():
        moments = {key: torch.ones_like(weight, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.tensor(1.0), **moments}
    return {"model": module, "optimizer": optimizer}


def small_state(count: int) -> Tree:
    """A module with `count` parameters."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    pick = random.Random(0)
    make = _Maker()
    module = nn.Module()
    for i in range(count):
        elements = -(-pick.randint(1024, 16384) // world) * world
        module.register_parameter(f"weight{i:05d}", nn.Parameter(make(elements, torch.float32), requires_grad=False))
    return {"model": module}


class _Maker:
    """Makes tensors, each filled with a number of its own; of several ranks each gets its shard."""

    def __init__(self) -> None:
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._mesh = init_device_mesh("cpu", (self._world,)) if self._world > 1 else None
        self._made = 0

    def __call__(self, elements: int, dtype: torch.dtype) -> Tensor:
        self._made += 1
        local = torch.full((elements // self._world,), _content(self._made), dtype=dtype)
        return local if self._mesh is None else DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False)


def tensors(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a tree with their names."""
    for key, value in tree.items():
        if isinstance(value, nn.Module):
            yield from tensors(value.state_dict(), f"{prefix}{key}/")
        elif isinstance(value, Mapping):
            yield from tensors(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all tensors that this rank holds."""
    return sum(local(t).nbytes for _, t in tensors(tree))


def wipe(tree: Mapping[str, Any]) -> None:
    """Overwrite all that this rank holds, so that a restore has something to do."""
    with torch.no_grad():
        for _, tensor in tensors(tree):
            local(tensor).zero_()


def is_intact(tree: Mapping[str, Any]) -> bool:
    """Whether every tensor has at both ends what it was made with."""
    for number, (_, tensor) in enumerate(tensors(tree), 1):
        part, content = local(tensor), _content(number)
        if part.numel() and not (part[0] == content and part[-1] == content):
            return False
    return True


def _content(number: int) -> int:
    """What the tensor made as that one is filled with: exact in every element type."""
    return number % 97 + 1
