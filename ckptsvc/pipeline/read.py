"""Shards -> memory: which bytes of which shard go where, read in windows, verified extent by extent.

A window is a fixed run of extents of one shard. Windows do not depend on who wants what, so ranks that plan on their
own agree on them: that is how a job reads every byte once (see client.exchange). A window's pieces are boxes of targets
that its bytes fill; what a target is, the caller's sink knows.

    index + wants --plan_windows--> windows --read--> buffer --verify--> sink(target, place, array)
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import Damaged, LayoutError
from ckptsvc.format.checksum import Digests, bad_extents
from ckptsvc.geometry.box import Box, Region, flat_to_boxes
from ckptsvc.geometry.reshard import Copy, StoredRegion, View, plan
from ckptsvc.types import DTYPES, TensorMeta

WINDOW_EXTENTS = 32
"""Most extents in a window: at most 63, the bits of a mask that travels as an int64."""

WINDOW_BYTES = 16 << 20
"""Most bytes in a window of several extents: readers hold a few windows in memory."""

READERS = 4
"""Windows that are read at a time. Measured on a local disk, cold, against the fastest raw read of the file: one takes
1.4 times as long (the device idles while a window is looked at), two 1.3, three to six 1.1 to 1.15."""

_CARRIER = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""The element type that carries elements of that many bytes; only their bytes matter."""


