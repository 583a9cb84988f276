"""What a rank holds of a tensor: from a live torch tensor to the parts that are stored or filled.

A plain tensor is held whole by every rank that has it. A DTensor is cut by its mesh and placements; which box
that is, `ckptsvc.geometry.layout` says. The tensors in the parts are views of the live ones: nothing is
copied here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import msgspec
import torch
import xxhash
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptsvc.errors import LayoutError, UnsupportedObject
from ckptsvc.geometry import layout
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import DTYPES, TensorMeta

DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, n): n for n in DTYPES if hasattr(torch, n)}
"""The name in `ckptsvc.types.DTYPES` of every element type that this torch has and that can be stored."""

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Holders(msgspec.Struct, frozen=True):
    """Who holds this very same piece.

    Attributes:
        ranks: the global ranks in the order of their mesh, this one included; None stands for every rank that
            holds the same set of plain tensors, which only the session can know.
    """

    ranks: tuple[int, ...] | None


EVERYONE = Holders(None)


class LocalPart(msgspec.Struct, frozen=True, eq=False, weakref=True):
    """One piece of a logical tensor on this rank.

    Attributes:
        meta: the logical tensor: name, dtype, global shape.
        region: which part of it this is.
        tensor: the local data, of the region's shape: a view of the live tensor, on its device, with any
            strides.
        holders: the ranks that hold the same piece.
        splittable: whether the holders may each store some bytes of it. True for parameters and optimizer
            state, which training keeps bitwise equal. False for the rest, which the first holder stores
            whole: a tensor must never be torn between ranks whose values differ.
    """

    meta: TensorMeta
    region: Box | FlatRange
    tensor: Tensor
    holders: Holders
    splittable: bool


class Capture(msgspec.Struct, frozen=True, eq=False):
    """The state tree of one rank at one moment.

    Attributes:
        parts: the pieces of all its tensors. The same tuple object as last time if nothing but values
            changed.
        aliases: name -> the name under which the very same memory is stored (tied weights).
        structure: 16 hex digits that change whenever a name, a dtype, a shape, a region or an alias does.
        objects: the document of plain values (see `ckptsvc.format.document`). It is this rank's own and
            shares no mutable value with the program, except objects that are encoded by a codec.
    """

    parts: tuple[LocalPart, ...]
    aliases: dict[str, str]
    structure: str
    objects: Any


def digest(parts: Iterable[LocalPart], aliases: dict[str, str]) -> str:
    """16 hex digits (xxh3_64) that stand for the names, dtypes, shapes, regions and aliases."""
    described = [(part.meta, part.region) for part in parts]
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode((described, aliases)))


def parts_of(name: str, tensor: Tensor, *, splittable: bool) -> list[LocalPart]:
    """The pieces of `tensor` that this rank holds, under the logical name `name`.

    No part for a rank outside the tensor's mesh or with an empty shard. A tensor without elements is one
    part.

    Raises:
        UnsupportedObject: a kind of tensor whose bytes alone do not say what it is, or that has none.
        LayoutError: the local tensor does not have the shape that mesh and placements give it.
    """
    if isinstance(tensor, DTensor):
        return _dtensor_parts(name, tensor, splittable)
    if type(tensor) not in _PLAIN_TYPES or tensor.layout is not torch.strided or tensor.is_nested:
        _refuse_special(name, tensor)
    shape = tuple(tensor.shape)
    meta = TensorMeta(name, _dtype_name(name, tensor), shape)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    return [LocalPart(meta, Box.full(shape), tensor, EVERYONE, splittable)]


def local_of(tensor: Tensor) -> Tensor:
    """The memory that this rank has of a tensor: the local tensor of a DTensor, any other tensor itself."""
    if isinstance(tensor, DTensor):
        local: Tensor = tensor._local_tensor  # to_local() makes an autograd node and costs 20 times as much
        return local
    return tensor


class Identity(NamedTuple):
    """Two tensors with the same identity are the same memory read in the same way."""

    pointer: int
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    region: Box | FlatRange
    whole: tuple[int, ...]


def identity_of(part: LocalPart) -> Identity | None:
    """What makes a part the same memory as another; None for a part without bytes."""
    t = part.tensor
    if not t.numel():
        return None
    return Identity(t.data_ptr(), t.device, t.dtype, tuple(t.shape), t.stride(), part.region, part.meta.shape)


class _Seat(NamedTuple):
    """This rank's place in a mesh for given placements."""

    mesh: DeviceMesh  # kept alive: the cache below goes by its id
    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None
    placements: tuple[layout.Placement, ...]
    holders: Holders


