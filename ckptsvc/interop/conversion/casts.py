"""Elements of one type as elements of another, with NumPy alone.

Floats are rounded to the nearest, ties to even; NaN stays NaN. A cast that cannot change a value is lossless; of the
others, those from floats to integers and between integers are made only where every value survives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput
from ckptsvc.pipeline.read import carrier
from ckptsvc.types import DTYPES

Array = NDArray[Any]

BLOCK = 1 << 17
"""Elements cast at a time: a few arrays of so many stay in the cache of a core."""


class _Range(NamedTuple):
    """What a type can hold: bits of its significand (or of its integers), exponents of its floats."""

    bits: int
    signed: bool
    floating: bool
    lowest: int = 0
    highest: int = 0


_RANGES = {
    "bool": _Range(1, False, False),
    **{f"uint{n}": _Range(n, False, False) for n in (8, 16, 32, 64)},
    **{f"int{n}": _Range(n - 1, True, False) for n in (8, 16, 32, 64)},
    "float16": _Range(11, True, True, -24, 15),
    "bfloat16": _Range(8, True, True, -133, 127),
    "float32": _Range(24, True, True, -149, 127),
    "float64": _Range(53, True, True, -1074, 1023),
}


def can_cast(source: str, target: str) -> bool:
    """Whether there is a cast between these dtypes at all."""
    return source == target or (source in _RANGES and target in _RANGES and target != "bool")


def is_lossless(source: str, target: str) -> bool:
    """Whether every value of one dtype is a value of the other."""
    if source == target:
        return True
    if not can_cast(source, target):
        return False
    a, b = _RANGES[source], _RANGES[target]
    if a.floating and not b.floating:
        return False
    if a.floating:
        return a.bits <= b.bits and a.lowest >= b.lowest and a.highest <= b.highest
    if b.floating:
        return a.bits <= b.bits and a.bits <= b.highest
    return a.bits <= b.bits and (b.signed or not a.signed)


def is_float(dtype: str) -> bool:
    """Whether `cast_into` knows it as a float."""
    return dtype in _RANGES and _RANGES[dtype].floating


def cast_into(target: Array, source: Array, to: str, of: str) -> int:
    """Fill an array of carrier type (see `pipeline.read.carrier`) with the cast elements of another.

    Args:
        target: what is filled, of any strides.
        source: of the same shape.
        to: dtype of the target.
        of: dtype of the source.

    Returns:
        how many finite values became infinite.

    Raises:
        InvalidInput: there is no such cast, or an integer would not survive it.
    """
    if not can_cast(of, to):
        raise InvalidInput(f"{of} cannot be cast to {to}")
    if source.ndim == 0:
        return cast_into(target.reshape(1), source.reshape(1), to, of)
    if source.size > BLOCK and source.shape[0] > 1:
        rows = max(BLOCK * source.shape[0] // source.size, 1)
        steps = range(0, source.shape[0], rows)
        return sum(cast_into(target[i : i + rows], source[i : i + rows], to, of) for i in steps)
    if source.size > BLOCK:
        return cast_into(target[0], source[0], to, of)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if _cast_plain(target, source, to, of):
            return 0
        values = decode(np.ascontiguousarray(source), of)
        encoded, infinite = _encode(values, to)
    target[...] = encoded
    return infinite


_NATIVE = {"float16": np.float16, "float32": np.float32, "float64": np.float64}

# As bits of a float32 without its sign: from here on rounding makes it infinite (or it is that, or NaN, already).
_TOO_LARGE = {"float16": 0x477FF000, "bfloat16": 0x7F7F8000}


def _cast_plain(target: Array, source: Array, to: str, of: str) -> bool:
    """Make the casts that most conversions are made of, in few passes; False where a value takes more care."""
    if of == "bfloat16" and to == "float32":
        target[...] = source
        np.left_shift(target, 16, out=target)
        return True
    if of in _NATIVE and to in _NATIVE and is_lossless(of, to):
        target.view(_NATIVE[to])[...] = source.view(_NATIVE[of])
        return True
    if of != "float32" or to not in _TOO_LARGE:
        return False
    word = np.ascontiguousarray(source)
    if int((word & np.uint32(0x7FFFFFFF)).max(initial=0)) >= _TOO_LARGE[to]:
        return False
    if to == "float16":
        target.view(np.float16)[...] = word.view(np.float32)
        return True
    rounded = word >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += word
    target[...] = rounded.view(np.uint16)[..., 1::2]  # the upper half of each
    return True


def decode(raw: Array, dtype: str) -> Array:
    """Contiguous elements of carrier type as numbers: of their NumPy type, bfloat16 as float32."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(np.bool_ if dtype == "bool" else dtype)


def encode(values: Array, dtype: str) -> Array:
    """Numbers as elements of carrier type; the opposite of `decode`, with rounding."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return _encode(values, dtype)[0]


def _encode(values: Array, dtype: str) -> tuple[Array, int]:
    bits = carrier(DTYPES[dtype].itemsize)
    if not _RANGES[dtype].floating:
        whole = values.astype(dtype)
        if not (whole.astype(values.dtype) == values).all() or ((whole < 0) != (values < 0)).any():
            raise InvalidInput(f"a value of {values.dtype} is no {dtype}")
        return whole.view(bits), 0
    if dtype == "bfloat16":
        rounded = _bfloat16(_float32_to_odd(values))
        back = decode(rounded, dtype)
    else:
        back = values.astype(dtype)
        rounded = back.view(bits)
    if values.dtype.kind != "f" or values.dtype.itemsize < back.dtype.itemsize:
        return rounded, 0
    return rounded, int(np.count_nonzero(np.isinf(back) & np.isfinite(values)))


def _float32_to_odd(values: Array) -> NDArray[np.float32]:
    """As float32, rounded to odd: what is rounded once more afterwards then is right (Boldo and Melquiond, 2008)."""
    near: NDArray[np.float32] = values.astype(np.float32)
    if values.dtype.kind == "f" and values.dtype.itemsize <= 4:
        return near
    exact = values.astype(np.longdouble)  # 64-bit integers do not fit in a float64
    back = near.astype(np.longdouble)
    inexact = np.isfinite(near) & (back != exact)
    word = near.view(np.uint32)
    too_far = inexact & (np.abs(back) > np.abs(exact))
    word = (word - too_far.astype(np.uint32)) | inexact.astype(np.uint32)
    odd: NDArray[np.float32] = word.view(np.float32)
    return odd


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    word = values.view(np.uint32)
    rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (word >> np.uint32(16)) | np.uint32(0x40)
    result: NDArray[np.uint16] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return result
