"""`fsspec+PROTOCOL://...`: any place that fsspec knows, for those that have no driver of their own.

A driver that speaks the protocol itself does more and does it faster; this one promises what can be had everywhere:
objects are written and read in blocks, one call after the other, and an object that is put if absent is refused where
the protocol has no way that was seen to let exactly one writer win (see `fsspec_protocols`).

fsspec's caches of listings and of instances are off: both show what was, not what is. Its transactions are not used:
some file systems ignore them. Its clients do not survive fork(2).
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from ckptsvc.errors import (
    CkptsvcError,
    ConfigError,
    Damaged,
    InvalidInput,
    NotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from ckptsvc.storage import (
    READ_LIMIT,
    TEMPORARY_PREFIX,
    Capabilities,
    Entry,
    Progress,
    check_key,
    check_prefix,
    check_record,
    check_size,
    check_target,
    is_key,
)
from ckptsvc_drivers.fsspec_protocols import FileSystem, protocol
from ckptsvc_drivers.linux import translate

PREFIX = "fsspec+"
BLOCK = 8 << 20
"""Bytes per call, unless the option `block` says otherwise."""

_ATTEMPTS = 100  # to open a file in a directory that others remove because it has just become empty
_ROUNDS, _RACERS = 3, 4  # of the race that shows whether exactly one writer wins
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_DENIED = {"AuthenticationException", "BadHostKeyException", "NoCredentialsError", "ClientAuthenticationError"}
_UNAVAILABLE = {
    *("ConnectionError", "TimeoutError", "EOFError"),
    *("SSHException", "NoValidConnectionsError"),  # paramiko
    *("HTTPClientError", "ClientError"),  # botocore, aiohttp
}


def connect(url: str, options: Mapping[str, object]) -> FsspecStore:
    """Return the store at `fsspec+PROTOCOL://...`; all options but `block` go to the class of the file system.

    Raises:
        ConfigError: no such protocol, a package it needs is missing, a bad address or option.
        StoreError: the other side refuses, or does not answer.
    """
    inner = url.removeprefix(PREFIX)
    scheme, separator, rest = inner.partition("://")
    if inner == url or not scheme or not separator:
        raise ConfigError(f"{url!r} is no address for fsspec", hint="write fsspec+PROTOCOL://..., as fsspec+sftp://...")
    if "::" in inner or any(ord(each) < 32 for each in inner):
        raise ConfigError(f"{url!r} chains file systems", hint="caches in between show what was, not what is")
    if "?" in inner or "#" in inner:
        raise ConfigError(f"fsspec+{scheme}:// with a query in the address", hint="give settings as options")
    if urlsplit(f"x://{rest.partition('/')[0]}").password is not None:
        raise ConfigError(f"fsspec+{scheme}:// with a password in the address", hint="give it as an option")
    given = dict(options)
    block = given.pop("block", BLOCK)
    if not isinstance(block, int) or block < 1:
        raise ConfigError(f"options of {url}: block is {block!r}; it must be a number of bytes")
    return FsspecStore(url.rstrip("/"), scheme, lambda: _open(inner.rstrip("/"), scheme, given), block)


def _open(inner: str, scheme: str, options: Mapping[str, object]) -> tuple[FileSystem, str]:
    """Open a file system of fsspec; returns it and the path in it."""
    import fsspec

    try:
        arguments = {**protocol(scheme).arguments(), **options}
        filesystem, path = fsspec.url_to_fs(inner, skip_instance_cache=True, **arguments)
        protocol(scheme).prepare(filesystem)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"fsspec cannot open {inner}: {error}") from error
    except Exception as error:  # fsspec's file systems raise what their libraries do
        raise _translated(error, f"{PREFIX}{inner}") from error
    filesystem.dircache.use_listings_cache = False
    return filesystem, path.rstrip("/")


class FsspecStore:
    """Objects as files of an fsspec file system below one path.

    Args:
        url: the address.
        scheme: fsspec's name of the protocol.
        open_one: opens the file system, and returns it and the path.
        block: bytes per call.
    """

    def __init__(self, url: str, scheme: str, open_one: Callable[[], tuple[FileSystem, str]], block: int) -> None:
        self._url, self._scheme, self._open_one, self._block = url, scheme, open_one, block
        self._protocol, self._pid = protocol(scheme), os.getpid()
        self._lock = threading.Lock()
        self._refusal: str | None = None  # why nothing may be put if absent; "" where it may; None is not known yet
        self._filesystem, self._root = open_one()
        self._idle = [self._filesystem]  # where one serves one thread only

    @property
    def url(self) -> str:
        """`fsspec+` and fsspec's address."""
        return self._url

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`; whether creating is exclusive is found out by a small race, once."""
        notes = [f"file system: {type(self._filesystem).__name__} of fsspec"]
        try:
            refusal = self._why_not()
            notes.append(refusal or f"exclusive by {self._protocol.how}")
        except StoreError as error:
            refusal = str(error)
            notes.append(refusal)
        if not self._protocol.durable:
            notes.append("what is written may not be durable when a call returns")
        return Capabilities(
            exclusive_create=not refusal,
            direct_io="bytes go through fsspec",
            local=self._scheme in ("file", "local", "memory"),
            notes=tuple(notes),
        )

    def close(self) -> None:
        """Close the connections, where there are some."""
        while self._idle and self._pid == os.getpid():
            _hang_up(self._idle.pop())

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root or "/"

    # --- writing --------------------------------------------------------------------------------------------

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`; every block is copied once, since most file systems take no memoryview."""
        path = self._path(check_key(key))
        with check_size(data, size) as view, self._borrowed(key) as filesystem:
            with self._errors(key):
                if self._protocol.directories:
                    _remove(filesystem, path)
                file = _in_directory(filesystem, path, lambda: self._protocol.open(filesystem, path, self._block))
            try:
                for start in range(0, size, self._block):
                    stop = min(start + self._block, size)
                    if ready is not None:
                        ready(stop)
                    with self._errors(key), view[start:stop] as part:
                        file.write(bytes(part))
                    if progress is not None:
                        progress(stop - start)
                with self._errors(key):
                    if self._protocol.sync is not None:
                        self._protocol.sync(file)
                    file.close()
            except BaseException:
                with suppress(Exception):  # the error that counts is on its way
                    file.close()
                with suppress(Exception):
                    _remove(filesystem, path)
                raise

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`; StoreError where the protocol has no way that lets one writer win."""
        path, content = self._path(check_key(key)), bytes(check_record(data))
        if refusal := self._why_not():
            raise StoreError(f"{self.url}/{key}: {refusal}", hint="choose another store for checkpoints")
        return self._create(key, path, content)

    def _create(self, key: str, path: str, content: bytes) -> bool:
        create = self._protocol.create
        with self._using(key) as filesystem:
            return create is not None and bool(
                _in_directory(filesystem, path, lambda: create(filesystem, path, content))
            )

    def _why_not(self) -> str:
        """Why nothing can be put if absent here, or ""; found out by trying, once."""
        if self._protocol.create is None:
            return f"{self._scheme}:// has no known way to create an object exclusively"
        with self._lock:
            if self._refusal is None:
                exclusive = all(self._race() for _ in range(_ROUNDS))
                several = f"{self._protocol.how} is not exclusive on this server: several writers of one object won"
                self._refusal = "" if exclusive else several
            return self._refusal

    def _race(self) -> bool:
        """Let some threads create one temporary object; returns whether one of them won, and its content is there."""
        key = TEMPORARY_PREFIX + secrets.token_hex(8)
        path = self._path(key)
        contents = [f"racer {number}".encode() for number in range(_RACERS)]
        start = threading.Barrier(_RACERS)

        def contend(content: bytes) -> bool:
            start.wait()
            return self._create(key, path, content)

        try:
            with ThreadPoolExecutor(_RACERS) as pool:
                won = [content for content, first in zip(contents, pool.map(contend, contents), strict=True) if first]
            return len(won) == 1 and not self._create(key, path, b"late") and self.read(key) == won[0]
        finally:
            self.delete(key)

    def delete(self, key: str) -> None:
        """See `Store.delete`; directories that have become empty go as well."""
        with self._using(check_key(key)) as filesystem:
            _remove(filesystem, self._path(key))
            if self._protocol.directories:
                parts = key.split("/")
                with suppress(OSError):  # usually not empty
                    for depth in range(len(parts) - 1, 0, -1):
                        filesystem.rmdir(self._path("/".join(parts[:depth])))

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        size = self.size(key)
        if size > limit:
            raise InvalidInput(f"{self.url}/{key} has {size} bytes, more than the {limit} allowed")
        buffer = bytearray(size)
        with memoryview(buffer) as view:
            self._fill(key, 0, view)
        return bytes(buffer)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`."""
        with check_target(buffer, offset) as view:
            end = self.size(key)
            if len(view) and offset + len(view) > end:
                raise Damaged(f"{self.url}/{key} ends at byte {end}, before what is wanted")
            self._fill(key, offset, view)

    def _fill(self, key: str, offset: int, view: memoryview) -> None:
        for start in range(0, len(view), self._block):
            stop = min(start + self._block, len(view))
            with self._using(key) as filesystem:
                content = self._protocol.read(filesystem, self._path(key), offset + start, offset + stop)
            if len(content) != stop - start:
                raise Damaged(f"{self.url}/{key} ends at byte {offset + start + len(content)} all of a sudden")
            view[start:stop] = content

    def size(self, key: str) -> int:
        """See `Store.size`."""
        with self._using(check_key(key)) as filesystem:
            found = filesystem.info(self._path(key))
        if found["type"] != "file":
            raise NotFound(f"{self.url}/{key} is not a file")
        return int(found["size"])

    # --- listing --------------------------------------------------------------------------------------------

    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        found = {_last(each["name"]) for each in self._scan(check_prefix(prefix))}
        return sorted(name for name in found if is_key(name) and not name.startswith(TEMPORARY_PREFIX))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`."""
        waiting = [check_prefix(prefix)]
        while waiting:
            base = waiting.pop()
            for each in self._scan(base):
                name = _last(each["name"])
                if not is_key(name):
                    continue
                key = f"{base}/{name}" if base else name
                if each["type"] == "directory":
                    waiting.append(key)
                elif each["type"] == "file":
                    yield Entry(key, int(each["size"] or 0), _modified(each))

    def _scan(self, prefix: str) -> Sequence[Mapping[str, Any]]:
        """What lies in a directory; nothing where there is none."""
        path = self._path(prefix)
        with self._using(prefix) as filesystem, suppress(FileNotFoundError, NotADirectoryError):
            found = filesystem.ls(path, detail=True)
            return [each for each in found if each["name"].strip("/") != path.strip("/")]
        return ()

    @contextmanager
    def _using(self, key: str) -> Iterator[FileSystem]:
        """The file system, for calls about an object."""
        with self._borrowed(key) as filesystem, self._errors(key):
            yield filesystem

    @contextmanager
    def _borrowed(self, key: str) -> Iterator[FileSystem]:
        """The file system; where one serves one thread at a time, one that nobody else has now."""
        with self._errors(key):
            if not self._protocol.one_thread:
                filesystem = self._filesystem
            else:
                try:
                    filesystem = self._idle.pop()
                except IndexError:
                    filesystem, _ = self._open_one()
        broken = False
        try:
            yield filesystem
        except StoreError as error:
            broken = not isinstance(error, NotFound)
            raise
        finally:
            if self._protocol.one_thread:
                if broken:
                    _hang_up(filesystem)
                else:
                    self._idle.append(filesystem)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn whatever a file system raises into an error of ours that names the object."""
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.url} was opened in process {self._pid}, and fsspec's clients do not survive fork(2)",
                hint="connect in the process that uses the store",
            )
        try:
            yield
        except CkptsvcError:
            raise
        except Exception as error:
            raise _translated(error, f"{self.url}/{key}" if key else self.url) from error


