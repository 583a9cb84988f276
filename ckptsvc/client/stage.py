"""Staging: device -> arena in one pass. What goes where is planned once for each structure of the state."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import is_
from typing import cast

import torch
from torch import Tensor

from ckptsvc.client.memcopy import bytes_of, copy_bytes
from ckptsvc.client.parts import Capture, LocalPart
from ckptsvc.errors import ArenaExhausted
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.layout import split_replicated
from ckptsvc.pipeline.arena import TAIL, filled_word
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.types import DTYPES

Piece = memoryview | Tensor
"""One side of a copy: bytes where it is contiguous host memory, else a tensor."""

RUN_BYTES = 256 << 20
"""Bytes that are copied before the agent is told that they are final."""

OBJECTS_ROOM = 1 << 20
"""Bytes an arena has beyond what the first snapshot needs: the objects document grows as training goes on."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A piece of a part that this rank stages: the region it is, and how to get it from the part's tensor."""

    part: int
    region: Box | FlatRange
    index: tuple[slice, ...] | None


def choose(parts: Sequence[LocalPart], rank: int, same_plain: tuple[int, ...]) -> list[Chosen]:
    """Which pieces of its parts this rank stages. Every holder computes the same division, with no message.

    Args:
        parts: what this rank holds.
        rank: this rank.
        same_plain: ranks that hold the same set of plain tensors (this one included): the holders of those parts
            whose holders are `EVERYONE`.

    For another rank than the one that holds the parts, it is what that one stages of them.
    """
    chosen: list[Chosen] = []
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, part in enumerate(parts):
        ranks = same_plain if part.holders.ranks is None else part.holders.ranks
        if rank not in ranks:
            continue
        if len(ranks) == 1:
            chosen.append(Chosen(i, part.region, None))
        elif part.splittable:
            shared.setdefault(ranks, []).append(i)
        elif ranks[0] == rank:
            chosen.append(Chosen(i, part.region, None))
    for ranks, members in shared.items():
        members.sort(key=lambda i: (parts[i].meta.name, _as_box(parts[i].region).origin))  # ranks may differ in order
        boxes = [_as_box(parts[i].region) for i in members]
        items = [(box, DTYPES[parts[i].meta.dtype].itemsize) for i, box in zip(members, boxes, strict=True)]
        me = ranks.index(rank)
        for i, box, shares in zip(members, boxes, split_replicated(items, len(ranks)), strict=True):
            for holder, share in shares:
                if holder == me:
                    chosen.append(_piece(i, parts[i].region, box, share))
    return chosen


def _as_box(region: Box | FlatRange) -> Box:
    return region if isinstance(region, Box) else Box((region.start,), (region.length,))


def _piece(part: int, region: Box | FlatRange, box: Box, share: Box) -> Chosen:
    if share == box:
        return Chosen(part, region, None)
    index = share.relative_to(box.origin).slices()
    if isinstance(region, FlatRange):
        return Chosen(part, FlatRange(share.origin[0], share.shape[0]), index)
    return Chosen(part, share, index)