def window_bytes(extent: int) -> int:
    """The size of a window where a digest stands for `extent` bytes; a whole number of extents."""
    return extent * max(1, min(WINDOW_EXTENTS, WINDOW_BYTES // extent))


class Want(NamedTuple):
    """A region of a logical tensor that somebody wants; its place in the list given to `plan_windows` is the target."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    region: Region


class Piece(NamedTuple):
    """A part of a window that goes to one target.

    The source is `box` of the row-major array of shape `shape` that begins at byte `start` of the window; the target
    is the box inside the piece of the target's region that `place` says (see geometry.reshard.View), with the
    dimensions of the source in `order` (see geometry.reshard.Block) unless that is None.
    """

    start: int
    shape: tuple[int, ...]
    box: Box
    itemsize: int
    target: int
    place: View
    order: tuple[int, ...] | None = None


@dataclass(slots=True)
class Window:
    """`mask` has bit i set when extent i of the window is needed."""

    shard: int
    number: int
    mask: int = 0
    pieces: list[Piece] = field(default_factory=list)


class Catalogue(Protocol):
    """What a plan asks of a checkpoint: a `format.Index`, or a foreign checkpoint (`interop.logical`)."""

    @property
    def extent(self) -> int:
        """Bytes that are read, and verified where there are checksums, as one."""

    def resolve(self, name: str) -> str:
        """The name a tensor is stored under: the name itself unless it is an alias. LayoutError if there is none."""

    def meta(self, name: str) -> TensorMeta:
        """Name, dtype and global shape; LayoutError if there is no such tensor."""

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """All stored regions of a tensor that share an element with a wanted one; others may be among them."""

    def shard_name(self, shard: int) -> str:
        """The name of a shard, for messages."""


class Source(Protocol):
    """Where shards are read from."""

    def size(self, shard: int) -> int:
        """Bytes of the shard, as the index says."""

    def digests(self, shard: int) -> Digests | None:
        """xxh3_64 of every extent of the shard; None where the format keeps no checksums."""

    def name(self, shard: int) -> str:
        """The shard's name, for messages."""

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the shard's bytes from `offset` on."""

    def view(self, shard: int) -> memoryview | None:
        """All bytes of the shard where they are in memory already: then they are not copied first. Else None."""


Sink = Callable[[int, View, NDArray[Any]], None]
"""Takes (target, place, array): the array has the shape of the place's box; it is only lent."""


def carrier(itemsize: int) -> type[Any]:
    """The numpy element type that carries elements of `itemsize` bytes."""
    return _CARRIER[itemsize]


def plan_windows(index: Catalogue, wants: Sequence[Want]) -> dict[tuple[int, int], Window]:
    """The windows, by (shard, number), that fill every wanted region.

    Raises:
        LayoutError: a tensor is not stored, or with another dtype or shape, or not at a multiple of its element size.
    """
    windows: dict[tuple[int, int], Window] = {}
    span = window_bytes(index.extent)
    by_name: dict[str, list[int]] = {}
    for target, want in enumerate(wants):
        by_name.setdefault(index.resolve(want.name), []).append(target)
    for name, targets in by_name.items():
        meta = index.meta(name)
        for target in targets:
            want = wants[target]
            if (want.dtype, want.shape) != (meta.dtype, meta.shape):
                raise LayoutError(
                    f"{want.name} is stored as {meta.dtype}{list(meta.shape)} and wanted as"
                    f" {want.dtype}{list(want.shape)}"
                )
        itemsize = DTYPES[meta.dtype].itemsize
        regions = [wants[t].region for t in targets]
        stored = index.touching(name, regions)
        for piece in stored:
            if piece.offset % itemsize:  # an element could lie in two windows
                shard = index.shard_name(piece.shard)
                raise LayoutError(f"{name}: its data in {shard} begins at byte {piece.offset}, which is not aligned")
        for copy in plan(stored, regions, itemsize, meta.shape, name=name):
            _place(windows, copy, stored[copy.stored], targets[copy.target_index], itemsize, span)
    for window in windows.values():
        window.mask = _mask(window, index.extent)
    return windows


def _place(
    windows: dict[tuple[int, int], Window],
    copy: Copy,
    stored: StoredRegion,
    target: int,
    itemsize: int,
    span: int,
) -> None:
    """Cut a copy at window boundaries and note each part in its window."""
    source = copy.source
    base = stored.offset + source.offset * itemsize
    first, last = flat_bounds(source, itemsize)
    low, high = (base + first) // span, (base + last - 1) // span
    if low == high:
        window = windows.setdefault((stored.shard, low), Window(stored.shard, low))
        # Almost always: the data as it lies, from the first element of the piece that is inside this window.
        if base >= low * span and base + prod(source.shape) * itemsize <= (low + 1) * span:
            window.pieces.append(
                Piece(base - low * span, source.shape, source.box, itemsize, target, copy.target, copy.order)
            )
            return
    elements = prod(source.shape)
    for number in range(low, high + 1):
        window = windows.setdefault((stored.shard, number), Window(stored.shard, number))
        begin = max((number * span - base) // itemsize, 0)
        end = min(((number + 1) * span - base) // itemsize, elements)
        position = begin
        for block in flat_to_boxes(source.shape, begin, end - begin):
            part = block.intersect(source.box)
            if part is not None:
                shift = _reordered(part.relative_to(source.box.origin), copy.order)
                inside = Box(
                    tuple(a + b for a, b in zip(copy.target.box.origin, shift.origin, strict=True)),
                    shift.shape,
                )
                window.pieces.append(
                    Piece(
                        base + position * itemsize - number * span,
                        block.shape,
                        part.relative_to(block.origin),
                        itemsize,
                        target,
                        View(copy.target.offset, copy.target.shape, inside),
                        copy.order,
                    )
                )
            position += block.size


def _reordered(box: Box, order: tuple[int, ...] | None) -> Box:
    """A box of the source in the dimensions of the target."""
    if order is None:
        return box
    return Box(tuple(0 if d < 0 else box.origin[d] for d in order), tuple(1 if d < 0 else box.shape[d] for d in order))


def flat_bounds(view: View, itemsize: int) -> tuple[int, int]:
    """First byte, and one past the last byte, of a box inside the data of its piece."""
    first = last = 0
    for n, origin, extent in zip(view.shape, view.box.origin, view.box.shape, strict=True):
        first = first * n + origin
        last = last * n + origin + extent - 1
    return first * itemsize, (last + 1) * itemsize


def _mask(window: Window, extent: int) -> int:
    mask = 0
    for piece in window.pieces:
        first, last = flat_bounds(View(0, piece.shape, piece.box), piece.itemsize)
        low, high = (piece.start + first) // extent, (piece.start + last - 1) // extent
        mask |= ((1 << (high - low + 1)) - 1) << low
    return mask


def runs(mask: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits, as (first, one past the last)."""
    first = 0
    while mask >> first:
        if mask >> first & 1:
            last = first
            while mask >> last & 1:
                last += 1
            yield first, last
            first = last
        first += 1


def fill(window: Window, mask: int, source: Source, extent: int, buffer: memoryview) -> int:
    """Read the extents in `mask` into their places in the buffer, which stands for the whole window.

    Returns:
        bytes read.

    Raises:
        StoreError, Damaged: as the source raises.
    """
    start = window.number * window_bytes(extent)
    size = source.size(window.shard) - start
    total = 0
    for first, last in runs(mask):
        part = buffer[first * extent : min(last * extent, size)]
        source.read_into(window.shard, start + first * extent, part)
        total += len(part)
    return total


def verify(window: Window, mask: int, source: Source, extent: int, buffer: memoryview) -> None:
    """Check the extents in `mask` of a filled window.

    Raises:
        Damaged: names the shard and the byte range.
    """
    size, digests = source.size(window.shard), source.digests(window.shard)
    if digests is None:
        return
    for first, last in runs(mask):
        number = window.number * window_bytes(extent) // extent + first
        part = buffer[first * extent : min(last * extent, size - (number - first) * extent)]
        bad = bad_extents(part, digests, number, extent)
        if bad:
            stop = min((bad[0] + 1) * extent, size)
            what = f"{source.name(window.shard)}: bytes {bad[0] * extent} to {stop}"
            raise Damaged(f"{what} do not match their checksum")


def held(window: Window, source: Source, extent: int) -> memoryview | None:
    """The window's bytes in place, verified, where the source has them in memory; None where it has not.

    Raises:
        Damaged: as `verify`.
    """
    whole = source.view(window.shard)
    if whole is None:
        return None
    here = whole[window.number * window_bytes(extent) :]
    verify(window, window.mask, source, extent, here)
    return here


def deliver(window: Window, buffer: memoryview, sink: Sink) -> None:
    """Hand every piece of a filled window to the sink."""
    for start, shape, box, itemsize, target, place, order in window.pieces:
        count = prod(shape)
        array: NDArray[Any] = np.frombuffer(buffer, _CARRIER[itemsize], count, start).reshape(shape)
        part = array if box.shape == shape else array[box.slices()]
        sink(target, place, part if order is None else _in_order(part, order, place.box.shape))


def _in_order(array: NDArray[Any], order: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[Any]:
    kept = [d for d in order if d >= 0]
    return array.transpose(*kept, *(d for d in range(array.ndim) if d not in kept)).reshape(shape)


def place_of(array: NDArray[Any], region: Region, place: View) -> NDArray[Any]:
    """The part of a target's array that a place names; the array has the shape of the region (1-d for a flat range)."""
    if isinstance(region, Box):
        return array if place.box.shape == place.shape else array[place.box.slices()]
    flat = array[place.offset : place.offset + prod(place.shape)]
    block = flat.reshape(place.shape)
    return block[place.box.slices()] if place.shape else block  # a 0-d index would give a value, not a view


def array_sink(arrays: Sequence[NDArray[Any]], wants: Sequence[Want]) -> Sink:
    """A sink into numpy arrays of carrier type, one for each want, of the shape of its region."""

    def sink(target: int, place: View, source: NDArray[Any]) -> None:
        place_of(arrays[target], wants[target].region, place)[...] = source

    return sink


def read_windows(
    windows: Sequence[Window],
    source: Source,
    extent: int,
    sink: Sink,
    *,
    readers: int = READERS,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Read, verify and deliver windows; reading runs beside verifying and copying.

    Args:
        windows: in the order they should be read.
        source: where the shards are.
        extent: bytes per extent.
        sink: takes the pieces; it is called from several threads, never for the same elements.
        readers: windows that are read at a time; the memory budget is one window more.
        progress: called with bytes read since the last call, from several threads.

    Returns:
        bytes read.
    """
    total = 0
    lock, ended = threading.Lock(), threading.Event()
    count = min(readers + 1, max(len(windows), 1))
    todo = iter(windows)

    def work() -> None:
        nonlocal total
        buffer: memoryview | None = None
        while not ended.is_set():
            with lock:
                window = next(todo, None)
            if window is None:
                return
            nbytes, filled = 0, held(window, source, extent)
            if filled is None:
                filled = buffer = buffer or window_buffer(extent)
                with reading:
                    nbytes = fill(window, window.mask, source, extent, filled)
                verify(window, window.mask, source, extent, filled)
            deliver(window, filled, sink)
            with lock:
                total += nbytes
            if progress:
                progress(nbytes)

    # A thread that has read goes on to verify and copy while the next one reads: `readers` read at any time.
    reading = threading.Semaphore(readers)
    with ThreadPoolExecutor(count, thread_name_prefix="ckptsvc-read") as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after an error, or an interrupt from the keyboard, what the others would still read is of no use
            ended.set()
    for future in futures:
        future.result()
    return total


def read_arrays(
    index: Catalogue, source: Source, wants: Sequence[Want], *, readers: int = READERS
) -> list[NDArray[Any]]:
    """Wanted regions as arrays of carrier type, one for each want, of the shape of its region (1-d for a flat range).

    Raises:
        LayoutError, Damaged, StoreError: as `plan_windows` and `read_windows`.
    """
    arrays: list[NDArray[Any]] = []
    for want in wants:
        shape = want.region.shape if isinstance(want.region, Box) else (want.region.length,)
        arrays.append(np.empty(shape, carrier(DTYPES[want.dtype].itemsize)))
    windows = plan_windows(index, wants)
    ordered = [windows[key] for key in sorted(windows)]
    read_windows(ordered, source, index.extent, array_sink(arrays, wants), readers=readers)
    return arrays


def window_buffer(extent: int) -> memoryview:
    """Memory for one window, page-aligned, of huge pages where there are any: small ones cost 10 ms to touch."""
    memory = mmap.mmap(-1, window_bytes(extent), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
