from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.record import canonical, convert, parse

values = st.recursive(
    st.one_of(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1)),
    lambda inner: st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=8,
)


class Sample(msgspec.Struct):
    number: int
    format: str = "1.0"


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), values))
def test_the_canonical_form_is_that_of_the_json_module(record):
    expected = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical(record) == expected.encode()


def test_a_record_comes_back():
    record = parse(canonical(Sample(3)), 100, "x")
    assert convert(record, Sample, "x") == Sample(3)


def test_fields_of_a_newer_minor_version_are_dropped():
    record = parse(b'{"format":"1.9","new":{"a":"b"},"number":3}', 100, "x")
    assert convert(record, Sample, "x") == Sample(3, "1.9")


def test_a_newer_major_version_is_refused_whatever_else_it_holds():
    with pytest.raises(IncompatibleVersion):
        parse(b'{"format":"3.0","number":"three"}', 100, "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b'{"number":3}',
        b'{"number":3,"format":"1.0"}',  # not sorted
        b'{"format": "1.0","number":3}',  # white space
        b'{"format":"1.0","number":3}\n',
        b'{"format":"1.0","number":3,"number":3}',
        b'{"format":"1.0","number":3,"number":4}',
        b'{"format":"1.0","n\\u0075mber":3}',  # needless escape
        b'{"format":"1.0","number":3.50}',
        b'{"format":"1.0","number":1e999}',
        b'{"format":"1.0","number":' + b"9" * 5000 + b"}",
        b'{"format":"1.0","number":"\xff"}',
        b'{"format":"1.0","number":"\\ud800"}',
        b'{"format":"1.0","number":' + b"[" * 100_000,
    ],
)
def test_other_spellings_are_damage(data):
    with pytest.raises(Damaged):
        parse(data, 1_000_000, "x")


def test_fields_of_the_wrong_type_are_damage():
    with pytest.raises(Damaged, match=r"the record x.*number"):
        convert({"number": "3"}, Sample, "the record x")
