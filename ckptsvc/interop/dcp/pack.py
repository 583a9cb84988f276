"""`.distcp` files, planned: `torch.save` files one after another, one for each piece of a tensor and each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptsvc.errors import ConfigError, InvalidInput
from ckptsvc.geometry.box import Box, cut
from ckptsvc.interop.dcp.metadata import Chunk, Place, Tensor
from ckptsvc.interop.outputs import Crc, Fill, OutputFile
from ckptsvc.interop.torch_format.write import Slot, torch_output
from ckptsvc.quantities import parse_size
from ckptsvc.types import DTYPES

CHUNK_BYTES = 64 << 20
"""Most bytes of a piece of a tensor, unless the option `chunk` says otherwise."""

FILE_BYTES = 1 << 30
MAX_FILES = 1024

ALIGNMENT = 64
"""Entries begin at multiples of this, so that elements are aligned in the file as they are in the entry."""


class Named(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: what DCP calls it.
        source: its canonical name (see `interop.logical`).
        dtype: its element type in the file.
        shape: in elements.
        members: what it is put together from, if it is no single tensor: the index that a member has in its first
            dimensions, the member's canonical name, and the index of it in the first dimensions of that.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    members: tuple[tuple[tuple[int, ...], str, tuple[int, ...]], ...] = ()

    def pieces(self, most: int) -> Iterator[tuple[Box, str, Box]]:
        """Boxes of it, of at most so many elements, with the tensor and the box of that which each is."""
        for at, source, index in self.members or (((), self.source, ()),):
            inner = self.shape[len(at) :]
            for box in cut(Box.full(inner), most) if 0 not in inner else [Box.full(inner)]:
                yield _under(at, box), source, _under(index, box)


class _Entry(NamedTuple):
    """An entry that begins at byte 0: bytes before and after the data, and the checksums that follow it."""

    nbytes: int
    head: bytes
    tail: bytes
    crcs: Sequence[Crc]


class _Item(NamedTuple):
    """An entry to be written: a box of a tensor, which is a box of another; or a value."""

    entry: _Entry
    box: Box
    tensor: Named | None
    source: str = ""
    region: Box = Box((), ())


class Packed(NamedTuple):
    """The files, and where everything is in them."""

    files: list[OutputFile]
    tensors: dict[str, Tensor]
    values: dict[str, Place]


def division(options: Mapping[str, str]) -> tuple[int, int]:
    """The options files= and chunk= of a format: number of files (0: as many as fit) and bytes of a piece.

    Raises:
        ConfigError: one of them cannot be.
    """
    try:
        files, chunk = int(options.get("files", 0)), parse_size(options.get("chunk", CHUNK_BYTES))
    except (InvalidInput, ValueError) as error:
        raise ConfigError(f"files and chunk are a number and a number of bytes: {error}") from None
    if not 0 <= files <= 1 << 20 or chunk < 1:
        raise ConfigError(f"files={files} and chunk={chunk} cannot be")
    return files, chunk


def pack(tensors: Sequence[Named], values: dict[str, bytes], *, files: int, chunk: int) -> Packed:
    """Plan the files. Tensors keep their order, over the files as within them, so that a stream can write them.

    Args:
        tensors: what to write.
        values: files of `torch.save` by name (see `value`); equal ones are stored once.
        files: how many; 0: one for every `FILE_BYTES`, at most `MAX_FILES`.
        chunk: most bytes of a piece.
    """
    entries: dict[tuple[str, tuple[int, ...]], _Entry] = {}
    items = [_Item(_Entry(len(data), data, b"", ()), Box((), ()), None) for data in dict.fromkeys(values.values())]
    for tensor in tensors:
        step = max(chunk // DTYPES[tensor.dtype].itemsize, 1)
        for box, source, region in tensor.pieces(step):
            key = (tensor.dtype, box.shape)
            if key not in entries:
                entries[key] = _entry(*key)
            items.append(_Item(entries[key], box, tensor, source, region))
    total = sum(_aligned(item.entry.nbytes) for item in items) or 1
    count = files or min(-(-total // FILE_BYTES), MAX_FILES)
    made = [_File(f"__{i}_0.distcp") for i in range(count)]
    done = 0
    places: dict[bytes, Place] = {}
    chunks: dict[str, list[Chunk]] = {}
    for item in items:
        place = made[min(done * count // total, count - 1)].put(item)
        done += _aligned(item.entry.nbytes)
        if item.tensor is None:
            places[item.entry.head] = place
        else:
            chunks.setdefault(item.tensor.name, []).append(Chunk(item.box, place))
    written = {t.name: Tensor(t.dtype, t.shape, chunks[t.name]) for t in tensors}
    return Packed([file.done() for file in made], written, {name: places[data] for name, data in values.items()})


def value(root: Any) -> bytes:
    """The file of `torch.save` of a plain value.

    Raises:
        UnsupportedObject: it is not plain; the message says where.
    """
    return _joined(torch_output("archive", root).fixed)


class _File:
    def __init__(self, key: str) -> None:
        self._key, self._at = key, 0
        self._fixed: list[tuple[int, bytes]] = []
        self._fills: list[Fill] = []
        self._crcs: list[Crc] = []

    def put(self, item: _Item) -> Place:
        start, entry = self._at, item.entry
        self._fixed.append((start, entry.head))
        if entry.tail:
            self._fixed.append((start + entry.nbytes - len(entry.tail), entry.tail))
        if item.tensor is not None and not item.box.is_empty:
            self._fills.append(Fill(start + len(entry.head), item.source, item.region, item.tensor.dtype))
        for crc in entry.crcs:
            self._crcs.append(Crc(start + crc.start, crc.nbytes, tuple(start + at for at in crc.at)))
        self._at = _aligned(start + entry.nbytes)
        return Place(self._key, start, entry.nbytes)

    def done(self) -> OutputFile:
        return OutputFile(self._key, self._at, self._fixed, self._fills, self._crcs)


def _entry(dtype: str, shape: tuple[int, ...]) -> _Entry:
    """The entry of a tensor of that type and shape; all of them are equal but for the data and its checksum."""
    planned = torch_output("archive", Slot("", Box.full(shape), dtype, shape))
    begin = next((fill.offset for fill in planned.fills), planned.nbytes)
    head = _joined([piece for piece in planned.fixed if piece[0] < begin])
    tail = _joined([piece for piece in planned.fixed if piece[0] >= begin])
    return _Entry(planned.nbytes, head, tail, [crc for crc in planned.crcs if crc.nbytes])


def _under(index: tuple[int, ...], box: Box) -> Box:
    """A box of what stands at an index, as a box of the whole."""
    return Box((*index, *box.origin), (*(1 for _ in index), *box.shape)) if index else box


def _joined(pieces: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(data for _, data in pieces)


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
