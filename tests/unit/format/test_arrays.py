from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptsvc.errors import InvalidInput
from ckptsvc.format.arrays import decode_array, decode_bytes, encode_array, encode_bytes

dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    hnp.byte_string_dtypes(min_len=1, max_len=5),
    hnp.unicode_string_dtypes(endianness="?", min_len=1, max_len=5),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
)
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))


@given(arrays)
def test_arrays_come_back_bit_for_bit(array):
    found = decode_array(encode_array(array))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


def test_strides_do_not_matter():
    array = np.arange(24).reshape(4, 6)[::2, ::-3].T
    assert (decode_array(encode_array(array)) == array).all()


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.zeros(2, np.longdouble),
        np.zeros(2, np.clongdouble),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, "V4"),
    ],
)
def test_dtypes_that_mean_something_else_elsewhere_are_refused(array):
    with pytest.raises(InvalidInput, match="dtype"):
        encode_array(array)


def b64(data):
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        ["<i4", [1]],
        ["i4", [1], b64(bytes(4))],
        ["<i3", [1], b64(bytes(3))],
        ["|O", [1], b64(bytes(8))],
        ["<i4,<i4", [1], b64(bytes(8))],
        ["<f16", [1], b64(bytes(16))],
        ["<M8[q]", [1], b64(bytes(8))],
        ["<M8[0s]", [1], b64(bytes(8))],
        [["<i4"], [1], b64(bytes(4))],
        ["<i4", 1, b64(bytes(4))],
        ["<i4", [1.0], b64(bytes(4))],
        ["<i4", [True], b64(bytes(4))],
        ["<i4", [-1], b64(bytes(4))],
        ["<i4", [2], b64(bytes(4))],
        ["<i4", [0, 2**62, 2**62], ""],
        ["<i4", [0, 2**40], ""],
        ["<i4", [1] * 65, b64(bytes(4))],
        ["<i4", [1], "AAAA"],
        ["<i4", [1], "not base64"],
        ["<i4", [1], None],
        ["<i4", [1], "é"],
        ["|b1", [1], b64(b"\2")],
        ["<U1", [1], b64(b"\xff\xff\xff\xff")],
        [">U1", [1], b64(b"\0\x11\0\0")],
    ],
)
def test_what_is_no_array_is_refused(value):
    with pytest.raises((ValueError, TypeError)):
        decode_array(value)


@given(st.binary())
def test_bytes_come_back(data):
    assert decode_bytes(encode_bytes(data)) == data


@pytest.mark.parametrize("text", ["A", "AA", "AA=", "AB==", "AAA=AAAA", " AAAA", "AAAA\n", "AA-_", 3])
def test_base64_has_one_spelling(text):
    with pytest.raises((ValueError, TypeError)):
        decode_bytes(text)
