"""The bytes of a Lustre layout: golden ones, there and back, and what is no layout.

The golden bytes are those of the structures in Lustre's lustre_user.h, as a C compiler lays them out.
"""

import random
import struct

import pytest
from ckptsvc_drivers.lustre_layout import (
    ALL_TARGETS,
    END,
    MAX_BYTES,
    MAX_STRIPES,
    ON_MDT,
    OVERSTRIPED,
    RAID0,
    Component,
    decode,
    difference,
    encode,
    encode_directories,
)
from hypothesis import given
from hypothesis import strategies as st

MiB, GiB = 1 << 20, 1 << 30

GOLDEN_V1 = bytes.fromhex(
    "d00bd10b"  # LOV_USER_MAGIC_V1
    "01000000"  # RAID0
    "0000000000000000 0000000000000000"
    "00008000"  # 8 MiB
    "0400"  # 4 stripes
    "ffff"  # any target
)
GOLDEN_V3 = bytes.fromhex(
    "d00bd30b"  # LOV_USER_MAGIC_V3
    "01020000"  # RAID0, overstriped
    "0000000000000000 0000000000000000"
    "00000100"  # 64 KiB
    "ffff"  # every target
    "0300"  # from target 3 on
    "666c61736800000000000000 00000000"  # "flash"
)
GOLDEN_COMPOSITE = bytes.fromhex(
    "d00bd60b"  # LOV_USER_MAGIC_COMP_V1
    "c0000000"  # 192 bytes = 32 + 2 x 48 + 2 x 32
    "00000000 0000 0200 0000 00 00 0000 0000 0000000000000000"  # 2 components
    # the first entry
    "00000000 00000000"
    "0000000000000000 0000001000000000"  # [0, 256 MiB)
    "80000000 20000000"  # 32 bytes at 128
    "00000000 0000000000000000 00000000"
    # the second
    "00000000 00000000"
    "0000001000000000 ffffffffffffffff"  # [256 MiB, end)
    "a0000000 20000000"  # 32 bytes at 160
    "00000000 0000000000000000 00000000"
    # what they point at
    "d00bd10b 01000000 0000000000000000 0000000000000000 00008000 0100 ffff"
    "d00bd10b 01000000 0000000000000000 0000000000000000 00008000 ffff ffff"
)
GOLDEN_DIRECTORIES = bytes.fromhex(
    "d00cd30c"  # LMV_USER_MAGIC
    "01000000"  # one metadata server a directory
    "ffffffff"  # which one, they choose
    "00000000 00000000"
    "01 01 0000"  # for one level
    "00000000 00000000"
    "00000000000000000000000000000000"
)

TWO = (Component(1, 8 * MiB, 0, 256 * MiB), Component(ALL_TARGETS, 8 * MiB, 256 * MiB, END))


def test_one_component():
    assert encode([Component(4, 8 * MiB)]) == GOLDEN_V1
    assert len(GOLDEN_V1) == 32


def test_one_component_in_a_pool():
    pooled = Component(ALL_TARGETS, 1 << 16, pattern=RAID0 | OVERSTRIPED, pool="flash", first=3)
    assert encode([pooled]) == GOLDEN_V3
    assert len(GOLDEN_V3) == 48
    assert decode(GOLDEN_V3) == (pooled,)


def test_several_components():
    assert encode(TWO) == GOLDEN_COMPOSITE
    assert len(GOLDEN_COMPOSITE) == 32 + 2 * 48 + 2 * 32
    assert decode(GOLDEN_COMPOSITE) == TWO


def test_directories():
    assert encode_directories(1) == GOLDEN_DIRECTORIES
    assert len(GOLDEN_DIRECTORIES) == 48
    assert encode_directories(8)[4:16] == bytes.fromhex("08000000 ffffffff 02000000")


def test_what_lustre_gives_names_the_targets():
    objects = b"".join(struct.pack("=QQII", 1, 2, 3, target) for target in (3, 0, 1))
    given = struct.pack("=IIQQIHH", 0x0BD10BD0, RAID0, 5, 6, MiB, 3, 9) + objects
    (component,) = decode(given)
    assert (component.stripes, component.stripe_size, component.targets) == (3, MiB, (3, 0, 1))
    assert decode(given[:-24])[0].targets == (3, 0), "as far as they are there"
    released = struct.pack("=IIQQIHH", 0x0BD10BD0, 0x80000000 | RAID0, 5, 6, MiB, 3, 9)
    assert decode(released)[0] == Component(3, MiB, first=9)
    on_server = struct.pack("=IIQQIHH", 0x0BD10BD0, ON_MDT, 5, 6, MiB, 0, 0)
    assert decode(on_server)[0].pattern == ON_MDT


sizes = st.integers(0, 64).map(lambda n: n << 16)
patterns = st.sampled_from((RAID0, RAID0 | OVERSTRIPED))
counts = st.one_of(st.integers(0, MAX_STRIPES), st.just(ALL_TARGETS))
pools = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.-", max_size=15)


