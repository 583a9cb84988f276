"""Entries of `.distcp` files: where the data of a tensor begins in one, what object is in one, compressed ones.

A tensor's entry is a `torch.save` file of one tensor: about 1.5 KB and the data. Its first bytes are a zip header, the
pickle with shape and strides, and the header of the data. One small read finds the data, neighbours share a read, and
equal pickles are read once: a hundred thousand entries take about a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.dcp.metadata import Chunk, Place, Tensor
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Entry, Foreign, Stretch
from ckptsvc.interop.torch_format.file import TORCH, Storage, StoredTensor, read_torch, storage_id
from ckptsvc.interop.torch_format.pickles import loads
from ckptsvc.types import DTYPES, TensorMeta

HEAD = 1024
"""Bytes that are looked at of an entry: torch's own have the header of the data within 700."""

NEAR = 8 << 10
"""Entries that begin at most this far apart, in bytes, are looked at with one read."""

RUN = 1 << 20
"""Most bytes of such a read."""

READERS = 8
"""Reads at a time: a network file system answers each after a millisecond."""

MAX_ENTRY = 4 << 30
"""Largest entry that is taken into memory whole, in bytes."""

MAX_VALUE = 1 << 30
"""Most bytes that a compressed value may unpack to; a tensor may to its own size and `AROUND`."""

AROUND = 1 << 20
"""Most bytes of a file of `torch.save` around the data of its one tensor."""

ZSTD = "stream.zstd/1"

UNREADABLE = object()
"""Stands for a value that may not be read."""

_LOCAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x07\x08"
_FIRST = re.compile(rb"PK\x03\x04.{22}(..)(..)([^/]{1,100})/data\.pkl", re.DOTALL)


def add(foreign: Foreign, name: str, tensor: Tensor) -> None:
    """Add all pieces of a tensor to a checkpoint under a name, which may be another than its own.

    Raises:
        InvalidInput: an entry was transformed in a way that is not known.
        Damaged: the checkpoint has another tensor of that name.
    """
    meta = TensorMeta(name, tensor.dtype, tensor.shape)
    if 0 in tensor.shape:
        foreign.add_value(meta, b"")
    for chunk in tensor.chunks:
        foreign.add(meta, chunk.box, _where(tensor, chunk))


def _where(tensor: Tensor, chunk: Chunk) -> tuple[str, int] | Entry | Stretch:
    place = chunk.place
    if place.transforms:
        check_transforms(place)
        load = partial(_unpacked_tensor, tensor=tensor, chunk=chunk)
        return Stretch("", 0, tensor.nbytes(chunk.box), load=load)
    if place.raw:
        if place.nbytes != (size := tensor.nbytes(chunk.box)):
            raise Damaged(f"{place.key}: an entry has {place.nbytes} bytes where a piece of {size} should be")
        return place.key, place.start
    return Entry(place.key, place.start, place.nbytes, locate)


def check_transforms(place: Place) -> None:
    """Raises InvalidInput if an entry was transformed in a way that is not known."""
    if unknown := set(place.transforms) - {ZSTD}:
        raise InvalidInput(f"{place.key}: its entries were transformed by {sorted(unknown)}; only {ZSTD!r} is known")
    if len(place.transforms) > 1:
        raise InvalidInput(f"{place.key}: its entries were compressed {len(place.transforms)} times")


def read_values(files: Files, places: Sequence[Place], refused: list[InvalidInput] | None = None) -> list[Any]:
    """The objects of entries, read by the restricted reader, with `StoredTensor` in the places of tensors.

    Equal small objects may be one object: they must not be changed.

    Args:
        files: where they are.
        places: the entries.
        refused: collects why entries are not read, and `UNREADABLE` is in their places; None raises it.

    Raises:
        InvalidInput: one is of a type that is not on the list, or was transformed in a way that is not known.
        Damaged: one is not a file of torch.save.
    """
    known: dict[bytes, Any] = {}

    def take(place: Place, head: bytearray) -> Any:
        try:
            return read(place, head)
        except InvalidInput as error:
            if refused is None:
                raise
            refused.append(error)
            return UNREADABLE

    def read(place: Place, head: bytearray) -> Any:
        found = None if place.transforms else _pickle(head)
        if found is None or b"Q" in found[0]:  # it may refer to storages (BINPERSID)
            return _read_value(files, place)
        if found[0] not in known:
            known[found[0]] = loads(found[0], TORCH, f"{files.url}/{place.key}: the entry at byte {place.start}")
        return known[found[0]]

    return _in_runs(files, places, take)


