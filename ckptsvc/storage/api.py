"""The port: what a place must be able to do so that checkpoints can be kept there.

The values and the one protocol every driver implements; the words MUST and MAY below are what
`ckptsvc.storage.testing` checks. Every method may be called from several threads at once, may block for as long as
the store takes, and raises only errors from `ckptsvc.errors` (plus whatever a `progress` callback raised).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from ckptsvc.errors import InvalidInput

MAX_KEY_BYTES = 1024
"""Longest key, in bytes of UTF-8 (the limit of S3)."""

MAX_PART_BYTES = 255
"""Longest part between two slashes, in bytes of UTF-8 (NAME_MAX of Linux file systems)."""

READ_LIMIT = 64 << 20
"""Default for the largest object that `Store.read` returns whole, in bytes."""

TEMPORARY_PREFIX = ".tmp-"
"""First characters of the last part of every key that a driver makes up while it works."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a store can do, found out by trying where that is possible.

    Attributes:
        exclusive_create: `put_if_absent` lets exactly one of several writers win.
        direct_io: "" where large objects bypass the page cache, otherwise the reason why they do not.
        fork_safe: the same store object may be used in a forked child.
        local: the bytes are on this node and are lost with it.
        notes: facts for a person: the kind of file system, what had to be worked around.
    """

    exclusive_create: bool
    direct_io: str = ""
    fork_safe: bool = False
    local: bool = False
    notes: tuple[str, ...] = ()


class Entry(NamedTuple):
    """An object in a listing: its key, its size in bytes, and when it was last written (seconds since 1970)."""

    key: str
    size: int
    modified: float


@runtime_checkable
class Store(Protocol):
    """A place that keeps objects under keys (see `check_key`)."""

    @property
    def url(self) -> str:
        """The address, in one canonical spelling and without secrets; `connect(url)` leads to the same objects."""

    def capabilities(self) -> Capabilities:
        """Say what this store can do; the first call MAY write and remove a small temporary object."""

    def write(
        self, key: str, data: memoryview, size: int, *, progress: Callable[[int], None] | None = None
    ) -> None:
        """Write a large object; on return it is durable: its data, its size and its name.

        Not atomic: a reader may see a part of it, which the commit record protects it from. An object of that name is
        replaced. On an error nothing of the object need be left, and `data` is no longer read from.

        Args:
            key: name of the object.
            data: contiguous, page-aligned memory (other memory works, slower). Only the first `size` bytes are stored.
            size: bytes of the object, at most `len(data)`.
            progress: called now and then, in the calling thread, with the bytes written since the last call; the calls
                add up to `size`. It may block (the write then waits for it) or raise (the write then stops).

        Raises:
            InvalidInput: bad key or size.
            StoreError: and its subclasses, by what went wrong.
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a small object unless the key exists; exactly one of several concurrent writers wins.

        All or nothing, also under power loss: no reader ever sees a part of `data`. Durable on return. `data` MUST NOT
        be empty and should name its writer, so that a lost response can be resolved by reading the object back.

        Returns:
            True if this call created the object, False if the key existed.
        """

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """Return a whole small object.

        Raises:
            NotFound: no such object.
            InvalidInput: it is larger than `limit` bytes.
        """

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (contiguous, writable) with the object's bytes from `offset` on.

        Raises:
            NotFound: no such object.
            Damaged: it ends before the buffer is full.
        """

    def size(self, key: str) -> int:
        """Return the object's size in bytes; NotFound where there is none."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object whose key lies below `prefix` (whole parts; "" is everything), in any order.

        What interrupted writers left behind is listed too, so that it can be deleted. Nothing below `prefix` is no
        error. Objects created or deleted meanwhile may or may not appear.
        """

    def children(self, prefix: str = "") -> list[str]:
        """Return, sorted, the names one level below `prefix`: last parts of keys, and parts that lead to keys.

        Cheap: it does not look further down, so a part may be named that has no objects below it any more. Names that
        begin with `TEMPORARY_PREFIX` are left out.
        """

    def delete(self, key: str) -> None:
        """Remove an object, durably; no error where there is none."""

    def close(self) -> None:
        """Give back threads and connections; call it once, when no other method is running."""


def check_key(key: str) -> str:
    """Return `key` if it is one: 1..1024 bytes of UTF-8, parts of 1..255 bytes joined by "/", none "." or "..".

    Raises:
        InvalidInput: it is not; a driver calls this before it touches anything.
    """
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"key {key!r} is not valid Unicode") from None
    if not encoded or len(encoded) > MAX_KEY_BYTES:
        raise InvalidInput(f"key {key[:80]!r} has {len(encoded)} bytes; 1 to {MAX_KEY_BYTES} are allowed")
    if b"\0" in encoded:
        raise InvalidInput(f"key {key!r} contains a NUL")
    for part in encoded.split(b"/"):
        if part in (b"", b".", b"..") or len(part) > MAX_PART_BYTES:
            raise InvalidInput(
                f"key {key!r} has the part {part.decode()[:80]!r}",
                hint=f'parts are 1 to {MAX_PART_BYTES} bytes long and neither "." nor ".."; no "/" at either end',
            )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is "" or a key."""
    return prefix and check_key(prefix)


def check_size(data: memoryview, size: int) -> memoryview:
    """Return the first `size` bytes of the contiguous `data`; InvalidInput where it has fewer."""
    if not data.c_contiguous:
        raise InvalidInput("the memory to store is not contiguous")
    if not 0 <= size <= data.nbytes:
        raise InvalidInput(f"{size} bytes are to be stored out of {data.nbytes}")
    return data.cast("B")[:size]
