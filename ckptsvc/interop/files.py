"""Where a foreign checkpoint lies: named files that can be read in ranges, on a local path or in any store."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ckptsvc.errors import Damaged, InvalidInput, NotFound, StoreError
from ckptsvc.storage import Store
from ckptsvc.storage.opening import open_apart

MAX_OPEN = 64
"""Most files held open at a time."""

MAX_SMALL = 1 << 30
"""Largest file that is read whole, in bytes: metadata of foreign formats, never tensors."""


class Files(Protocol):
    """What importers read from; `storage.Store` has the same methods. Keys are relative paths with "/"."""

    @property
    def url(self) -> str:
        """For messages."""

    def read(self, key: str, limit: int = MAX_SMALL) -> bytes:
        """A whole small file; NotFound where there is none, InvalidInput if it is larger than `limit` bytes."""

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `offset` on; Damaged if the file ends before."""

    def size(self, key: str) -> int:
        """Bytes of a file; NotFound where there is none."""

    def children(self, prefix: str = "") -> Sequence[str]:
        """Sorted names directly below a folder; empty where there is none."""

    def close(self) -> None:
        """Give back what is open."""


def open_files(address: str) -> Files:
    """The files at a local path or a store's URL.

    Raises:
        NotFound: there is no such directory or file.
        ConfigError, StoreError: as `storage.connect`.
    """
    path = address.removeprefix("file://")
    if "://" not in path:
        return LocalFiles(Path(path).absolute())
    return _StoreFiles(open_apart(address))


class LocalFiles:
    """A directory, or one file in it.

    Unlike the `posix` driver it follows symbolic links: the caches of model hubs are made of them. A key never leads
    out of the directory by "..".

    Attributes:
        only: the file's name when the address was a file, else "".
    """

    def __init__(self, root: Path) -> None:
        """Raises NotFound if nothing is there."""
        if not root.exists():
            raise NotFound(f"{root} does not exist")
        self.only = "" if root.is_dir() else root.name
        self._root = root if root.is_dir() else root.parent
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)  # of whoever forgets to

    @property
    def url(self) -> str:
        """See Files."""
        return str(self._root / self.only)

    def read(self, key: str, limit: int = MAX_SMALL) -> bytes:
        """See Files."""
        size = self.size(key)
        if size > limit:
            raise InvalidInput(f"{self._root / key} has {size} bytes, more than the {limit} allowed")
        data = bytearray(size)
        self.read_into(key, 0, memoryview(data))
        return bytes(data)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See Files."""
        fd = self._descriptor(key)
        view, done = buffer.cast("B") if buffer.nbytes else buffer, 0
        try:
            while done < len(view):
                got = os.preadv(fd, [view[done:]], offset + done)
                if not got:
                    raise Damaged(f"{self._root / key} ends at byte {offset + done}, before what is wanted")
                done += got
        except OSError as error:
            raise StoreError(f"{self._root / key} cannot be read: {error.strerror}") from error
        finally:
            os.close(fd)

    def size(self, key: str) -> int:
        """See Files."""
        fd = self._descriptor(key)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def children(self, prefix: str = "") -> Sequence[str]:
        """See Files."""
        try:
            return sorted(os.listdir(self._path(prefix) if prefix else self._root))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise StoreError(f"{self._root / prefix} cannot be listed: {error.strerror}") from error

    def close(self) -> None:
        """See Files."""
        with self._lock:
            _close_all(self._open)

    def _descriptor(self, key: str) -> int:
        """A descriptor of the caller's own: one that others close meanwhile stays good."""
        with self._lock:
            fd = self._open.pop(key, None)
            if fd is None:
                fd = self._opened(key)
            self._open[key] = fd
            if len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            return os.dup(fd)

    def _opened(self, key: str) -> int:
        path = self._path(key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not hang us
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{path} does not exist") from None
        except OSError as error:
            kind = Damaged if error.errno == errno.ELOOP else StoreError
            raise kind(f"{path} cannot be opened: {error.strerror}") from error
        if not path.is_file():
            os.close(fd)
            raise NotFound(f"{path} is not a file")
        return fd

    def _path(self, key: str) -> Path:
        if key.startswith("/") or "\0" in key or ".." in key.split("/"):
            raise Damaged(f"{self._root}: a file of it is said to be {key[:200]!r}, which is outside")
        return self._root / key


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class _StoreFiles:
    """A store seen as files; see Files."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.url = store.url
        self.read_into, self.size, self.children, self.close = store.read_into, store.size, store.children, store.close

    def read(self, key: str, limit: int = MAX_SMALL) -> bytes:
        return self._store.read(key, limit)
