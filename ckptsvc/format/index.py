"""The index of a checkpoint: which region of which tensor lies where in which shard, with its checksums.

Columns all the way: a table of three million regions is built, checked and searched by NumPy, and objects
are made only of the rows that are asked for. Specified in `proto/FORMAT.md`, section "Index".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
import xxhash

from ckptsvc.errors import Damaged, InvalidInput, LayoutError
from ckptsvc.format import columnar, cover, record
from ckptsvc.format.checksum import EXTENT, Digests, extent_count
from ckptsvc.format.columnar import KIND_FLAT, Array, Int64, Tensors
from ckptsvc.format.columns import check_geometry, check_inside_file, geometry_counts
from ckptsvc.format.commit import parse_shard_name
from ckptsvc.format.compat import FORMAT
from ckptsvc.format.limits import MAX_INDEX_INFO_BYTES, MAX_NAME_BYTES, MAX_SHARDS, MAX_TENSOR_BYTES
from ckptsvc.format.merge import ShardRecord, merge
from ckptsvc.geometry import reshard
from ckptsvc.geometry.box import Box, FlatRange, Region, as_flat
from ckptsvc.geometry.ranges import touching
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.types import DTYPE_BY_CODE, TensorMeta

__all__ = ["Index", "IndexInfo", "ShardEntry", "ShardRecord"]

_SCHEMA: Final[dict[str, Any]] = {
    "tensor_hash": np.uint64,
    "tensor_dtype": np.uint8,
    "tensor_ndim": np.uint8,
    "tensor_shape": np.int64,
    "tensor_name_ends": np.uint64,
    "tensor_names": np.uint8,
    "tensor_region_ends": np.uint64,
    "region_kind": np.uint8,
    "region_shard": np.uint32,
    "region_offset": np.uint64,
    "region_geometry": np.int64,
    "shard_rank": np.uint32,
    "shard_nbytes": np.uint64,
    "shard_name_ends": np.uint64,
    "shard_names": np.uint8,
    "shard_digest_ends": np.uint64,
    "shard_digests": np.uint64,
}
_SAME_LENGTH: Final = {
    "tensor_hash": ("tensor_dtype", "tensor_ndim", "tensor_name_ends", "tensor_region_ends"),
    "region_kind": ("region_shard", "region_offset"),
    "shard_rank": ("shard_nbytes", "shard_name_ends", "shard_digest_ends"),
}
_FEW: Final = 16  # so many regions are made objects sooner than sifted

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class IndexInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for the whole checkpoint.

    Attributes:
        step: the training step.
        epoch: which attempt of the run saved it (fencing).
        attempt: the attempt as the job's launcher counts it.
        job: the job's name.
        world_size: how many ranks saved.
        created: ISO 8601 in UTC.
        extent: bytes per digest.
        aliases: further names of tensors (tied weights), each with the name the tensor is stored under.
        format: version of the format.
    """

    step: _Count
    epoch: _Count
    attempt: _Count
    job: str
    world_size: _Count
    created: str
    extent: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] = EXTENT
    aliases: dict[str, str] = {}
    format: str = FORMAT


class ShardEntry(NamedTuple):
    """One shard of the checkpoint: its name, the rank it comes from, its bytes."""

    name: str
    rank: int
    nbytes: int


