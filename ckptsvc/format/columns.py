"""The table of one shard as columns: what a worker reports to the coordinator, once per structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from ckptsvc.errors import Damaged
from ckptsvc.format import columnar, record
from ckptsvc.format.columnar import Int64, UInt8, UInt64
from ckptsvc.format.compat import FORMAT
from ckptsvc.format.limits import MAX_RECORD_BYTES
from ckptsvc.format.names import name_columns
from ckptsvc.format.regions import KIND_BOX, KIND_FLAT, Regions, Tensors
from ckptsvc.format.shard import Entry, ShardTable
from ckptsvc.geometry.box import FlatRange
from ckptsvc.types import DTYPES

_SCHEMA: Final[dict[str, Any]] = {
    "name_hash": np.uint64,
    "name_check": np.uint64,
    "name_ends": np.uint64,
    "offset": np.uint64,
    "shape": np.int64,
    "geometry": np.int64,
    "names": np.uint8,
    "dtype": np.uint8,
    "ndim": np.uint8,
    "kind": np.uint8,
}


class _Info(msgspec.Struct, frozen=True, kw_only=True):
    objects_offset: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    structure: str
    format: str = FORMAT


class Columns(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The regions of one shard, without its objects document, which changes its size with every save.

    Attributes:
        name_hash: [n] xxh3_64 of the name of each region's tensor.
        name_check: [n] xxh3_64 of it with seed 1: names with equal hashes are equal if these are.
        name_ends: [n] where each name ends in `names`.
        names: all names, UTF-8.
        dtype: [n] code of the tensor's dtype.
        ndim: [n] its number of dimensions.
        shape: its global shape, flat, `ndim` numbers a region.
        kind: [n] 0 for a box, 1 for a flat range.
        geometry: flat: origin and shape of a box, start and length of a flat range.
        offset: [n] absolute byte offset in the shard.
        objects_offset: absolute byte offset of the objects document, which ends with the file.
        structure: the shard's `ShardInfo.structure`.
    """

    name_hash: UInt64
    name_check: UInt64
    name_ends: UInt64
    names: UInt8
    dtype: UInt8
    ndim: UInt8
    shape: Int64
    kind: UInt8
    geometry: Int64
    offset: UInt64
    objects_offset: int
    structure: str

    @classmethod
    def from_table(cls, table: ShardTable) -> Columns:
        """The columns of a decoded shard header."""
        return cls.from_entries(table.entries[:-1], table.objects.offset, table.info.structure)

    @classmethod
    def from_entries(cls, entries: Sequence[Entry], objects_offset: int, structure: str) -> Columns:
        """The columns of a shard's entries (a template has some) but its objects document."""
        names = [entry.meta.name.encode() for entry in entries]
        flat = [isinstance(entry.region, FlatRange) for entry in entries]
        return cls(
            **name_columns(names),
            dtype=np.array([DTYPES[entry.meta.dtype].code for entry in entries], np.uint8),
            ndim=np.array([len(entry.meta.shape) for entry in entries], np.uint8),
            shape=np.array([n for entry in entries for n in entry.meta.shape], np.int64),
            kind=np.where(np.array(flat, np.bool_), KIND_FLAT, KIND_BOX).astype(np.uint8),
            geometry=np.array([n for entry in entries for n in _numbers(entry)], np.int64),
            offset=np.array([entry.offset for entry in entries], np.uint64),
            objects_offset=objects_offset,
            structure=structure,
        )

    def __len__(self) -> int:
        return len(self.name_hash)

    def encode(self) -> bytes:
        """The columns as one message, a safetensors file."""
        info = _Info(objects_offset=self.objects_offset, structure=self.structure)
        return columnar.encode({name: getattr(self, name) for name in _SCHEMA}, record.canonical(info))

    @classmethod
    def decode(cls, data: bytes | memoryview, what: str = "the columns of a shard") -> Columns:
        """The columns in a message; they are views of it.

        Raises:
            Damaged: malformed or contradictory.
            IncompatibleVersion: of a newer major version of the format.
        """
        found, raw = columnar.decode(data, _SCHEMA, what, MAX_RECORD_BYTES)
        info = record.convert(raw, _Info, what)
        columns = cls(**found, objects_offset=info.objects_offset, structure=info.structure)
        columns._check(what)
        return columns

    def _check(self, what: str) -> None:
        n = len(self)
        if any(
            len(column) != n
            for column in (self.name_check, self.name_ends, self.dtype, self.ndim, self.kind, self.offset)
        ):
            raise Damaged(f"{what} have different lengths")
        columnar.check_names(self.names, self.name_ends, what)
        tensors = Tensors.checked(self.dtype, self.ndim, self.shape, what)
        regions = Regions.checked(tensors, np.arange(n), self.kind, self.geometry, what)
        regions.check_places(np.zeros(n, np.int64), self.offset, np.array([self.objects_offset]), what)


def _numbers(entry: Entry) -> tuple[int, ...]:
    region = entry.region
    return (region.start, region.length) if isinstance(region, FlatRange) else (*region.origin, *region.shape)