def _read_value(files: Files, place: Place) -> Any:
    if not place.transforms:
        return read_torch(files, place.key, place.start, place.nbytes).root
    return read_torch(Memory(unpacked(files, place, MAX_VALUE), f"{files.url}/{place.key}"), "").root


# ---- where data begins --------------------------------------------------------------------------------------


def locate(files: Files, entries: Sequence[Entry]) -> list[StoredTensor]:
    """The tensors of entries: type, shape, strides, and where their data begins.

    Raises:
        Damaged: one is not a `torch.save` file of one tensor.
        InvalidInput: one was pickled with something that is not on the list.
    """
    known: dict[bytes, StoredTensor] = {}
    return _in_runs(files, entries, lambda entry, head: _at_sight(entry, head, known) or _by_directory(files, entry))


_Ranged = TypeVar("_Ranged", Entry, Place)


def _in_runs(files: Files, items: Sequence[_Ranged], take: Callable[[_Ranged, bytearray], Any]) -> list[Any]:
    """What `take` makes of each item and its first bytes, of which there are at most `HEAD`; in several threads."""
    results: list[Any] = [None] * len(items)
    runs = list(_runs(items, sorted(range(len(items)), key=lambda i: items[i][:2])))

    def look(some: Sequence[Sequence[int]]) -> None:
        for run in some:
            first, last = items[run[0]], items[run[-1]]
            data = bytearray(last.start - first.start + min(HEAD, last.nbytes))
            files.read_into(first.key, first.start, memoryview(data))
            for i in run:
                at = items[i].start - first.start
                results[i] = take(items[i], data[at : at + min(HEAD, items[i].nbytes)])

    if len(runs) < READERS:
        look(runs)
    else:
        share = -(-len(runs) // (4 * READERS))
        with ThreadPoolExecutor(READERS, thread_name_prefix="ckptsvc-look") as pool:
            for _ in pool.map(look, (runs[i : i + share] for i in range(0, len(runs), share))):
                pass
    return results


def _runs(items: Sequence[Entry] | Sequence[Place], order: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours in a file that are looked at together."""
    run: list[int] = []
    for i in order:
        item = items[i]
        if run:
            first, last = items[run[0]], items[run[-1]]
            if item.key != first.key or item.start - last.start > NEAR or item.start - first.start > RUN:
                yield run
                run = []
        run.append(i)
    if run:
        yield run


def _pickle(head: bytearray) -> tuple[bytes, int, bytes] | None:
    """The pickle at the beginning of a zip file, where it ends, and the archive's name; None if it is not there."""
    first = _FIRST.match(head)
    if first is None:
        return None
    begin = 30 + int.from_bytes(first[1], "little") + int.from_bytes(first[2], "little")
    end = min((i for i in (head.find(_LOCAL, begin), head.find(_DESCRIPTOR, begin)) if i > 0), default=0)
    return (bytes(head[begin:end]), end, bytes(first[3])) if end else None


def _at_sight(entry: Entry, head: bytearray, known: dict[bytes, StoredTensor]) -> StoredTensor | None:
    """The tensor of an entry of which these are the first bytes, if it is laid out as torch does it.

    `known` has tensors by their pickle, without a place; it is added to.
    """
    found = _pickle(head)
    if found is None or (b"/byteorder" in head and b"little" not in head):
        return None
    pickled, end, archive = found
    header = head.find(b"%b/data/0" % archive, end) - 30
    if header < end or head[header : header + 4] != _LOCAL:
        return None
    tensor = known.get(pickled)
    if tensor is None:
        tensor = known[pickled] = _tensor(pickled, entry)
    name, extra = head[header + 26 : header + 28], head[header + 28 : header + 30]
    data = header + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
    if data + tensor.storage.nbytes > entry.nbytes:
        raise Damaged(f"{entry.key}: the entry at byte {entry.start} is shorter than its tensor")
    return _placed(tensor, Storage(entry.key, entry.start + data, tensor.storage.nbytes, tensor.storage.dtype))


def _tensor(pickled: bytes, entry: Entry) -> StoredTensor:
    """What the pickle of one tensor says."""
    what = f"{entry.key}: the entry at byte {entry.start}"

    def storage(pid: Any) -> Storage:
        kind, name, elements = storage_id(pid, what)
        if name != "0" or elements < 0:
            raise Damaged(f"{what} is not one tensor")
        return Storage(entry.key, 0, elements * DTYPES[kind].itemsize, kind)

    return _one_tensor(loads(pickled, TORCH, what, storage), what)


def _by_directory(files: Files, entry: Entry) -> StoredTensor:
    """The tensor of an entry of any layout, by the zip directory at its end."""
    root = read_torch(files, entry.key, entry.start, entry.nbytes).root
    return _one_tensor(root, f"{files.url}/{entry.key}: the entry at byte {entry.start}")


def _one_tensor(root: Any, what: str) -> StoredTensor:
    if not isinstance(root, StoredTensor):
        raise Damaged(f"{what} is not a tensor, but {type(root).__name__}")
    return root


def _placed(tensor: StoredTensor, storage: Storage) -> StoredTensor:
    return StoredTensor(tensor.dtype, tensor.shape, tensor.strides, storage, tensor.offset)


# ---- compressed entries -------------------------------------------------------------------------------------


class Memory:
    """One file that is in memory; see `files.Files`."""

    def __init__(self, data: bytes, url: str) -> None:
        self.data, self.url = data, url

    def read(self, key: str, limit: int = MAX_ENTRY) -> bytes:
        """See Files."""
        return self.data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See Files."""
        if offset + len(buffer) > len(self.data):
            raise Damaged(f"{self.url} ends before what is wanted")
        buffer[:] = self.data[offset : offset + len(buffer)]

    def size(self, key: str) -> int:
        """See Files."""
        return len(self.data)

    def children(self, prefix: str = "") -> Sequence[str]:
        """See Files."""
        return ()

    def close(self) -> None:
        """See Files."""


def unpacked(files: Files, place: Place, limit: int) -> bytes:
    """The bytes of a compressed entry.

    Args:
        files: where the checkpoint is.
        place: the entry.
        limit: most bytes that it may have.

    Raises:
        Damaged: it is not what it is said to be, or larger than that.
    """
    check_transforms(place)
    what = f"{files.url}/{place.key}: the entry at byte {place.start}"
    import zstandard  # few checkpoints need it

    if place.nbytes > limit:  # zstd adds next to nothing to what cannot be compressed
        raise Damaged(f"{what} has {place.nbytes} compressed bytes")
    packed = bytearray(place.nbytes)
    files.read_into(place.key, place.start, memoryview(packed))
    try:
        # The streams do not say how long their content is: read until the end, or one byte more than is allowed.
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)) as stream:
            data: bytes = stream.read(limit + 1)
    except zstandard.ZstdError as error:
        raise Damaged(f"{what} is not compressed with zstd: {error}") from None
    if len(data) > limit:
        raise Damaged(f"{what} has more than {limit} bytes when decompressed")
    return data


def _unpacked_tensor(files: Files, tensor: Tensor, chunk: Chunk) -> bytes:
    """The elements of a compressed piece, row-major."""
    limit = min(tensor.nbytes(chunk.box) + AROUND, MAX_ENTRY)
    memory = Memory(unpacked(files, chunk.place, limit), f"{files.url}/{chunk.place.key}")
    stored = _one_tensor(read_torch(memory, "").root, memory.url)
    if (stored.dtype, stored.shape) != (tensor.dtype, chunk.box.shape):
        raise Damaged(f"{memory.url}: a piece is {stored.dtype}{list(stored.shape)}, not {tensor.dtype}{chunk.box}")
    itemsize = DTYPES[stored.dtype].itemsize
    elements = np.frombuffer(memory.data, np.dtype(f"V{itemsize}"), offset=stored.where[1], count=_extent(stored))
    strides = [stride * itemsize for stride in stored.strides]
    return np.lib.stride_tricks.as_strided(elements, stored.shape, strides, writeable=False).tobytes()


def _extent(stored: StoredTensor) -> int:
    return (
        sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True)) + 1 if 0 not in stored.shape else 0
    )
