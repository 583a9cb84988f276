"""Elements of any stored dtype as numbers, with NumPy alone, and how far two tensors are apart.

Formats without a NumPy type: bfloat16 is the upper half of a float32; complex32 is two float16; float8_e4m3fn and
float8_e5m2: Micikevicius et al., arXiv:2209.05433; their fnuz variants: Noune et al., arXiv:2206.02915; float8_e8m0fnu
and float4_e2m1fn: OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 1 << 20
"""Elements compared at a time."""


class Distance(msgspec.Struct):
    """How far two tensors of one dtype and shape are apart; distances of several parts can be added.

    Attributes:
        elements: how many were compared.
        differing: elements that are not equal.
        not_finite: of these, elements where one of the two is NaN or infinite.
        max_abs: largest |a - b| over elements that are finite and not equal; None where there are none, or where the
            dtype has no numbers, only bits. An int for integers.
        max_rel: largest |a - b| / max(|a|, |b|) over the same.
    """

    elements: int = 0
    differing: int = 0
    not_finite: int = 0
    max_abs: float | int | None = None
    max_rel: float | None = None

    def add(self, other: Distance) -> None:
        """Take in another part of the same tensor."""
        self.elements += other.elements
        self.differing += other.differing
        self.not_finite += other.not_finite
        self.max_abs = _largest(self.max_abs, other.max_abs)
        self.max_rel = _largest(self.max_rel, other.max_rel)


def distance(a: Array, b: Array, dtype: str, tolerance: float | None = None) -> Distance:
    """Compare two arrays of carrier type (`pipeline.read.carrier`), of one shape.

    Without a tolerance, elements are equal if all their bits are: 0.0 and -0.0 are not, nor two different NaNs. With
    one they are equal where |a - b| <= tolerance * max(1, |a|, |b|), or where both are NaN; where a dtype has no
    numbers (see `has_numbers`) only equal bits are equal.
    """
    total = Distance()
    a, b = a.reshape(-1), b.reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities are what is looked for
        for start in range(0, len(a), BLOCK):
            total.add(_compare(a[start : start + BLOCK], b[start : start + BLOCK], dtype, tolerance))
    return total


def first_different(a: Array, b: Array, dtype: str, tolerance: float | None = None) -> int:
    """The position of the first element that `distance` counts as differing, among the flattened elements; or -1."""
    a, b = a.reshape(-1), b.reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(a), BLOCK):
            low, high = start, min(start + BLOCK, len(a))
            if not _compare(a[low:high], b[low:high], dtype, tolerance).differing:
                continue
            while high - low > 1:  # it is before `high`
                middle = (low + high) // 2
                if _compare(a[low:middle], b[low:middle], dtype, tolerance).differing:
                    high = middle
                else:
                    low = middle
            return low
    return -1


def has_numbers(dtype: str) -> bool:
    """Whether the elements of a dtype are numbers that can be subtracted; otherwise they are bits."""
    return dtype in _DECODERS


def _compare(a: Array, b: Array, dtype: str, tolerance: float | None) -> Distance:
    # As integers: a float that is carried by its own type compares as a number, where a NaN is never equal.
    unlike = _bits(a) != _bits(b)
    differ = unlike.reshape(len(a), -1).any(axis=1)
    at = np.flatnonzero(differ)
    decode = _DECODERS.get(dtype)
    if not len(at) or decode is None:
        return Distance(len(a), len(at))
    x, y = (decode(array[at]).reshape(len(at), -1) for array in (a, b))
    finite = np.isfinite(x) & np.isfinite(y)
    apart, size = _apart(x, y), np.maximum(_magnitude(x), _magnitude(y))
    if tolerance is not None:
        # Not finite: only alike (both NaN, or the same infinity) is equal.
        near = np.where(finite, apart <= tolerance * np.maximum(size, 1.0), _alike(x, y))
        keep = ~near.all(axis=1)
        x, y, finite, apart, size = x[keep], y[keep], finite[keep], apart[keep], size[keep]
    found = Distance(len(a), len(x), int((~finite).any(axis=1).sum()))
    if finite.any():
        apart, size = apart[finite], size[finite]
        found.max_abs = apart.max().item()
        found.max_rel = float((apart / np.maximum(size, sys.float_info.min)).max())
    return found


def _bits(array: Array) -> Array:
    return array.view(np.uint64 if array.itemsize >= 8 else f"<u{array.itemsize}")


def _apart(x: Array, y: Array) -> Array:
    """|x - y|; exact for integers, whose difference may not fit in their type."""
    if x.dtype.kind in "iu":
        return np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)  # modulo 2**64
    difference: Array = np.minimum(np.abs(x - y), sys.float_info.max)  # or infinite for two finite ones
    return difference


def _magnitude(x: Array) -> Array:
    magnitude: Array = np.abs(x.astype(np.float64) if x.dtype.kind in "iu" else x)  # the least int64 has no abs()
    return magnitude


def _alike(x: Array, y: Array) -> Array:
    alike: Array = (x == y) | (np.isnan(x) & np.isnan(y))
    return alike


def _largest(a: Any, b: Any) -> Any:
    return max((value for value in (a, b) if value is not None), default=None)


def _minifloat(exponent: int, mantissa: int, bias: int, special: str) -> NDArray[np.float64]:
    """Every value of a small float format by its code.

    Args:
        exponent: bits of the exponent.
        mantissa: bits of the mantissa.
        bias: of the exponent.
        special: "ieee": the highest exponent is infinity and NaN; "fn": all ones is NaN; "fnuz": minus zero is the only
            NaN; "none": every code is a number.
    """
    values = []
    for code in range(1 << 1 + exponent + mantissa):
        sign = -1.0 if code >> exponent + mantissa else 1.0
        power, fraction = code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
        ones = power == (1 << exponent) - 1
        scale = fraction / (1 << mantissa)
        value = sign * math.ldexp(scale + (power > 0), max(power, 1) - bias)
        if special == "ieee" and ones:
            value = math.nan if fraction else sign * math.inf
        values.append(value)
    if special == "fn":
        values[-1] = values[len(values) // 2 - 1] = math.nan
    if special == "fnuz":
        values[len(values) // 2] = math.nan
    return np.array(values, np.float64)


def _table(values: NDArray[np.float64]) -> Callable[[Array], Array]:
    return lambda raw: values[raw]


def _as(dtype: Any) -> Callable[[Array], Array]:
    return lambda raw: raw.view(dtype)


def _widened(dtype: Any, wide: Any) -> Callable[[Array], Array]:
    return lambda raw: raw.view(dtype).astype(wide)


_E2M1 = _minifloat(2, 1, 1, "none")
_E8M0 = np.array([math.ldexp(1.0, code - 127) for code in range(255)] + [math.nan], np.float64)

_DECODERS: dict[str, Callable[[Array], Array]] = {
    "bool": _as(np.uint8),
    **{f"{sign}int{bits}": _as(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": _widened(np.float16, np.float64),
    "bfloat16": lambda raw: (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64),
    "float32": _widened(np.float32, np.float64),
    "float64": _as(np.float64),
    "complex32": lambda raw: raw.view(np.float16).astype(np.float32).view(np.complex64).astype(np.complex128),
    "complex64": _widened(np.complex64, np.complex128),
    "complex128": _as(np.complex128),
    "float8_e4m3fn": _table(_minifloat(4, 3, 7, "fn")),
    "float8_e5m2": _table(_minifloat(5, 2, 15, "ieee")),
    "float8_e4m3fnuz": _table(_minifloat(4, 3, 8, "fnuz")),
    "float8_e5m2fnuz": _table(_minifloat(5, 2, 16, "fnuz")),
    "float8_e8m0fnu": lambda raw: _E8M0[raw],
    # Two numbers in each element.
    "float4_e2m1fn_x2": lambda raw: _E2M1[np.stack((raw & 15, raw >> 4), axis=-1)],
}
"""From elements of carrier type, one-dimensional, to numbers, for every dtype whose elements are numbers."""
