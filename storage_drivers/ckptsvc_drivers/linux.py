"""What Linux tells about a file system and its errors, for drivers that go through a mount point."""

from __future__ import annotations

import ctypes
import errno
import functools
import os

from ckptsvc.errors import InvalidInput, NotFound, StoreDenied, StoreError, StoreFull, StoreUnavailable

_CLASSES: dict[int, type[StoreError] | type[InvalidInput]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.ENAMETOOLONG: InvalidInput,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StoreFull),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP), StoreDenied),
    **dict.fromkeys(
        (errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM, errno.ENOLINK)
        + (
            errno.ENOTCONN,
            errno.ESHUTDOWN,
            errno.ECONNREFUSED,
            errno.ECONNRESET,
            errno.ECONNABORTED,
            errno.EPIPE,
        )
        + (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO),
        StoreUnavailable,
    ),
}

_HINTS = {
    errno.ENOSPC: "the file system is full: free some space or choose another store",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check owner and mode of the directories",
    errno.ELOOP: "symbolic links below the store are not followed",
    errno.EFBIG: "the file system or a limit of the process (ulimit -f) allows no file of this size",
    errno.EMFILE: "too many open files: raise ulimit -n",
}


def translate(error: OSError, where: str) -> StoreError | InvalidInput:
    """Return the error of ours for an error of the operating system that met an operation on `where`."""
    number = error.errno or 0
    found = _CLASSES.get(number, StoreError)
    translated = found(f"{where}: {os.strerror(number).lower()}", hint=_HINTS.get(number, ""))
    if number == errno.EIO:
        translated.retryable = True  # a lost path or a rebuilding target: the next try often succeeds
    return translated


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, nbytes: int) -> None:
    """Reserve the first `nbytes` of a file and make it that long, if the file system can; fallocate(2).

    Not `os.posix_fallocate`: where the file system cannot, glibc writes into every block instead.

    Raises:
        OSError: there is not enough space, or the file may not be that large.
    """
    length = ctypes.c_int64(nbytes)
    call = _libc().fallocate64 if hasattr(_libc(), "fallocate64") else _libc().fallocate
    if nbytes and call(fd, 0, ctypes.c_int64(0), length) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def file_system(path: str) -> str:
    """Return the type of the file system that holds an existing path, for example "ext4", or "" if unknown.

    Read from /proc/self/mountinfo (proc_pid_mountinfo(5)), because all FUSE file systems share one f_type.
    """
    path = os.path.realpath(path)
    best, kind = "", ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                point = left.split(" ")[4].encode(errors="surrogateescape").decode("unicode_escape")
                inside = path == point or path.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):  # of two mounts on one point the later one is seen
                    best, kind = point, right.split(" ")[0]
    except (OSError, IndexError):
        return ""
    return kind
