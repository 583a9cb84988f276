"""Where the bytes of shards lie that have no file of their own: in segments of files, of this and of other checkpoints.

A segment is a run of extents of one shard with its place: file, offset, stored bytes, codec. It may have a base: the
place of other bytes of the same size, with which it was combined (see `format.planes`). A base has no base, and a
place is always in the file that holds the bytes: there is no chain to follow. Columns of the index, specified in
`proto/FORMAT.md`, section "Segments".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from ckptsvc.errors import Damaged
from ckptsvc.format import columnar
from ckptsvc.format.checksum import extent_count
from ckptsvc.format.columnar import Array, Bool, Int64
from ckptsvc.format.commit import parse_checkpoint_name, parse_shard_name
from ckptsvc.format.limits import MAX_HEADER_BYTES, MAX_REFERS, MAX_SEGMENT_BYTES, MAX_TENSOR_BYTES
from ckptsvc.format.planes import PLAIN, PLANES

SCHEMA: Final[dict[str, Any]] = {
    "shard_segment_ends": np.uint64,
    "segment_extents": np.uint32,
    "segment_file": np.uint32,
    "segment_offset": np.uint64,
    "segment_nbytes": np.uint64,
    "segment_codec": np.uint8,
    "segment_digest": np.uint64,
    "segment_base": np.uint32,
    "base_file": np.uint32,
    "base_offset": np.uint64,
    "base_nbytes": np.uint64,
    "base_codec": np.uint8,
    "base_digest": np.uint64,
    "file_folder": np.uint32,
    "file_nbytes": np.uint64,
    "file_header_nbytes": np.uint64,
    "file_header_digest": np.uint64,
    "file_name_ends": np.uint64,
    "file_names": np.uint8,
    "folder_name_ends": np.uint64,
    "folder_names": np.uint8,
}
"""The columns and their dtypes."""

PLACE: Final = ("file", "offset", "nbytes", "codec", "digest")
"""What columns say of a place."""

_SAME_LENGTH: Final = {
    "segment_extents": tuple(f"segment_{name}" for name in (*PLACE, "base")),
    "base_file": tuple(f"base_{name}" for name in PLACE),
    "file_folder": ("file_nbytes", "file_header_nbytes", "file_header_digest", "file_name_ends"),
}


class StoredFile(NamedTuple):
    """A file that segments lie in.

    Attributes:
        folder: of the checkpoint that it was written for.
        name: of the file in it, that of a shard.
        nbytes: its size.
        header_nbytes: how many of its first bytes are a header, which is part of no segment; 0 in a shard that is
            stored whole, where the header is a part of the shard.
        header_digest: the xxh3_64 of these.
    """

    folder: str
    name: str
    nbytes: int
    header_nbytes: int = 0
    header_digest: int = 0

    @property
    def key(self) -> str:
        """Its key in the store."""
        return f"{self.folder}/{self.name}"


class Place(NamedTuple):
    """Some bytes of a file.

    Attributes:
        file: its number.
        offset: absolute byte offset of the first.
        nbytes: how many are stored there.
        codec: how they are stored, see `format.planes`.
        digest: their xxh3_64; 0 for a plain segment, whose bytes have the digests of their extents.
    """

    file: int
    offset: int
    nbytes: int
    codec: int
    digest: int


class Segment(NamedTuple):
    """Bytes [start, stop) of a shard, where they are, and with what they were combined."""

    start: int
    stop: int
    place: Place
    base: Place | None


class SegmentMap:
    """The segments of one or more shards; checked when it is made, not changed afterwards.

    Args:
        columns: those of `SCHEMA`.
        sizes: bytes of each shard.
        extent: bytes per extent.
        what: where the columns come from, for messages.

    Raises:
        Damaged: they contradict themselves or each other.

    Attributes:
        columns: as given.
        files: all files, by number.
        folders: the checkpoints they belong to.
    """

    def __init__(self, columns: Mapping[str, Array], sizes: Sequence[int], extent: int, what: str) -> None:
        for key, others in _SAME_LENGTH.items():
            if any(len(columns[other]) != len(columns[key]) for other in others):
                raise Damaged(f"{what}: {key} and the columns beside it have different lengths")
        self.columns = {name: columns[name] for name in SCHEMA}
        self._extent, self._sizes = extent, np.array(sizes, np.int64)
        self.folders = self._read_names("folder", what)
        self.files = self._checked_files(what)
        ends = columns["shard_segment_ends"]
        if len(ends) != len(sizes):
            raise Damaged(f"{what} has segments of {len(ends)} shards, but {len(sizes)} shards")
        columnar.check_ends(ends, len(columns["segment_file"]), f"the segments of {what}")
        self._ends = ends.astype(np.int64)
        self._first = np.concatenate((np.zeros(1, np.int64), self._ends))[:-1]
        self._start = self._checked_starts(what)
        logical = self._logical()
        self._check_places("segment", logical, what)
        self._check_bases(logical, what)

    # Reading

    def is_mapped(self, shard: int) -> bool:
        """Whether the shard has segments; one without is a file of its own."""
        return self._ends.item(shard) > self._first.item(shard)

    def find(self, shard: int, start: int, stop: int) -> Iterator[Segment]:
        """The segments that hold bytes [start, stop) of a shard, in order."""
        low, high = self._first.item(shard), self._ends.item(shard)
        if low == high or start >= stop:
            return
        row = low + int(np.searchsorted(self._start[low:high], start, "right")) - 1
        size = self._sizes.item(shard)
        while row < high and self._start.item(row) < stop:
            until = self._start.item(row + 1) if row + 1 < high else size
            base = int(self.columns["segment_base"][row])
            yield Segment(
                self._start.item(row),
                until,
                self._place("segment", row),
                self._place("base", base - 1) if base else None,
            )
            row += 1

    def files_of(self, shard: int) -> list[StoredFile]:
        """The files that hold bytes of a shard."""
        rows = slice(self._first.item(shard), self._ends.item(shard))
        bases = self.columns["segment_base"][rows].astype(np.int64)
        used = {*self.columns["segment_file"][rows].tolist(), *self.columns["base_file"][bases[bases > 0] - 1].tolist()}
        return [self.files[number] for number in sorted(used)]

    def _place(self, kind: str, row: int) -> Place:
        columns = self.columns
        return Place(*(int(columns[f"{kind}_{name}"][row]) for name in PLACE))

    # Totals

    def stored(self, folder: str) -> dict[str, int]:
        """How the bytes of the mapped shards are stored, seen from the checkpoint in `folder`.

        Returns:
            bytes of the shards that are "referenced" (they lie in other checkpoints) and "compressed" (in this one),
            what the latter are "compressed_to", how many of them are "deltas", and the bytes of the files that were
            "written".
        """
        columns = self.columns
        own = np.array([file.folder == folder for file in self.files], np.bool_)[columns["segment_file"]]
        logical = self._logical()
        packed = own & (columns["segment_codec"] != PLAIN)
        return {
            "referenced": int(logical[~own].sum()),
            "compressed": int(logical[packed].sum()),
            "compressed_to": int(columns["segment_nbytes"][packed].sum()),
            "deltas": int(logical[packed & (columns["segment_base"] > 0)].sum()),
            "written": sum(file.nbytes for file in self.files if file.folder == folder),
        }

    def _logical(self) -> Int64:
        """Bytes of the shard that each segment stands for."""
        stops = np.append(self._start[1:], 0)
        mapped = self._ends > self._first
        stops[self._ends[mapped] - 1] = self._sizes[mapped]
        found: Int64 = stops - self._start
        return found

    # Checks

    def _read_names(self, kind: str, what: str) -> list[str]:
        columns = self.columns
        columnar.check_names(columns[f"{kind}_names"], columns[f"{kind}_name_ends"], f"the {kind}s of {what}")
        return [name.decode() for name in columnar.split(columns[f"{kind}_names"], columns[f"{kind}_name_ends"])]

    def _checked_files(self, what: str) -> list[StoredFile]:
        folders = self.folders
        if len(set(folders)) != len(folders) or len(folders) > MAX_REFERS + 1:
            raise Damaged(f"{what} has segments in {len(folders)} folders")
        for folder in folders:
            if parse_checkpoint_name(folder) is None:
                raise Damaged(f"{what} has segments in {folder[:200]!r}, which is no checkpoint")
        names = self._read_names("file", what)
        numbers = [
            self.columns[f"file_{name}"].tolist() for name in ("folder", "nbytes", "header_nbytes", "header_digest")
        ]
        files = []
        for name, folder, nbytes, header, digest in zip(names, *numbers, strict=True):
            impossible = (
                folder >= len(folders) or header > min(nbytes, 8 + MAX_HEADER_BYTES) or nbytes > MAX_TENSOR_BYTES
            )
            if impossible or parse_shard_name(name) is None:
                raise Damaged(f"{what} has segments in the impossible file {name[:200]!r} of {nbytes} bytes")
            files.append(StoredFile(folders[folder], name, nbytes, header, digest))
        if len({file.key for file in files}) != len(files):
            raise Damaged(f"{what} has a file of segments twice")
        return files

    def _checked_starts(self, what: str) -> Int64:
        """The first byte of each segment in its shard."""
        extents = self.columns["segment_extents"].astype(np.int64)
        if (extents < 1).any():
            raise Damaged(f"{what} has an empty segment")
        before = np.concatenate((np.zeros(1, np.int64), np.cumsum(extents)))
        counts = before[self._ends] - before[self._first]
        mapped = self._ends > self._first
        wanted = np.array([extent_count(size, self._extent) for size in self._sizes.tolist()], np.int64)
        if (counts[mapped] != wanted[mapped]).any():
            raise Damaged(f"{what} has segments that do not fill their shard")
        number = before[:-1] - np.repeat(before[self._first], self._ends - self._first)
        starts: Int64 = number * self._extent  # less than the bytes of the shard
        return starts

    def _check_places(self, kind: str, logical: Int64, what: str) -> None:
        """Raises Damaged unless each place is inside its file and as large as its codec allows."""
        columns = self.columns
        file, codec = columns[f"{kind}_file"], columns[f"{kind}_codec"]
        offset, nbytes = columns[f"{kind}_offset"], columns[f"{kind}_nbytes"]
        if len(file) and int(file.max()) >= len(self.files):
            raise Damaged(f"{what} has a segment in a file that it does not list")
        size = np.array([each.nbytes for each in self.files], np.uint64)[file]
        header = np.array([each.header_nbytes for each in self.files], np.uint64)[file]
        inside = (offset >= header) & (offset <= size)
        inside &= nbytes <= np.where(inside, size - np.where(inside, offset, 0), 0)
        if not inside.all():
            raise Damaged(f"{what} has a segment that is not inside its file")
        plain = codec == PLAIN
        fits = np.where(plain, nbytes == logical.astype(np.uint64), nbytes <= logical.astype(np.uint64))
        if not (fits & (plain | self._may_be_packed(logical, codec))).all():
            raise Damaged(f"{what} has a segment of an impossible size or codec")

    def _may_be_packed(self, logical: Int64, codec: Array) -> Bool:
        found: Bool = np.isin(codec, PLANES) & (logical <= min(self._extent, MAX_SEGMENT_BYTES))
        return found

    def _check_bases(self, logical: Int64, what: str) -> None:
        columns = self.columns
        base = columns["segment_base"].astype(np.int64)
        used = np.flatnonzero(base)
        if not np.array_equal(base[used], np.arange(1, len(columns["base_file"]) + 1)):
            raise Damaged(f"{what} has bases that are not those of its segments, in their order")
        if (columns["segment_codec"][used] == PLAIN).any():
            raise Damaged(f"{what} has a segment with a base that is not compressed")
        self._check_places("base", logical[used], what)


def merge(maps: Sequence[SegmentMap | None]) -> dict[str, Array]:
    """The columns for many shards, from a map of each; None for a shard that is a file of its own."""
    folders: dict[str, int] = {}
    parts: dict[str, list[Array]] = {name: [np.empty(0, dtype)] for name, dtype in SCHEMA.items()}
    files = bases = segments = text = 0
    counts = []
    for one in maps:
        if one is None:
            counts.append(segments)
            continue
        columns = dict(one.columns)
        numbers = np.array([folders.setdefault(folder, len(folders)) for folder in one.folders], np.uint32)
        columns["file_folder"] = numbers[columns["file_folder"]]
        for name in ("segment_file", "base_file"):
            columns[name] = columns[name] + np.uint32(files)
        based = columns["segment_base"]
        columns["segment_base"] = np.where(based > 0, based + np.uint32(bases), np.uint32(0)).astype(np.uint32)
        columns["file_name_ends"] = columns["file_name_ends"] + np.uint64(text)
        for name, column in columns.items():
            if not name.startswith(("folder_", "shard_")):
                parts[name].append(column)
        files, bases = files + len(one.files), bases + len(columns["base_file"])
        segments, text = segments + len(based), text + len(columns["file_names"])
        counts.append(segments)
    names = [folder.encode() for folder in folders]
    parts["shard_segment_ends"] = [np.array(counts, np.uint64)]
    parts["folder_names"] = [np.frombuffer(b"".join(names), np.uint8)]
    parts["folder_name_ends"] = [np.cumsum(np.array([len(name) for name in names], np.uint64), dtype=np.uint64)]
    return {name: np.concatenate(part) for name, part in parts.items()}
