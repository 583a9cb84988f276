"""Restore: from one checkpoint (in a store, or in the arenas of the job's nodes) into the live state, in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ckptsvc.client.exchange import Progress, Readable, exchange
from ckptsvc.client.group import Group, together
from ckptsvc.client.link import AgentLink
from ckptsvc.client.parts import LocalPart
from ckptsvc.client.stage import storable
from ckptsvc.client.state import StateTree
from ckptsvc.client.wanted import Stored
from ckptsvc.errors import Damaged, LayoutError
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import shard_name
from ckptsvc.format.index import Index, IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.objects import decode
from ckptsvc.format.shard import decode_header, header_length, objects_name
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.reshard import View
from ckptsvc.interop.logical import Logical
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.read import Catalogue, Source, Want, carrier, place_of, plan_windows
from ckptsvc.pipeline.sources import ArenaSource, StoreSource
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.types import DTYPES, TensorMeta

log = logging.getLogger("ckptsvc")


@dataclass(frozen=True)
class Image:
    """A checkpoint that can be read.

    Attributes:
        catalogue: what is stored where.
        stored: every name in it, aliases too, with its description.
        source: where its shards are read.
        readable: which of them this rank reads.
        document: the plain values this rank goes by; all ranks call it together.
    """

    catalogue: Catalogue
    stored: Stored
    source: Source
    readable: Readable
    document: Callable[[Group], dict[str, Any]]


class StoredNames(Mapping[str, TensorMeta]):
    """Every logical name of a checkpoint, aliases too, with its description."""

    def __init__(self, catalogue: Index | Logical) -> None:
        self._catalogue = catalogue

    def __getitem__(self, name: str) -> TensorMeta:
        try:
            return self._catalogue.meta(name)
        except LayoutError:
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return name in self._catalogue

    def __iter__(self) -> Iterator[str]:
        yield from self._catalogue.names()
        yield from self._catalogue.aliases

    def __len__(self) -> int:
        return sum(1 for _ in self)


def store_image(checkpoint: Checkpoint) -> Image:
    """A committed checkpoint in a store that every rank reaches."""
    return _image(checkpoint.index, StoreSource(checkpoint), Readable(True))


def _image(index: Index, source: Source, readable: Readable) -> Image:
    return Image(index, StoredNames(index), source, readable, lambda group: _document(index, source, readable, group))


class _Told(msgspec.Struct):
    """What a rank tells the others about a shard in its node's memory."""

    rank: int
    nbytes: int
    extent: int
    digests: bytes
    columns: bytes


def memory_image(snapshot: agent_pb2.Snapshot | None, link: AgentLink, group: Group, job: str, attempt: int) -> Image:
    """A snapshot in the arenas of the job's nodes; all ranks call this together.

    Args:
        snapshot: what this rank's agent has of it; None if it has nothing.
        link: to the agent.
        group: the job's ranks.
        job: the job's name.
        attempt: of the job.

    Raises:
        Damaged: a shard is in nobody's memory any more, or its header is broken.
    """
    arenas: dict[int, memoryview] = {}
    told: list[_Told] = []
    try:
        for shard in snapshot.local if snapshot else ():
            view = link.arena(shard.slot, writable=False).view
            arenas[shard.rank] = view[: shard.bytes]
            told.append(_describe(shard, view, (snapshot.epoch, snapshot.step) if snapshot else (0, -1)))
    except Exception as error:  # noqa: BLE001
        # The others wait below; without our shards all of us find the snapshot incomplete.
        log.warning("rank %d cannot read a snapshot in memory: %s", group.rank, error)
    index = _gathered_index(told, snapshot, group, job, attempt)
    numbers = {entry.rank: number for number, entry in enumerate(index.shards)}
    local = {numbers[rank]: view for rank, view in arenas.items()}
    return _image(index, ArenaSource(index, local), Readable(False, frozenset(local)))


class _Common(msgspec.Struct):
    """What rank 0 tells all about the snapshot."""

    epoch: int
    step: int
    world_size: int
    aliases: dict[str, str]


def _gathered_index(
    told: list[_Told], snapshot: agent_pb2.Snapshot | None, group: Group, job: str, attempt: int
) -> Index:
    """The index of a snapshot in memory, from what every rank tells of its node; the same on all ranks."""
    shards: dict[int, _Told] = {}
    for data in group.all_gather(msgspec.msgpack.encode(told)):
        for one in msgspec.msgpack.decode(data, type=list[_Told]):
            shards.setdefault(one.rank, one)
    mine = _Common(snapshot.epoch, snapshot.step, snapshot.world_size, dict(snapshot.aliases)) if snapshot else None
    common = msgspec.msgpack.decode(group.broadcast(msgspec.msgpack.encode(mine)), type=_Common | None)
    if common is None or sorted(shards) != list(range(common.world_size)):
        raise Damaged(f"only {len(shards)} shards of the snapshot are in memory")
    records = [
        ShardRecord(
            shard_name(rank, "00000000"),
            rank,
            one.nbytes,
            np.frombuffer(one.digests, "<u8"),
            Columns.decode(one.columns),
        )
        for rank, one in sorted(shards.items())
    ]
    info = IndexInfo(
        step=common.step,
        epoch=common.epoch,
        attempt=attempt,
        job=job,
        world_size=common.world_size,
        created="",
        extent=shards[0].extent,
        aliases=common.aliases,
    )
    return Index.build(info, records)


