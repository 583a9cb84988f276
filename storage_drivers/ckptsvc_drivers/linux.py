"""What Linux does and tells about files and mounts, for the drivers that go through a mount point."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import stat

from ckptsvc.errors import InvalidInput, NotFound, StoreDenied, StoreError, StoreFull, StoreUnavailable

_MAY_PASS = """ETIMEDOUT ESTALE EAGAIN EINTR EBUSY ENOMEM ENOTCONN ESHUTDOWN ECONNREFUSED ECONNRESET
ECONNABORTED EPIPE EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH EREMOTEIO ENOLINK"""

_CLASSES: dict[int, type[StoreError | InvalidInput]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.ENAMETOOLONG: InvalidInput,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StoreFull),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP), StoreDenied),
    **dict.fromkeys((getattr(errno, name) for name in _MAY_PASS.split()), StoreUnavailable),
}

_SAMPLES = 32

_HINTS = {
    errno.ENOSPC: "free some space or choose another store",
    errno.EDQUOT: "the quota is used up: free some space or choose another store",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check owner and mode of the directories",
    errno.ELOOP: "symbolic links below the store are not followed",
    errno.EFBIG: "the file system or a limit of the process (ulimit -f) allows no file of this size",
    errno.EMFILE: "too many open files: raise ulimit -n",
}


def translate(error: OSError, where: str) -> StoreError | InvalidInput:
    """Return the error of ours for an error of the operating system that met an operation on `where`."""
    number = error.errno or errno.EIO
    translated = _CLASSES.get(number, StoreError)(
        f"{where}: {os.strerror(number)} [{errno.errorcode.get(number, number)}]", hint=_HINTS.get(number, "")
    )
    if number == errno.EIO:
        translated.retryable = True  # a lost path, a rebuilding target: the next try often succeeds
    return translated


class System:
    """The calls that move and publish bytes; a test, or a driver for one file system, replaces some."""

    def open(self, name: str, flags: int, directory: int) -> int:
        """Open a file below a directory; see openat(2)."""
        return os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=directory)

    def reserve(self, fd: int, nbytes: int) -> None:
        """Reserve space for a file; see `fallocate`."""
        fallocate(fd, nbytes)

    def pwrite(self, fd: int, part: memoryview, offset: int) -> int:
        """Write to a file at an offset; see pwritev(2)."""
        return os.pwritev(fd, [part], offset)

    def pread(self, fd: int, part: memoryview, offset: int) -> int:
        """Read from a file at an offset; see preadv(2)."""
        return os.preadv(fd, [part], offset)

    def sync(self, fd: int) -> None:
        """Make a file or a directory durable; see fsync(2)."""
        os.fsync(fd)

    def link(self, source: str, target: str, directory: int) -> None:
        """Give a file a second name that must not exist; see linkat(2)."""
        os.link(source, target, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)

    def mknod(self, name: str, directory: int) -> None:
        """Make an empty file that must not exist, without opening it; see mknodat(2)."""
        os.mknod(name, stat.S_IFREG | 0o666, dir_fd=directory)

    def get_attribute(self, fd: int, name: str) -> bytes:
        """Return an extended attribute of an open file; see fgetxattr(2)."""
        return os.getxattr(fd, name)

    def set_attribute(self, fd: int, name: str, value: bytes) -> None:
        """Set an extended attribute of an open file; see fsetxattr(2)."""
        os.setxattr(fd, name, value)

    def set_attribute_of(self, file: str, directory: int, name: str, value: bytes) -> None:
        """Set an extended attribute of a file that is not open, or of the directory itself ("."); see lsetxattr(2)."""
        os.setxattr(f"/proc/self/fd/{directory}/{file}", name, value, follow_symlinks=False)

    def ioctl(self, fd: int, request: int, buffer: bytearray) -> None:
        """Ask what only some file systems know; the answer is in `buffer`; see ioctl(2)."""
        fcntl.ioctl(fd, request, buffer, True)

    def kind(self, fd: int) -> int:
        """Return the number of the kind of file system (f_type), 0 if unknown; see fstatfs(2)."""
        return _f_type(fd)


SYSTEM = System()
"""The calls as they are."""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, nbytes: int) -> None:
    """Reserve the first `nbytes` of a file and make it that long, if the file system can; see fallocate(2).

    Not `os.posix_fallocate`: where the file system cannot, glibc writes into every block instead.

    Raises:
        OSError: there is not enough space, or the file may not be that large.
    """
    if nbytes and _libc().fallocate64(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def _f_type(fd: int) -> int:
    status = (ctypes.c_long * 64)()  # struct statfs has 120 bytes; f_type is the first word
    return status[0] & 0xFFFF_FFFF if _libc().fstatfs(fd, ctypes.byref(status)) == 0 else 0


def in_page_cache(fd: int, offset: int, nbytes: int) -> bool:
    """Return whether most of a range of a file is in memory, judged by a few of its pages; see mincore(2).

    Args:
        fd: the file, open for reading.
        offset: in bytes, a multiple of the page size.
        nbytes: at least one page.
    """
    libc = _libc()
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(nbytes), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_int64(offset))
    if address is None or address == ctypes.c_void_p(-1).value:
        return False
    resident = (ctypes.c_ubyte * 1)()
    pages, found = nbytes // mmap.PAGESIZE, 0
    try:
        for sample in range(_SAMPLES):
            page = ctypes.c_void_p(address + sample * pages // _SAMPLES * mmap.PAGESIZE)
            if libc.mincore(page, ctypes.c_size_t(mmap.PAGESIZE), resident) == 0:
                found += resident[0] & 1
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    return 2 * found > _SAMPLES


class _Buffer(ctypes.Structure):
    """Py_buffer of the interpreter's interface for extensions, as far as it is looked at here."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_byte * 120))


def address_of(view: memoryview) -> int:
    """Return where a contiguous buffer, writable or not, lies in memory."""
    found = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(found), 0)
    try:
        return found.address or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))


def file_system(path: str) -> str:
    """Return the type of the file system that holds a path (or will), for example "ext4"; "" if unknown.

    From /proc/self/mountinfo, see proc_pid_mountinfo(5), because all FUSE file systems share one f_type.
    """
    path = os.path.realpath(path)
    best, kind = "", ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                point = left.split(" ")[4].replace("\\040", " ")
                inside = path == point or path.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):  # of two mounts on one point the later one is seen
                    best, kind = point, right.split(" ")[0]
    except (OSError, IndexError):
        return ""
    return kind
