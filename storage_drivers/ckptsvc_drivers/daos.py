"""`daos://POOL/CONTAINER/path`: a directory of a DAOS container with a file system in it, through libdfs.

Large objects are files, striped as the container's redundancy allows and written from the caller's memory in blocks by
a few threads; libdaos cuts each block into chunks, all of which are on their way at once.

A record that is put if absent is an extended attribute of an otherwise empty file, set with XATTR_CREATE: the one call
of libdfs that creates, in one step at the server, a name together with its content. A copy of it in the file itself
is for whoever looks at the container through dfuse. proto/decisions/013 says why it is not a rename.

A call that DAOS never answers blocks its thread for as long as DAOS takes: no call can be given up. That is why
stores are used from a process of their own, which can be.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Annotated

import msgspec

from ckptsvc.errors import ConfigError, Damaged, InvalidInput, NotFound, StoreError, StoreUnavailable
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
from ckptsvc_drivers import daos_client
from ckptsvc_drivers.libdfs import XATTR_CREATE, XATTR_MAX, Mount, Object
from ckptsvc_drivers.linux import translate
from ckptsvc_drivers.threads import Threads

_RECORD = b"user.ckptsvc.record"  # the content of an object that was put if absent
_EMPTY = b"user.ckptsvc.empty"  # tells an object of no bytes from a file that somebody is about to put a record in
_RECORD_CHUNK = 1 << 20  # bytes: a record lies in one chunk, so that its copy is written in one step too
_LABEL = re.compile(r"[A-Za-z0-9._:-]{1,127}", re.ASCII)  # DAOS_PROP_LABEL_MAX_LEN; a UUID is one too
_ATTEMPTS = 100  # to create a file in a directory that others remove because it has just become empty


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a `daos://` store.

    Attributes:
        object_class: of large objects, by its name, for example "SX" or "EC_8P2GX"; "" lets DAOS choose the widest
            one that keeps the container's redundancy.
        record_class: of records, likewise, for example "RP_3G1"; "" lets DAOS choose one for small files.
        chunk: bytes of a large object that lie together on one target; 0 is what the container says.
        threads: threads that transfer, shared by all calls.
        block: bytes per transfer, a multiple of 64 KiB.
        system: name of the DAOS system; "" is the default one.
        library: path of libdfs.so; "" looks for it.
    """

    object_class: str = ""
    record_class: str = ""
    chunk: Annotated[int, msgspec.Meta(ge=0, le=1 << 30, multiple_of=1 << 12)] = 4 << 20
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    block: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 30, multiple_of=1 << 16)] = 16 << 20
    system: str = ""
    library: str = ""


OPTIONS = Options
"""What `[store.options.SCHEME]` may set."""


