"""Copies of host memory as bytes: everything arrives, nothing is disturbed, the collector is left alone."""

import gc
import itertools
import os

import numpy as np
import pytest
import torch

from ckptsvc.client import memcopy
from ckptsvc.client.memcopy import bytes_of, copy_bytes


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_the_bytes_of_a_tensor_are_its_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    found = bytes_of(tensor)
    assert len(found) == tensor.nbytes
    assert bytes(found) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    tensor.fill_(1)
    assert bytes(found) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), "a view, not a copy"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 4).t()[:, 1:],
        torch.zeros(4, 4)[:, 1],
        torch.zeros(3).expand(2, 3),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3, device="meta"),
    ],
    ids=["transposed", "column", "expanded", "conjugated", "negated", "meta"],
)
def test_what_is_not_plain_memory_has_no_bytes(tensor: torch.Tensor) -> None:
    assert bytes_of(tensor) is None


def test_a_parameter_can_be_resized_after_it_was_looked_at() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10))
    assert len(bytes_of(parameter)) == 40
    parameter.data.resize_(20)
    assert parameter.untyped_storage().resizable()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pieces_of_every_size_arrive(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcopy, "LARGE", 1000)
    monkeypatch.setattr(memcopy, "STEP", 700)
    sources = [os.urandom(size) for size in (0, 1, 999, 1000, 1400, 10_001)]
    image = memoryview(bytearray(sum(map(len, sources))))
    starts = np.cumsum([0, *map(len, sources)])
    targets = [image[a:b] for a, b in itertools.pairwise(starts)]
    copy_bytes(targets, [memoryview(s) for s in sources], threads)
    assert image == b"".join(sources)


def test_nothing_to_copy_is_no_error() -> None:
    copy_bytes([], [], 4)


def test_lengths_that_differ_are_an_error() -> None:
    for size in (10, memcopy.LARGE):
        with pytest.raises(ValueError, match=r"shape|different"):
            copy_bytes([memoryview(bytearray(size + 1))], [memoryview(bytes(size))], 1)


def test_thousands_of_small_pieces_do_not_set_off_the_garbage_collector() -> None:
    sources = [memoryview(bytes(10))] * 20_000
    targets = [memoryview(bytearray(10)) for _ in sources]
    gc.collect()
    before = [generation["collections"] for generation in gc.get_stats()]
    copy_bytes(targets, sources, 2)
    assert [generation["collections"] for generation in gc.get_stats()][1:] == before[1:]
