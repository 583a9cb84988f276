"""Copies of shards on a disk of their own node: how they lie there, and how they go on from there and back.

One folder for each job, in it, as in the durable store, one for each checkpoint:

    step-000000000100.e00007/r00003-9f2c01ab.safetensors              the shard, byte for byte
    step-000000000100.e00007/r00003-9f2c01ab.safetensors.json         its record: written after it, so that it is whole
    step-000000000100.e00007/r00003-9f2c01ab.safetensors.durable      it is in the durable store, under the same name
    step-000000000100.e00007/r00003-9f2c01ab.safetensors.committed    so is the whole checkpoint

A shard without a record is what an interrupted write has left. A shard that is drained once more gets the same name in
the durable store, so that an interrupted drain leaves nothing behind. Bytes are verified whenever they are read.
"""

from __future__ import annotations

import enum
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
import numpy as np

from ckptsvc.config import LARGEST_EXTENT, PAGE
from ckptsvc.errors import CkptsvcError, Damaged, IncompatibleVersion, InvalidInput, NotFound, StoreError
from ckptsvc.format.checksum import Digests, check, digest64, extent_count, strong_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import checkpoint_name, parse_shard_name
from ckptsvc.format.compat import FORMAT
from ckptsvc.format.limits import MAX_SHARDS, MAX_TENSOR_BYTES
from ckptsvc.format.record import canonical, convert, parse
from ckptsvc.format.shard import ShardInfo, decode_header, header_length
from ckptsvc.pipeline.arena import Label
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.storage import Store

MAX_COPY_RECORD: Final = 64 << 20
"""Bytes of a record: a shard of 4 TiB, in extents of 1 MiB, has 32 MiB of digests, and a third more in JSON."""

_RECORD: Final = ".json"
_READ_STEP: Final = 16 << 20
_MAP_NORESERVE: Final = 0x4000  # Linux; the mmap module has it from Python 3.13 on
_HUGE: Final = 2 << 20


