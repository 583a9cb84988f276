"""The directories below a store's root: opened one by one, never through a symbolic link, made durable."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from ckptsvc_drivers.linux import SYSTEM, System

# O_PATH: the way down costs look-ups, but no open at the servers of a network file system.
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROOT = _STEP & ~os.O_NOFOLLOW  # the root itself may well be a link
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class Found(NamedTuple):
    """What lies in a directory: a name; for a file its size in bytes and when it was last written."""

    name: str
    is_directory: bool
    size: int
    modified: float


@contextmanager
def parents(root: str, key: str, *, create: bool = False, system: System = SYSTEM) -> Iterator[Sequence[int]]:
    """Hold open the directories from `root` to the one that `key` lies in; yields their descriptors.

    Nobody can swap a directory for a link while we work below it, since everything goes by descriptor.

    Args:
        root: absolute path.
        key: a valid key; its last part is not looked at.
        create: make what is missing.
        system: the calls to make.

    Raises:
        OSError: ELOOP where a part is a symbolic link.
    """
    with ExitStack() as opened:
        if create:
            _make_root(root, system)
        descriptors = [os.open(root, _ROOT)]
        opened.callback(os.close, descriptors[0])
        for part in key.split("/")[:-1]:
            try:
                below = _step(part, descriptors[-1])
            except FileNotFoundError:  # looked up first: thousands of ranks must not all ask for one directory
                if not create:
                    raise
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptors[-1])
                below = _step(part, descriptors[-1])
            descriptors.append(below)
            opened.callback(os.close, descriptors[-1])
        yield descriptors


def _step(part: str, directory: int) -> int:
    try:
        return os.open(part, _STEP, dir_fd=directory)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(part, dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), part) from None
        raise


def _make_root(root: str, system: System) -> None:
    if os.path.isdir(root):
        return
    parent = os.path.dirname(root)
    if parent != root:
        _make_root(parent, system)
    with suppress(FileExistsError):
        os.mkdir(root)
    fd = os.open(parent, _ROOT)
    try:
        sync([fd], system)
    finally:
        os.close(fd)


def sync(directories: Sequence[int], system: System) -> None:
    """Make the names in these directories durable, the last directory first."""
    for directory in reversed(directories):
        fd = os.open(".", _LIST, dir_fd=directory)  # O_PATH descriptors cannot be synced
        try:
            system.sync(fd)
        except OSError as error:
            if error.errno not in _NO_SYNC:  # some FUSE file systems cannot sync a directory
                raise
        finally:
            os.close(fd)


def remove(directories: Sequence[int], key: str, system: System) -> None:
    """Unlink the file of `key` if it is there, and every directory on the way that has become empty; durably.

    Args:
        directories: what `parents` yielded.
        key: the key it was called with.
        system: the calls to make.
    """
    *parts, name = key.split("/")
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directories[-1])
    depth = len(parts)
    with suppress(OSError):  # usually ENOTEMPTY; in no case worth an error
        while depth:
            os.rmdir(parts[depth - 1], dir_fd=directories[depth - 1])
            depth -= 1
    sync(directories[depth : depth + 1], system)


def scan(directory: int, *, details: bool) -> Iterator[Found]:
    """Yield the regular files and directories in a directory; sizes and times only with `details`."""
    fd = os.open(".", _LIST, dir_fd=directory)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield Found(entry.name, True, 0, 0.0)
                elif entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        status = entry.stat(follow_symlinks=False) if details else None
                        yield Found(
                            entry.name,
                            False,
                            status.st_size if status else 0,
                            status.st_mtime if status else 0.0,
                        )
    finally:
        os.close(fd)
