"""What several tests of this room draw from: tensors, regions, parts, and damage done to bytes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.checksum import EXTENT, extent_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import shard_name
from ckptsvc.format.index import IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate, decode_header
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.types import DTYPES, TensorMeta

settings.register_profile("ckptsvc", deadline=None)
settings.load_profile("ckptsvc")

names = st.one_of(
    st.sampled_from(["w", "w@0:1", "w@flat:0:1", "__metadata__", "a/b", "é", 'q"\\', "@rank/0/rng", "x" * 4096]),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
metas = st.builds(TensorMeta, names, st.sampled_from(sorted(DTYPES)), shapes)


@st.composite
def regions_in(draw, shape):
    if draw(st.booleans()):
        size = math.prod(shape)
        start = draw(st.integers(0, size))
        return FlatRange(start, draw(st.integers(0, size - start)))
    if draw(st.booleans()):
        return Box.full(shape)
    origin = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(origin, tuple(draw(st.integers(0, n - o)) for o, n in zip(origin, shape, strict=True)))


@st.composite
def parts_lists(draw, reserved=("@rank/", "/objects")):
    parts = {}
    for meta in draw(st.lists(metas, max_size=6, unique_by=lambda meta: meta.name)):
        if meta.name.startswith(reserved[0]) and meta.name.endswith(reserved[1]):
            continue
        for region in draw(st.lists(regions_in(meta.shape), min_size=1, max_size=3)):
            parts[meta.name, region] = Part(meta, region)
    return list(parts.values())


@st.composite
def damaged(draw, data):
    """The data with bytes changed, cut out, doubled or put in."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        what = draw(st.sampled_from(["set", "flip", "cut", "truncate", "double", "insert"]))
        stop = min(len(result), at + draw(st.sampled_from([1, 2, 7, 8, 64])))
        if what == "set" and result:
            result[at] = draw(st.integers(0, 255))
        elif what == "flip" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del result[at:stop]
        elif what == "truncate":
            del result[at:]
        elif what == "double":
            result[at:at] = result[at:stop]
        else:
            result[at:at] = draw(st.sampled_from([b'"', b"\\", b"[", b"{", b"9" * 30, b"-", b"\0", b"\xff", b"1e9"]))
    return bytes(result)


def survives(parser, data):
    """What the parser makes of the data, or None when it refuses it as it should; other exceptions go on."""
    try:
        return parser(data)
    except (Damaged, IncompatibleVersion):
        return None


def shard_info(rank=0, **changes):
    fields = {"run": "file:///run", "job": 'jö"b', "step": 7, "epoch": 2, "attempt": 3, "world_size": 8}
    return ShardInfo(rank=rank, **{**fields, **changes})


def shard_record(rank, parts, objects=b"{}", extent=EXTENT):
    """The report of a shard with these parts: (record, its bytes)."""
    template = ShardTemplate(parts)
    data = (np.arange(template.tensor_bytes) * (rank + 3) % 251).astype(np.uint8).tobytes()
    file = template.header(shard_info(rank), len(objects)) + data + objects
    columns = Columns.from_table(decode_header(file, len(file)))
    return ShardRecord(shard_name(rank, "9f2c01ab"), rank, len(file), extent_digests(file, extent), columns), file


def entries_of(rank, parts):
    """The entries of that shard in file order, its objects document not among them."""
    file = shard_record(rank, parts)[1]
    return decode_header(file, len(file)).entries[:-1]


@st.composite
def jobs(draw):
    """The parts of each rank: regions drawn at random of the same few tensors."""
    tensors = draw(st.lists(metas, max_size=5, unique_by=lambda meta: meta.name))
    job = []
    for _ in range(draw(st.integers(0, 4))):
        parts = {}
        for meta in tensors:
            for region in draw(st.lists(regions_in(meta.shape), max_size=2)):
                parts[meta.name, region] = Part(meta, region)
        job.append(list(parts.values()))
    return job


def index_info(world_size=8, **changes):
    fields = {"step": 7, "epoch": 2, "attempt": 3, "job": "jö", "created": "2026-01-02T03:04:05Z"}
    return IndexInfo(world_size=world_size, **{**fields, **changes})


@pytest.fixture(scope="session")
def kit():
    """The strategies and helpers above."""
    return SimpleNamespace(
        names=names,
        shapes=shapes,
        metas=metas,
        regions_in=regions_in,
        parts_lists=parts_lists,
        damaged=damaged,
        survives=survives,
        shard_info=shard_info,
        shard_record=shard_record,
        entries_of=entries_of,
        jobs=jobs,
        index_info=index_info,
    )
