"""The index of a checkpoint: which region of which tensor lies where in which shard, with its checksums.

Columns all the way: a table of three million regions is built, checked and searched by NumPy, and objects
are made only of the rows that are asked for. Specified in `proto/FORMAT.md`, section "Index".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import repeat
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np

from ckptsvc.errors import Damaged, InvalidInput, LayoutError
from ckptsvc.format import columnar, cover, record, segments
from ckptsvc.format.checksum import EXTENT, Digests, extent_count
from ckptsvc.format.columnar import Array, Int64
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import parse_shard_name
from ckptsvc.format.compat import FORMAT, SEGMENTED, check_version
from ckptsvc.format.limits import (
    MAX_ELEMENTS,
    MAX_INDEX_INFO_BYTES,
    MAX_NAME_BYTES,
    MAX_SHARDS,
    MAX_TENSOR_BYTES,
)
from ckptsvc.format.merge import ShardRecord, merge
from ckptsvc.format.names import Names
from ckptsvc.format.regions import Regions, Selection, Tensors
from ckptsvc.format.segments import SegmentMap
from ckptsvc.geometry import reshard
from ckptsvc.geometry.box import Region
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.types import TensorMeta

__all__ = ["Columns", "Index", "IndexInfo", "ShardEntry", "ShardRecord"]

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

    A *row* numbers tensors, regions or shards, as the columns do. Tensors are ordered by the hash of their name,
    regions by their tensor and within it by the first number of the region.

    Attributes:
        info: what holds for the whole checkpoint.
        shards: the shards by row.
        region_tensor: [regions] row of the tensor each region belongs to.
        region_shard: [regions] row of the shard it lies in.
        region_offset: [regions] absolute byte offset in that shard.
        region_nbytes: [regions] its length in bytes.
        segments: where the bytes of shards are that have no file of their own; None where all have one.
    """

    def __init__(self, info: IndexInfo, columns: dict[str, Array], what: str) -> None:
        """Checks all columns; raises Damaged for what cannot be an index."""
        for key, others in _SAME_LENGTH.items():
            for other in others:
                if len(columns[other]) != len(columns[key]):
                    raise Damaged(f"{what}: the columns {key} and {other} have different lengths")
        self.info = info
        self._columns = columns
        self._names = Names(columns["tensor_names"], columns["tensor_name_ends"], columns["tensor_hash"], what)
        tensors = Tensors.checked(columns["tensor_dtype"], columns["tensor_ndim"], columns["tensor_shape"], what)
        if float(tensors.size.sum(dtype=np.float64)) > MAX_ELEMENTS:
            raise Damaged(f"{what} has more than {MAX_ELEMENTS} elements in all tensors")
        kind, ends = columns["region_kind"], columns["tensor_region_ends"]
        columnar.check_ends(ends, len(kind), f"the regions of {what}", 1)
        self._region_ends = ends.astype(np.int64)
        tensor = np.repeat(np.arange(len(ends)), np.diff(self._region_ends, prepend=0))
        self._regions = Regions.checked(tensors, tensor, kind, columns["region_geometry"], what)
        self.region_tensor, self.region_nbytes = tensor, self._regions.nbytes
        self.region_shard, self.region_offset = columns["region_shard"], columns["region_offset"]
        self.shards = self._checked_shards(what)
        if len(kind) and int(self.region_shard.max()) >= len(self.shards):
            raise Damaged(f"{what} has a region in a shard that it does not list")
        sizes = np.array([shard.nbytes for shard in self.shards], np.int64)
        self._regions.check_places(self.region_shard, self.region_offset, sizes, what)
        self._check_aliases(what)
        is_segmented = "shard_segment_ends" in columns
        self.segments = SegmentMap(columns, sizes.tolist(), info.extent, what) if is_segmented else None

    @classmethod
    def build(cls, info: IndexInfo, records: Sequence[ShardRecord]) -> Index:
        """The index of a checkpoint, from what the writers of its shards report.

        Raises:
            InvalidInput: a record or an alias is impossible.
            LayoutError: two shards disagree about a tensor; the message names it and both.
        """
        records = sorted(records, key=lambda record: record.rank)
        columns = merge(records)
        maps = [record.segments for record in records]
        if any(one is not None for one in maps):
            info = msgspec.structs.replace(info, format=SEGMENTED)
            columns |= segments.merge(maps)
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
            raise InvalidInput(f"the aliases take {len(info)} bytes; at most {MAX_INDEX_INFO_BYTES} are allowed")
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
        if check_version(raw["format"], what) >= (2, 0):
            columns |= columnar.decode(data, segments.SCHEMA, what, MAX_INDEX_INFO_BYTES)[0]
        return cls(record.convert(raw, IndexInfo, f"the info record of {what}"), columns, what)

    # Tensors

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._names.row(self.info.aliases.get(name, name)) >= 0

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tensors, each with the name the tensor is stored under."""
        return self.info.aliases

    def names(self) -> list[str]:
        """The names of all tensors, sorted, without aliases."""
        return sorted(name.decode() for name in self._names)

    def name_at(self, row: int) -> str:
        """The name of a tensor."""
        return self._names.at(row)

    def resolve(self, name: str) -> str:
        """The name under which a tensor is stored: the name itself unless it is an alias.

        Raises:
            LayoutError: there is no such tensor.
        """
        self.row(name)
        return self.info.aliases.get(name, name)

    def row(self, name: str) -> int:
        """The row of a tensor, by its name or an alias. Raises LayoutError when there is none."""
        row = self._names.row(self.info.aliases.get(name, name))
        if row < 0:
            raise LayoutError(
                f"the checkpoint of step {self.info.step} has no tensor {name[:200]!r}",
                hint="`ckptsvc inspect` lists the tensors it has",
            )
        return row

    def find(self, names: Sequence[str]) -> Int64:
        """The rows of many tensors, by their names or aliases; -1 where there is none."""
        aliases = self.info.aliases
        return self._names.rows([aliases.get(name, name) for name in names] if aliases else names)

    def meta(self, name: str) -> TensorMeta:
        """Name, dtype and global shape of a tensor. Raises LayoutError when there is none of that name."""
        return self.meta_at(self.row(name))

    def meta_at(self, row: int) -> TensorMeta:
        """Name, dtype and global shape of a tensor."""
        tensors = self._regions.tensors
        return TensorMeta(self._names.at(row), tensors.dtype_of(row), tensors.shape_of(row))

    # Regions

    def regions(self, name: str) -> list[StoredRegion]:
        """All stored regions of a tensor. Raises LayoutError when there is none of that name."""
        row = self.row(name)
        return self._stored(row, self.region_rows(row))

    def region_rows(self, row: int) -> slice:
        """The rows of the regions of a tensor."""
        return slice(self._region_ends.item(row - 1) if row else 0, self._region_ends.item(row))

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """The stored regions of a tensor that may be needed to fill wanted ones, in the order of `regions`.

        All that share an element with a wanted region are among them, and as a rule few others: a rank that
        wants its part of a tensor with a thousand stored regions makes objects of a few only.

        Raises:
            LayoutError: there is no tensor of that name.
        """
        row = self.row(name)
        rows = self.region_rows(row)
        few = rows.stop - rows.start <= _FEW
        return self._stored(row, rows if few else self._regions.near(rows, wanted))

    @cached_property
    def line(self) -> cover.Line:
        """All regions as ranges of elements, for plans over whole checkpoints (`geometry.ranges`)."""
        return cover.line(self._regions)

    def check_cover(self) -> None:
        """Checks that the regions of every tensor cover all of it.

        Raises:
            LayoutError: the message names a tensor and a part of it that no shard has.
        """
        for row in cover.doubtful(self._regions):
            meta = self.meta_at(row)
            regions = self._regions.objects(self.region_rows(row))
            reshard.check_cover(meta.shape, regions, name=meta.name)

    # Shards

    @property
    def extent(self) -> int:
        """Bytes per digest."""
        return self.info.extent

    def shard_name(self, shard: int) -> str:
        """The name of a shard, by its row."""
        return self.shards[shard].name

    def digests(self, shard: int) -> Digests:
        """The xxh3_64 of each extent of a shard, by its row."""
        ends = self._columns["shard_digest_ends"]
        start = ends.item(shard - 1) if shard else 0
        digests: Digests = self._columns["shard_digests"][start : ends.item(shard)]
        return digests

    # Checks and conversions

    def _stored(self, row: int, rows: Selection) -> list[StoredRegion]:
        """Some regions of a tensor as objects."""
        name = repeat(self._names.at(row))
        columns = (self.region_shard, self.region_offset, self.region_nbytes)
        numbers = (column[rows].tolist() for column in columns)
        return list(map(StoredRegion, name, self._regions.objects(rows), *numbers))

    def _checked_shards(self, what: str) -> list[ShardEntry]:
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
                raise Damaged(f"{what} has the impossible shard {name[:200]!r} of rank {rank}, {nbytes} bytes")
            if stop - start != extent_count(nbytes, self.info.extent):
                raise Damaged(f"{what} has {stop - start} digests for {name} of {nbytes} bytes")
            start = stop
        return shards

    def _check_aliases(self, what: str) -> None:
        aliases = self.info.aliases
        for alias in aliases:
            if not 1 <= len(alias.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
                raise Damaged(f"{what} has the impossible alias {alias[:200]!r}")
        names = list(aliases.values())
        for name in np.array(names, object)[self._names.rows(names) < 0]:
            raise Damaged(f"{what} has an alias for {name[:200]!r}, which it does not have")
        for alias in np.array(list(aliases), object)[self._names.rows(list(aliases)) >= 0]:
            raise Damaged(f"{what} has {alias[:200]!r} as a tensor and as an alias")