class Mark(enum.Enum):
    """What is known of a copy beyond its record; the value is the end of the marker's name."""

    DURABLE = ".durable"
    COMMITTED = ".committed"


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one copy.

    Attributes:
        label: whose it is, as beside an arena.
        name: of the shard, here and in the durable store.
        digests: xxh3_64 of every extent, u64 little-endian.
    """

    label: Label
    name: str
    digests: bytes
    format: str = FORMAT

    @property
    def folder(self) -> str:
        """The name of its checkpoint."""
        return checkpoint_name(self.label.step, self.label.epoch)

    @property
    def key(self) -> str:
        """Its key, here and in the durable store."""
        return f"{self.folder}/{self.name}"

    def array(self) -> Digests:
        """The digests as an array."""
        return np.frombuffer(self.digests, "<u8")

    def encode(self) -> bytes:
        """The bytes of the record: canonical JSON with the `check` of all other fields."""
        fields = msgspec.to_builtins(self)
        fields["check"] = digest64(canonical(fields))
        return canonical(fields)

    @classmethod
    def decode(cls, data: bytes, what: str) -> Copy:
        """Read a record.

        Raises:
            Damaged: it does not verify, or says what cannot be.
            IncompatibleVersion: a newer major version wrote it.
        """
        fields = parse(data, MAX_COPY_RECORD, what)
        given = fields.pop("check", None)
        if given != digest64(canonical(fields)):
            raise Damaged(f"{what} does not match its own checksum")
        copy = convert(fields, cls, what)
        label = copy.label
        try:
            checkpoint_name(label.step, label.epoch)
        except InvalidInput as error:
            raise Damaged(f"{what}: {error}") from None
        possible = (
            0 <= label.rank < label.world_size <= MAX_SHARDS
            and 0 < label.nbytes <= MAX_TENSOR_BYTES
            and 0 < label.extent <= LARGEST_EXTENT
            and label.extent % PAGE == 0
            and 0 <= label.attempt < 1 << 31
        )
        if not possible or not label.job or not label.store or parse_shard_name(copy.name) != label.rank:
            raise Damaged(f"{what} says what cannot be")
        if len(copy.digests) != 8 * extent_count(label.nbytes, label.extent):
            raise Damaged(f"{what} has {len(copy.digests)} bytes of digests for {label.nbytes} of data")
        return copy


class Found(NamedTuple):
    """A copy that an earlier agent has left."""

    copy: Copy
    marks: frozenset[Mark]


def keep(store: Store, copy: Copy) -> None:
    """The shard is there, whole and synced: write its record, which makes it a copy."""
    store.put_if_absent(copy.key + _RECORD, copy.encode())


def mark(store: Store, copy: Copy, what: Mark) -> None:
    """Remember something about a copy beyond the life of this process."""
    store.put_if_absent(copy.key + what.value, b"1")


def remove(store: Store, key: str) -> None:
    """Remove a copy, its record first; `key` is that of the shard."""
    for end in (_RECORD, *(m.value for m in Mark), ""):
        store.delete(key + end)


def scan(store: Store, on_damaged: Callable[[CkptsvcError], None]) -> Iterator[Found]:
    """The copies of one job's folder, oldest first; what interrupted writes and removals left there is removed.

    `on_damaged` is told of every record that cannot be used; its shard is removed too.
    """
    for folder in store.children(""):
        sizes = {entry.key: entry.size for entry in store.list(folder)}
        known = set()
        for key in sorted(sizes):
            shard = key.removesuffix(_RECORD)
            if shard == key or shard not in sizes:
                continue
            try:
                copy = Copy.decode(store.read(key, MAX_COPY_RECORD), key)
                if copy.key != shard or copy.label.nbytes != sizes[shard]:
                    raise Damaged(f"{key} is the record of {copy.key}, of {copy.label.nbytes} bytes")
            except (Damaged, IncompatibleVersion, InvalidInput, NotFound) as error:
                on_damaged(error)
                continue
            marks = frozenset(m for m in Mark if shard + m.value in sizes)
            known |= {shard, key, *(shard + m.value for m in marks)}
            yield Found(copy, marks)
        for key in sorted(sizes.keys() - known, reverse=True):
            store.delete(key)


def describe(store: Store, copy: Copy) -> tuple[Columns, ShardInfo]:
    """The table of a copy and where it comes from, verified; Damaged where it cannot be read, or does not verify."""
    extent, head = copy.label.extent, bytearray(min(copy.label.extent, copy.label.nbytes))
    _read(store, copy, memoryview(head), 0, len(head))
    prefix = 8 + header_length(bytes(head[:8]))
    if prefix > len(head):
        head = bytearray(min(-(-prefix // extent) * extent, copy.label.nbytes))
        _read(store, copy, memoryview(head), 0, len(head))
    table = decode_header(bytes(head[:prefix]), copy.label.nbytes)
    return Columns.from_table(table), table.info


def strong_halves(store: Store, copy: Copy, go_on: Callable[[], None]) -> Digests:
    """64 bits more for each of a copy's digests (see `strong_digests`), which are verified; Damaged as `describe`."""
    halves = []
    for start, stop in _steps(0, copy.label.nbytes, copy.label.extent):
        go_on()
        buffer = memoryview(bytearray(min(stop, copy.label.nbytes) - start))
        _read_at(store, copy, start, buffer)
        halves.append(strong_digests(buffer, copy.label.extent)[1])
    return np.concatenate(halves)


