"""What every driver checks before it touches anything: keys, sizes, buffers. All raise InvalidInput."""

from __future__ import annotations

from ckptsvc.errors import InvalidInput

MAX_KEY_BYTES = 1024
"""Longest key, in bytes of UTF-8 (the limit of S3)."""

MAX_PART_BYTES = 255
"""Longest part between two slashes, in bytes of UTF-8 (NAME_MAX of Linux file systems)."""


def check_key(key: str) -> str:
    """Return `key` if it is one: parts of 1 to 255 bytes of UTF-8 joined by "/", none of them "." or "..".

    Raises:
        InvalidInput: it is not; every driver calls this before it touches anything.
    """
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"key {key!r} is not valid Unicode") from None
    if not 0 < len(encoded) <= MAX_KEY_BYTES or b"\0" in encoded:
        raise InvalidInput(f"key {key[:80]!r} is not 1 to {MAX_KEY_BYTES} bytes without a NUL")
    for part in encoded.split(b"/"):
        if part in (b"", b".", b"..") or len(part) > MAX_PART_BYTES:
            hint = f'parts are 1 to {MAX_PART_BYTES} bytes long and neither "." nor ".."'
            raise InvalidInput(f"key {key[:80]!r} has the part {part.decode()[:80]!r}", hint=hint)
    return key


def is_key(key: str) -> bool:
    """Return whether `check_key` takes it."""
    try:
        check_key(key)
    except InvalidInput:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is "" or a key."""
    return prefix and check_key(prefix)


def check_record(data: bytes) -> bytes:
    """Return what is to be put if absent unless it is empty, which a driver may use to claim a name."""
    if not data:
        raise InvalidInput("an empty object cannot be put if absent")
    return data


def check_size(data: memoryview, size: int) -> memoryview:
    """Return the first `size` bytes of contiguous memory that has so many."""
    if not data.c_contiguous or not 0 <= size <= data.nbytes:
        raise InvalidInput(f"{size} bytes are to be stored out of {data.nbytes} (which must be contiguous)")
    return data.cast("B")[:size] if size else memoryview(b"")


def check_target(buffer: memoryview, offset: int) -> memoryview:
    """Return the bytes of a contiguous, writable buffer that is to be filled from `offset` of an object."""
    if not buffer.c_contiguous or buffer.readonly or offset < 0:
        raise InvalidInput(f"cannot read from offset {offset}: the buffer must be contiguous and writable")
    return buffer.cast("B") if buffer.nbytes else memoryview(bytearray())
