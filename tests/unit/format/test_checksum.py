from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format.checksum import bad_extents, check, digest64, digest128, extent_count, extent_digests


def test_the_hashes_are_xxh3():
    # Published by xxHash for empty input and seed 0.
    assert digest64(b"") == "2d06800538d394c2"
    assert digest128(b"") == "99aa06d3014798d86001c324468d497f"


@given(st.binary(max_size=200), st.integers(1, 40))
def test_every_extent_has_the_digest_of_its_bytes(data, extent):
    digests = extent_digests(data, extent)
    assert digests.dtype == np.uint64
    assert len(digests) == extent_count(len(data), extent)
    assert digests.tolist() == [xxhash.xxh3_64_intdigest(data[i : i + extent]) for i in range(0, len(data), extent)]
    assert bad_extents(data, digests, extent=extent) == []


@given(st.binary(min_size=1, max_size=200), st.integers(1, 40), st.data())
def test_a_flipped_bit_is_found_where_it_is(data, extent, draw):
    digests = extent_digests(data, extent)
    at = draw.draw(st.integers(0, len(data) - 1))
    first = draw.draw(st.integers(0, at // extent))
    flipped = bytearray(data)
    flipped[at] ^= 1 << draw.draw(st.integers(0, 7))
    part = memoryview(flipped)[first * extent :]
    assert bad_extents(part, digests, first, extent) == [at // extent]
    with pytest.raises(Damaged, match=rf"shard r3: bytes {at // extent * extent} to "):
        check(part, digests, "shard r3", first, extent)


def test_the_message_names_the_first_bad_range():
    data = bytearray(25)
    digests = extent_digests(data, 10)
    data[21] = data[24] = data[11] = 1
    with pytest.raises(Damaged, match=r"bytes 10 to 20 do not match their checksum \(2 bad extents\)"):
        check(data, digests, "x", extent=10)
    with pytest.raises(Damaged, match=r"bytes 20 to 25 "):
        check(data[20:], digests, "x", first=2, extent=10)
    check(data[:10], digests, "x", extent=10)


def test_any_buffer_will_do():
    array = np.arange(6, dtype=np.int32)
    assert extent_digests(memoryview(array), 8).tolist() == extent_digests(array.tobytes(), 8).tolist()


@pytest.mark.parametrize("first", [-1, 1, 5])
def test_more_extents_than_the_file_has_are_a_mistake(first):
    with pytest.raises(InvalidInput):
        bad_extents(bytes(20), extent_digests(bytes(20), 10), first, 10)


def test_an_extent_has_bytes():
    with pytest.raises(InvalidInput):
        extent_digests(b"x", 0)
