"""Plain values of torch's own types, in state dicts of modules, schedulers and users: how they are written down."""

from __future__ import annotations

from typing import Any

import torch

from ckptsvc.errors import InvalidInput
from ckptsvc.format.objects import register_codec


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise InvalidInput(f"this torch has no element type {name!r}")
    return found


def _size(shape: Any) -> torch.Size:
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise InvalidInput(f"{shape!r} is no shape")
    return torch.Size(shape)


def _device(name: Any) -> torch.device:
    if not isinstance(name, str):
        raise InvalidInput(f"{name!r} is no device")
    return torch.device(name)


def register() -> None:
    """Teaches `ckptsvc.format.objects` the types `torch.dtype`, `torch.Size` and `torch.device`."""
    register_codec(torch.dtype, "torch.dtype", lambda dtype: str(dtype).removeprefix("torch."), _dtype)
    register_codec(torch.Size, "torch.Size", list, _size)
    register_codec(torch.device, "torch.device", str, _device)
