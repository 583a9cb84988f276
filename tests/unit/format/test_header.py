from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.header import count_quotes, decode, header_length
from ckptsvc.format.limits import MAX_HEADER_BYTES

INFO = '{"format":"1.0"}'


def file_of(header, data=b"", pad=0):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    body += b" " * pad
    return len(body).to_bytes(8, "little") + body + data


def entry(start, stop, dtype="U8", shape=None):
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def decoded(file):
    return decode(file, len(file), "the file", 1000)


def with_info(**entries):
    return {"__metadata__": {"ckptsvc": INFO}, **entries}


def test_entries_come_back_in_file_order_with_absolute_offsets():
    header = with_info(b=entry(8, 12), a=entry(0, 8, "F32", [2, 1]), empty=entry(12, 12, "F64", [0, 3]))
    header["__metadata__"]["other"] = "x"
    found = decoded(file_of(header, bytes(12), pad=5))
    start = found.data_start
    assert [(key, *value) for key, value in found.entries.items()] == [
        ("a", "F32", (2, 1), start, start + 8),
        ("b", "U8", (4,), start + 8, start + 12),
        ("empty", "F64", (0, 3), start + 12, start + 12),
    ]
    assert found.metadata == {"ckptsvc": INFO, "other": "x"}
    assert found.info == {"format": "1.0"}


def test_a_newer_version_is_refused_before_anything_else_is_looked_at():
    header = {"__metadata__": {"ckptsvc": '{"format":"3.0"}'}, "a": entry(0, 5, "F6_NEW")}
    with pytest.raises(IncompatibleVersion):
        decoded(file_of(header))


@pytest.mark.parametrize(
    ("entries", "nbytes"),
    [
        ({"a": entry(1, 4)}, 4),  # hole at the start
        ({"a": entry(0, 4), "b": entry(5, 8)}, 8),  # hole
        ({"a": entry(0, 4), "b": entry(3, 8)}, 8),  # overlap
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4),  # the same bytes twice
        ({"a": entry(0, 4)}, 5),  # bytes at the end
        ({"a": entry(0, 4)}, 3),  # truncated
        ({"a": entry(0, 4, shape=[5])}, 4),
        ({"a": entry(0, 4, "F64", [1])}, 4),
        ({"a": entry(4, 0, shape=[0])}, 4),
        ({"a": entry(0, 4, "F3")}, 4),
        ({"a": entry(0, 4, shape=[-2, -2])}, 4),
        ({"a": entry(0, 4, shape=[4.0])}, 4),
        ({"a": entry(0, 4, shape=["4"])}, 4),
        ({"a": entry(0, 4, shape=[2**64])}, 4),
        ({"a": entry(0, 4, shape=[2**62, 2**62])}, 4),
        ({"a": entry(0, 0, shape=[1] * 70 + [0])}, 0),
        ({"a": {**entry(0, 4), "more": 1}}, 4),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4),
        ({"a": 3}, 4),
        ({"a": []}, 4),
    ],
)
def test_a_header_that_contradicts_itself_is_damage(entries, nbytes):
    with pytest.raises(Damaged, match="the file"):
        decoded(file_of(with_info(**entries), bytes(nbytes)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"__metadata__":{}}',
        b'{"__metadata__":{"ckptsvc":3}}',
        b'{"__metadata__":{"ckptsvc":"{}"}}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":null}',
        b'{"__metadata__":' * 10_000,
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"\xff":3}',
        b"\xef\xbb\xbf{}",
        b"{} {}",
    ],
)
def test_what_is_no_header_of_ours_is_damage(body):
    with pytest.raises(Damaged):
        decoded(file_of(body))


def test_a_key_that_occurs_twice_is_damage():
    one = json.dumps(with_info(a=entry(0, 4)))[:-1].encode()
    assert decoded(file_of(one + b"}", bytes(4)))
    for more in (
        b',"a":' + json.dumps(entry(0, 4)).encode(),
        b',"\\u0061":' + json.dumps(entry(0, 4)).encode(),
        b',"__metadata__":{"ckptsvc":' + json.dumps(INFO).encode() + b"}",
    ):
        with pytest.raises(Damaged, match="twice"):
            decoded(file_of(one + more + b"}", bytes(4)))
    inner = one.replace(b'"dtype": "U8"', b'"dtype": "U8", "dtype": "U8"')
    assert inner != one
    with pytest.raises(Damaged, match="twice"):
        decoded(file_of(inner + b"}", bytes(4)))


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_quotes_are_counted_as_a_parser_would(value):
    def strings(value):
        if isinstance(value, str):
            return 1
        if isinstance(value, dict):
            return len(value) + sum(map(strings, value.values()))
        return sum(map(strings, value))

    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        assert count_quotes(text) == 2 * strings(value)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, bytes(8), (1).to_bytes(8, "little"), b"\xff" * 8])
def test_a_length_that_no_header_has_is_damage(data):
    with pytest.raises(Damaged, match="my file"):
        header_length(data, "my file")


def test_the_length_is_read_from_the_first_bytes():
    assert header_length((4088).to_bytes(8, "little") + b"more") == 4088
    assert header_length(MAX_HEADER_BYTES.to_bytes(8, "little")) == MAX_HEADER_BYTES


def test_a_prefix_without_the_whole_header_is_damage():
    file = file_of(with_info(a=entry(0, 4)), bytes(4))
    with pytest.raises(Damaged, match="truncated"):
        decode(file[:20], len(file), "the file", 1000)
    with pytest.raises(Damaged, match="truncated"):
        decode(file, 20, "the file", 1000)


@given(st.data())
def test_damage_comes_out_as_damage(kit, data):
    file = file_of(with_info(a=entry(0, 8, "F32", [2, 1]), b=entry(8, 12)), bytes(12), pad=5)
    kit.survives(decoded, data.draw(kit.damaged(file)))
