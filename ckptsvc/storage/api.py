"""The port: what a place must be able to do so that checkpoints can be kept there.

`Store` is the one protocol that every driver implements and `ckptsvc.storage.testing` checks. Its methods may
be called from several threads at once, may block for as long as the store takes, and raise only errors from
`ckptsvc.errors` (and whatever a `progress` callback raised).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

Progress = Callable[[int], None]
"""Called with a number of bytes."""

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
    """An object in a listing: key, size in bytes, time of the last write in seconds since 1970."""

    key: str
    size: int
    modified: float


@runtime_checkable
class Store(Protocol):
    """A place that keeps objects under keys (see `arguments.check_key`)."""

    @property
    def url(self) -> str:
        """The address, in one spelling and without secrets; `connect(url)` leads to the same objects."""

    def capabilities(self) -> Capabilities:
        """Say what this store can do; may write and remove a small temporary object to find out."""

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """Write a large object; on return its data, its size and its name are durable.

        Replaces an object of that name. Not atomic: a reader may see a part of it, which is why readers
        look for the commit record first. When this returns or raises, `data` is no longer read or held on to.

        Args:
            key: name of the object.
            data: contiguous, page-aligned memory (other memory works, but slower).
            size: bytes of the object: the first `size` of `data` are stored.
            ready: called in the calling thread before bytes are taken, with a growing number, `size` at last: it
                returns when the first so many bytes of `data` are final, or raises (the write then stops). Without
                it all of them are.
            progress: called now and then in the calling thread with the bytes written since the last call,
                `size` in all, in the order of the object: what is reported is not read again, and its memory may
                go. Called before `ready` for all that is written by then. It may block (the write then waits) or
                raise (the write then stops).
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a small object unless the key exists; exactly one of several concurrent writers wins.

        All or nothing, also under power loss; durable on return. `data` is not empty, and names its writer so
        that a lost response can be resolved by reading the object back.

        Returns:
            True if this call created the object, False if the key existed.
        """

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """Return a whole small object.

        Raises:
            NotFound: no such object.
            InvalidInput: it has more than `limit` bytes.
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

        What interrupted writers left behind is listed too, so that it can be deleted. Objects created or
        deleted meanwhile may or may not appear.
        """

    def children(self, prefix: str = "") -> Sequence[str]:
        """Return, sorted, the next part of every key below `prefix`, without `TEMPORARY_PREFIX` names.

        Cheap: nothing further down is looked at, so a part may have no objects below it any more.
        """

    def delete(self, key: str) -> None:
        """Remove an object, durably; no error where there is none."""

    def close(self) -> None:
        """Give back threads and connections; call it once, when no other method is running."""


class Layout(NamedTuple):
    """How an object lies on the targets (disks, servers) of its store, as the store itself says.

    Attributes:
        stripes: over how many of them it is spread; 0 is not known.
        stripe_size: bytes on one before the next has its turn; 0 is not known.
        targets: their numbers, in order, as far as they are known.
        problem: why that is not what the driver asked for, or "".
    """

    stripes: int
    stripe_size: int
    targets: tuple[int, ...]
    problem: str


@runtime_checkable
class Spreading(Protocol):
    """What a driver may have beside `Store`, if it decides over how many targets a large object is spread."""

    writers: int
    """How many processes write at the same time, 0 if unknown; who uses the store sets it."""

    def layout(self, key: str) -> Layout | None:
        """Tell once how an object lies that was written through this very store object; None if nothing is known."""