class Index:
    """The index of one checkpoint. Made by `build` or `decode`, not changed afterwards.

    A *row* numbers tensors, regions or shards, as the columns do. Tensors are ordered by the hash of their
    name,
    regions by their tensor and within it by the first number of the region.

    Attributes:
        info: what holds for the whole checkpoint.
        shards: the shards by row.
        region_tensor: [regions] row of the tensor each region belongs to.
        region_shard: [regions] row of the shard it lies in.
        region_offset: [regions] absolute byte offset in that shard.
        region_nbytes: [regions] its length in bytes.
    """

    def __init__(self, info: IndexInfo, columns: dict[str, Array], what: str) -> None:
        """Checks all columns; raises Damaged for what cannot be an index."""
        self.info = info
        self._columns = columns
        for key, others in _SAME_LENGTH.items():
            for other in others:
                if len(columns[other]) != len(columns[key]):
                    raise Damaged(f"{what}: the columns {key} and {other} have different lengths")
        self._hash = columns["tensor_hash"]
        self._check_names(what)
        self._name_ends = columns["tensor_name_ends"].astype(np.int64)
        tensors = Tensors(
            columns["tensor_dtype"],
            columns["tensor_ndim"],
            columns["tensor_shape"],
            columnar.starts(columns["tensor_ndim"]),
        )
        size = columnar.check_tensors(tensors, what)
        self.shards = self._check_shards(what)
        kind, ends = columns["region_kind"], columns["tensor_region_ends"]
        columnar.check_ends(ends, len(kind), f"the regions of {what}", 1)
        self._region_ends = ends.astype(np.int64)
        counts = np.diff(self._region_ends, prepend=0)
        self.region_tensor: Int64 = np.repeat(np.arange(len(counts)), counts)
        self.region_shard, self.region_offset = columns["region_shard"], columns["region_offset"]
        numbers = geometry_counts(kind, tensors.ndim[self.region_tensor])
        geometry = columns["region_geometry"]
        check_geometry(kind, numbers, len(geometry), what)
        first = columnar.starts(numbers)
        self._table = cover.Regions(tensors, size, self.region_tensor, kind, geometry, first)
        self.region_nbytes: Int64 = columnar.region_bytes(*self._table, what)
        self._check_places(what)
        self._check_aliases(what)

    @classmethod
    def build(cls, info: IndexInfo, records: Sequence[ShardRecord]) -> Index:
        """The index of a checkpoint, from what the writers of its shards report.

        Raises:
            InvalidInput: a record or an alias is impossible.
            LayoutError: two shards disagree about a tensor; the message names it and both.
        """
        columns = merge(sorted(records, key=lambda record: record.rank))
        try:
            return cls(info, columns, "the index")
        except Damaged as error:
            raise InvalidInput(f"no index can be made of these shards: {error.what}") from None

    def encode(self) -> bytes:
        """The index file.

        Raises:
            InvalidInput: there are too many aliases.
        """
        info = record.canonical(self.info)
        if len(info) > MAX_INDEX_INFO_BYTES:
            raise InvalidInput(
                f"the aliases take {len(info)} bytes; at most {MAX_INDEX_INFO_BYTES} are allowed"
            )
        return columnar.encode(self._columns, info)

    @classmethod
    def decode(cls, data: bytes | memoryview, what: str = "the index") -> Index:
        """The index in a file; its columns are views of it.

        Args:
            data: the whole file.
            what: its name, for messages.

        Raises:
            Damaged: malformed or contradictory.
            IncompatibleVersion: of a newer major version of the format.
        """
        columns, raw = columnar.decode(data, _SCHEMA, what, MAX_INDEX_INFO_BYTES)
        return cls(record.convert(raw, IndexInfo, f"the info record of {what}"), columns, what)

    # Tensors

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._hash)

    def names(self) -> list[str]:
        """The names of all tensors, sorted, without aliases."""
        return sorted(name.decode() for name in self._all_names())

    def name_at(self, row: int) -> str:
        """The name of a tensor."""
        return self._name_bytes(row).decode()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find([name])[0] >= 0

    def resolve(self, name: str) -> str:
        """The name under which a tensor is stored: the name itself unless it is an alias.

        Raises:
            LayoutError: there is no such tensor.
        """
        return self.name_at(self.row(name))

    def row(self, name: str) -> int:
        """The row of a tensor, by its name or an alias. Raises LayoutError when there is none."""
        row = int(self.find([name])[0])
        if row < 0:
            raise LayoutError(
                f"the checkpoint of step {self.info.step} has no tensor {name[:200]!r}",
                hint="`ckptsvc inspect` lists the tensors it has",
            )
        return row

    def find(self, names: Sequence[str]) -> Int64:
        """The rows of tensors, by their names or aliases, in the order given; -1 where there is none."""
        aliases = self.info.aliases
        return np.array(self._find(aliases.get(name, name) for name in names), np.int64)

    def meta(self, name: str) -> TensorMeta:
        """Name, dtype and global shape of a tensor. Raises LayoutError when there is none of that name."""
        return self.meta_at(self.row(name))

    def meta_at(self, row: int) -> TensorMeta:
        """Name, dtype and global shape of a tensor."""
        tensors = self._table.tensors
        first = int(tensors.first[row])
        shape = tuple(tensors.shape[first : first + int(tensors.ndim[row])].tolist())
        return TensorMeta(self.name_at(row), DTYPE_BY_CODE[int(tensors.dtype[row])].name, shape)

    # Regions

    def regions(self, name: str) -> list[StoredRegion]:
        """All stored regions of a tensor. Raises LayoutError when there is none of that name."""
        row = self.row(name)
        return self.stored(self.region_rows(row), self.name_at(row))

    def region_rows(self, row: int) -> range:
        """The rows of the regions of a tensor."""
        return range(int(self._region_ends[row - 1]) if row else 0, int(self._region_ends[row]))

    def stored(self, rows: range | Int64, name: str) -> list[StoredRegion]:
        """Some rows of regions, all of the tensor of that name, as objects."""
        at = np.asarray(rows, np.int64)
        columns = (self._regions(at), self.region_shard[at], self.region_offset[at], self.region_nbytes[at])
        regions, *numbers = columns
        return [
            StoredRegion(name, region, shard, offset, nbytes)
            for region, shard, offset, nbytes in zip(regions, *(n.tolist() for n in numbers), strict=True)
        ]

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """The stored regions of a tensor that can be needed to fill the wanted ones, in the order of
        `regions`.

        All that share an element with a wanted region are among them, and as a rule few others: a rank that
        wants its part of a tensor with a thousand stored regions makes objects of a few only.

        Raises:
            LayoutError: there is no tensor of that name.
        """
        row = self.row(name)
        rows = np.array(self.region_rows(row), np.int64)
        if len(rows) > _FEW:
            rows = rows[self._near(rows, self.meta_at(row).shape, wanted)]
        return self.stored(rows, self.name_at(row))

    @cached_property
    def line(self) -> cover.Line:
        """All regions as ranges of elements, for plans over whole checkpoints (`geometry.ranges`)."""
        return cover.line(self._table)

    def check_cover(self) -> None:
        """Checks that the regions of every tensor cover all of it.

        Raises:
            LayoutError: the message names a tensor and a part of it that no shard has.
        """
        for row in cover.doubtful(self._table):
            meta = self.meta_at(row)
            regions = self._regions(np.array(self.region_rows(row), np.int64))
            reshard.check_cover(meta.shape, regions, name=meta.name)

    # Shards

    def digests(self, shard: int) -> Digests:
        """The xxh3_64 of each extent of a shard, by its row."""
        ends = self._columns["shard_digest_ends"]
        digests: Digests = self._columns["shard_digests"][
            int(ends[shard - 1]) if shard else 0 : int(ends[shard])
        ]
        return digests

    def _check_names(self, what: str) -> None:
        columns = self._columns
        columnar.check_names(columns["tensor_names"], columns["tensor_name_ends"], f"the tensors of {what}")
        if not (self._hash[1:] > self._hash[:-1]).all():
            raise Damaged(f"the tensors of {what} are not in the order of their hashes")
        digests = map(xxhash.xxh3_64_intdigest, self._all_names())
        if (np.fromiter(digests, np.uint64, len(self._hash)) != self._hash).any():
            raise Damaged(f"{what} has a tensor whose name does not match its hash")

    def _check_shards(self, what: str) -> list[ShardEntry]:
        columns = self._columns
        ranks, sizes = columns["shard_rank"].tolist(), columns["shard_nbytes"].tolist()
        if len(ranks) > MAX_SHARDS or len(set(ranks)) != len(ranks):
            raise Damaged(f"{what} has {len(ranks)} shards of {len(set(ranks))} ranks")
        columnar.check_names(columns["shard_names"], columns["shard_name_ends"], f"the shards of {what}")
        names = columnar.split(columns["shard_names"], columns["shard_name_ends"])
        shards = [ShardEntry(name.decode(), *row) for name, *row in zip(names, ranks, sizes, strict=True)]
        ends = columns["shard_digest_ends"]
        columnar.check_ends(ends, len(columns["shard_digests"]), f"the digests of {what}")
        start = 0
        for shard, stop in zip(shards, ends.tolist(), strict=True):
            name, rank, nbytes = shard
            if parse_shard_name(name) != rank or rank >= self.info.world_size or nbytes > MAX_TENSOR_BYTES:
                raise Damaged(
                    f"{what} has the impossible shard {name[:200]!r} of rank {rank}, {nbytes} bytes"
                )
            if stop - start != extent_count(nbytes, self.info.extent):
                raise Damaged(f"{what} has {stop - start} digests for {name} of {nbytes} bytes")
            start = stop
        return shards

    def _check_places(self, what: str) -> None:
        if len(self.region_shard) and int(self.region_shard.max()) >= len(self.shards):
            raise Damaged(f"{what} has a region in a shard that it does not list")
        sizes = np.array([shard.nbytes for shard in self.shards], np.int64)
        for rows in columnar.chunks(len(self.region_nbytes)):
            stop = sizes[self.region_shard[rows]]
            check_inside_file(self.region_offset[rows], self.region_nbytes[rows], stop, what)

    def _check_aliases(self, what: str) -> None:
        aliases = self.info.aliases
        for alias in aliases:
            if not 1 <= len(alias.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
                raise Damaged(f"{what} has the impossible alias {alias[:200]!r}")
        missing = [
            name for name, row in zip(aliases.values(), self._find(aliases.values()), strict=True) if row < 0
        ]
        if missing:
            raise Damaged(f"{what} has an alias for {missing[0][:200]!r}, which it does not have")
        doubled = [alias for alias, row in zip(aliases, self._find(aliases), strict=True) if row >= 0]
        if doubled:
            raise Damaged(f"{what} has {doubled[0][:200]!r} as a tensor and as an alias")

    def _find(self, names: Iterable[str]) -> list[int]:
        """The rows of stored names; -1 where there is none."""
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        hashes = np.array([xxhash.xxh3_64_intdigest(name) for name in encoded], np.uint64)
        rows = np.searchsorted(self._hash, hashes).tolist()
        # Equal hashes of different names are refused when an index is built; here any name may be asked for.
        return [
            row if row < len(self) and self._name_bytes(row) == name else -1
            for row, name in zip(rows, encoded, strict=True)
        ]

    def _name_bytes(self, row: int) -> bytes:
        start = self._name_ends[row - 1] if row else 0
        return self._columns["tensor_names"][start : self._name_ends[row]].tobytes()

    def _all_names(self) -> Iterator[bytes]:
        return columnar.split(self._columns["tensor_names"], self._columns["tensor_name_ends"])

    def _regions(self, rows: Int64) -> list[Region]:
        """Rows of regions of one tensor as objects."""
        if not len(rows):
            return []
        table = self._table
        ndim = int(table.tensors.ndim[table.tensor[rows[0]]])
        flat = table.kind[rows] == KIND_FLAT
        if flat.all():
            return [FlatRange(*numbers) for numbers in self._numbers(rows, 2).tolist()]
        if flat.any():
            return [region for row in rows for region in self._regions(row[None])]
        numbers = self._numbers(rows, 2 * ndim)
        origins, extents = numbers[:, :ndim].tolist(), numbers[:, ndim:].tolist()
        return list(map(Box, map(tuple, origins), map(tuple, extents)))

    def _numbers(self, rows: Int64, width: int) -> Int64:
        """[rows, width] the geometry of regions that have `width` numbers each."""
        first = self._table.first[rows]
        return np.take(self._table.geometry, first[:, None] + np.arange(width))

    def _near(self, rows: Int64, shape: tuple[int, ...], wanted: Sequence[Region]) -> Int64 | slice:
        """Which regions of a tensor share elements with wanted ones; all where that is not easy to say."""
        flat = self._table.kind[rows] == KIND_FLAT
        if flat.all():
            ranges = [
                region if isinstance(region, FlatRange) else as_flat(shape, region) for region in wanted
            ]
            boxes = [Box((r.start,), (r.length,)) for r in ranges if r is not None]
            width = 1
        else:
            boxes = [region for region in wanted if isinstance(region, Box)]
            width = len(shape)
        if flat.any() != flat.all() or len(boxes) != len(wanted):
            return slice(None)
        numbers = self._numbers(rows, 2 * width)
        return touching(numbers[:, :width], numbers[:, width:], boxes)