def _describe(shard: agent_pb2.LocalShard, view: memoryview, key: tuple[int, int]) -> _Told:
    """What is in an arena.

    Raises:
        Damaged: its header is broken, or it is another shard than the one that the agent speaks of.
    """
    table = decode_header(bytes(view[: 8 + header_length(bytes(view[:8]))]), shard.bytes)
    info = table.info
    if (info.epoch, info.step, info.rank) != (*key, shard.rank):
        raise Damaged(f"rank {shard.rank}: the memory holds step {info.step} (epoch {info.epoch}) of rank {info.rank}")
    return _Told(shard.rank, shard.bytes, shard.extent, shard.digests, Columns.from_table(table).encode())


def restore(image: Image, tree: StateTree, group: Group, progress: Progress = lambda nbytes: None) -> dict[str, Any]:
    """Fill the live state from the image; all ranks call this together.

    `progress` is called with the bytes of every window that has come in, from several threads.

    Returns:
        the plain values of the state tree, as they were saved.

    Raises:
        Damaged, StoreError: this or another rank could not read what it needs; the state is partly overwritten.
        LayoutError: the checkpoint does not fit the state; nothing was changed.
    """
    document = image.document(group)
    with together(group):
        parts = tree.targets(image.stored, document).parts
    return fill(image, tree, parts, document, group, progress)


def fill(
    image: Image,
    tree: StateTree,
    parts: Sequence[LocalPart],
    document: dict[str, Any],
    group: Group,
    progress: Progress,
) -> dict[str, Any]:
    """Read the parts of `tree.targets` and hand the document to the tree; see `restore`.

    Tensors are cast where `targets` allowed another element type than the stored one.
    """
    metas = [image.stored[p.meta.name] for p in parts]
    wants = [Want(m.name, m.dtype, m.shape, p.region) for m, p in zip(metas, parts, strict=True)]
    targets = [_Target(p, m.dtype) for m, p in zip(metas, parts, strict=True)]
    _read(image.catalogue, image.source, image.readable, wants, targets, group, progress)
    with together(group):
        return tree.load(document)


def _document(index: Index, source: Source, readable: Readable, group: Group) -> dict[str, Any]:
    """The objects document this rank goes by: its own where the world has the same size, else that of rank % world."""
    name = objects_name(group.rank % index.info.world_size)
    with together(group):
        meta = index.meta(name)
    data = np.empty(meta.shape, np.uint8)
    _read(index, source, readable, [Want(name, meta.dtype, meta.shape, Box.full(meta.shape))], [_Array(data)], group)
    with together(group):
        document: dict[str, Any] = decode(data.tobytes(), name)
    return document


def _read(
    catalogue: Catalogue,
    source: Source,
    readable: Readable,
    wants: Sequence[Want],
    targets: Sequence[_Target | _Array],
    group: Group,
    progress: Progress = lambda nbytes: None,
) -> None:
    def sink(target: int, place: View, array: NDArray[Any]) -> None:
        targets[target].put(place, array)

    with together(group):
        windows = plan_windows(catalogue, wants)
    with together(group):
        exchange(group, windows, readable, source, catalogue.extent, sink, progress)


class _Array:
    """A numpy array to fill."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array, self._region = array, Box.full(array.shape)

    def put(self, place: View, source: NDArray[Any]) -> None:
        """Fill a place."""
        place_of(self._array, self._region, place)[...] = source


class _Target:
    """A live tensor to fill: through numpy in host memory, through torch on a device or where values are cast."""

    def __init__(self, part: LocalPart, stored: str) -> None:
        self._region = part.region
        self._tensor = storable(part.tensor.detach())
        self._cast = None if stored == part.meta.dtype else getattr(torch, stored)
        self._array: NDArray[Any] | None = None
        if self._tensor.device.type == "cpu" and self._cast is None:
            self._array = _as_array(self._tensor, DTYPES[part.meta.dtype].itemsize)

    def put(self, place: View, source: NDArray[Any]) -> None:
        """Fill a place with the bytes of `source`."""
        if self._array is not None:
            place_of(self._array, self._region, place)[...] = source
            return
        host = torch.from_numpy(np.ascontiguousarray(source).view(_SIGNED[source.itemsize]))
        target = self._tensor
        if isinstance(self._region, FlatRange):
            target = target[place.offset :][: int(np.prod(place.shape, dtype=np.int64))].view(place.shape)
        if place.shape:
            target = target[place.box.slices()]
        if self._cast is not None:
            target.copy_(host.view(self._cast))
            return
        # The bytes, not the values: both sides are seen as integers of the same size.
        target.view(host.dtype).copy_(host) if host.dtype is not torch.complex128 else target.copy_(host)


_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _as_array(tensor: torch.Tensor, itemsize: int) -> NDArray[Any]:
    """The tensor's own memory as a numpy array of carrier type, whatever its strides are."""
    # Not Tensor.numpy(), which forbids the storage to be resized from then on.
    array: NDArray[Any] = np.from_dlpack(tensor.view(_TORCH[itemsize]))
    return array if itemsize in (1, 16) else array.view(carrier(itemsize))
