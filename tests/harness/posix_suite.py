"""The conformance suite for stores that keep objects as files below a directory."""

from pathlib import Path

from ckptsvc.storage import Store
from ckptsvc.storage.testing import StoreTests


def path_of(store: Store, key: str) -> Path:
    """Where an object lies."""
    return Path(store.url.partition("://")[2]) / key


class Posix(StoreTests):
    """What all the tests of PosixStore share."""

    def raw_read(self, store, key):
        return path_of(store, key).read_bytes()

    def raw_write(self, store, key, content):
        path = path_of(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
