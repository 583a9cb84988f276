"""A checkpoint of any format as ckptsvc would have saved it.

The canonical names are those of a state tree {"model": model, "optimizer": optimizer}:

    model/<parameter or buffer>                     in the dtype the job trained in
    optimizer/state/<parameter>/exp_avg, ...        the optimizer's own names for its state; `step` is 0-d float32
    optimizer/state/<parameter>/master              the fp32 master where the model's own tensor is a lower precision

Two names of one tensor (tied weights) are one tensor and an alias. Everything that is not a tensor is in the document:
{"optimizer": {"state": {}, "param_groups": [{"lr": ..., "params": [<parameter>, ...]}, ...]}, ...}.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import msgspec

from ckptsvc.errors import Damaged, LayoutError, NotFound
from ckptsvc.format.checksum import Digests
from ckptsvc.geometry.box import Box, Region
from ckptsvc.geometry.reshard import Block, StoredRegion, check_cover
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.pipeline.read import Catalogue, Source
from ckptsvc.types import DTYPES, TensorMeta

EXTENT = 256 << 10
"""Bytes of a foreign file that are read as one: large reads come of neighbours."""

MAX_LOADED = 4
"""Entries that are kept in memory because they are not in the file as they are (compressed)."""

MAX_LOADED_BYTES = 256 << 20
"""Bytes that they have together; a larger one is kept alone."""

MASTER = "master"
"""The slot of optimizer state that is the fp32 master of a parameter."""

_LANES = 32  # numbers a file has: one for each remainder of an element size, up to 16, ...
_VALUE = 16  # ... and this lane is that of values, numbered by themselves

MODEL, STATE = "model/", "optimizer/state/"


class Note(NamedTuple):
    """Something a person should know about what was read or will be written.

    Attributes:
        kind: "lost" (not carried over), "repaired" (right here, wrong in the framework's own tools) or "warning".
        what: one sentence.
    """

    kind: str
    what: str


class Logical(Catalogue, Protocol):
    """A checkpoint that can be read, converted and compared, whatever its format."""

    @property
    def origin(self) -> str:
        """Format and place, for messages: "deepspeed:/path/global_step5"."""

    @property
    def step(self) -> int:
        """The training step; 0 if the format does not say."""

    @property
    def world_size(self) -> int:
        """How many documents there are."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tensors, each with the name it is stored under."""

    @property
    def notes(self) -> Sequence[Note]:
        """What a person should know about it."""

    @property
    def source(self) -> Source:
        """Where the bytes are read from."""

    def names(self) -> list[str]:
        """All tensors, sorted, without aliases."""

    def __contains__(self, name: object) -> bool:
        """Whether it is the name or an alias of a tensor."""

    def document(self, rank: int = 0) -> dict[str, Any]:
        """The plain values of a rank."""

    def close(self) -> None:
        """Give back what is open."""


class Stretch(NamedTuple):
    """What a shard number of a foreign checkpoint stands for.

    Attributes:
        key: the file; "" for bytes that are in `data`.
        start: the byte of the file that is byte 0 of the shard.
        nbytes: length in bytes; of zeros if there are neither key nor data.
        data: the bytes themselves, for small values that no file has as such.
        load: makes the bytes where they are not in the file as they are (compressed entries); kept while in use.
    """

    key: str
    start: int
    nbytes: int
    data: bytes | None = None
    load: Callable[[Files], bytes] | None = None


class Entry(NamedTuple):
    """An entry of a foreign file whose data lies somewhere inside: found out when it is first wanted.

    Attributes:
        key, start, nbytes: the entry: file, first byte, length in bytes.
        locate: reads what it must of some entries and returns the tensor that each of them is.
    """

    key: str
    start: int
    nbytes: int
    locate: Callable[[Files, Sequence[Entry]], Sequence[StoredTensor]]


class _Chunk(msgspec.Struct, gc=False):
    block: Block | None
    where: Entry | Stretch | StoredTensor | tuple[str, int]
    value: int  # the number of a `Stretch`; else -1


class _Tensor(msgspec.Struct):
    meta: TensorMeta
    chunks: dict[Region, _Chunk]
    stored: list[StoredRegion] | None = None


class Foreign:
    """A `Logical` that an importer builds: `add...` for every piece, `seal`, then it is read.

    Attributes: see `Logical`; the importer sets `step`, `plain` (the document), `aliases` and adds to `notes`.
    """

    extent = EXTENT
    world_size = 1

    def __init__(self, origin: str, files: Files) -> None:
        self.origin = origin
        self.files = files
        self.step = 0
        self.plain: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        self.notes: list[Note] = []
        self._tensors: dict[str, _Tensor] = {}
        self._values: list[Stretch | None] = []
        self._keys: list[str] = []
        self._key_numbers: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._order: list[str] = []
        self._looked = 0
        self.source: Source = _ForeignSource(self)

    # ---- building -------------------------------------------------------------------------------------------

    def add(
        self,
        meta: TensorMeta,
        region: Region,
        where: tuple[str, int] | Entry | Stretch,
        block: Block | None = None,
    ) -> None:
        """One stored piece of a tensor. The first of pieces that say the same region is used, others are dropped.

        Args:
            meta: name, dtype, global shape: the same in every call for the tensor.
            region: which part it is; empty parts are dropped.
            where: the file and the byte where its data begins; or an entry to be looked into later; or bytes.
            block: where the data is a part of a larger array (see `geometry.reshard.Block`).

        Raises:
            Damaged: an unknown dtype, or pieces that disagree about dtype or shape.
        """
        if meta.dtype not in DTYPES:
            raise Damaged(f"{self.origin}: {meta.name} has the unknown element type {meta.dtype!r}")
        tensor = self._tensors.setdefault(meta.name, _Tensor(meta, {}))
        if tensor.meta != meta:
            raise Damaged(
                f"{self.origin}: {meta.name} is {tensor.meta.dtype}{list(tensor.meta.shape)} in one file and"
                f" {meta.dtype}{list(meta.shape)} in another"
            )
        if (not region.is_empty or 0 in meta.shape) and region not in tensor.chunks:
            tensor.chunks[region] = _Chunk(block, where, self._numbered(where))

    def _numbered(self, where: tuple[str, int] | Entry | Stretch) -> int:
        """Files and values get their numbers as they are added: the same on every rank that reads the same files."""
        if isinstance(where, Stretch):
            self._values.append(None)
            return len(self._values) - 1
        if where[0] not in self._key_numbers:
            self._key_numbers[where[0]] = len(self._keys)
            self._keys.append(where[0])
        return -1

    def add_value(self, meta: TensorMeta, data: bytes) -> None:
        """A whole small tensor given by its little-endian bytes."""
        self.add(meta, Box.full(meta.shape), Stretch("", 0, len(data), data))

    def rename(self, name: str, new: str) -> None:
        """Call a tensor otherwise."""
        tensor = self._tensors.pop(name)
        tensor.meta = tensor.meta._replace(name=new)
        self._tensors[new] = tensor

    def drop(self, name: str) -> None:
        """Forget a tensor."""
        del self._tensors[name]

    def seal(self) -> Foreign:
        """Check that the pieces of every tensor cover it, and that every alias has its tensor; returns itself.

        Raises:
            LayoutError: names a tensor and a part of it that no file has.
        """
        for name, tensor in self._tensors.items():
            shape = tensor.meta.shape
            try:
                check_cover(shape, list(tensor.chunks), name=name)
            except LayoutError as error:
                raise LayoutError(f"{self.origin}: {error.what}", hint="a file of the checkpoint is missing") from None
        for alias, name in self.aliases.items():
            if name not in self._tensors or alias in self._tensors:
                raise Damaged(f"{self.origin}: {alias} is said to be another name of {name}")
        self._order = self.names()
        return self

    # ---- reading --------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """See Logical."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self.aliases

    def __len__(self) -> int:
        return len(self._tensors)

    def resolve(self, name: str) -> str:
        """See Catalogue."""
        return self._tensor(name).meta.name

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        return self._tensor(name).meta

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """See Catalogue; looks into entries the first time."""
        tensor = self._tensor(name)
        if tensor.stored is None:
            self._look_into(tensor)
            tensor.stored = [self._stored(tensor.meta, *item) for item in tensor.chunks.items()]
        return tensor.stored

    def shard_name(self, shard: int) -> str:
        """See Catalogue."""
        key = self.stretch(shard).key
        return f"{self.files.url}/{key}" if key else f"a value of {self.origin}"

    def document(self, rank: int = 0) -> dict[str, Any]:
        """See Logical."""
        return self.plain

    def close(self) -> None:
        """See Logical."""
        self.files.close()

    def _tensor(self, name: str) -> _Tensor:
        tensor = self._tensors.get(self.aliases.get(name, name))
        if tensor is None:
            raise LayoutError(f"{self.origin} has no tensor {name[:200]!r}", hint="`ckptsvc inspect` lists what it has")
        return tensor

    def _look_into(self, tensor: _Tensor) -> None:
        """Find where the data of its entries begins.

        Who wants many tensors wants them in the order of their names: as many entries of the next ones are looked into
        as there were before, so that many are at a time and few in vain.
        """
        if not any(isinstance(chunk.where, Entry) for chunk in tensor.chunks.values()):
            return
        found: dict[Callable[..., Any], list[tuple[_Chunk, Entry]]] = {}
        next_ones = islice(self._order, bisect_right(self._order, tensor.meta.name), None)
        count = 0
        for one in chain((tensor,), (self._tensors[name] for name in next_ones)):
            if count > self._looked:
                break
            for chunk in one.chunks.values():
                if isinstance(chunk.where, Entry):
                    found.setdefault(chunk.where.locate, []).append((chunk, chunk.where))
                    count += 1
        for locate, chunks in found.items():
            for (chunk, _), where in zip(chunks, locate(self.files, [entry for _, entry in chunks]), strict=True):
                chunk.where = where
        self._looked += count

    def _stored(self, meta: TensorMeta, region: Region, chunk: _Chunk) -> StoredRegion:
        itemsize = DTYPES[meta.dtype].itemsize
        where, block = chunk.where, chunk.block
        if isinstance(where, Entry):
            (where,) = where.locate(self.files, [where])
        if isinstance(where, StoredTensor):
            block = _seen(meta, region, block, where)
            where = where.where
        size = math.prod(block.shape) if block else region.size
        if isinstance(where, Stretch):
            self._values[chunk.value] = where
            shard, offset = chunk.value * _LANES + _VALUE, 0
        else:
            # One shard of a file for each remainder of the element size: no element then lies across two windows.
            key, start = where
            phase = start % itemsize
            shard, offset = self._key_numbers[key] * _LANES + phase, start - phase
        if offset < 0 or offset + (_reach(block) if block else size) * itemsize > self.stretch(shard).nbytes:
            raise Damaged(f"{meta.name}: {self.shard_name(shard)} ends before its data does")
        return StoredRegion(meta.name, region, shard, offset, size * itemsize, block)

    def stretch(self, shard: int) -> Stretch:
        """What a shard number stands for."""
        number, lane = divmod(shard, _LANES)
        if lane == _VALUE:
            value = self._values[number]
            assert value is not None, "a region of it has been asked for"
            return value
        key = self._keys[number]
        if key not in self._sizes:
            try:
                self._sizes[key] = self.files.size(key)
            except NotFound:
                raise Damaged(f"{self.files.url}/{key} is missing") from None
        return Stretch(key, lane, max(self._sizes[key] - lane, 0))


def _reach(block: Block) -> int:
    """Elements of the stored array up to the last of the region: the array itself may end behind the file's end."""
    last = 0
    for n, origin, extent in zip(block.shape, block.box.origin, block.box.shape, strict=True):
        last = last * n + origin + extent - 1
    return last + 1


def _seen(meta: TensorMeta, region: Region, block: Block | None, stored: StoredTensor) -> Block | None:
    """How a region is seen in the tensor that an entry turned out to be."""
    shape = block.shape if block else region.shape if isinstance(region, Box) else (region.length,)
    if stored.dtype != meta.dtype or stored.shape != shape:
        raise Damaged(
            f"{meta.name}: {stored.storage.key} has {stored.dtype}{list(stored.shape)} for {region}, where"
            f" {meta.dtype}{list(shape)} is expected"
        )
    inner = stored.block()
    if inner is None or block is None:
        return inner or block
    return Block(inner.shape, inner.inside(block.box), tuple(-1 if d < 0 else inner.order[d] for d in block.order))


class _ForeignSource:
    """Reads the stretches of a foreign checkpoint; see pipeline.read.Source."""

    def __init__(self, foreign: Foreign) -> None:
        self._foreign = foreign
        self._loaded: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def size(self, shard: int) -> int:
        return self._foreign.stretch(shard).nbytes

    def digests(self, shard: int) -> Digests | None:
        return None

    def name(self, shard: int) -> str:
        return self._foreign.shard_name(shard)

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        key, start, nbytes, data, load = self._foreign.stretch(shard)
        if data is None and load is not None:
            data = self._load(shard, load)
            if len(data) != nbytes:
                raise Damaged(f"{self.name(shard)}: an entry has {len(data)} bytes, {nbytes} are expected")
        if data is not None:
            buffer[:] = data[offset : offset + len(buffer)]
        elif key:
            self._foreign.files.read_into(key, start + offset, buffer)
        else:
            buffer[:] = bytes(len(buffer))

    def view(self, shard: int) -> memoryview | None:
        return None

    def _load(self, shard: int, load: Callable[[Files], bytes]) -> bytes:
        # One at a time: several readers want windows of the same entry, and memory is the scarcer.
        with self._lock:
            data = self._loaded.pop(shard, None)
            if data is None:
                room = MAX_LOADED_BYTES - self.size(shard)
                while self._loaded and (len(self._loaded) >= MAX_LOADED or sum(map(len, self._loaded.values())) > room):
                    self._loaded.popitem(last=False)
                data = load(self._foreign.files)
            self._loaded[shard] = data
            return data
