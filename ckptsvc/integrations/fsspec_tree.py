"""One checkpoint as a tree of read-only files: every tensor an .npy, and JSON about the whole.

    checkpoint.json             what holds for the checkpoint, and a table of its tensors
    model/layer.weight.npy      a tensor, whole, by the name the model has for it
    @rank/0/objects.json        the plain values of a rank, as tagged JSON (proto/FORMAT.md)

A tensor's name is a path already; each part of it is percent-encoded where a file name could not carry it (see
`file_name`). Elements of types that NumPy lacks, such as bfloat16, are unsigned integers of the same size; the table
says what they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import msgspec
import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray

from ckptsvc.format.shard import objects_name
from ckptsvc.geometry.box import FlatRange
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.read import Want, array_sink, carrier, plan_windows, read_windows
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.types import DTYPES, TensorMeta

SUMMARY = "checkpoint.json"
"""The file that describes the checkpoint."""

_PLAIN = " !$&'()+,;=@~"  # and letters, digits, "_", "." and "-": stand for themselves in a file name


class File(Protocol):
    """A file of the tree."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, both inside the file."""

    def details(self) -> dict[str, Any]:
        """What is worth telling beside name and size."""


class Document(NamedTuple):
    """A file whose bytes are there."""

    content: bytes

    @property
    def size(self) -> int:
        """See File."""
        return len(self.content)

    def read(self, start: int, stop: int) -> bytes:
        """See File."""
        return self.content[start:stop]

    def details(self) -> dict[str, Any]:
        """See File."""
        return {}


class Stored(NamedTuple):
    """A file assembled from the shards when it is read, every extent of them verified.

    Attributes:
        checkpoint: whose.
        tensor: its name, or one of its names.
        meta: what it is.
        header: the bytes before the elements.
    """

    checkpoint: Checkpoint
    tensor: str
    meta: TensorMeta
    header: bytes

    @property
    def size(self) -> int:
        """See File."""
        return len(self.header) + prod(self.meta.shape) * DTYPES[self.meta.dtype].itemsize

    def read(self, start: int, stop: int) -> bytes:
        """See File; reads the extents that hold the range, and no other."""
        head = self.header[start:stop]
        first, last = max(start - len(self.header), 0), stop - len(self.header)
        if last <= first:
            return head
        itemsize = DTYPES[self.meta.dtype].itemsize
        low, high = first // itemsize, -(-last // itemsize)
        elements = _elements(self.checkpoint, self.meta, low, high)
        return head + elements.view(np.uint8)[first - low * itemsize : last - low * itemsize].tobytes()

    def details(self) -> dict[str, Any]:
        """See File."""
        return {"dtype": self.meta.dtype, "shape": list(self.meta.shape)} if self.header else {}


def _elements(checkpoint: Checkpoint, meta: TensorMeta, low: int, high: int) -> NDArray[Any]:
    """Elements of a tensor by their place in its flattened form, of carrier type."""
    want = Want(meta.name, meta.dtype, meta.shape, FlatRange(low, high - low))
    found: NDArray[Any] = np.empty(high - low, carrier(DTYPES[meta.dtype].itemsize))
    windows = plan_windows(checkpoint.index, [want])
    ordered = [windows[key] for key in sorted(windows)]
    sink = array_sink([found], [want])
    read_windows(ordered, StoreSource(checkpoint), checkpoint.index.extent, sink)
    return found


class Tree:
    """The files of a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        files: every file by its path.
        directories: for every directory, "" among them, the names in it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.files: dict[str, File] = dict(_files(checkpoint))
        self.directories: dict[str, set[str]] = {"": set()}
        for path in self.files:
            while path:
                above, _, name = path.rpartition("/")
                names = self.directories.setdefault(above, set())
                if name in names:
                    break
                names.add(name)
                path = above


def file_name(part: str, *, last: bool) -> str:
    """A part of a tensor's name as a file name has it: no two parts become the same, and none a special one.

    Args:
        part: of the name, between slashes; may be empty.
        last: it is the last one, and gets a suffix.
    """
    made = quote(part, safe=_PLAIN)
    if last:
        return made
    if made in ("", ".", ".."):
        return made.replace(".", "%2E") or "%"
    stem, dot, suffix = made.rpartition(".")
    return f"{stem}%2E{suffix}" if dot and suffix in ("npy", "json") else made  # that is a file


def path_of(tensor: str, suffix: str = ".npy") -> str:
    """Where a tensor's file is in the tree."""
    *above, name = tensor.split("/")
    return "/".join([*(file_name(part, last=False) for part in above), file_name(name, last=True) + suffix])


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The element type of an .npy file for an element type of ours: itself, or unsigned integers of its size."""
    size = DTYPES[name].itemsize
    try:
        found = np.dtype(name)
    except TypeError:
        return np.dtype(f"<u{size}")
    return found.newbyteorder("<") if found.itemsize == size else np.dtype(f"<u{size}")


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, File]]:
    index, table = checkpoint.index, []
    documents = {objects_name(rank) for rank in range(index.info.world_size)}
    for name in [*index.names(), *sorted(index.aliases)]:
        meta = index.meta(name)
        if name in documents:
            yield path_of(name, ".json"), Stored(checkpoint, name, meta, b"")
            continue
        file = Stored(checkpoint, name, meta, _header(meta))
        yield path_of(name), file
        row = {"name": name, "dtype": meta.dtype, "shape": meta.shape, "bytes": file.size - len(file.header)}
        table.append({**row, "file": path_of(name), "alias_of": index.aliases.get(name)})
    facts = msgspec.to_builtins(checkpoint.commit)
    summary = {"checkpoint": {"store": checkpoint.store.url, "name": checkpoint.ref.name, **facts}, "tensors": table}
    yield SUMMARY, Document(msgspec.json.format(msgspec.json.encode(summary)) + b"\n")


def _header(meta: TensorMeta) -> bytes:
    """What an .npy file begins with (NumPy's format 1.0)."""
    made = io.BytesIO()
    kind = {"descr": dtype_to_descr(numpy_dtype(meta.dtype)), "fortran_order": False, "shape": meta.shape}
    write_array_header_1_0(made, kind)
    return made.getvalue()
