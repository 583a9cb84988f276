"""Compression: what went in comes out, and nothing hostile makes a reader allocate or believe."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format.planes import PLANES, compress, decompress, exclusive_or

planes = st.sampled_from(PLANES)


@given(st.binary(min_size=1, max_size=5000), planes, st.integers(1, 5))
def test_what_goes_in_comes_out(data: bytes, count: int, level: int) -> None:
    frame = compress(data, count, level)
    assert decompress(frame, count, len(data), "x").tobytes() == data


@given(st.binary(max_size=999), st.randoms(use_true_random=False))
def test_combining_twice_gives_back_the_first(data: bytes, random) -> None:
    base = random.randbytes(len(data))
    assert exclusive_or(exclusive_or(data, base), base).tobytes() == data


def test_floats_are_smaller_in_planes() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32).tobytes()
    assert len(compress(values, 4, 1)) < 0.87 * len(values) < len(compress(values, 1, 1))


def test_differences_of_small_updates_are_small() -> None:
    before = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    after = (before * np.float32(1 + 1e-5)).tobytes()
    assert len(compress(exclusive_or(after, before.tobytes()), 4, 1)) < 0.6 * len(compress(after, 4, 1))


@given(st.binary(min_size=1, max_size=2000), planes, st.data())
def test_a_flipped_bit_or_a_cut_never_raises_anything_else(data: bytes, count: int, draw: st.DataObject) -> None:
    frame = bytearray(compress(data, count, 1))
    at = draw.draw(st.integers(0, len(frame) - 1))
    if draw.draw(st.booleans()):
        frame[at] ^= 1 << draw.draw(st.integers(0, 7))
    else:
        del frame[at:]
    with contextlib.suppress(Damaged):
        assert len(decompress(bytes(frame), count, len(data), "x")) == len(data)  # the extent's digest tells


@given(st.binary(max_size=300))
def test_noise_is_damage(data: bytes) -> None:
    with pytest.raises(Damaged):
        decompress(data, 2, 1000, "x")


def test_a_frame_comes_to_what_it_must_or_is_refused_before_it_is_opened() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(100_000_000))
    for frame, nbytes in ((bomb, 1000), (compress(b"abc", 1, 1), 4), (compress(b"abc", 1, 1) + b"x", 3)):
        with pytest.raises(Damaged):
            decompress(frame, 1, nbytes, "x")
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc")
    with pytest.raises(Damaged):
        decompress(silent, 1, 3, "x")
    with pytest.raises(InvalidInput):
        compress(b"abc", 3, 1)
