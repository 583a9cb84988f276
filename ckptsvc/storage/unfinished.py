"""What some stores keep of writes that were never finished, where no listing of objects shows it.

A writer that was killed in the middle of a multipart upload leaves its parts at the server. A driver of such a store
has the method of `KeepsUnfinished`; it lists the same entries in `Store.list`, and removes them in `Store.delete`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from ckptsvc.storage.api import Entry, Store


@runtime_checkable
class KeepsUnfinished(Protocol):
    """A store that keeps parts of objects whose writing was never finished."""

    def unfinished(self, prefix: str = "") -> Iterator[Entry]:
        """Yield an entry for every unfinished write below `prefix`.

        Its key begins with the key of the object, goes on with a part that begins with `TEMPORARY_PREFIX`, and deletes
        what is kept when it is given to `Store.delete`; its time is the write's beginning.
        """


def unfinished_by_folder(store: Store) -> dict[str, Sequence[Entry]]:
    """Every unfinished write, by the first part of its key; nothing where the store keeps none.

    Raises:
        StoreError: the store cannot be asked.
    """
    found: dict[str, list[Entry]] = {}
    inner: object = store
    while not isinstance(inner, KeepsUnfinished) and hasattr(inner, "inner"):
        inner = inner.inner  # a wrapper
    if isinstance(inner, KeepsUnfinished):
        for entry in inner.unfinished():
            found.setdefault(entry.key.partition("/")[0], []).append(entry)
    return {folder: tuple(entries) for folder, entries in found.items()}
