from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format import columnar
from ckptsvc.format.columnar import check_ends, check_names, chunks, decode, encode, gather, split, starts

INFO = b'{"format":"1.0"}'
COLUMNS = {
    "bytes": np.array([1, 2, 255], np.uint8),
    "wide": np.array([2**64 - 1], np.uint64),
    "signed": np.array([-1, 2**63 - 1], np.int64),
    "narrow": np.array([], np.uint32),
}
SCHEMA = {name: column.dtype for name, column in COLUMNS.items()}


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(columnar, "CHUNK", 3)


def test_columns_come_back_and_safetensors_reads_them():
    file = encode(COLUMNS, INFO)
    columns, info = decode(file, SCHEMA, "x", 100)
    assert info == {"format": "1.0"}
    for name, column in load(file).items():
        assert columns[name].dtype == column.dtype == SCHEMA[name]
        assert columns[name].tolist() == column.tolist() == COLUMNS[name].tolist()
    assert columns["wide"].flags.aligned
    assert not columns["wide"].flags.writeable


def test_more_columns_than_are_wanted_are_a_newer_minor_version():
    file = encode(COLUMNS, b'{"format":"1.5"}')
    assert set(decode(file, {"wide": np.uint64}, "x", 100)[0]) == {"wide"}
    with pytest.raises(IncompatibleVersion):
        decode(encode(COLUMNS, b'{"format":"3.0"}'), SCHEMA, "x", 100)


@pytest.mark.parametrize("schema", [{"missing": np.uint8}, {"wide": np.int64}, {"bytes": np.uint64}])
def test_a_column_that_is_missing_or_of_another_type_is_damage(schema):
    with pytest.raises(Damaged, match="no column"):
        decode(encode(COLUMNS, INFO), schema, "x", 100)


def test_a_column_has_one_dimension():
    file = encode(COLUMNS, INFO).replace(b'"shape":[3]', b'"shape":[3,1]')
    broken = file.replace(b" ", b"", 2)
    with pytest.raises(Damaged, match="no column 'bytes'"):
        decode(broken, SCHEMA, "x", 100)


lists = st.lists(st.binary(max_size=9), max_size=12)


@pytest.mark.usefixtures("_small_chunks")
@given(lists)
def test_lists_are_split_at_their_ends(items):
    flat = np.frombuffer(b"".join(items), np.uint8)
    lengths = np.array([len(item) for item in items], np.int64)
    ends = np.cumsum(lengths).astype(np.uint64)
    assert list(split(flat, ends)) == items
    assert starts(lengths).tolist() == [sum(map(len, items[:i])) for i in range(len(items))]
    check_ends(ends, len(flat), "x")


@pytest.mark.usefixtures("_small_chunks")
@given(lists, st.data())
def test_gather_takes_lists(items, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(items))), max_size=9)) if items else []
    flat = np.frombuffer(b"".join(items), np.uint8)
    lengths = np.array([len(item) for item in items], np.int64)
    rows = np.array(chosen, np.int64)
    assert gather(flat, starts(lengths)[rows], lengths[rows]).tobytes() == b"".join(items[i] for i in chosen)


@pytest.mark.usefixtures("_small_chunks")
@given(st.integers(0, 20), st.integers(0, 40))
def test_chunks_cover_all_rows(n, items):
    slices = list(chunks(n, items))
    assert [i for part in slices for i in range(n)[part]] == list(range(n))
    assert all(1 <= part.stop - part.start <= 3 for part in slices)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize(
    ("ends", "total"),
    [
        ([], 1),
        ([0], 1),
        ([2], 1),
        ([1, 0, 1], 1),
        ([5, 1], 1),
        ([1, 2, 3, 2, 5], 5),
        ([1, 2, 3, 2**64 - 1, 5], 5),
        ([2**63, 5], 5),
        ([1, 2, 3, 4, 6], 5),
    ],
)
def test_ends_that_do_not_add_up_are_damage(ends, total):
    with pytest.raises(Damaged, match="the lists"):
        check_ends(np.array(ends, np.uint64), total, "the lists")


@pytest.mark.usefixtures("_small_chunks")
def test_lists_may_have_a_least_and_a_greatest_length():
    ends = np.array([1, 2, 4, 4, 9], np.uint64)
    check_ends(ends, 9, "x", 0, 5)
    for least, most in ((1, 5), (0, 4)):
        with pytest.raises(Damaged):
            check_ends(ends, 9, "x", least, most)


def names_of(*names):
    return np.frombuffer(b"".join(names), np.uint8), np.cumsum([len(name) for name in names]).astype(np.uint64)


def test_names_are_utf_8():
    check_names(*names_of(b"a", "é".encode(), "日本".encode(), b"b"), "x")
    check_names(*names_of(b"a", b"b"), "x")
    check_names(np.empty(0, np.uint8), np.empty(0, np.uint64), "x")
    for bad in ([b"\xff"], [b"a", b""], ["é".encode()[:1], "é".encode()[1:]], [b"a", b"\xed\xa0\x80"]):
        with pytest.raises(Damaged, match="x"):
            check_names(*names_of(*bad), "x")


@given(st.data())
def test_damage_comes_out_as_damage(kit, data):
    kit.survives(lambda file: decode(file, SCHEMA, "x", 100), data.draw(kit.damaged(encode(COLUMNS, INFO))))
