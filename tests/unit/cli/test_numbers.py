"""Every dtype as numbers, against torch; and distances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.cli import numbers
from ckptsvc.cli.numbers import Distance, distance, has_numbers
from ckptsvc.pipeline.read import carrier
from ckptsvc.types import DTYPES

OF_TORCH = [name for name in sorted(DTYPES) if has_numbers(name) and name not in ("float4_e2m1fn_x2", "complex32")]


def carried(values, dtype: str) -> np.ndarray:
    """Values of a dtype, as they come from a checkpoint."""
    tensor = torch.tensor(values, dtype=getattr(torch, dtype))
    return np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), carrier(DTYPES[dtype].itemsize))


def every_code(itemsize: int) -> np.ndarray:
    if itemsize <= 2:
        return np.arange(256**itemsize, dtype=f"<u{itemsize}")
    raw = np.random.default_rng(0).integers(0, 256, 4096 * itemsize, dtype=np.uint8)
    return raw.view(carrier(itemsize))


@pytest.mark.parametrize("dtype", OF_TORCH)
def test_all_codes_mean_what_torch_says(dtype: str) -> None:
    raw = every_code(DTYPES[dtype].itemsize)
    if dtype == "bool":
        raw = raw[:2]
    tensor = torch.frombuffer(bytearray(raw.tobytes()), dtype=getattr(torch, dtype))
    with np.errstate(invalid="ignore"):
        found = numbers._DECODERS[dtype](raw)
    wide = tensor if tensor.dtype.is_complex or not tensor.dtype.is_floating_point else tensor.double()
    assert np.array_equal(found, wide.numpy(), equal_nan=wide.dtype != torch.bool)


def test_two_halves_of_a_complex32() -> None:
    raw = np.array([1.5, -2.0, np.inf, 0.0], np.float16).view(np.uint32)
    assert numbers._DECODERS["complex32"](raw).tolist() == [1.5 - 2j, complex(np.inf, 0)]


def test_the_numbers_of_float4() -> None:
    found = numbers._DECODERS["float4_e2m1fn_x2"](np.array([0x10, 0x72, 0xF9], np.uint8))
    assert found.tolist() == [[0, 0.5], [1, 6], [-0.5, -6]]


def test_dtypes_without_numbers_are_compared_as_bits() -> None:
    bits = {name for name in DTYPES if not has_numbers(name)}
    assert {"bits8", "bits16", "uint4", "int1"} <= bits
    assert all(name.startswith(("bits", "int", "uint")) for name in bits)
    a = np.array([1, 2, 3], np.uint8)
    b = np.array([1, 9, 9], np.uint8)
    assert distance(a, b, "bits8") == distance(a, b, "bits8", tolerance=1e9) == Distance(3, 2, 0, None, None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_distance_of_floats(dtype: str) -> None:
    a = carried([1.0, 2.0, 0.0, float("nan"), 1.0, float("inf"), 4.0], dtype)
    b = carried([1.0, 3.0, 0.0, float("nan"), float("nan"), float("-inf"), 4.0], dtype)
    found = distance(a, b, dtype)
    assert found == Distance(7, 3, 2, 1.0, pytest.approx(1 / 3))


def test_equal_is_equal_bit_for_bit() -> None:
    a, b = np.array([0.0, 1.0]), np.array([-0.0, 1.0])
    assert distance(a.view(np.uint64), b.view(np.uint64), "float64") == Distance(2, 1, 0, 0.0, 0.0)
    quiet, other = (np.array([code], np.uint32) for code in (0x7FC00000, 0x7FC00001))
    assert distance(quiet, quiet, "float32") == Distance(1)
    assert distance(quiet, other, "float32") == Distance(1, 1, 1)
    assert distance(quiet, other, "float32", tolerance=0.0) == Distance(1)
    assert distance(a.view(np.uint64), b.view(np.uint64), "float64", tolerance=0.0) == Distance(2)


@pytest.mark.parametrize("value", [complex(np.nan, 1), complex(-0.0, 1), complex(np.inf, np.nan)])
def test_complex_numbers_are_compared_bit_for_bit_too(value: complex) -> None:
    a = np.array([value, 1 + 1j])
    assert distance(a, a.copy(), "complex128") == Distance(2)
    assert distance(a, np.array([value, 1 + 2j]), "complex128").max_abs == 1.0
    assert distance(np.array([complex(0.0, 0)]), np.array([complex(-0.0, 0)]), "complex128").differing == 1


def test_a_tolerance_is_absolute_for_small_numbers_and_relative_for_large_ones() -> None:
    a = carried([1e-9, 1000.0, 1000.0, 2.0], "float64")
    b = carried([5e-7, 1000.0009, 1000.002, 2.5], "float64")
    found = distance(a, b, "float64", tolerance=1e-6)
    assert found.differing == 2
    assert found.max_abs == 0.5
    infinite = carried([float("inf"), float("inf")], "float32")
    assert distance(infinite, carried([float("inf"), 3.0], "float32"), "float32", tolerance=1e9) == Distance(2, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("int64", -(2**63), 2**63 - 1), ("uint64", 0, 2**64 - 1), ("int8", -128, 127)]
)
def test_integers_are_subtracted_exactly(dtype: str, low: int, high: int) -> None:
    a, b = (np.array(pair, dtype).view(f"<u{DTYPES[dtype].itemsize}") for pair in ([low, high], [high, high - 1]))
    found = distance(a, b, dtype)
    assert found.max_abs == high - low
    assert isinstance(found.max_abs, int)
    assert found.differing == 2


def test_distances_are_finite_numbers() -> None:
    huge = np.array([1.7e308])
    found = distance(huge.view(np.uint64), (-huge).view(np.uint64), "float64")
    assert np.isfinite(found.max_abs)
    assert np.isfinite(found.max_rel)
    tiny = np.array([5e-324])
    assert np.isfinite(distance(tiny.view(np.uint64), np.zeros(1, np.uint64), "float64").max_rel)


@given(
    st.integers(0, 7),
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=20),
    st.none() | st.floats(0, 10),
)
def test_cutting_a_tensor_changes_nothing(at: int, pairs: list[tuple[float, float]], tolerance: float | None) -> None:
    a, b = (np.array([pair[i] for pair in pairs], np.float32).view(np.uint32) for i in (0, 1))
    parts = Distance()
    parts.add(distance(a[:at], b[:at], "float32", tolerance))
    parts.add(distance(a[at:], b[at:], "float32", tolerance))
    assert parts == distance(a, b, "float32", tolerance)
    assert distance(a, a, "float32", tolerance).differing == 0


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.arange(1000, dtype=np.uint16).reshape(10, 100)
    b = a.copy()
    b[9, 99] += 5
    b[0, 0] += 1
    whole = distance(a, b, "int16")
    monkeypatch.setattr(numbers, "BLOCK", 7)
    assert distance(a, b, "int16") == whole == Distance(1000, 2, 0, 5, 1.0)
