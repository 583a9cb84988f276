"""The places of all extents of one shard, one row each: what a writer keeps to know what it need not write again.

They become a `SegmentMap` when they are written down: neighbouring extents then are one segment.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptsvc.format import columnar, record, segments
from ckptsvc.format.checksum import Digests, extent_count
from ckptsvc.format.columnar import Array
from ckptsvc.format.compat import SEGMENTED
from ckptsvc.format.limits import MAX_RECORD_BYTES
from ckptsvc.format.planes import PLAIN
from ckptsvc.format.segments import SegmentMap, StoredFile

ROW: Final = np.dtype(
    [(f"{prefix}{name}", kind) for prefix in ("", "base_") for name, kind in zip(segments.PLACE,
     (np.int64, np.int64, np.int64, np.uint8, np.uint64), strict=True)]
)  # fmt: skip
"""Where an extent is, and its base: a `file` of -1 is none. The digests are of the stored bytes."""

Rows = NDArray[Any]


class ExtentTable(msgspec.Struct, frozen=True, eq=False):
    """The extents of one shard.

    Attributes:
        files: the files that rows name by number.
        rows: [extents] of dtype `ROW`.
    """

    files: tuple[StoredFile, ...]
    rows: Rows

    @classmethod
    def whole(cls, file: StoredFile, extent: int, digests: Digests) -> ExtentTable:
        """Those of a shard that is all of a file; `digests` are those of its extents."""
        rows = empty_rows(extent_count(file.nbytes, extent))
        rows["file"] = 0
        rows["offset"] = np.arange(len(rows)) * extent
        rows["nbytes"] = np.minimum(extent, file.nbytes - rows["offset"])
        rows["digest"] = digests
        return cls((file,), rows)

    def segments(self, nbytes: int, extent: int) -> SegmentMap:
        """The map of the shard, with the files that are used and no others.

        Args:
            nbytes: of the shard.
            extent: bytes per extent.

        Raises:
            Damaged: the rows are not those of such a shard.
        """
        rows = self.rows
        used = np.unique(np.concatenate((rows["file"], rows["base_file"][rows["base_file"] >= 0])))
        files = [self.files[number] for number in used.tolist()]
        folders = sorted({file.folder for file in files})
        follows = (rows["codec"][1:] == PLAIN) & (rows["codec"][:-1] == PLAIN)
        follows &= rows["file"][1:] == rows["file"][:-1]
        follows &= rows["offset"][1:] == rows["offset"][:-1] + rows["nbytes"][:-1]
        first = np.flatnonzero(np.concatenate((np.ones(min(len(rows), 1), np.bool_), ~follows)))
        based = first[rows["base_file"][first] >= 0]
        base = np.zeros(len(rows), np.uint32)
        base[based] = np.arange(1, len(based) + 1)
        columns: dict[str, Array] = {
            "shard_segment_ends": np.array([len(first)]),
            "segment_extents": np.diff(np.append(first, len(rows))),
            "segment_file": np.searchsorted(used, rows["file"][first]),
            "segment_offset": rows["offset"][first],
            "segment_nbytes": np.add.reduceat(rows["nbytes"], first) if len(first) else rows["nbytes"],
            "segment_codec": rows["codec"][first],
            "segment_digest": np.where(rows["codec"][first] == PLAIN, np.uint64(0), rows["digest"][first]),
            "segment_base": base[first],
            "base_file": np.searchsorted(used, rows["base_file"][based]),
            "file_folder": np.array([folders.index(file.folder) for file in files]),
            "file_nbytes": np.array([file.nbytes for file in files]),
            "file_header_nbytes": np.array([file.header_nbytes for file in files]),
            "file_header_digest": np.array([file.header_digest for file in files], np.uint64),
        }
        columns |= {name: rows[name][based] for name in ("base_offset", "base_nbytes", "base_codec", "base_digest")}
        for kind, names in (("file", [file.name for file in files]), ("folder", folders)):
            text = [name.encode() for name in names]
            columns[f"{kind}_names"] = np.frombuffer(b"".join(text), np.uint8)
            columns[f"{kind}_name_ends"] = np.cumsum(np.array([len(name) for name in text], np.uint64))
        typed = {name: np.asarray(columns[name]).astype(dtype) for name, dtype in segments.SCHEMA.items()}
        return SegmentMap(typed, [nbytes], extent, "the shard")


def empty_rows(count: int) -> Rows:
    """Rows of extents that are nowhere yet."""
    rows = np.zeros(count, ROW)
    rows["file"] = rows["base_file"] = -1
    return rows


class _Info(msgspec.Struct, frozen=True):
    format: str = SEGMENTED


def encode(found: SegmentMap) -> bytes:
    """The map of one shard as a message, a safetensors file."""
    return columnar.encode(found.columns, record.canonical(_Info()))


def decode(data: bytes | memoryview, nbytes: int, extent: int, what: str = "the segments of a shard") -> SegmentMap:
    """The map in a message; `nbytes` and `extent` are those of the shard.

    Raises:
        Damaged: malformed or contradictory.
        IncompatibleVersion: of a newer major version of the format.
    """
    columns, _ = columnar.decode(data, segments.SCHEMA, what, MAX_RECORD_BYTES)
    return SegmentMap(columns, [nbytes], extent, what)
