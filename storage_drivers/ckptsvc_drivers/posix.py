"""`file://`: a directory on a local disk or on any mounted parallel file system.

Large objects go from the caller's memory to the device by direct I/O, in blocks written by a few threads into
space reserved beforehand: as fast as the device, at a twentieth of the CPU time of buffered writes. Where a
file system refuses direct I/O, at open or only at a write, the same blocks go through the page cache instead.

Only calls that work on every file system met are used: no O_TMPFILE, no renameat2, no posix_fallocate.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Annotated

import msgspec

from ckptsvc.errors import ConfigError, Damaged, InvalidInput, NotFound, StoreError
from ckptsvc.storage.api import READ_LIMIT, TEMPORARY_PREFIX, Capabilities, Entry, Layout, Progress
from ckptsvc.storage.arguments import (
    check_key,
    check_prefix,
    check_record,
    check_size,
    check_target,
    is_key,
)
from ckptsvc_drivers import tree
from ckptsvc_drivers.linux import SYSTEM, System, address_of, file_system, in_page_cache, translate
from ckptsvc_drivers.lustre_striping import SUPER_MAGIC, LustreStriping
from ckptsvc_drivers.striping import SMALLEST, CephStriping, Striping, StripingOptions, aligned_block
from ckptsvc_drivers.transfer import PAGE, File, Transfer

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: a named pipe must not hang us
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay")
_CEPH = ("ceph", "fuse.ceph-fuse", "fuse.ceph")
_CLAIMS = "no hard links: a new record may be seen empty for an instant"
_DIRECT_READ = 1 << 20  # bytes; shorter reads are left to the page cache and its read-ahead
_LAYOUTS = 1000  # remembered until somebody asks
_ATTEMPTS = 100  # to create a file in a directory that others remove because it has just become empty


class Options(StripingOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a `file://` store, beside those of striping.

    Attributes:
        direct: try direct I/O.
        threads: threads that transfer, shared by all calls.
        block: bytes per transfer, a multiple of 64 KiB.
    """

    direct: bool = True
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    block: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 30, multiple_of=1 << 16)] = 8 << 20


DEFAULTS = Options()


OPTIONS = Options
"""What `[store.options.SCHEME]` may set."""


def connect(url: str, options: Mapping[str, object]) -> PosixStore:
    """Return the store at `file:///absolute/path`; the directory is made by the first write.

    The path is taken as it stands: no percent escapes, no "~".

    Raises:
        ConfigError: the URL names a host or no absolute path, or an option is unknown or out of range.
    """
    return PosixStore(*parse(url, options))