@dataclass
class StagePlan:
    """Where every tensor of this rank's shard lies, and the views that the copy goes through.

    The views of an arena are made once; those of the live tensors once for as long as the capture holds.
    """

    template: ShardTemplate
    chosen: list[Chosen]
    same_plain: tuple[int, ...] = ()
    _targets: dict[str, list[Piece]] = field(default_factory=dict)
    _sources: list[Piece] = field(default_factory=list)
    _sources_of: tuple[LocalPart, ...] = ()
    _live: list[Tensor] = field(default_factory=list)
    _addresses: list[int] = field(default_factory=list)
    _arenas: dict[str, memoryview] = field(default_factory=dict)
    _in_order: list[tuple[list[int], int]] = field(default_factory=list)

    @staticmethod
    def make(capture: Capture, rank: int, same_plain: tuple[int, ...]) -> StagePlan:
        """Plan for one structure."""
        chosen = choose(capture.parts, rank, same_plain)
        template = ShardTemplate([Part(capture.parts[c.part].meta, c.region) for c in chosen])
        return StagePlan(template, chosen, same_plain)

    def room(self, objects: int) -> int:
        """Bytes to ask for in an arena where the objects document has so many now."""
        return self.template.total(2 * objects) + OBJECTS_ROOM

    def write(
        self, capture: Capture, arena: memoryview, slot: str, info: ShardInfo, objects: bytes, *, overlap: bool = False
    ) -> tuple[int, Callable[[], None]]:
        """Fill the arena with the shard image.

        Returns:
            (size of the image in bytes, what is left to do). Without `overlap` nothing is left and all bytes are
            final. With it, parameters and optimizer state are copied by the callable, which may run beside forward
            and backward; it must have returned before an optimizer changes them.
        """
        total = self.template.total(len(objects))
        if total > len(arena) - TAIL:
            raise ArenaExhausted(f"an arena of {len(arena)} bytes cannot hold a snapshot of {total}")
        sources = self._pieces(capture)
        targets = self._targets.get(slot)
        if targets is None:
            targets = self._targets[slot] = self._views(capture, arena)
            self._arenas[slot] = arena
        arena[: self.template.data_start] = self.template.header(info, len(objects))
        offset = self.template.objects_offset
        arena[offset : offset + len(objects)] = objects
        filled = filled_word(arena)
        if not overlap:
            if all(isinstance(source, memoryview) for source in sources):
                self._copy_in_order(targets, sources, filled)
            else:
                _copy(targets, sources, arena)
            filled[0] = total
            return total, _nothing
        on_gpu = {s.device for s in self._live if s.is_cuda}
        ready = [(device, torch.cuda.current_stream(device).record_event()) for device in on_gpu]
        late = [capture.parts[c.part].splittable for c in self.chosen]
        now = [not is_late for is_late in late]
        _copy(list(compress(targets, now)), list(compress(sources, now)), arena)

        def finish() -> None:
            for device, event in ready:
                torch.cuda.current_stream(device).wait_event(event)  # the training's kernels so far, on any stream
            _copy(list(compress(targets, late)), list(compress(sources, late)), arena)
            filled[0] = total

        return total, finish

    def _copy_in_order(self, targets: list[Piece], sources: list[Piece], filled: memoryview) -> None:
        """Copy from the front of the image to its end, and say how far it is: the agent writes it meanwhile."""
        for pieces, start in self._runs():
            filled[0] = start
            failpoint("in_copy")
            _copy_host([targets[i] for i in pieces], [sources[i] for i in pieces])

    def _runs(self) -> list[tuple[list[int], int]]:
        """The pieces in the order of the file, in runs of some size, and where each run begins."""
        if not self._in_order:
            entries, size = self.template.entries, RUN_BYTES
            for i in sorted(range(len(entries)), key=lambda i: entries[i].offset):
                if size >= RUN_BYTES:
                    self._in_order.append(([], entries[i].offset))
                    size = 0
                self._in_order[-1][0].append(i)
                size += entries[i].nbytes
        return self._in_order

    def forget(self, but: Collection[str]) -> None:
        """Drop the views of all arenas but these, so that they can be unmapped."""
        for slot in [s for s in self._arenas if s not in but]:
            self._targets.pop(slot, None)
            _unpin(self._arenas.pop(slot))

    def _pieces(self, capture: Capture) -> list[Piece]:
        known = self._sources_of
        same = len(known) == len(capture.parts) and all(map(is_, known, capture.parts))
        # A capture sees to it that equal parts are equal memory; bytes of freed memory must not be staged even so.
        if not same or list(map(Tensor.data_ptr, self._live)) != self._addresses:
            tensors = [capture.parts[c.part].tensor for c in self.chosen]
            self._live = [
                storable(t if c.index is None else t[c.index]) for t, c in zip(tensors, self.chosen, strict=True)
            ]
            self._addresses = list(map(Tensor.data_ptr, self._live))
            self._sources = [bytes_of(tensor) or tensor for tensor in self._live]
            self._sources_of = capture.parts
            self._targets.clear()  # which of them are bytes follows the sources
        return self._sources

    def _views(self, capture: Capture, arena: memoryview) -> list[Piece]:
        whole = torch.frombuffer(arena, dtype=torch.uint8)
        views: list[Piece] = []
        for source, chosen, entry in zip(self._sources, self.chosen, self.template.entries, strict=True):
            stop = entry.offset + entry.nbytes
            if isinstance(source, memoryview):
                views.append(arena[entry.offset : stop])
                continue
            shape = chosen.region.shape if isinstance(chosen.region, Box) else (chosen.region.length,)
            views.append(whole[entry.offset : stop].view(source.dtype).view(shape))
        return views


def _nothing() -> None:
    """All is done."""


def _copy(targets: list[Piece], sources: list[Piece], arena: memoryview) -> None:
    """Copy into the arena; the bytes are final when this returns."""
    raw = [isinstance(source, memoryview) for source in sources]
    tensors = [not is_raw for is_raw in raw]
    device_sources = cast("list[Tensor]", list(compress(sources, tensors)))
    devices = {s.device for s in device_sources if s.device.type != "cpu"}
    if any(device.type == "cuda" for device in devices):
        _pin(arena)
    if device_sources:
        views = cast("list[Tensor]", list(compress(targets, tensors)))
        torch._foreach_copy_(views, device_sources, non_blocking=bool(devices))
    _copy_host(list(compress(targets, raw)), list(compress(sources, raw)))
    for device in devices:
        getattr(torch, device.type).synchronize(device)  # torch.cuda, torch.xpu, torch.npu ...


def _copy_host(targets: list[Piece], sources: list[Piece]) -> None:
    places, pieces = (cast("list[memoryview]", side) for side in (targets, sources))
    copy_bytes(places, pieces, torch.get_num_threads())


_pinned: set[int] = set()
"""Addresses of the arenas whose pages are locked."""


def _unpin(arena: memoryview) -> None:
    """Undo `_pin` while the arena is still mapped: another one may come to lie at the same address."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    if address in _pinned:
        _pinned.remove(address)
        torch.cuda.cudart().cudaHostUnregister(address)


def _pin(arena: memoryview) -> None:
    """Lock an arena's pages for the accelerator, once: copies into it then run at the speed of the link."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    if address not in _pinned:
        _pinned.add(address)
        # An error only means slower copies: locked memory may be limited (ulimit -l).
        torch.cuda.cudart().cudaHostRegister(address, len(arena), 0)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COPYABLE = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip


def storable(tensor: Tensor) -> Tensor:
    """The same memory as a dtype that every torch can copy: its own, or an integer of the same size."""
    if tensor.dtype in _COPYABLE:
        return tensor
    return tensor.view(_INTEGERS[tensor.element_size()])