def connect(url: str, options: Mapping[str, object]) -> DaosStore:
    """Return the store at `daos://POOL/CONTAINER/path`; its directory is made by the first write.

    Labels are taken as they stand, UUIDs too; the path has no percent escapes.

    Raises:
        ConfigError: a bad address or option, or there is no libdfs.
        StoreError: DAOS refuses, or does not answer.
    """
    pool, _, rest = url.removeprefix("daos://").partition("/")
    container, _, path = rest.partition("/")
    path = path.strip("/")
    if not (url.startswith("daos://") and _LABEL.fullmatch(pool) and _LABEL.fullmatch(container)):
        raise ConfigError(f"{url!r} does not name a container", hint="write daos://POOL/CONTAINER/path")
    if path and not is_key(path):
        raise ConfigError(f"{url!r} has a path that cannot be used", hint='no part may be empty, "." or ".."')
    try:
        settings = msgspec.convert(dict(options), Options, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of {url}: {error}") from error
    address = daos_client.Address(pool, container, settings.system, settings.library)
    connection = daos_client.connect(address)
    try:
        return DaosStore(connection, path, settings)
    except BaseException:
        daos_client.release(connection)
        raise


class DaosStore:
    """Objects as files below one directory of a container.

    Args:
        connection: the open container, given back by `close`.
        path: of the directory, without slashes at its ends; need not exist.
        options: settings.
    """

    def __init__(self, connection: daos_client.Connection, path: str, options: Options) -> None:
        self._connection, self._root = connection, path
        self._chunk, self._block = options.chunk, options.block
        mount = connection.live()
        self._class = self._object_class(mount, options.object_class, "file:max")
        self._record_class = self._object_class(mount, options.record_class, "file:single")
        self._threads = Threads(options.threads)

    def _object_class(self, mount: Mount, name: str, hint: str) -> int:
        with self._errors(""):
            return mount.library.object_class(name) if name else mount.suggested_class(hint)

    @property
    def url(self) -> str:
        """`daos://`, the pool, the container and the path."""
        address = self._connection.address
        return f"daos://{address.pool}/{address.container}" + (f"/{self._root}" if self._root else "")

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`; how large objects are laid out is read back from a temporary one."""
        notes, exclusive = [f"library: {self._connection.mount.library.path}"], True
        try:
            if self._connection.read_only:
                notes.append("may be read only")
            else:
                layout, exclusive = self._try()
                notes.append(f"large objects: {layout}")
        except StoreError as error:
            notes.append(str(error))
        return Capabilities(exclusive_create=exclusive, notes=tuple(notes))

    def _try(self) -> tuple[str, bool]:
        """Write one object and one record; returns how the object is laid out, and whether the record is exclusive."""
        key = TEMPORARY_PREFIX + secrets.token_hex(8)
        with memoryview(b"1") as data:
            self.write(key, data, 1)
        with self._errors(key), self._mount.lookup(self._path(key)) as file:
            object_class, chunk = self._mount.layout(file)
        self.delete(key)
        first, second = self.put_if_absent(key, b"1"), self.put_if_absent(key, b"2")
        self.delete(key)
        return f"class {object_class}, chunks of {chunk} bytes", first and not second

    def close(self) -> None:
        """End the transferring threads, and close the container unless another store in this process uses it."""
        self._threads.close()
        daos_client.release(self._connection)

    @property
    def _mount(self) -> Mount:
        return self._connection.live()

    def _path(self, key: str) -> str:
        return "/" + "/".join(part for part in (self._root, key) if part)

    # --- writing --------------------------------------------------------------------------------------------

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`."""
        mount = self._mount
        with check_size(data, size) as view, self._errors(check_key(key)), self._new_file(key) as file:

            def write_block(start: int, stop: int) -> int:
                with view[start:stop] as part:
                    mount.write(file, part, start)
                return stop - start

            try:
                if size == 0:
                    mount.set_attribute(file, _EMPTY, b"1")
                self._threads.spread(write_block, size, self._block, ready, progress)
            except BaseException:
                with suppress(OSError):  # so that a full pool is not left full of it
                    self._remove_if(key, file)
                raise

    @contextmanager
    def _new_file(self, key: str) -> Iterator[Object]:
        """Make a file for `key`; one of that name is removed first, so that a late writer writes into nothing."""
        mount, name = self._mount, _name(key)
        for _ in range(_ATTEMPTS):
            with ExitStack() as opened:
                directory = None
                try:
                    directory = opened.enter_context(self._directory_of(key, create=True))
                    file = opened.enter_context(mount.create(directory, name, self._class, self._chunk, new=True))
                except FileNotFoundError:
                    continue  # a directory was removed
                except FileExistsError:
                    if directory is not None:
                        self._remove_file(directory, name)
                    continue
                # DAOS makes a file in a directory that has just been removed, too: nobody would find it there.
                if self._leads_to(key, file):
                    yield file
                    return
        raise StoreUnavailable(f"{self.url}/{key}: others keep removing the place of this object")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`: the content becomes an extended attribute that must not exist yet."""
        content = bytes(check_record(data))
        if len(content) > XATTR_MAX:
            raise InvalidInput(f"{self.url}/{key}: a record of {len(content)} bytes; DAOS takes {XATTR_MAX}")
        with self._errors(check_key(key)):
            for _ in range(_ATTEMPTS):
                with suppress(FileNotFoundError):  # the file or its directory was removed while we were about it
                    won = self._put(key, content)
                    if won is not None:
                        return won
        raise StoreUnavailable(f"{self.url}/{key}: others keep removing the place of this record")

    def _put(self, key: str, content: bytes) -> bool | None:
        """Try to put a record; returns whether this made it, None if it went down with its directory."""
        mount = self._mount
        with self._directory_of(key, create=True) as directory:
            created = mount.create(directory, _name(key), self._record_class, _RECORD_CHUNK, new=False)
            with created as file:
                if mount.size(file) or self._attribute(file, _EMPTY):
                    return False
                try:
                    mount.set_attribute(file, _RECORD, content, XATTR_CREATE)
                except FileExistsError:
                    return False
                with suppress(OSError), memoryview(content) as copy:  # the record is there already
                    mount.write(file, copy, 0)
            # What counts is what a reader finds: an attribute goes to whatever has the name by now.
            with mount.lookup(self._path(key)) as found:
                return True if self._attribute(found, _RECORD) == content else None

    def delete(self, key: str) -> None:
        """See `Store.delete`; directories that have become empty go as well."""
        parts = check_key(key).split("/")
        with self._errors(key):
            with (
                suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError),
                self._directory_of(key) as directory,
            ):
                self._remove_file(directory, parts[-1])
            with suppress(OSError):  # usually ENOTEMPTY; in no case worth an error
                for depth in range(len(parts) - 1, 0, -1):
                    self._remove_directory("/".join(parts[:depth]))

    def _remove_directory(self, key: str) -> None:
        """Remove a directory; OSError where it is none, or not empty."""
        with self._directory_of(key) as above:
            with self._mount.entry(above, _name(key)) as found:
                if not found.is_directory:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._mount.remove(above, _name(key))

    def _remove_file(self, directory: Object, name: str) -> None:
        """Remove what is no directory, if it is there."""
        with suppress(FileNotFoundError):
            with self._mount.entry(directory, name) as found:
                if found.is_directory:
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._mount.remove(directory, name)

    def _remove_if(self, key: str, file: Object) -> None:
        """Remove the file of `key` if it is this one, and not what a later writer has put in its place."""
        with self._directory_of(key) as directory:
            if self._leads_to(key, file):
                self._mount.remove(directory, _name(key))

    def _leads_to(self, key: str, file: Object) -> bool:
        """Whether this file is what a reader of `key` finds."""
        try:
            with self._mount.lookup(self._path(key)) as found:
                return self._mount.identity(found) == self._mount.identity(file)
        except FileNotFoundError:
            return False

    @contextmanager
    def _directory_of(self, key: str, *, create: bool = False) -> Iterator[Object]:
        """Open the directory that `key` lies in, for changes; made on the way with `create`."""
        path = self._path(key).rpartition("/")[0] or "/"
        if create:
            self._make(path)
        with self._mount.lookup(path, os.O_RDWR) as directory:
            if not directory.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            yield directory

    def _make(self, path: str) -> None:
        """Make a directory and those above it."""
        with suppress(FileNotFoundError), self._mount.lookup(path):
            return
        above, _, name = path.rpartition("/")
        self._make(above or "/")
        with suppress(FileExistsError), self._mount.lookup(above or "/", os.O_RDWR) as directory:
            self._mount.mkdir(directory, name)

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`; a record comes with its attribute, in one call."""
        with self._opened(key) as file:
            content = self._attribute(file, _RECORD)
            size = len(content) or self._size(key, file)
            if size > limit:
                raise InvalidInput(f"{self.url}/{key} has {size} bytes, more than the {limit} allowed")
            if content:
                return content
            buffer = bytearray(size)
            with memoryview(buffer) as view:
                self._fill(key, file, 0, view)
            return bytes(buffer)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`; more than a block is read by all threads."""
        with check_target(buffer, offset) as view, self._opened(key) as file:
            if len(view):
                self._fill(key, file, offset, view)
            else:
                self._size(key, file)

    def _fill(self, key: str, file: Object, offset: int, view: memoryview) -> None:
        mount = self._mount

        def read_block(start: int, stop: int) -> int:
            with view[start:stop] as part:
                found = mount.read(file, part, offset + start)
            if found < stop - start:
                raise EOFError(offset + start + found)
            return found

        try:
            if len(view) > self._block:
                self._threads.spread(read_block, len(view), self._block)
            elif len(view):
                read_block(0, len(view))
        except EOFError as error:
            content = self._attribute(file, _RECORD)  # its copy may be missing
            if len(content) < offset + len(view):
                what = f"{self.url}/{key} ends at byte {error}, before what is wanted"
                raise Damaged(what) from error
            view[:] = content[offset : offset + len(view)]

    def size(self, key: str) -> int:
        """See `Store.size`."""
        with self._opened(key) as file:
            return self._size(key, file)

    def _size(self, key: str, file: Object) -> int:
        """Bytes of an object; NotFound for a file that no record has been put in yet."""
        size = self._mount.size(file) or len(self._attribute(file, _RECORD))
        if size == 0 and not self._attribute(file, _EMPTY):
            raise NotFound(f"{self.url}/{key}: only its name has been taken")
        return size

    def _attribute(self, file: Object, name: bytes) -> bytes:
        """The value of an extended attribute, b"" where there is none."""
        try:
            return self._mount.attribute(file, name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return b""

    @contextmanager
    def _opened(self, key: str) -> Iterator[Object]:
        with self._errors(check_key(key)), self._mount.lookup(self._path(key)) as file:
            if not file.is_file:
                raise NotFound(f"{self.url}/{key} is not a file")
            yield file

    # --- listing --------------------------------------------------------------------------------------------

    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        with self._errors(check_prefix(prefix)):
            return sorted(name for name in self._names(prefix) if not name.startswith(TEMPORARY_PREFIX))

    def _names(self, prefix: str) -> Sequence[str]:
        """The names in a directory that can be part of a key; none where there is no such directory."""
        with suppress(FileNotFoundError, NotADirectoryError), self._mount.lookup(self._path(prefix)) as directory:
            if directory.is_directory:
                return [name for name in self._mount.names(directory) if is_key(name)]
        return ()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`; a call to the servers for each object, so it is for collecting garbage only."""
        waiting = [check_prefix(prefix)]
        while waiting:
            base = waiting.pop()
            with self._errors(base):
                found, below = self._entries(base)
            waiting += below
            yield from found

    def _entries(self, base: str) -> tuple[Sequence[Entry], Sequence[str]]:
        """The objects in a directory, and the directories in it."""
        found: list[Entry] = []
        below: list[str] = []
        names = self._names(base)
        with suppress(FileNotFoundError), self._mount.lookup(self._path(base)) as directory:
            for name in names:
                key = f"{base}/{name}" if base else name
                with suppress(FileNotFoundError):  # deleted meanwhile
                    status = self._mount.status(directory, name)
                    item = Object(0, status.mode)
                    if item.is_directory:
                        below.append(key)
                    elif item.is_file:
                        found.append(Entry(key, status.size or self._record_size(directory, name), status.modified))
        return found, below

    def _record_size(self, directory: Object, name: str) -> int:
        """Bytes of a record whose copy is missing; 0 for what is none."""
        with self._mount.entry(directory, name) as file:
            return len(self._attribute(file, _RECORD))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn an error of DAOS into one of ours that names the object."""
        try:
            yield
        except OSError as error:
            raise translate(error, f"{self.url}/{key}" if key else self.url) from error


def _name(key: str) -> str:
    return key.rpartition("/")[2]