@st.composite
def layouts(draw):
    found, start = [], 0
    for number in range(count := draw(st.integers(1, 6))):
        size = draw(sizes)
        end = (
            END if number == count - 1 else (start // (size or 1 << 16) + draw(st.integers(1, 99))) * (size or 1 << 16)
        )
        found.append(
            Component(draw(counts), size, start, end, draw(patterns), draw(pools), draw(st.integers(0, 0xFFFF)))
        )
        start = end
    return tuple(found)


@given(layouts())
def test_there_and_back(layout):
    assert decode(encode(layout)) == layout


@given(layouts())
def test_any_cut_is_noticed(layout):
    blob = encode(layout)
    for kept in {0, 1, 31, len(blob) // 2, len(blob) - 1}:
        if kept < len(blob):
            with pytest.raises(ValueError, match=r"layout|lies outside"):
                decode(blob[:kept])


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [Component(1, MiB, 1)],
        [Component(1, MiB, 0, MiB)],
        [Component(1, MiB, 0, 4 * MiB), Component(1, MiB, 5 * MiB)],
        [Component(1, MiB, 0, MiB // 2), Component(1, MiB, MiB // 2)],
        [Component(1, MiB, 0, 0), Component(1, MiB, 0)],
        [Component(2001, MiB)],
        [Component(-1, MiB)],
        [Component(1, MiB + 1)],
        [Component(1, 1 << 32)],
        [Component(1, -(1 << 16))],
        [Component(1, MiB, pattern=ON_MDT)],
        [Component(1, MiB, pool="a" * 16)],
        [Component(1, MiB, pool="é" * 8)],
        [Component(1, MiB, pool="a\0b")],
        [Component(1, MiB, first=-1)],
        [Component(1, MiB, first=0x10000)],
        [Component(1, 1 << 16, n << 16, END if n == 999 else n + 1 << 16) for n in range(1000)],
    ],
)
def test_what_is_no_layout_is_not_encoded(bad):
    with pytest.raises(ValueError, match=r"component|stripe|pattern|pool|target"):
        encode(bad)


@pytest.mark.parametrize("magic", [0, 0x0BD20BD0, 0x0BD40BD0, 0x0BD70BD0, 0xD00BD10B])
def test_other_layouts_are_refused(magic):
    with pytest.raises(ValueError, match="known"):
        decode(struct.pack("=I", magic) + bytes(100))


def test_any_bytes_are_decoded_or_refused():
    """Seeded: mutations of good layouts, and noise."""
    chance = random.Random(20170)
    good = [GOLDEN_V1, GOLDEN_V3, GOLDEN_COMPOSITE, encode(TWO) + bytes(200)]
    refused = 0
    for _ in range(20_000):
        blob = bytearray(chance.choice(good))
        for _ in range(chance.randrange(1, 5)):
            blob[chance.randrange(len(blob))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        blob = blob[: chance.randrange(len(blob) + 1)] if chance.random() < 0.3 else blob
        try:
            found = decode(bytes(blob))
        except ValueError:
            refused += 1
            continue
        assert found
        assert all(len(each.targets) * 24 <= len(blob) for each in found)
    assert 1000 < refused < 19_000
    for _ in range(2000):
        with pytest.raises(ValueError, match=r"layout|known"):
            decode(chance.randbytes(chance.randrange(300)))


def test_a_layout_fits_into_an_attribute():
    many = [Component(1, 1 << 16, n << 16, END if n == 799 else n + 1 << 16) for n in range(800)]
    assert len(encode(many)) <= MAX_BYTES
    assert decode(encode(many)) == tuple(many)


@pytest.mark.parametrize(
    ("asked", "given_", "said", "ineffective"),
    [
        (Component(4, MiB), Component(4, MiB, targets=(1, 2, 3, 0)), "", False),
        (Component(4, MiB), Component(2, MiB), "2 stripes instead of 4", False),
        (Component(1, MiB), Component(2, MiB), "2 stripes instead of 1", True),
        (Component(4, MiB), Component(1, 4 * MiB), "instead of 1048576", True),
        (Component(ALL_TARGETS, MiB), Component(7, MiB), "", False),
        (Component(0, 0), Component(7, MiB, pool="flash"), "", False),
        (Component(4, MiB, pool="flash"), Component(4, MiB), "pool '' instead", False),
    ],
)
def test_what_was_given_is_compared_with_what_was_asked(asked, given_, said, ineffective):
    what, without_effect = difference([asked], [given_])
    assert said in what
    assert bool(what) == bool(said)
    assert without_effect == ineffective


def test_components_are_compared():
    assert difference(TWO, TWO) == ("", False)
    assert difference(TWO, TWO[:1])[1]
    assert difference(TWO, (TWO[0]._replace(end=GiB), TWO[1]._replace(start=GiB)))[1]