_seats: dict[tuple[int, tuple[TorchPlacement, ...]], _Seat] = {}


def _seat(name: str, tensor: DTensor) -> _Seat:
    mesh = tensor.device_mesh
    key = (id(mesh), tuple(tensor.placements))
    seat = _seats.get(key)
    if seat is None:
        placements = tuple(_placement(name, p) for p in tensor.placements)
        shape, at = tuple(mesh.shape), mesh.get_coordinate()
        coordinate = None if at is None else tuple(at)
        ranks: tuple[int, ...] = ()
        if coordinate is not None:
            group = next(g for g in layout.holders(shape, placements) if coordinate in g)
            ranks = tuple(int(mesh.mesh[c]) for c in group)
        seat = _seats[key] = _Seat(mesh, shape, coordinate, placements, Holders(ranks))
    return seat


def _placement(name: str, placement: TorchPlacement) -> layout.Placement:
    if isinstance(placement, _StridedShard):
        return layout.StridedShard(placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return layout.Shard(placement.dim)
    if isinstance(placement, Replicate):
        return layout.Replicate()
    raise UnsupportedObject(
        f"/{name} is a DTensor with the placement {placement!r}",
        hint="redistribute it to Shard or Replicate first: a partial sum is not a value yet",
    )


def _dtensor_parts(name: str, tensor: DTensor, splittable: bool) -> list[LocalPart]:
    seat = _seat(name, tensor)
    local = local_of(tensor)
    if isinstance(local, DTensor) or type(local) not in _PLAIN_TYPES or local.layout is not torch.strided:
        _refuse_special(name, local)
    shape = tuple(tensor.shape)
    meta = TensorMeta(name, _dtype_name(name, local), shape)
    if seat.coordinate is None:
        return []
    if 0 in shape:  # nobody's shard says anything, yet the tensor must be there when it is looked for
        everyone = Holders(tuple(seat.mesh.mesh.flatten().tolist()))
        empty = torch.empty(shape, dtype=local.dtype, device=local.device)
        return [LocalPart(meta, Box.full(shape), empty, everyone, False)]
    if local.requires_grad:
        local = local.detach()
    try:
        pieces = layout.held_pieces(shape, seat.shape, seat.coordinate, seat.placements, local.shape)
    except LayoutError as error:
        raise LayoutError(f"/{name}: {error.what}", hint=error.hint) from None
    if len(pieces) == 1:
        return [LocalPart(meta, pieces[0].box, local, seat.holders, splittable)]
    return [LocalPart(meta, p.box, local[p.local.slices()], seat.holders, splittable) for p in pieces]


def _dtype_name(name: str, tensor: Tensor) -> str:
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedObject(
            f"/{name} is a tensor of {tensor.dtype}, which cannot be stored",
            hint="dequantise it, or give it a state_dict of plain tensors",
        )
    if tensor.is_meta:
        raise UnsupportedObject(f"/{name} is a tensor on the meta device", hint="materialise it first")
    return dtype


def _refuse_special(name: str, tensor: Tensor) -> None:
    """Raises UnsupportedObject for a tensor that is more than strided memory; a mere subclass passes."""
    if tensor.layout is not torch.strided:
        kind = f"sparse tensor ({tensor.layout})"
    elif tensor.is_nested:
        kind = "nested tensor"
    elif torch.nn.parameter.is_lazy(tensor):
        kind = "parameter that has no shape yet"
    elif is_traceable_wrapper_subclass(cast("Any", tensor)):
        kind = f"tensor of the wrapper class {type(tensor).__module__}.{type(tensor).__qualname__}"
    else:
        return
    raise UnsupportedObject(
        f"/{name} is a {kind}",
        hint="store it as plain tensors, for example from an object with state_dict and load_state_dict",
    )