def parse(url: str, options: Mapping[str, object], scheme: str = "file") -> tuple[str, Options]:
    """Return the path and the options; see `connect`."""
    path = url.removeprefix(f"{scheme}://")
    if path == url or not path.startswith("/") or "\0" in path:
        raise ConfigError(f"{url!r} is not the address of a directory", hint=f"write {scheme}:///absolute/path")
    try:
        return path, msgspec.convert(dict(options), Options, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of {url}: {error}") from error


class PosixStore:
    """Objects as files below one directory; symbolic links below it are not followed.

    Args:
        root: absolute path; need not exist.
        options: settings.
        system: the calls to make.

    Attributes:
        writers: how many processes write at the same time, 0 if unknown: large files are striped accordingly.
    """

    scheme = "file"

    def __init__(self, root: str, options: Options = DEFAULTS, system: System = SYSTEM) -> None:
        self._root = "/" + os.path.normpath(root).lstrip("/")
        self._options = options
        self._direct = options.direct
        self._system = system
        self._claims = False  # records are published by `_claim`
        self._transfer = Transfer(self._system, options.threads, options.block)
        self.writers = 0
        self._striping: Striping | None = None
        self._looked = False  # which striping there is
        self._layouts: dict[str, Layout] = {}

    @property
    def url(self) -> str:
        """The scheme and the path."""
        return f"{self.scheme}://{self._root}"

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`; direct I/O is tried with one page in a temporary file."""
        kind = file_system(self._root)
        direct, notes = self._try()
        return Capabilities(
            exclusive_create=True,
            direct_io=direct,
            fork_safe=True,
            local=kind in _LOCAL,
            notes=(f"file system: {kind or 'unknown'}", *notes, *(self._striping.notes() if self._striping else ())),
        )

    def _try(self) -> tuple[str, Sequence[str]]:
        """Write one page and one record; returns why not by direct I/O, or "", and what else was met."""
        if not os.path.isdir(self._root):
            return "not known before the first write makes the directory", ()
        key = TEMPORARY_PREFIX + secrets.token_hex(8)
        try:
            with mmap.mmap(-1, PAGE) as page, memoryview(page) as data:
                refused = self._write(key, data, None, None)
            self.delete(key)
            self.put_if_absent(key, b"1")
            self.delete(key)
        except StoreError as error:
            return "not known: nothing can be written", (str(error),)
        if not self._direct:
            refused = "switched off by the option `direct`"
        return refused, (_CLAIMS,) if self._claims else ()

    def close(self) -> None:
        """End the transferring threads."""
        self._transfer.close()

    # --- writing --------------------------------------------------------------------------------------------

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`."""
        with check_size(data, size) as view:
            self._write(check_key(key), view, ready, progress)

    def _write(self, key: str, view: memoryview, ready: Progress | None, progress: Progress | None) -> str:
        """Write an object; returns why direct I/O was not used, or ""."""
        name = _name(key)
        # Unaligned memory is refused only later by some, by GlusterFS even after it has said that all is written.
        direct = self._direct and address_of(view) % PAGE == 0
        with self._errors(key), self._creating(key, name, direct=direct, nbytes=len(view)) as created:
            directories, file = created
            try:
                self._system.reserve(file.fd, -(-len(view) // PAGE) * PAGE)
                self._transfer.write(file, view, ready, progress)
                os.ftruncate(file.fd, len(view))
                self._system.sync(file.fd)
                self._sync(key, directories)
            except BaseException:
                with suppress(OSError):  # so that a full disk is not left full of it
                    _unlink_if(name, file, directories[-1])
                raise
            return file.refused

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`: a synced temporary file gets the name by link(2), never replacing."""
        check_record(data)
        name, temporary = _name(check_key(key)), TEMPORARY_PREFIX + secrets.token_hex(8)
        with self._errors(key), self._creating(key, temporary, direct=False) as (directories, file):
            try:
                self._transfer.write_all(file, memoryview(data), 0)
                self._system.sync(file.fd)
                won = self._publish(temporary, name, directories[-1])
            finally:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=directories[-1])
            # Whoever won: what we report as there is there after a power failure too.
            self._sync(key, directories)
            return won

    def _sync(self, key: str, directories: Sequence[int]) -> None:
        """Make the names on the way to `key` durable."""
        try:
            tree.sync(directories, self._system)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # One of them was removed, with the object, or its server knows it by another handle by now: look again.
            with suppress(FileNotFoundError), tree.parents(self._root, key) as found:
                tree.sync(found, self._system)

    def _publish(self, temporary: str, name: str, directory: int) -> bool:
        try:
            self._system.link(temporary, name, directory)
        except FileExistsError:
            # A network file system may have done it and lost the answer: then the file has two names by now.
            return os.stat(temporary, dir_fd=directory, follow_symlinks=False).st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._claims = True
            return self._claim(temporary, name, directory)
        return True

    def _claim(self, temporary: str, name: str, directory: int) -> bool:
        """Where there are no hard links: create `name` exclusively, empty, and rename `temporary` over it."""
        try:
            os.close(self._system.open(name, _CREATE, directory))
        except FileExistsError:
            return False
        try:
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            with suppress(OSError):
                if os.stat(name, dir_fd=directory, follow_symlinks=False).st_size == 0:  # not renamed after all
                    os.unlink(name, dir_fd=directory)
            raise
        return True

    @contextmanager
    def _creating(self, key: str, name: str, *, direct: bool, nbytes: int = 0) -> Iterator[tuple[Sequence[int], File]]:
        """Open a new file `name` beside `key`; yields the directories from the root on, and the file.

        A file of that name is unlinked before, not truncated: a writer that hung and wakes up late then writes
        into nothing. Of `nbytes` that are large enough the file gets a layout.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            with ExitStack() as opened:
                try:
                    made = not self._looked and not os.path.isdir(self._root)
                    parents = tree.parents(self._root, key, create=True, system=self._system)
                    directories = opened.enter_context(parents)
                    self._look(directories[0], made=made)
                    try:
                        file = self._open_new(key, name, directories[-1], direct=direct, nbytes=nbytes)
                    except FileExistsError:  # rare: the names of shards are new
                        os.unlink(name, dir_fd=directories[-1])
                        file = self._open_new(key, name, directories[-1], direct=direct, nbytes=nbytes)
                except (FileNotFoundError, FileExistsError):
                    if attempt == _ATTEMPTS:
                        raise
                    continue  # a directory has been removed, or another writer was faster
                opened.callback(os.close, file.fd)
                yield directories, file
                return

    def _open_new(self, key: str, name: str, directory: int, *, direct: bool, nbytes: int) -> File:
        refused = ""
        if direct:
            try:
                return self._open_as(key, name, _CREATE | os.O_DIRECT, directory, nbytes)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            refused = "the file system refuses it when a file is opened"
            with suppress(FileNotFoundError):  # some create the file before they refuse
                os.unlink(name, dir_fd=directory)
        file = self._open_as(key, name, _CREATE, directory, nbytes)
        file.refused = refused
        return file

    def _open_as(self, key: str, name: str, flags: int, directory: int, nbytes: int) -> File:
        direct = bool(flags & os.O_DIRECT)
        if self._striping is None or nbytes < SMALLEST:
            return File(self._system.open(name, flags, directory), direct=direct)
        fd, layout = self._striping.create(name, flags, directory, nbytes, self._options.writers or self.writers)
        self._layouts[key] = layout
        for old in list(self._layouts)[:-_LAYOUTS]:
            self._layouts.pop(old, None)
        return File(fd, direct=direct, block=aligned_block(self._options.block, layout.stripe_size))

    def layout(self, key: str) -> Layout | None:
        """See `Spreading.layout`."""
        return self._layouts.pop(key, None)

    def _look(self, root: int, *, made: bool) -> None:
        """Find out once what the file system can be told about the layout of files."""
        if self._looked:
            return
        if self._options.striping:
            if self._system.kind(root) == SUPER_MAGIC:
                self._striping = LustreStriping(self._system, self._options, self._options.block)
            elif file_system(self._root) in _CEPH:
                self._striping = CephStriping(self._system, self._options, self._options.block)
        self._looked = True
        if made and self._striping is not None:
            self._striping.root_made(root, self._options.writers or self.writers)

    def delete(self, key: str) -> None:
        """See `Store.delete`; directories that have become empty go as well."""
        with (
            self._errors(check_key(key)),
            suppress(FileNotFoundError),
            tree.parents(self._root, key) as found,
        ):
            tree.remove(found, key, self._system)

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        with self._opened(key) as (file, size):
            if size > limit:
                raise InvalidInput(f"{self.url}/{key} has {size} bytes, more than the {limit} allowed")
            buffer = bytearray(size)
            with memoryview(buffer) as view:
                self._transfer.read(file, 0, view)
            return bytes(buffer)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`.

        What is in the page cache is copied from there. Otherwise a range of 1 MiB or more is read by direct
        I/O, provided that `offset` and the address of `buffer` are multiples of the page size.
        """
        with check_target(buffer, offset) as view, self._opened(key) as (file, _):
            aligned = len(view) >= _DIRECT_READ and offset % PAGE == 0 and address_of(view) % PAGE == 0
            if self._direct and aligned and not in_page_cache(file.fd, offset, len(view)):
                with suppress(OSError):
                    file.set_direct(True)
            self._transfer.read(file, offset, view)

    def size(self, key: str) -> int:
        """See `Store.size`."""
        with self._opened(key) as (_, size):
            return size

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[File, int]]:
        """Open an object; yields it and its size in bytes."""
        with self._errors(check_key(key)), tree.parents(self._root, key) as directories:
            file = File(self._system.open(_name(key), _READ, directories[-1]))
            try:
                status = os.fstat(file.fd)
                if not stat.S_ISREG(status.st_mode):
                    raise NotFound(f"{self.url}/{key} is not a file")
                # To Lustre, O_NONBLOCK means not to wait for a lock that another node holds: EAGAIN.
                os.set_blocking(file.fd, True)
                yield file, status.st_size
            except EOFError as error:
                raise Damaged(f"{self.url}/{key} ends at byte {error}, before what is wanted") from error
            finally:
                os.close(file.fd)

    # --- listing --------------------------------------------------------------------------------------------

    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        found = self._scan(check_prefix(prefix), details=False)
        return sorted(each.name for each in found if not each.name.startswith(TEMPORARY_PREFIX))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`."""
        return self._below(check_prefix(prefix))

    def _below(self, prefix: str) -> Iterator[Entry]:
        waiting = [prefix]
        while waiting:
            base = waiting.pop()
            for each in self._scan(base, details=True):
                key = f"{base}/{each.name}" if base else each.name
                if each.is_directory:
                    waiting.append(key)
                else:
                    yield Entry(key, each.size, each.modified)

    def _scan(self, prefix: str, *, details: bool) -> Sequence[tree.Found]:
        with (
            self._errors(prefix),
            suppress(FileNotFoundError, NotADirectoryError),
            tree.parents(self._root, f"{prefix}/" if prefix else "") as directories,
        ):
            return [each for each in tree.scan(directories[-1], details=details) if is_key(each.name)]
        return ()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn an error of the operating system into one of ours that names the object."""
        try:
            yield
        except OSError as error:
            raise translate(error, f"{self.url}/{key}" if key else self.url) from error


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _unlink_if(name: str, file: File, directory: int) -> None:
    """Unlink `name` if it is this file, and not what a later writer has put in its place."""
    if os.path.samestat(os.stat(name, dir_fd=directory, follow_symlinks=False), os.fstat(file.fd)):
        os.unlink(name, dir_fd=directory)
