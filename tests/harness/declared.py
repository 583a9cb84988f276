"""A checkpoint of arrays in this process, and files made of parts of it, as an importer and an exporter make them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ckptsvc.geometry.box import Box, Region
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.interop.logical import Note
from ckptsvc.interop.outputs import Fill, OutputFile
from ckptsvc.types import DTYPES, TensorMeta

EXTENT = 4096


class Arrays:
    """A `Logical` whose tensors lie one after the other in one shard; counts what is read.

    Attributes:
        reads: (offset, bytes) of every read.
        fail: raised by the next read.
    """

    step, world_size, extent, origin = 5, 1, EXTENT, "arrays"

    def __init__(self, arrays: Mapping[str, np.ndarray], aliases: Mapping[str, str] = {}) -> None:
        self.aliases, self.notes, self.source = dict(aliases), list[Note](), self
        self.arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.places: dict[str, int] = {}
        content = bytearray()
        for name, array in self.arrays.items():
            content += bytes(-len(content) % 16)
            self.places[name] = len(content)
            content += array.tobytes()
        self.content = bytes(content)
        self.identity = str(hash(self.content))
        self.reads: list[tuple[int, int]] = []
        self.fail: BaseException | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def bytes_read(self) -> int:
        return sum(nbytes for _, nbytes in self.reads)

    def names(self) -> list[str]:
        return sorted(self.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays or name in self.aliases

    def resolve(self, name: str) -> str:
        return self.aliases.get(name, name)

    def meta(self, name: str) -> TensorMeta:
        array = self.arrays.get(self.resolve(name), np.zeros(0, np.float32))
        return TensorMeta(self.resolve(name), str(array.dtype), array.shape)

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        name = self.resolve(name)
        array = self.arrays[name]
        return [StoredRegion(name, Box.full(array.shape), 0, self.places[name], array.nbytes)]

    def shard_name(self, shard: int) -> str:
        return "arrays"

    name = shard_name

    def document(self, rank: int = 0) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def size(self, shard: int) -> int:
        return len(self.content)

    def digests(self, shard: int) -> None:
        return None

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self.reads.append((offset, len(buffer)))
            error, self.fail = self.fail, None
        if error is not None:
            raise error
        buffer[:] = self.content[offset : offset + len(buffer)]

    def view(self, shard: int) -> None:
        return None


def columns(source: Arrays, name: str, count: int, key: str = "") -> list[OutputFile]:
    """Files that hold a slice of the columns of a matrix each, behind a header of 10 bytes."""
    return _slices(source, name, count, 1, key or name)


def rows(source: Arrays, name: str, count: int, key: str = "") -> list[OutputFile]:
    """Files that hold a slice of the rows each."""
    return _slices(source, name, count, 0, key or name)


def _slices(source: Arrays, name: str, count: int, dim: int, key: str) -> list[OutputFile]:
    meta = source.meta(name)
    files = []
    for number, (low, high) in enumerate(pairwise(meta.shape[dim] * i // count for i in range(count + 1))):
        origin, shape = [0, 0], list(meta.shape)
        origin[dim], shape[dim] = low, high - low
        region = Box(tuple(origin), tuple(shape))
        nbytes = 10 + region.size * DTYPES[meta.dtype].itemsize
        fills = [Fill(10, name, region, meta.dtype)]
        files.append(OutputFile(f"{key}{number}", nbytes, [(0, b"0123456789")], fills))
    return files