def _translated(error: Exception, where: str) -> CkptsvcError:
    """The error of ours for what a library raised, by its errno, or by the names of its classes."""
    names = {each.__name__ for each in type(error).__mro__}
    what = f"{where}: {type(error).__name__}: {error}"
    if names & _DENIED:
        return StoreDenied(what, hint="check the credentials, and known_hosts")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{where}: no such object")
    if isinstance(error, PermissionError):
        return StoreDenied(what)
    if isinstance(error, OSError) and error.errno is not None:
        known = translate(error, where)
        translated = type(known)(what, hint=known.hint)
        translated.retryable = known.retryable
        return translated
    gone = names & _UNAVAILABLE or "is closed" in str(error)  # paramiko: a bare OSError
    return StoreUnavailable(what) if gone else StoreError(what)


def _remove(filesystem: FileSystem, path: str) -> None:
    """Remove a file if it is there; a directory stays."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if filesystem.info(path)["type"] != "directory":
            filesystem.rm_file(path)


def _in_directory(filesystem: FileSystem, path: str, make: Callable[[], Any]) -> Any:
    """Call `make`; where its directory is missing, make that and call again."""
    for _ in range(_ATTEMPTS):
        try:
            return make()
        except FileNotFoundError:
            with suppress(OSError):  # somebody else has made it, or removed one above; the next try tells
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    return make()


def _hang_up(filesystem: FileSystem) -> None:
    """Close the connection of a file system that has one, as those of SFTP and SMB have."""
    client: Any = getattr(filesystem, "client", None)
    if hasattr(client, "close"):
        with suppress(Exception):  # nothing depends on it
            client.close()


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _modified(found: Mapping[str, Any]) -> float:
    """When an object was last written, in seconds since 1970; 0 where the file system does not tell."""
    for name in _TIMES:
        value = found.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0