class Stretch:
    """Some extents of a copy, read and verified when somebody asks for them; see `assembled.Piece`."""

    def __init__(self, store: Store, copy: Copy, first: int, count: int, go_on: Callable[[], None]) -> None:
        extent, nbytes = copy.label.extent, copy.label.nbytes
        self._store, self._copy, self._go_on = store, copy, go_on
        self._start, self._stop = first * extent, min((first + count) * extent, nbytes)

    def __len__(self) -> int:
        """How many bytes."""
        return self._stop - self._start

    def __getitem__(self, part: slice, /) -> memoryview:
        """Those from part.start to before part.stop; whole extents are read for them."""
        self._go_on()
        extent = self._copy.label.extent
        start, stop = self._start + part.start, self._start + part.stop
        low, high = start // extent * extent, min(-(-stop // extent) * extent, self._stop)
        buffer = memoryview(bytearray(high - low))
        _read_at(self._store, self._copy, low, buffer)
        failpoint("in_drain")
        return buffer[start - low : stop - low]


def drain(local: Store, durable: Store, copy: Copy, go_on: Callable[[], None]) -> float:
    """Write a copy to the durable store, under the same key; returns the seconds that that store took.

    It is read behind the write's back, a little ahead of it, and let go when it is written: the memory that is taken
    does not depend on the size of the shard.

    Args:
        local: the folder of the job.
        durable: the store of the run.
        copy: what to drain.
        go_on: called before every piece; raises to stop the drain.

    Raises:
        Damaged: the copy cannot be read or does not verify; what was written of it is removed.
        StoreError: the durable store failed.
    """
    nbytes = copy.label.nbytes
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE) as memory:
        view = memoryview(memory)
        window = _Window(local, copy, memory, view, go_on)
        began = time.perf_counter()
        try:
            durable.write(copy.key, view, nbytes, ready=window.ready, progress=window.written)
        except Damaged:
            durable.delete(copy.key)
            raise
        finally:
            view.release()
        return time.perf_counter() - began - window.seconds


def refill(local: Store, copy: Copy, arena: memoryview) -> None:
    """Read a copy into an arena, verified; Damaged where it cannot be read, or does not verify."""
    for start, stop in _steps(0, copy.label.nbytes, copy.label.extent):
        _read(local, copy, arena, start, stop)
        failpoint("in_refill")


class _Window:
    """The part of a shard that is in memory: read and not yet written; `seconds`: what the reading took."""

    def __init__(
        self, local: Store, copy: Copy, memory: mmap.mmap, view: memoryview, go_on: Callable[[], None]
    ) -> None:
        self._local, self._copy, self._memory, self._view, self._go_on = local, copy, memory, view, go_on
        self._read = self._written = self._dropped = 0
        self.seconds = 0.0

    def ready(self, nbytes: int) -> None:
        """See `Store.write`."""
        self._go_on()
        began = time.perf_counter()
        for start, stop in _steps(self._read, nbytes, self._copy.label.extent):
            end = min(stop, self._copy.label.nbytes)
            _read(self._local, self._copy, self._view, start, end)
            self._read = end
        self.seconds += time.perf_counter() - began

    def written(self, nbytes: int) -> None:
        """See `Store.write`."""
        failpoint("in_drain")
        self._go_on()
        self._written += nbytes
        stop = self._written // _HUGE * _HUGE
        if stop > self._dropped:
            self._memory.madvise(mmap.MADV_DONTNEED, self._dropped, stop - self._dropped)
            self._dropped = stop


def _steps(start: int, stop: int, extent: int) -> Iterator[tuple[int, int]]:
    """Pieces of whole extents from `start`, which begins one, to `stop` or beyond."""
    step = max(_READ_STEP // extent, 1) * extent
    while start < stop:
        yield start, start + step
        start += step


def _read(local: Store, copy: Copy, target: memoryview, start: int, stop: int) -> None:
    with target[start : min(stop, copy.label.nbytes)] as part:
        _read_at(local, copy, start, part)


def _read_at(local: Store, copy: Copy, start: int, part: memoryview) -> None:
    """Read whole extents from byte `start` on."""
    try:
        local.read_into(copy.key, start, part)
    except StoreError as error:  # of the disk, not of the store that a drain writes to
        raise Damaged(f"{local.url}/{copy.key} cannot be read: {error}") from None
    check(part, copy.array(), f"{local.url}/{copy.key}", start // copy.label.extent, copy.label.extent)
