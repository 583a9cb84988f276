"""The map of segments: what is written down is found again, and nothing hostile gets through."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.extents import ROW, ExtentTable, decode, encode
from ckptsvc.format.limits import MAX_REFERS
from ckptsvc.format.planes import PLAIN, PLANES
from ckptsvc.format.segment_file import Part, SegmentFileInfo, encode_header
from ckptsvc.format.segments import SCHEMA, Place, SegmentMap, StoredFile, merge

EXTENT = 100
FILES = (
    StoredFile("step-000000000001.e00001", "r00000-00000000.safetensors", 5000),
    StoredFile("step-000000000001.e00001", "r00000-00000001.safetensors", 6000, 4096, 2**64 - 1),
    StoredFile("step-000000000002.e00001", "r00007-00000000.safetensors", 9000, 4096, 7),
)


@st.composite
def tables(draw: Any) -> tuple[ExtentTable, int]:
    """Where the extents of a shard are, in runs as a rule, and its size."""
    count = draw(st.integers(1, 12))
    nbytes = count * EXTENT - draw(st.integers(0, EXTENT - 1))
    rows = np.zeros(count, ROW)
    rows["base_file"] = -1
    number = 0
    while number < count:
        file = draw(st.integers(0, 2))
        offset = FILES[file].header_nbytes + draw(st.integers(0, 600))
        for i in range(number, min(number + draw(st.integers(1, 5)), count)):
            length = min(EXTENT, nbytes - i * EXTENT)
            codec = draw(st.sampled_from([PLAIN, PLAIN, *PLANES]))
            stored = length if codec == PLAIN else draw(st.integers(0, length))
            base = (-1, 0, 0, 0, 0)
            if codec != PLAIN and draw(st.booleans()):
                base = (draw(st.integers(0, 2)), 4096, length, PLAIN, draw(st.integers(0, 2**64 - 1)))
            rows[i] = (file, offset, stored, codec, draw(st.integers(0, 2**64 - 1)), *base)
            offset += stored
            number = i + 1
    return ExtentTable(FILES, rows), nbytes


def found(segments: SegmentMap, shard: int, table: ExtentTable, nbytes: int) -> None:
    """Asserts that each byte range of the shard is where the table has it."""
    for i, row in enumerate(table.rows.tolist()):
        start, stop = i * EXTENT, min((i + 1) * EXTENT, nbytes)
        (segment,) = segments.find(shard, start, stop)
        assert segment.start <= start < stop <= segment.stop
        place = segment.place
        file, offset, stored, codec, digest, *base = row
        assert (segments.files[place.file], place.codec) == (FILES[file], codec)
        if codec == PLAIN:
            assert place.offset + start - segment.start == offset
            assert place.digest == 0
        else:
            assert (place.offset, place.nbytes, place.digest) == (offset, stored, digest)
        if base[0] < 0:
            assert segment.base is None
        else:
            assert segment.base is not None
            assert (segments.files[segment.base.file], *segment.base[1:]) == (FILES[base[0]], *base[1:])


@given(st.lists(st.none() | tables(), min_size=1, max_size=4))
def test_what_is_written_down_is_found_again(shards: list[tuple[ExtentTable, int] | None]) -> None:
    maps = []
    for one in shards:
        if one is None:
            maps.append(None)
            continue
        table, nbytes = one
        sent = decode(encode(table.segments(nbytes, EXTENT)), nbytes, EXTENT)
        found(sent, 0, table, nbytes)
        maps.append(sent)
    if not any(maps):
        return
    # In an index a file belongs to one shard.
    named = [None if one is None else _renamed(one, i) for i, one in enumerate(maps)]
    sizes = [one[1] if one else 50 for one in shards]
    together = SegmentMap(merge(named), sizes, EXTENT, "the index")
    assert [together.is_mapped(i) for i in range(len(shards))] == [one is not None for one in shards]
    for i, one in enumerate(maps):
        if one is None:
            assert list(together.find(i, 0, 50)) == []
            continue
        alone = [(s.start, s.stop, _where(one, s.place, i), _where(one, s.base, i)) for s in one.find(0, 0, sizes[i])]
        assert alone == [
            (s.start, s.stop, _where(together, s.place), _where(together, s.base))
            for s in together.find(i, 0, sizes[i])
        ]
        assert {_key(file, i) for file in one.files_of(0)} == {file.key for file in together.files_of(i)}


def _renamed(one: SegmentMap, shard: int) -> SegmentMap:
    columns = dict(one.columns)
    columns["file_names"] = np.frombuffer(
        b"".join(file.name.replace("r0000", f"r000{shard + 1}").encode() for file in one.files), np.uint8
    )
    return SegmentMap(columns, one._sizes.tolist(), EXTENT, "x")


def _key(file: StoredFile, shard: int | None) -> str:
    return file.key if shard is None else file.key.replace("/r0000", f"/r000{shard + 1}")


def _where(segments: SegmentMap, place: Place | None, shard: int | None = None) -> Any:
    return None if place is None else (_key(segments.files[place.file], shard), *place[1:])


def sample() -> tuple[SegmentMap, int]:
    """Three plain extents in two files, one compressed, one a difference."""
    rows = np.zeros(5, ROW)
    rows["base_file"] = -1
    rows["nbytes"] = [100, 100, 100, 30, 20]
    rows["file"], rows["offset"] = [0, 0, 2, 2, 2], [0, 100, 4096, 4196, 4226]
    rows["codec"] = [0, 0, 0, 4, 2]
    rows[4]["base_file"], rows[4]["base_nbytes"] = 0, 50
    return ExtentTable(FILES, rows).segments(450, EXTENT), 450


def test_neighbours_are_one_segment() -> None:
    segments, nbytes = sample()
    assert [(s.start, s.stop, s.place.codec) for s in segments.find(0, 0, nbytes)] == [
        (0, 200, 0), (200, 300, 0), (300, 400, 4), (400, 450, 2),
    ]  # fmt: skip
    assert [s.start for s in segments.find(0, 199, 201)] == [0, 200]
    assert segments.stored("step-000000000002.e00001") == {
        "referenced": 200, "compressed": 150, "compressed_to": 50, "deltas": 50, "written": 9000,
    }  # fmt: skip


BAD = {
    "a segment beyond its file": {"segment_offset": (0, 4990)},
    "a segment that begins beyond its file": {"segment_offset": (0, 2**64 - 1)},
    "a segment in a header": {"segment_offset": (1, 4095)},
    "a segment in no file": {"segment_file": (0, 2)},
    "a plain segment of another size": {"segment_nbytes": (0, 199)},
    "a compressed segment larger than its content": {"segment_nbytes": (2, 101)},
    "a compressed segment of several extents": {"segment_codec": (0, 4)},
    "an unknown codec": {"segment_codec": (2, 3)},
    "too few extents": {"segment_extents": (0, 1)},
    "too many": {"segment_extents": (0, 2**32 - 1)},
    "none": {"segment_extents": (1, 0)},
    "a base of another row": {"segment_base": (3, 2)},
    "a base nobody uses": {"segment_base": (3, 0)},
    "a plain segment with a base": {"segment_base": (0, 1)},
    "a base of another size": {"base_nbytes": (0, 51)},
    "a base beyond its file": {"base_offset": (0, 4951)},
    "a base in no file": {"base_file": (0, 9)},
    "a file in no folder": {"file_folder": (0, 2)},
    "a header larger than its file": {"file_header_nbytes": (1, 9001)},
    "a file that is too large": {"file_nbytes": (0, 2**63)},
    "a path for a name": {"file_names": (0, ord("/"))},
    "a name that is no checkpoint's": {"folder_names": (0, ord("."))},
    "ends that do not add up": {"shard_segment_ends": (0, 3)},
    "more names than there are": {"file_name_ends": (1, 99)},
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused(what: str) -> None:
    segments, nbytes = sample()
    ((column, (row, value)),) = BAD[what].items()
    columns = {name: array.copy() for name, array in segments.columns.items()}
    columns[column][row] = value
    with pytest.raises(Damaged):
        SegmentMap(columns, [nbytes], EXTENT, "the index")


def test_columns_belong_together() -> None:
    segments, nbytes = sample()
    for name, column in segments.columns.items():
        with pytest.raises(Damaged):
            SegmentMap({**segments.columns, name: column[:-1]}, [nbytes], EXTENT, "the index")
        if name not in ("file_names", "folder_names"):
            with pytest.raises(Damaged):
                SegmentMap({**segments.columns, name: np.append(column, column[-1:])}, [nbytes], EXTENT, "the index")
    twice = {name: np.concatenate((column, column)) for name, column in segments.columns.items() if "folder_n" in name}
    twice["folder_name_ends"] = segments.columns["folder_name_ends"][[0, 1, 0, 1]] + np.uint64([0, 0, 48, 48])
    with pytest.raises(Damaged, match="folders"):
        SegmentMap({**segments.columns, **twice}, [nbytes], EXTENT, "the index")


def test_whatever_is_in_the_columns_is_refused_or_harmless() -> None:
    rng = random.Random(16)
    segments, nbytes = sample()
    values = [0, 1, 2, 3, 99, 4096, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
    accepted = 0
    for _ in range(3000):
        columns = {name: array.copy() for name, array in segments.columns.items()}
        for _ in range(rng.randint(1, 3)):
            column = columns[rng.choice(list(SCHEMA))]
            column[rng.randrange(len(column))] = rng.choice(values) % (int(np.iinfo(column.dtype).max) + 1)
        try:
            hostile = SegmentMap(columns, [nbytes], EXTENT, "the index")
        except Damaged:
            continue
        accepted += 1
        for segment in hostile.find(0, 0, nbytes):
            for place in (segment.place, segment.base):
                if place is not None:
                    file = hostile.files[place.file]
                    assert file.header_nbytes <= place.offset <= place.offset + place.nbytes <= file.nbytes
    assert accepted  # digests of headers and offsets may be anything


def test_a_message_of_a_newer_major_version_is_refused() -> None:
    segments, nbytes = sample()
    message = encode(segments)
    assert set(load(message)) == set(SCHEMA)
    with pytest.raises(IncompatibleVersion):
        decode(message.replace(b'\\"2.0\\"', b'\\"3.0\\"'), nbytes, EXTENT)
    with pytest.raises(Damaged):
        decode(message, nbytes + EXTENT, EXTENT)


def test_a_limited_number_of_checkpoints_is_referred_to() -> None:
    segments, nbytes = sample()
    for more, fits in ((0, True), (1, False)):
        folders = [f"step-{n:012}.e00001".encode() for n in range(MAX_REFERS + 1 + more)]
        columns = {
            **segments.columns,
            "folder_names": np.frombuffer(b"".join(folders), np.uint8),
            "folder_name_ends": np.cumsum([len(folder) for folder in folders]).astype(np.uint64),
        }
        if fits:
            SegmentMap(columns, [nbytes], EXTENT, "the index")
        else:
            with pytest.raises(Damaged, match="folders"):
                SegmentMap(columns, [nbytes], EXTENT, "the index")


def test_the_safetensors_library_opens_a_file_of_segments() -> None:
    info = SegmentFileInfo(
        run="file:///run", job="j", step=3, epoch=1, attempt=1, rank=2, world_size=4, extent=4096, shard_nbytes=50_000
    )
    parts = [Part(0, 2, 8192, PLAIN, False), Part(5, 1, 30, 4, False), Part(6, 1, 31, 2, True)]
    header = encode_header(info, parts)
    assert len(header) % 4096 == 0
    tensors = load(header + bytes(range(256)) * 32 + b"a" * 30 + b"b" * 31)
    assert {name: array.tobytes()[:1] for name, array in tensors.items()} == {
        "extents@0:2": b"\0", "extents@5:1@zstd:4": b"a", "extents@6:1@zstd:2@delta": b"b",
    }  # fmt: skip
    told = json.loads(json.loads(header[8:])["__metadata__"]["ckptsvc"])
    assert (told["format"], told["rank"], told["shard_nbytes"]) == ("2.0", 2, 50_000)
    assert save(tensors)
