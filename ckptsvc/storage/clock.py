"""What time it is by the clock that dates a store's objects, which need not be that of this node."""

from __future__ import annotations

import secrets
import time

from ckptsvc.storage.api import TEMPORARY_PREFIX, Store

_LOOKS = (0.0, 0.5, 1.0, 2.0)  # seconds before each: a listing may be behind


def store_time(store: Store, folder: str) -> float | None:
    """The time at a store, in seconds since 1970; None where it does not date its objects.

    Most file systems of a cluster have the writer's node date them: then this is the time of this node.

    Args:
        store: a small object is written there, looked up in a listing, and removed.
        folder: first part of its key, where few other objects are.

    Raises:
        StoreError: as the store raises, also where nothing may be written.
    """
    key = f"{folder}/{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    store.put_if_absent(key, b"what time is it?")
    try:
        for wait in _LOOKS:
            time.sleep(wait)
            for entry in store.list(folder):
                if entry.key == key:
                    return entry.modified or None
        return None
    finally:
        store.delete(key)
