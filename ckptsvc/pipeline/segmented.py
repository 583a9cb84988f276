"""Reads of a shard turned into reads of the segments that hold its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from ckptsvc.errors import Damaged, NotFound
from ckptsvc.format.planes import PLAIN, decompress, exclusive_or
from ckptsvc.format.segments import Place, Segment, SegmentMap
from ckptsvc.storage import Store

READ_AT_ONCE = 16 << 20
"""Most bytes of neighbouring compressed segments that are read as one."""


def read_segments(store: Store, segments: SegmentMap, shard: int, offset: int, buffer: memoryview) -> None:
    """Fill the buffer with the bytes of a mapped shard from `offset` on.

    Plain segments are read in place. Of compressed ones, those are read whole that have a byte in the buffer.

    Raises:
        Damaged: a file is missing or too short, or what is in it cannot be decompressed.
        StoreError: as the store raises.
    """
    stop = offset + len(buffer)
    for run in _runs(segments.find(shard, offset, stop)):
        if run[0].place.codec == PLAIN:
            (segment,) = run
            low, high = max(segment.start, offset), min(segment.stop, stop)
            place = segment.place._replace(offset=segment.place.offset + low - segment.start, nbytes=high - low)
            _read(store, segments, place, buffer[low - offset : high - offset])
            continue
        first = run[0].place
        stored = memoryview(bytearray(sum(segment.place.nbytes for segment in run)))
        _read(store, segments, first._replace(nbytes=len(stored)), stored)
        for segment in run:
            at = segment.place.offset - first.offset
            content = _unpacked(store, segments, segment, stored[at : at + segment.place.nbytes])
            low, high = max(segment.start, offset), min(segment.stop, stop)
            buffer[low - offset : high - offset] = content[low - segment.start : high - segment.start]


def _runs(found: Iterator[Segment]) -> Iterator[list[Segment]]:
    """Plain segments one by one; compressed ones that lie side by side in their file together."""
    run: list[Segment] = []
    nbytes = 0
    for segment in found:
        place = segment.place
        if run:
            last = run[-1].place
            beside = place.file == last.file and place.offset == last.offset + last.nbytes
            if PLAIN in (place.codec, last.codec) or not beside or nbytes + place.nbytes > READ_AT_ONCE:
                yield run
                run, nbytes = [], 0
        run.append(segment)
        nbytes += place.nbytes
    if run:
        yield run


def _unpacked(store: Store, segments: SegmentMap, segment: Segment, stored: memoryview) -> memoryview:
    """The bytes of a compressed segment."""
    size = segment.stop - segment.start
    content = _content(store, segments, segment.place, stored, size)
    base = segment.base
    if base is None:
        return content
    data = memoryview(bytearray(base.nbytes))
    _read(store, segments, base, data)
    return exclusive_or(content, _content(store, segments, base, data, size))


def _content(store: Store, segments: SegmentMap, place: Place, stored: memoryview, size: int) -> memoryview:
    """What bytes that were read from a place stand for, verified before they are looked at."""
    what = f"{store.url}/{segments.files[place.file].key}: bytes {place.offset} to {place.offset + place.nbytes}"
    if xxhash.xxh3_64_intdigest(stored) != place.digest:
        raise Damaged(f"{what} do not match their checksum")
    return stored if place.codec == PLAIN else decompress(stored, place.codec, size, f"what is in {what},")


def _read(store: Store, segments: SegmentMap, place: Place, buffer: memoryview) -> None:
    key = segments.files[place.file].key
    try:
        store.read_into(key, place.offset, buffer)
    except NotFound:
        raise Damaged(f"{store.url}/{key}, which holds a part of a shard, is missing") from None
