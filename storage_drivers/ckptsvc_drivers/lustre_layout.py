"""How Lustre writes down the layout of a file, as bytes: no calls, no files, only encoding and decoding.

The structures are lov_user_md_v1 and _v3, lov_comp_md_v1, lov_comp_md_entry_v1, lov_user_ost_data_v1 and
lmv_user_md_v1 of Lustre's include/uapi/linux/lustre/lustre_user.h. They are what the extended attribute
"lustre.lov" holds and what the ioctls take, in the byte order of the host.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

MAGIC_V1, MAGIC_V3, MAGIC_SPECIFIC, MAGIC_COMPOSITE = 0x0BD10BD0, 0x0BD30BD0, 0x0BD50BD0, 0x0BD60BD0
MAGIC_DIRECTORIES = 0x0CD30CD0

RAID0, ON_MDT, OVERSTRIPED = 0x001, 0x100, 0x200
"""Patterns: striped over targets, on the metadata server, and that one target may hold several stripes."""

END = 0xFFFF_FFFF_FFFF_FFFF
"""End of the last component of a file, wherever that may be."""

ALL_TARGETS = 0xFFFF
"""As number of stripes: one on every target."""

ANY_TARGET = 0xFFFF
"""As first target: the metadata server chooses."""

MIN_STRIPE = 1 << 16
"""Stripe sizes and ends of components are multiples of it."""

MAX_STRIPES = 2000

MAX_POOL = 15
"""Bytes of the name of a pool of targets."""

MAX_BYTES = 1 << 16
"""No layout is longer: XATTR_SIZE_MAX of Linux."""

_PLAIN = struct.Struct("=IIQQIHH")  # magic, pattern, object id (2), stripe size, stripes, first target
_POOL = struct.Struct("=16s")
_TARGET = struct.Struct("=QQII")  # object id (2), generation, number of the target
_COMPOSITE = struct.Struct("=IIIHHHBxHHQ")  # magic, size, generation, flags, components, mirrors - 1, code, padding
_ENTRY = struct.Struct("=IIQQIIIQI")  # id, flags, start, end, offset, size, generation, time, parity
_DIRECTORIES = struct.Struct("=IiIIIBBHII16s")

_STRIPES_WIDE = 0xFFE0  # from here on a number of stripes is a wish, and no objects follow
_NEVER_SET = 0xFFFF0000  # bits of a pattern that the servers set: released, holes


class Component(NamedTuple):
    """A range of a file, and how it is spread.

    Attributes:
        stripes: number of objects it is spread over; `ALL_TARGETS` is one on every target, 0 the default.
        stripe_size: bytes in one object before the next has its turn; 0 is the default.
        start: first byte.
        end: byte after the last, or `END`.
        pattern: `RAID0`, also with `OVERSTRIPED`; others are only read.
        pool: name of the pool of targets, or "".
        first: number of the first target, or `ANY_TARGET`. What is read back is a generation instead.
        targets: numbers of the targets, in order; only read back, and empty as long as nothing was written there.
    """

    stripes: int
    stripe_size: int
    start: int = 0
    end: int = END
    pattern: int = RAID0
    pool: str = ""
    first: int = ANY_TARGET
    targets: tuple[int, ...] = ()


def encode(components: Sequence[Component]) -> bytes:
    """Return what a layout looks like to Lustre: of one component for a whole file, or of several in a row.

    Raises:
        ValueError: they do not follow one another from 0 to `END`, or one of them is not possible.
    """
    if [each.start for each in components] != [0, *(each.end for each in components[:-1])]:
        raise ValueError("components follow one another from byte 0 on")
    if not components or components[-1].end != END:
        raise ValueError("the last component has no end")
    parts = [_encode_one(each) for each in components]
    if len(parts) == 1:
        return parts[0]
    offset = _COMPOSITE.size + len(parts) * _ENTRY.size
    size = offset + sum(map(len, parts))
    if size > MAX_BYTES:
        raise ValueError(f"{len(parts)} components make a layout of {size} bytes; {MAX_BYTES} are allowed")
    encoded = bytearray(_COMPOSITE.pack(MAGIC_COMPOSITE, size, 0, 0, len(parts), 0, 0, 0, 0, 0))
    for each, part in zip(components, parts, strict=True):
        encoded += _ENTRY.pack(0, 0, each.start, each.end, offset, len(part), 0, 0, 0)
        offset += len(part)
    return bytes(encoded) + b"".join(parts)


def _encode_one(component: Component) -> bytes:
    stripes, size, start, end, pattern, pool, first, _ = component
    if stripes != ALL_TARGETS and not 0 <= stripes <= MAX_STRIPES:
        raise ValueError(f"{stripes} stripes: at most {MAX_STRIPES} are possible")
    if size % MIN_STRIPE or not 0 <= size < 1 << 32:
        raise ValueError(f"a stripe of {size} bytes: it must be a multiple of {MIN_STRIPE} below 4 GiB")
    if end != END and (end <= start or end % (size or MIN_STRIPE)):
        raise ValueError(f"a component that ends at {end}: it must be a multiple of its stripe size")
    if pattern not in (RAID0, RAID0 | OVERSTRIPED):
        raise ValueError(f"pattern {pattern:#x} is not written here")
    if not 0 <= first <= ANY_TARGET:
        raise ValueError(f"no target has the number {first}")
    name = pool.encode()
    if len(name) > MAX_POOL or b"\0" in name:
        raise ValueError(f"{pool!r} is no name of a pool: it has 1 to {MAX_POOL} bytes")
    plain = _PLAIN.pack(MAGIC_V3 if name else MAGIC_V1, pattern, 0, 0, size, stripes, first)
    return plain + _POOL.pack(name) if name else plain


def decode(blob: bytes) -> tuple[Component, ...]:
    """Return the components of a layout that Lustre gave.

    Raises:
        ValueError: these bytes are no layout that is known here.
    """
    try:
        if struct.unpack_from("=I", blob)[0] == MAGIC_COMPOSITE:
            return tuple(_components(blob))
        return (_decode_one(blob, 0, END),)
    except struct.error as error:
        raise ValueError(f"a layout of {len(blob)} bytes ends too early") from error


def _components(blob: bytes) -> Sequence[Component]:
    _, size, _, _, count, *_ = _COMPOSITE.unpack_from(blob)
    table_end = _COMPOSITE.size + count * _ENTRY.size
    if not count or not table_end <= size <= len(blob):
        raise ValueError(f"a layout of {count} components cannot have {size} of {len(blob)} bytes")
    found = []
    for number in range(count):
        _, _, start, end, offset, length, *_ = _ENTRY.unpack_from(blob, _COMPOSITE.size + number * _ENTRY.size)
        if offset < table_end or offset + length > size or start >= end:
            raise ValueError(f"component {number} of a layout lies outside of it")
        found.append(_decode_one(blob[offset : offset + length], start, end))
    return found


def _decode_one(blob: bytes, start: int, end: int) -> Component:
    magic, pattern, _, _, size, stripes, first = _PLAIN.unpack_from(blob)
    offset, pool = _PLAIN.size, ""
    if magic in (MAGIC_V3, MAGIC_SPECIFIC):
        (name,) = _POOL.unpack_from(blob, offset)
        offset, pool = offset + _POOL.size, name.partition(b"\0")[0].decode(errors="replace")
    elif magic != MAGIC_V1:
        raise ValueError(f"{magic:#010x} begins no layout that is known")
    room = (len(blob) - offset) // _TARGET.size  # a directory's, and one without objects yet, ends here
    known = min(stripes, room) if stripes < _STRIPES_WIDE else 0
    targets = tuple(_TARGET.unpack_from(blob, offset + number * _TARGET.size)[3] for number in range(known))
    return Component(stripes, size, start, end, pattern & ~_NEVER_SET, pool, first, targets)


def difference(asked: Sequence[Component], given: Sequence[Component]) -> tuple[str, bool]:
    """Compare the layout that was asked for with what was given.

    Returns:
        what is not as asked, or ""; and whether what was asked had no effect at all, so that another way to ask may
        help. Fewer stripes than asked for are the servers' decision: they have no more targets.
    """
    if len(asked) != len(given):
        return f"{len(given)} components instead of {len(asked)}", True
    for want, got in zip(asked, given, strict=True):
        if want.stripe_size not in (0, got.stripe_size):
            return f"stripes of {got.stripe_size} bytes instead of {want.stripe_size}", True
        if (want.start, want.end) != (got.start, got.end):
            return f"a component up to {got.end} instead of {want.end}", True
        if ALL_TARGETS > got.stripes > want.stripes > 0:
            return f"{got.stripes} stripes instead of {want.stripes}", True
    for want, got in zip(asked, given, strict=True):
        if want.pool not in ("", got.pool):
            return f"pool {got.pool!r} instead of {want.pool!r}", False
        if want.stripes not in (0, ALL_TARGETS, got.stripes):
            return f"{got.stripes} stripes instead of {want.stripes}", False
    return "", False


def encode_directories(stripes: int, *, deep: int = 1) -> bytes:
    """Return the default for new directories below one: each on a metadata server of its own choice.

    Args:
        stripes: over how many metadata servers the names in one directory are spread.
        deep: for how many levels of directories it holds.
    """
    hashing = 2 if stripes > 1 else 0  # FNV-1a, known to every server that can stripe a directory
    anywhere = 0xFFFF_FFFF
    return _DIRECTORIES.pack(MAGIC_DIRECTORIES, stripes, anywhere, hashing, 0, deep, deep, 0, 0, 0, b"")
