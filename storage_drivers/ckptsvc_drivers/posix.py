"""`file://`: a directory on a local disk or on any mounted parallel file system.

Large objects go from the caller's memory to the device by direct I/O, in blocks written by a few threads into
space reserved beforehand: as fast as the device, at a twentieth of the CPU time of buffered writes. Where a
file system refuses direct I/O, at open or only at a write, the same blocks go through the page cache instead.

Only calls that work on every file system met are used: no O_TMPFILE, no renameat2, no posix_fallocate.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ckptsvc.errors import ConfigError, Damaged, InvalidInput, NotFound, StoreError
from ckptsvc.storage.api import READ_LIMIT, TEMPORARY_PREFIX, Capabilities, Entry
from ckptsvc.storage.arguments import (
    check_key,
    check_prefix,
    check_record,
    check_size,
    check_target,
    is_key,
)
from ckptsvc_drivers import tree
from ckptsvc_drivers.linux import fallocate, file_system, translate

PAGE = mmap.PAGESIZE
"""Alignment of direct I/O in memory, offset and length; most file systems ask for 512, none met for more."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
)  # O_NONBLOCK: a named pipe must not hang us
_READ_BLOCK = 64 << 20  # bytes; signals are looked at between two blocks
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay")
_ATTEMPTS = 8  # to create a file in a directory that others remove because it has just become empty


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a `file://` store.

    Attributes:
        direct: try direct I/O.
        threads: threads that write, shared by all calls of `write`.
        block: bytes per write, a multiple of 64 KiB.
    """

    direct: bool = True
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    block: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 30, multiple_of=1 << 16)] = 8 << 20


DEFAULTS = Options()


def connect(url: str, options: Mapping[str, object]) -> PosixStore:
    """Return the store at `file:///absolute/path`; the directory is made by the first write.

    The path is taken as it stands: no percent escapes, no "~".

    Raises:
        ConfigError: the URL names a host or no absolute path, or an option is unknown or out of range.
    """
    path = url.removeprefix("file://")
    if path == url or not path.startswith("/") or "\0" in path:
        raise ConfigError(f"{url!r} is not the address of a directory", hint="write file:///absolute/path")
    try:
        return PosixStore(path, msgspec.convert(dict(options), Options, strict=False))
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of {url}: {error}") from error


@dataclass(slots=True)
class _Output:
    """A file that is being written."""

    fd: int
    direct: bool


class PosixStore:
    """Objects as files below one directory; symbolic links below it are not followed.

    A subclass for a particular file system, or a test, overrides the calls in the last section.
    """

    def __init__(self, root: str, options: Options = DEFAULTS) -> None:
        self._root = "/" + os.path.normpath(root).lstrip("/")
        self._options = options
        self._buffered = ""  # why the last large write went through the page cache
        self._pool, self._pid = self._new_pool(), os.getpid()

    @property
    def url(self) -> str:
        """`file://` and the path."""
        return f"file://{self._root}"

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`; direct I/O is tried with one page in a temporary file."""
        if not os.path.isdir(self._root):
            direct, kind = "not known: the directory is made by the first write", ""
        else:
            direct, kind = self._try_direct(), file_system(self._root)
        return Capabilities(
            exclusive_create=True,
            direct_io=direct,
            fork_safe=True,
            local=kind in _LOCAL,
            notes=(f"file system: {kind}",) if kind else (),
        )

    def close(self) -> None:
        """End the writing threads."""
        if self._pid == os.getpid():
            self._pool.shutdown()

    # --- large objects --------------------------------------------------------------------------------------

    def write(
        self, key: str, data: memoryview, size: int, *, progress: Callable[[int], None] | None = None
    ) -> None:
        """See `Store.write`."""
        name, view = _name(check_key(key)), check_size(data, size)
        with (
            self._errors(key),
            self._creating(key, name, direct=self._options.direct) as (directories, output),
        ):
            try:
                self._reserve(output.fd, -(-size // PAGE) * PAGE)
                self._write_blocks(output, view, progress)
                os.ftruncate(output.fd, size)
                self._sync(output.fd)
            except BaseException:
                with suppress(OSError):  # so that a full disk is not left full of it
                    os.unlink(name, dir_fd=directories[-1])
                raise
            tree.sync(directories)

    def _write_blocks(
        self, output: _Output, view: memoryview, progress: Callable[[int], None] | None
    ) -> None:
        """Write all of `view` from offset 0 on, the last page padded with zeros."""
        whole = len(view) // PAGE * PAGE
        self._spread(
            lambda start, stop: self._write_all(output, view[start:stop], start),
            whole,
            self._options.block,
            progress,
        )
        if rest := len(view) - whole:
            with mmap.mmap(-1, PAGE) as page, memoryview(page) as padded:
                padded[:rest] = view[whole:]
                self._write_all(output, padded, whole)
            if progress is not None:
                progress(rest)

    def _spread(
        self, work: Callable[[int, int], int], nbytes: int, step: int, progress: Callable[[int], None] | None
    ) -> None:
        """Call `work(start, stop)` for every step of `nbytes` in the threads, and `progress` with what it returns.

        When this returns or raises, no call is running or waiting any more: the memory is the caller's again.
        """
        threads = self._threads()
        pending: deque[Future[int]] = deque()

        def finish(*, down_to: int) -> None:
            while len(pending) > down_to:
                done = pending.popleft().result()
                if progress is not None:
                    progress(done)

        try:
            for start in range(0, nbytes, step):
                # A few steps ahead and no more, so that several calls take turns in the threads they share.
                finish(down_to=2 * self._options.threads - 1)
                pending.append(threads.submit(work, start, min(start + step, nbytes)))
            finish(down_to=0)
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def _write_all(self, output: _Output, part: memoryview, offset: int) -> int:
        """Write `part` at `offset`, by direct I/O as long as the file system takes it; returns its length."""
        done = 0
        while done < len(part):
            direct = output.direct
            try:
                done += self._pwrite(output.fd, part[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._buffered = "the file system refuses it when a block is written"
                output.direct = False
                flags = fcntl.fcntl(output.fd, fcntl.F_GETFL)
                fcntl.fcntl(output.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return done

    def _try_direct(self) -> str:
        """Write one page to a temporary file; returns why that does not work by direct I/O, or ""."""
        if not self._options.direct:
            return "switched off by the option `direct`"
        self._buffered = ""
        key = TEMPORARY_PREFIX + secrets.token_hex(8)
        try:
            with mmap.mmap(-1, PAGE) as page, memoryview(page) as data:
                self.write(key, data, PAGE)
            self.delete(key)
        except StoreError as error:
            return f"not known: {error}"
        return self._buffered

    def _threads(self) -> ThreadPoolExecutor:
        if self._pid != os.getpid():  # a forked child has none of the parent's threads
            self._pool, self._pid = self._new_pool(), os.getpid()
        return self._pool

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._options.threads, thread_name_prefix="ckptsvc-posix")

    # --- small objects --------------------------------------------------------------------------------------

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`: a synced temporary file gets the name by link(2), never replacing."""
        check_record(data)
        name, temporary = _name(check_key(key)), TEMPORARY_PREFIX + secrets.token_hex(8)
        with self._errors(key), self._creating(key, temporary, direct=False) as (directories, output):
            try:
                self._write_all(output, memoryview(data), 0)
                self._sync(output.fd)
                won = self._publish(temporary, name, directories[-1])
            finally:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=directories[-1])
            tree.sync(directories)  # whoever won: what we report as there is there after a power failure too
            return won

    def _publish(self, temporary: str, name: str, directory: int) -> bool:
        try:
            self._link(temporary, name, directory)
        except FileExistsError:
            # A network file system may have done it and lost the answer: then the file has two names by now.
            return os.stat(temporary, dir_fd=directory, follow_symlinks=False).st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._claim(temporary, name, directory)
        return True

    def _claim(self, temporary: str, name: str, directory: int) -> bool:
        """Where there are no hard links: create `name` exclusively, empty, and rename `temporary` over it."""
        try:
            os.close(self._open(name, _CREATE, directory))
        except FileExistsError:
            return False
        try:
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        return True

    def delete(self, key: str) -> None:
        """See `Store.delete`; directories that have become empty go as well."""
        with (
            self._errors(check_key(key)),
            suppress(FileNotFoundError),
            tree.parents(self._root, key) as found,
        ):
            tree.remove(found, key)

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        with self._opened(key) as (fd, size):
            if size > limit:
                raise InvalidInput(f"{self.url}/{key} has {size} bytes, more than the {limit} allowed")
            buffer = bytearray(size)
            self._fill(key, fd, 0, memoryview(buffer))
            return bytes(buffer)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`.

        What is in the page cache is copied from there. The rest, if it is large and `offset` and the buffer's
        address are multiples of the page size, is read by direct I/O, else through the page cache.
        """
        view = check_target(buffer, offset)
        with self._opened(key) as (fd, _):
            if len(view) < _LARGE:
                self._fill(key, fd, offset, view)
                return
            whole = 0
            if self._options.direct and offset % PAGE == 0 and address_of(view) % PAGE == 0:
                ...
    def size(self, key: str) -> int:
        """See `Store.size`."""
        with self._opened(key) as (_, size):
            return size

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        """Open an object; yields its descriptor and its size in bytes."""
        with self._errors(check_key(key)), tree.parents(self._root, key) as directories:
            fd = self._open(_name(key), _READ, directories[-1])
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise NotFound(f"{self.url}/{key} is not a file")
                yield fd, status.st_size
            finally:
                os.close(fd)

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

    # --- files ----------------------------------------------------------------------------------------------

    @contextmanager
    def _creating(self, key: str, name: str, *, direct: bool) -> Iterator[tuple[Sequence[int], _Output]]:
        """Open a new file `name` beside `key`; yields the directories from the root on, and the file.

        A file of that name is unlinked first, not truncated: a writer that hung and wakes up late then writes
        into nothing.
        """
        for _ in range(_ATTEMPTS):
            with ExitStack() as opened:
                try:
                    directories = opened.enter_context(tree.parents(self._root, key, create=True))
                    output = self._open_new(name, directories[-1], direct=direct)
                except (FileNotFoundError, FileExistsError):
                    continue  # a directory has been removed, or another writer was faster
                opened.callback(os.close, output.fd)
                yield directories, output
                return
        raise StoreError(f"{self.url}/{key} cannot be created: others keep removing or making it")

    def _open_new(self, name: str, directory: int, *, direct: bool) -> _Output:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        if direct:
            try:
                return _Output(self._open(name, _CREATE | os.O_DIRECT, directory), direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._buffered = "the file system refuses it when a file is opened"
            with suppress(FileNotFoundError):  # some create the file before they refuse
                os.unlink(name, dir_fd=directory)
        return _Output(self._open(name, _CREATE, directory), direct=False)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn an error of the operating system into one of ours that names the object."""
        try:
            yield
        except OSError as error:
            raise translate(error, f"{self.url}/{key}" if key else self.url) from error

    # --- one system call each -------------------------------------------------------------------------------

    def _open(self, name: str, flags: int, directory: int) -> int:
        return os.open(name, flags, 0o666, dir_fd=directory)

    def _reserve(self, fd: int, nbytes: int) -> None:
        fallocate(fd, nbytes)

    def _pwrite(self, fd: int, part: memoryview, offset: int) -> int:
        return os.pwritev(fd, [part], offset)

    def _pread(self, fd: int, part: memoryview, offset: int) -> int:
        return os.preadv(fd, [part], offset)

    def _sync(self, fd: int) -> None:
        os.fsync(fd)

    def _link(self, source: str, target: str, directory: int) -> None:
        os.link(source, target, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)


def _name(key: str) -> str:
    return key.rpartition("/")[2]
