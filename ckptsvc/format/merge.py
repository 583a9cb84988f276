"""From the tables of all shards to the columns of an index. No step loops over regions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format import columnar
from ckptsvc.format.checksum import Digests
from ckptsvc.format.columnar import Array, Bool, Int64
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import parse_shard_name
from ckptsvc.format.names import name_columns
from ckptsvc.format.regions import KIND_BOX, numbers_per_region
from ckptsvc.format.segments import SegmentMap
from ckptsvc.format.shard import objects_name
from ckptsvc.types import DTYPES


class ShardRecord(msgspec.Struct, frozen=True, eq=False):
    """What the writer of a shard reports about it.

    Attributes:
        name: the shard's name in the checkpoint's directory.
        rank: the rank whose snapshot it holds.
        nbytes: its size.
        digests: the xxh3_64 of each extent.
        columns: its table.
        segments: where its bytes are, if it has no file of its own; `name` is then that of the first file written.
    """

    name: str
    rank: int
    nbytes: int
    digests: Digests
    columns: Columns
    segments: SegmentMap | None = None


def merge(records: Sequence[ShardRecord]) -> dict[str, Array]:
    """The columns of the index of these shards.

    Raises:
        InvalidInput: a shard's name, rank or size is impossible.
        LayoutError: two shards disagree about the dtype or shape of a tensor, or two names have one hash.
    """
    for record in records:
        if parse_shard_name(record.name) != record.rank or record.columns.objects_offset > record.nbytes:
            raise InvalidInput(f"{record.name!r} of rank {record.rank} with {record.nbytes} bytes is no shard")
    return _Merge(records).columns()


class _Merge:
    """All regions as rows, shard after shard, and last those of one more table: the objects documents."""

    def __init__(self, records: Sequence[ShardRecord]) -> None:
        self.records = records
        self.tables = [record.columns for record in records] + [_objects(records)]
        sizes = [len(table) for table in self.tables]
        self.first_row = columnar.starts(np.array(sizes))  # of each table
        shards = np.arange(len(records), dtype=np.uint32)
        self.shard = np.concatenate((np.repeat(shards, sizes[:-1]), shards))
        self.hash = self._rows("name_hash")
        self.dtype, self.ndim, self.kind = self._rows("dtype"), self._rows("ndim"), self._rows("kind")
        self.shape, self.geometry = self._rows("shape"), self._rows("geometry")
        self.shape_first = columnar.starts(self.ndim)
        self.geometry_counts = numbers_per_region(self.kind, self.ndim)
        self.geometry_first = columnar.starts(self.geometry_counts)

    def columns(self) -> dict[str, Array]:
        order = self._order()
        hashes = self.hash[order]
        is_first = np.concatenate((np.ones(min(len(order), 1), np.bool_), hashes[1:] != hashes[:-1]))
        first = np.flatnonzero(is_first)
        tensor_rows = order[first]  # one row to speak for each tensor
        ends = np.append(first[1:], len(order))
        self._check_agreement(order, np.repeat(tensor_rows, np.diff(first, append=len(order))))
        name_ends, names = self._names(tensor_rows)
        records = self.records
        shard_names = [record.name.encode() for record in records]
        counts = self.geometry_counts[order]
        return {
            "tensor_hash": hashes[first],
            "tensor_dtype": self.dtype[tensor_rows],
            "tensor_ndim": self.ndim[tensor_rows],
            "tensor_shape": columnar.gather(self.shape, self.shape_first[tensor_rows], self.ndim[tensor_rows]),
            "tensor_name_ends": name_ends,
            "tensor_names": names,
            "tensor_region_ends": ends[: len(first)].astype(np.uint64),
            "region_kind": self.kind[order],
            "region_shard": self.shard[order],
            "region_offset": self._rows("offset")[order],
            "region_geometry": columnar.gather(self.geometry, self.geometry_first[order], counts),
            "shard_rank": np.array([record.rank for record in records], np.uint32),
            "shard_nbytes": np.array([record.nbytes for record in records], np.uint64),
            "shard_name_ends": _ends([len(name) for name in shard_names]),
            "shard_names": np.frombuffer(b"".join(shard_names), np.uint8),
            "shard_digest_ends": _ends([len(record.digests) for record in records]),
            "shard_digests": _concatenate([record.digests for record in records], np.uint64),
        }

    def _rows(self, column: str) -> Array:
        return np.concatenate([getattr(table, column) for table in self.tables])

    def _order(self) -> Int64:
        """Rows by tensor, within a tensor by the first number of the region, within that by shard."""
        position = np.zeros(len(self.hash), np.int64)
        some = np.flatnonzero(self.geometry_counts)
        position[some] = self.geometry[self.geometry_first[some]]
        order = np.argsort(self.hash, kind="stable")
        hashes, positions = self.hash[order], position[order]
        if ((hashes[1:] == hashes[:-1]) & (positions[1:] < positions[:-1])).any():
            order = np.lexsort((position, self.hash))
        return order

    def _check_agreement(self, rows: Int64, others: Int64) -> None:
        """Raises LayoutError unless each row describes the same tensor as the row beside it in `others`."""
        check = self._rows("name_check")
        self._refuse(check[rows] != check[others], rows, others, "have the same hash and different names")
        self._refuse(self.dtype[rows] != self.dtype[others], rows, others, "have different dtypes")
        self._refuse(self.ndim[rows] != self.ndim[others], rows, others, "have different numbers of dimensions")
        ndim = self.ndim[rows]
        for d in range(int(ndim.max(initial=0))):
            some = np.flatnonzero(ndim > d)
            left, right = rows[some], others[some]
            differ = self.shape[self.shape_first[left] + d] != self.shape[self.shape_first[right] + d]
            self._refuse(differ, left, right, f"have different global extents in dimension {d}")

    def _refuse(self, differ: Bool, rows: Int64, others: Int64, how: str) -> None:
        if differ.any():
            i = int(np.argmax(differ))
            sides = [f"{self._name(row)!r} in {self.records[self.shard[row]].name}" for row in (others[i], rows[i])]
            raise LayoutError(f"{sides[0]} and {sides[1]} {how}")

    def _name(self, row: int) -> str:
        source = int(np.searchsorted(self.first_row, row, "right")) - 1
        table, i = self.tables[source], int(row - self.first_row[source])
        start = int(table.name_ends[i - 1]) if i else 0
        return table.names[start : int(table.name_ends[i])].tobytes().decode()

    def _names(self, rows: Int64) -> tuple[Array, Array]:
        """The names of some rows: (ends, names)."""
        source = np.searchsorted(self.first_row, rows, "right") - 1
        ends = self._rows("name_ends").astype(np.int64)
        begin = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
        begin[self.first_row[self.first_row < len(begin)]] = 0
        counts = ends[rows] - begin[rows]
        # Few tables speak for all tensors as a rule, so only their names are put together.
        used, which = np.unique(source, return_inverse=True)
        tables = [self.tables[i].names for i in used]
        base = columnar.starts(np.array([len(names) for names in tables]))
        flat = _concatenate(tables, np.uint8)
        names = columnar.gather(flat, begin[rows] + (base[which] if len(base) else 0), counts)
        return np.cumsum(counts).astype(np.uint64), names


def _objects(records: Sequence[ShardRecord]) -> Columns:
    """The objects documents of all shards as one table."""
    names = [objects_name(record.rank).encode() for record in records]
    n = len(records)
    sizes = np.array([record.nbytes - record.columns.objects_offset for record in records], np.int64)
    return Columns(
        **name_columns(names),
        dtype=np.full(n, DTYPES["uint8"].code, np.uint8),
        ndim=np.ones(n, np.uint8),
        shape=sizes,
        kind=np.full(n, KIND_BOX, np.uint8),
        geometry=np.stack((np.zeros_like(sizes), sizes), axis=1).reshape(-1),
        offset=np.array([record.columns.objects_offset for record in records], np.uint64),
        objects_offset=0,
        structure="",
    )


def _ends(lengths: list[int]) -> Array:
    return np.cumsum(np.array(lengths, np.uint64), dtype=np.uint64)


def _concatenate(arrays: list[Array], dtype: type) -> Array:
    return np.concatenate([np.empty(0, dtype), *arrays])
