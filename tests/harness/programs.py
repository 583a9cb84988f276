"""Small training programs that are exactly repeatable, and digests to compare their states by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from harness.rank import Rank
from torch import Tensor, nn

import ckptsvc


def network(seed: int = 0) -> nn.Module:
    """A small network with odd sizes, a buffer that changes, and dropout (which draws from the global generator)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(7, 13),
        nn.BatchNorm1d(13),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(13, 13),
        nn.ReLU(),
        nn.Linear(13, 3),
    )


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Its optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int = 0) -> float:
    """One step on data that depends on the step and the rank alone; returns the loss."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    loss = model(torch.randn(8, 7, generator=generator)).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def raw(tensor: Tensor) -> bytes:
    """All elements in row-major order, bit for bit."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = whole.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # of one element or none, which counts as contiguous
        flat = flat.as_strided(flat.shape, (1,)) if flat.numel() < 2 else flat.contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every tensor of model and optimizer by logical name, found without the code under test."""
    found = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"optimizer/state/{name}/{key}"] = value
    return found


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A digest of each whole tensor: its dtype, shape and every bit. DTensors are gathered: a collective."""
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_64_hexdigest(raw(tensor))}"
        for name, tensor in tensors.items()
    }


def state_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """`digest` of all of a training program's tensors."""
    return digest(tensors_of(model, optimizer))


def differences(left: dict[str, Any], right: dict[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Names whose values differ, or that only one side has."""
    return sorted(n for n in left.keys() | right.keys() if left.get(n) != right.get(n) and n not in set(ignore))


def save_three(rank: Rank, store: str) -> list[dict[str, str]]:
    """Saves steps 1, 2 and 3; returns what the state was at each."""
    if rank.world > 1:
        rank.join()
    model = network()
    optimizer = adam(model)
    run = ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every="off")
    states = []
    for step in range(3):
        train_step(model, optimizer, step)
        run.step()
        run.save(wait=True)
        states.append(state_digest(model, optimizer))
    run.close()
    return states
