"""NumPy arrays inside a JSON document: [dtype, shape, base64 of the elements in row-major order].

The dtype is NumPy's own spelling (`numpy.dtype.str`), restricted to those that mean the same on every
machine: no objects, no structures, no long double.
"""

from __future__ import annotations

import base64
import re
from math import prod
from typing import Any

import numpy as np

from ckptsvc.errors import InvalidInput
from ckptsvc.format.limits import MAX_NDIM, MAX_OBJECTS_BYTES

_PORTABLE = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(8|16)"
    r"|\|S[1-9][0-9]{0,8}|[<>]U[1-9][0-9]{0,8}|[<>][mM]8(\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?",
    re.ASCII,
)


def encode_bytes(data: bytes | bytearray | memoryview) -> str:
    """Base64 (RFC 4648, standard alphabet, padded)."""
    return base64.b64encode(data).decode("ascii")


def decode_bytes(text: Any) -> bytes:
    """The opposite of `encode_bytes`. Raises TypeError or ValueError for what it would not have written."""
    if not isinstance(text, str):
        raise TypeError("expected base64 text")
    data = base64.b64decode(text, validate=True)
    if encode_bytes(data) != text:
        raise ValueError("base64 text with stray bits at its end")
    return data


def encode_array(array: np.ndarray[Any, Any]) -> list[Any]:
    """The array as a JSON value.

    Raises:
        InvalidInput: its dtype is not portable.
    """
    if not _PORTABLE.fullmatch(array.dtype.str):
        raise InvalidInput(f"a NumPy value of dtype {array.dtype} cannot be stored")
    return [array.dtype.str, list(array.shape), encode_bytes(array.tobytes())]


def decode_array(value: Any) -> np.ndarray[Any, Any]:
    """The array of a JSON value, writable.

    Raises:
        ValueError, TypeError: it is not what `encode_array` writes.
    """
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("expected [dtype, shape, base64]")
    spelling, shape, text = value
    if not isinstance(spelling, str) or not _PORTABLE.fullmatch(spelling):
        raise ValueError(f"unknown NumPy dtype {str(spelling)[:50]!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > MAX_NDIM:
        raise ValueError(f"impossible shape {str(shape)[:50]}")
    dtype, data = np.dtype(spelling), decode_bytes(text)
    if prod(shape) * dtype.itemsize != len(data) or prod(n for n in shape if n) > MAX_OBJECTS_BYTES:
        raise ValueError(f"{len(data)} bytes for the shape {str(shape)[:50]} of {spelling}")
    array: np.ndarray[Any, Any] = np.ndarray(tuple(shape), dtype, data).copy()
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    if dtype.kind == "U" and array.size and _code_points(array).max() > 0x10FFFF:
        raise ValueError("a character that is not in Unicode")
    return array


def _code_points(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(array.tobytes(), np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
