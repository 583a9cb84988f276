"""What is to be read from a checkpoint, gathered from the state tree before anything is read.

Most parts are views of the live tensors, which the reader fills in place: no second copy of the model is
made. Fresh memory is for what has no live memory to fill: optimizer state before the first step, states of
objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ckptsvc.client.parts import LocalPart, parts_of
from ckptsvc.errors import LayoutError, UnsupportedObject
from ckptsvc.format.document import ArrayRef
from ckptsvc.format.objects import TensorRef
from ckptsvc.types import TensorMeta

Stored = Mapping[str, TensorMeta]
"""What a checkpoint holds: every logical name, aliases too, with its description."""


class Wanted:
    """Gathers parts to fill, and names the checkpoint lacks.

    Attributes:
        stored: what the checkpoint holds; None if it is not known and everything is taken as it is now.
        parts: the parts to fill.
        absent: what the state tree has and the checkpoint has not.
        names: all that is wanted, also by a rank that holds no part of it.
        cast: the names whose values are to be cast; None where none may be.
    """

    def __init__(self, stored: Stored | None, *, cast: bool = False) -> None:
        """`cast`: take floating-point tensors that are stored in another precision."""
        self.stored = stored
        self.cast: list[str] | None = [] if cast else None
        self.parts: list[LocalPart] = []
        self.absent: list[str] = []
        self.names: set[str] = set()
        self._fresh: dict[str, Tensor] = {}

    def meta(self, name: str) -> TensorMeta | None:
        """The description of a stored tensor; None if there is none of that name, or if nothing is known."""
        return None if self.stored is None else self.stored.get(name)

    def fill(self, name: str, tensor: Tensor, *, splittable: bool = False) -> None:
        """Wants `tensor` to be filled from the logical tensor `name`.

        Raises:
            LayoutError: the checkpoint has it with another dtype or global shape.
            UnsupportedObject: several elements of `tensor` are one place in memory.
        """
        self.names.add(name)
        parts = parts_of(name, tensor, splittable=splittable)
        if any(0 in p.tensor.stride() and _is_expanded(p.tensor) for p in parts):
            raise UnsupportedObject(
                f"/{name} cannot be filled: several of its elements are the same memory",
                hint="call contiguous() on what expand() made, before attach",
            )
        meta = self.meta(name)
        if self.stored is not None and meta is None:
            self.absent.append(name)
            return
        if meta is not None and parts and self.cast is not None and _castable(parts[0].meta, meta):
            self.cast.append(name)
            self.parts += parts
            return
        for part in parts:
            if meta is not None and not fits(part.meta, meta):
                raise LayoutError(
                    f"/{name} is {part.meta.dtype} {list(part.meta.shape)} here, "
                    f"but {meta.dtype} {list(meta.shape)} in the checkpoint",
                    hint="build the same model, or load the tensors yourself with ckptsvc.load()",
                )
        self.parts += parts

    def fresh(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """New memory, to be filled, for a whole tensor of the checkpoint; the same for the same name.

        Raises:
            LayoutError: the checkpoint does not have it, though its document speaks of it.
        """
        tensor = self._fresh.get(name)
        if tensor is None:
            meta = self.meta(name)
            if meta is None:
                raise LayoutError(
                    f"/{name} is in the document of the checkpoint and not among its tensors",
                    hint="another rank's document, or a damaged checkpoint: see `ckptsvc verify`",
                )
            tensor = self._fresh[name] = torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device=device)
            self.fill(name, tensor)
        return tensor

    def check(self) -> None:
        """Raises LayoutError with the list of names that the checkpoint lacks."""
        if self.absent:
            raise LayoutError(
                listed(self.absent, "in the state tree and not in the checkpoint"),
                hint="attach the tree that was saved, or load what you need yourself with ckptsvc.load()",
            )


def _is_expanded(tensor: Tensor) -> bool:
    return any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def other_kind(path: str) -> LayoutError:
    """The error for an object whose place in the document has what its kind never writes."""
    return LayoutError(
        f"/{path} is an object of another kind in the checkpoint than here",
        hint="attach the tree that was saved, or load what you need yourself with ckptsvc.load()",
    )


def fits(live: TensorMeta, stored: TensorMeta) -> bool:
    """Whether the bytes of one are the bytes of the other."""
    return live.dtype == stored.dtype and tuple(live.shape) == tuple(stored.shape)


def _castable(live: TensorMeta, stored: TensorMeta) -> bool:
    return (
        live.dtype != stored.dtype
        and tuple(live.shape) == tuple(stored.shape)
        and all(getattr(torch, meta.dtype).is_floating_point for meta in (live, stored))
    )


def listed(names: list[str], where: str) -> str:
    """A sentence with at most ten of the names."""
    shown = ", ".join(f"/{name}" for name in names[:10])
    if len(names) == 1:
        return f"{shown} is {where}"
    return f"{len(names)} names are {where}: {shown}{', ...' if len(names) > 10 else ''}"


def as_leaf(leaf: Any, ref: TensorRef | ArrayRef) -> Any:
    """A filled tensor as what stood there when it was saved: an array or a tensor."""
    return leaf.numpy() if isinstance(ref, ArrayRef) and isinstance(leaf, Tensor) else leaf
