"""A file of segments: a safetensors file with one tensor of bytes for each, in the order of the shard.

Readers go by the index. The header is for people, for the safetensors library and for whoever has lost the index: its
keys say which extents of which shard these are and how they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from ckptsvc.errors import InvalidInput
from ckptsvc.format import header, record
from ckptsvc.format.compat import SEGMENTED
from ckptsvc.format.limits import MAX_HEADER_BYTES
from ckptsvc.format.planes import PLAIN
from ckptsvc.format.shard import PAGE, ShardInfo


class Part(NamedTuple):
    """One segment: its first extent, how many, stored bytes, codec, and whether it has a base."""

    first: int
    extents: int
    nbytes: int
    codec: int
    delta: bool

    @property
    def key(self) -> str:
        """How the header calls it."""
        packed = "" if self.codec == PLAIN else f"@zstd:{self.codec}"
        return f"extents@{self.first}:{self.extents}{packed}" + ("@delta" if self.delta else "")


class SegmentFileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The info record: whose snapshot the segments are of, and how that is divided.

    Attributes:
        run, job, step, epoch, attempt, rank, world_size: as in a shard.
        extent: bytes per extent.
        shard_nbytes: bytes of the shard.
        format: version of the format.
    """

    run: str
    job: str
    step: int
    epoch: int
    attempt: int
    rank: int
    world_size: int
    extent: int
    shard_nbytes: int
    format: str = SEGMENTED

    @classmethod
    def of(cls, shard: ShardInfo, extent: int, nbytes: int) -> SegmentFileInfo:
        """That of segments of a shard of `nbytes` bytes."""
        fields = {name: getattr(shard, name) for name in _FROM_SHARD}
        return cls(**fields, extent=extent, shard_nbytes=nbytes)


_FROM_SHARD: Final = ("run", "job", "step", "epoch", "attempt", "rank", "world_size")


def encode_header(info: SegmentFileInfo, parts: Sequence[Part]) -> bytes:
    """The header, padded to a multiple of `PAGE`; the segments follow it without gaps.

    Raises:
        InvalidInput: there are more than a header can hold.
    """
    entries: dict[str, object] = {header.METADATA: {header.INFO: record.canonical(info).decode()}}
    position = 0
    for part in parts:
        stop = position + part.nbytes
        entries[part.key] = {"dtype": "U8", "shape": (part.nbytes,), "data_offsets": (position, stop)}
        position = stop
    body = msgspec.json.encode(entries)
    size = -(-(header.LENGTH_BYTES + len(body)) // PAGE) * PAGE
    length = size - header.LENGTH_BYTES
    if length > MAX_HEADER_BYTES:
        raise InvalidInput(f"the header of a file with {len(parts)} segments would have {length} bytes")
    return length.to_bytes(header.LENGTH_BYTES, "little") + body.ljust(length)
