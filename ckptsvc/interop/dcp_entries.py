"""Entries of `.distcp` files: where the data of a tensor begins in one, what object is in one, compressed ones.

A tensor's entry is a `torch.save` file of one tensor: about 1.5 KB and the data. Its first bytes are a zip header, the
pickle with shape and strides, and the header of the data. One small read finds the data, neighbours share a read, and
equal pickles are read once: a hundred thousand entries take about a second.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ckptsvc.errors import ConfigError, Damaged, InvalidInput
from ckptsvc.interop.dcp_metadata import Chunk, Place, Tensor
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Entry, Foreign, Stretch
from ckptsvc.interop.pickles import loads
from ckptsvc.interop.torch_file import TORCH, Storage, StoredTensor, read_torch, storage_id
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
"""Largest entry that is taken into memory whole, in bytes: compressed tensors, and values."""

ZSTD = "stream.zstd/1"

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
    place, size = chunk.place, tensor.nbytes(chunk.box)
    if place.transforms:
        check_transforms(place)
        return Stretch("", 0, size, load=lambda files: _unpacked_tensor(files, tensor, chunk))
    if place.raw:
        if place.nbytes != size:
            raise Damaged(f"{place.key}: an entry has {place.nbytes} bytes where a piece of {size} should be")
        return place.key, place.start
    return Entry(place.key, place.start, place.nbytes, locate)


def check_transforms(place: Place) -> None:
    """Raises InvalidInput if an entry was transformed in a way that is not known."""
    if unknown := set(place.transforms) - {ZSTD}:
        raise InvalidInput(f"{place.key}: its entries were transformed by {sorted(unknown)}; only {ZSTD!r} is known")


def read_value(files: Files, place: Place) -> Any:
    """The object of an entry, read by the restricted reader, with `StoredTensor` in the places of tensors.

    Raises:
        InvalidInput: it is of a type that is not on the list, or was transformed in a way that is not known.
        Damaged: it is not a file of torch.save.
    """
    if not place.transforms:
        return read_torch(files, place.key, place.start, place.nbytes).root
    return read_torch(Memory(unpacked(files, place), f"{files.url}/{place.key}"), "").root


# ---- where data begins --------------------------------------------------------------------------------------


def locate(files: Files, entries: Sequence[Entry]) -> list[StoredTensor]:
    """The tensors of entries: type, shape, strides, and where their data begins.

    Raises:
        Damaged: one is not a `torch.save` file of one tensor.
        InvalidInput: one was pickled with something that is not on the list.
    """
    order = sorted(range(len(entries)), key=lambda i: entries[i][:2])
    runs = list(_runs(entries, order))
    tensors: list[Any] = [None] * len(entries)
    known: dict[bytes, StoredTensor] = {}

    def look(some: Sequence[Sequence[int]]) -> None:
        for run in some:
            for i, tensor in zip(run, _look(files, [entries[i] for i in run], known), strict=True):
                tensors[i] = tensor

    if len(runs) < READERS:
        look(runs)
    else:
        share = -(-len(runs) // (4 * READERS))
        with ThreadPoolExecutor(READERS, thread_name_prefix="ckptsvc-look") as pool:
            for _ in pool.map(look, (runs[i : i + share] for i in range(0, len(runs), share))):
                pass
    return tensors


def _runs(entries: Sequence[Entry], order: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours in a file that are looked at together."""
    run: list[int] = []
    for i in order:
        entry = entries[i]
        if run:
            first, last = entries[run[0]], entries[run[-1]]
            if entry.key != first.key or entry.start - last.start > NEAR or entry.start - first.start > RUN:
                yield run
                run = []
        run.append(i)
    if run:
        yield run


def _look(files: Files, run: Sequence[Entry], known: dict[bytes, StoredTensor]) -> list[StoredTensor]:
    """The tensors of neighbours.

    Args:
        files: where they are.
        run: the entries, in one file, ascending.
        known: tensors by their pickle, without a place; added to.
    """
    key, start, last = run[0].key, run[0].start, run[-1]
    data = bytearray(last.start - start + min(HEAD, last.nbytes))
    files.read_into(key, start, memoryview(data))
    found = []
    for entry in run:
        at = entry.start - start
        head = data[at : at + min(HEAD, entry.nbytes)]
        found.append(_at_sight(entry, head, known) or _by_directory(files, entry))
    return found


def _at_sight(entry: Entry, head: bytearray, known: dict[bytes, StoredTensor]) -> StoredTensor | None:
    """The tensor of an entry of which these are the first bytes, if it is laid out as torch does it."""
    first = _FIRST.match(head)
    if first is None:
        return None
    begin = 30 + int.from_bytes(first[1], "little") + int.from_bytes(first[2], "little")
    end = min((i for i in (head.find(_LOCAL, begin), head.find(_DESCRIPTOR, begin)) if i > 0), default=0)
    header = head.find(b"%b/data/0" % first[3], end) - 30
    if not end or header < end or head[header : header + 4] != _LOCAL:
        return None
    if b"/byteorder" in head and b"little" not in head:
        return None
    pickled = bytes(head[begin:end])
    tensor = known.get(pickled)
    if tensor is None:
        tensor = known[pickled] = _tensor(pickled, entry)
    lengths = (
        int.from_bytes(head[header + 26 : header + 28], "little"),
        int.from_bytes(head[header + 28 : header + 30], "little"),
    )
    data = header + 30 + sum(lengths)
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


def unpacked(files: Files, place: Place) -> bytes:
    """The bytes of a compressed entry.

    Raises:
        ConfigError: the package that does it is not installed.
        Damaged: it is not what it is said to be, or larger than `MAX_ENTRY`.
    """
    check_transforms(place)
    what = f"{files.url}/{place.key}: the entry at byte {place.start}"
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise ConfigError(f"{what} is compressed with zstd", hint="pip install zstandard") from None
    if place.nbytes > MAX_ENTRY:
        raise Damaged(f"{what} has {place.nbytes} compressed bytes")
    data = bytearray(place.nbytes)
    files.read_into(place.key, place.start, memoryview(data))
    for _ in place.transforms:
        try:
            # The streams do not say how long their content is: read until the end, or one byte more than is allowed.
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as stream:
                data = bytearray(stream.read(MAX_ENTRY + 1))
        except zstandard.ZstdError as error:
            raise Damaged(f"{what} is not compressed with zstd: {error}") from None
        if len(data) > MAX_ENTRY:
            raise Damaged(f"{what} has more than {MAX_ENTRY} bytes when decompressed")
    return bytes(data)


def _unpacked_tensor(files: Files, tensor: Tensor, chunk: Chunk) -> bytes:
    """The elements of a compressed piece, row-major."""
    memory = Memory(unpacked(files, chunk.place), f"{files.url}/{chunk.place.key}")
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
