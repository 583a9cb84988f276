"""Casts by NumPy alone, against torch's."""

import itertools

import numpy as np
import pytest
import torch

from ckptsvc.errors import InvalidInput
from ckptsvc.interop.conversion.casts import can_cast, cast_into, is_lossless
from ckptsvc.pipeline.read import carrier
from ckptsvc.types import DTYPES

FLOATS = ("float16", "bfloat16", "float32", "float64")
CARRIED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def raw(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.contiguous().view(CARRIED[tensor.element_size()]).numpy()
    return array.view(carrier(array.itemsize))


def cast(array: np.ndarray, of: str, to: str) -> tuple[np.ndarray, int]:
    target = np.empty(array.shape, carrier(DTYPES[to].itemsize))
    return target, cast_into(target, array, to, of)


def as_torch(tensor: torch.Tensor, to: str) -> torch.Tensor:
    return tensor.to(getattr(torch, to))


def equal(array: np.ndarray, tensor: torch.Tensor, to: str) -> bool:
    """Bit for bit, but for the payload of a NaN."""
    found = torch.from_numpy(array.view(f"i{array.itemsize}").copy()).view(getattr(torch, to))
    nan = torch.isnan(found) if found.is_floating_point() else torch.zeros_like(found, dtype=torch.bool)
    same = torch.from_numpy(array.view(f"i{array.itemsize}") == raw(tensor).view(f"i{array.itemsize}"))
    return bool((same | (nan & torch.isnan(tensor))).all()) if found.is_floating_point() else bool(same.all())


@pytest.mark.parametrize(("of", "to"), list(itertools.product(("float16", "bfloat16"), FLOATS)))
def test_every_value_of_16_bits(of: str, to: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, of))
    wanted = as_torch(every, to)
    found, infinite = cast(raw(every), of, to)
    assert equal(found, wanted, to)
    assert infinite == int((torch.isinf(wanted) & torch.isfinite(every)).sum())


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_every_rounding_from_float32(to: str) -> None:
    """Every float32 that is halfway between two values, and its neighbours on both sides."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, to)).float()
    every = every[torch.isfinite(every)].sort().values
    half = ((every[1:].double() + every[:-1].double()) / 2).float()
    near = torch.cat([half, torch.nextafter(half, torch.tensor(np.inf)), torch.nextafter(half, torch.tensor(-np.inf))])
    for some in (near, near[near.abs() < 65000]):  # the largest make the others of their block take the longer way
        found, _ = cast(raw(some), "float32", to)
        assert equal(found, as_torch(some, to), to)


@pytest.mark.parametrize("to", ["float16", "bfloat16", "float32"])
def test_float64_is_rounded_once(to: str) -> None:
    """Just above and just below halfway: rounding to float32 first would make both of them halfway."""
    start = np.linspace(0.6, 1.9, 5000).astype(np.float32)
    values = torch.from_numpy(start).to(getattr(torch, to)).double().numpy()
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[to]
    step = np.where(np.abs(values) < 1, step / 2, step)
    above, below = values + step + 1e-13, values + step - 1e-13
    for number, wanted in ((above, values + 2 * step), (below, values)):
        found, _ = cast(number.view(np.uint64), "float64", to)
        back, _ = cast(found, to, "float64")
        assert np.array_equal(back.view(np.float64), wanted)


def test_special_values_survive() -> None:
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4e38, 65520.0], np.float32)
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32)
    everything = np.concatenate([special.view(np.uint32), signalling])
    for to in FLOATS:
        found, infinite = cast(everything, "float32", to)
        wanted = as_torch(torch.from_numpy(everything.view(np.float32).copy()), to)
        assert equal(found, wanted, to)
        assert infinite == {"float16": 2, "bfloat16": 1}.get(to, 0)


def test_arrays_of_any_shape_and_strides() -> None:
    source = np.arange(2_400_000, dtype=np.float32).reshape(3, 4, -1)
    target = np.zeros((source.shape[2], 3, 4), np.float64)
    cast_into(target.view(np.uint64).transpose(1, 2, 0), source.view(np.uint32), "float64", "float32")
    assert np.array_equal(target.transpose(1, 2, 0), source)
    scalar = np.zeros((), np.uint16)
    cast_into(scalar, np.array(1.0, np.float32).view(np.uint32), "bfloat16", "float32")
    assert scalar == 0x3F80


def test_integers_only_where_they_survive() -> None:
    numbers = np.array([0, 1, 127, 200], np.int64)
    assert cast(numbers.view(np.uint64), "int64", "uint8")[0].tolist() == [0, 1, 127, 200]
    for of, to, values in (
        ("int64", "int8", numbers),
        ("int64", "uint64", np.array([-1], np.int64)),
        ("float32", "int32", np.array([1.5], np.float32)),
        ("float32", "int32", np.array([np.nan], np.float32)),
    ):
        with pytest.raises(InvalidInput, match="is no"):
            cast(values.view(carrier(values.itemsize)), of, to)
    with pytest.raises(InvalidInput, match="cannot be cast"):
        cast(np.zeros(1, np.uint8), "float8_e4m3fn", "float32")


def test_lossless_is_what_every_value_survives() -> None:
    assert all(is_lossless(a, b) for a, b in (("bfloat16", "float32"), ("float16", "float64"), ("int16", "float32"),
        ("uint8", "float16"), ("bool", "bfloat16"), ("uint32", "int64"), ("bits8", "bits8")))  # fmt: skip
    assert not any(is_lossless(a, b) for a, b in (("float32", "bfloat16"), ("float16", "bfloat16"),
        ("bfloat16", "float16"), ("int32", "float32"), ("int8", "uint8"), ("uint16", "float16"), ("float16", "int64"),
        ("bits8", "uint8")))  # fmt: skip
    assert not can_cast("float32", "bool")
