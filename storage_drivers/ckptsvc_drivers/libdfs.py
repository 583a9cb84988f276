"""libdfs, DAOS' library for file systems, through ctypes: the calls the driver needs, as methods that raise OSError.

Declared as in daos_fs.h, daos_obj_class.h and daos_types.h of DAOS 2.4, 2.6 and 2.9. Every call returns 0 or a positive
errno, releases the interpreter lock while it runs, and blocks until it is done (its event is NULL). What has been
written is durable when the call returns.
"""

from __future__ import annotations

import ctypes
import os
import platform
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ckptsvc.errors import ConfigError

XATTR_MAX = 65536
"""DFS_MAX_XATTR_LEN: most bytes of an extended attribute."""

XATTR_CREATE = 1
"""Of dfs_setxattr: fail with EEXIST if the attribute exists (sys/xattr.h)."""

_ANCHOR_EOF = 3  # DAOS_ANCHOR_TYPE_EOF
_ENTRIES = 256  # names asked for with one call


class _Iov(ctypes.Structure):  # d_iov_t
    _fields_: ClassVar = [("buf", c_void_p), ("buf_len", c_size_t), ("len", c_size_t)]


class _Sgl(ctypes.Structure):  # d_sg_list_t
    _fields_: ClassVar = [("nr", c_uint32), ("nr_out", c_uint32), ("iovs", POINTER(_Iov))]


class _Anchor(ctypes.Structure):  # daos_anchor_t
    _fields_: ClassVar = [
        ("type", c_uint16),
        ("shard", c_uint16),
        ("flags", c_uint32),
        ("sub_anchors", c_uint64),
        ("buf", c_uint8 * 104),
    ]


class _Dirent(ctypes.Structure):  # struct dirent of glibc
    _fields_: ClassVar = [
        ("ino", c_uint64),
        ("off", c_int64),
        ("reclen", c_uint16),
        ("type", c_uint8),
        ("name", ctypes.c_char * 256),
    ]


class _ObjectId(ctypes.Structure):  # daos_obj_id_t
    _fields_: ClassVar = [("lo", c_uint64), ("hi", c_uint64)]


class _ObjectInfo(ctypes.Structure):  # dfs_obj_info_t
    _fields_: ClassVar = [
        ("oclass", c_uint32),
        ("chunk", c_uint64),
        ("dir_oclass", c_uint32),
        ("file_oclass", c_uint32),
        ("oid", _ObjectId),
        ("later", c_uint8 * 256),  # each version has added to it
    ]


_STAT_X86_64: list[tuple[str, Any]] = [
    *(("dev", c_uint64), ("ino", c_uint64), ("nlink", c_uint64), ("mode", c_uint32), ("ids", c_uint32 * 3)),
    *(("rdev", c_uint64), ("size", c_int64), ("blksize", c_uint64), ("blocks", c_uint64)),
    *(("times", c_int64 * 6), ("rest", c_uint64 * 3)),
]
_STAT_OTHER: list[tuple[str, Any]] = [
    *(("dev", c_uint64), ("ino", c_uint64), ("mode", c_uint32), ("ids", c_uint32 * 3), ("rdev", c_uint64)),
    *(("pad", c_uint64), ("size", c_int64), ("blksize", c_uint64), ("blocks", c_uint64)),
    *(("times", c_int64 * 6), ("rest", c_uint64)),
]


class _Stat(ctypes.Structure):  # struct stat of glibc, which differs from machine to machine
    _fields_: ClassVar = _STAT_X86_64 if platform.machine() == "x86_64" else _STAT_OTHER


_HANDLE, _OUT = c_void_p, POINTER(c_void_p)

_CALLS: dict[str, tuple[Any, ...]] = {
    "dfs_init": (),
    "dfs_fini": (),
    "dfs_connect": (c_char_p, c_char_p, c_char_p, c_int, c_void_p, _OUT),
    "dfs_disconnect": (_HANDLE,),
    "dfs_lookup": (_HANDLE, c_char_p, c_int, _OUT, POINTER(c_uint32), c_void_p),
    "dfs_lookup_rel": (_HANDLE, _HANDLE, c_char_p, c_int, _OUT, POINTER(c_uint32), c_void_p),
    "dfs_open": (_HANDLE, _HANDLE, c_char_p, c_uint32, c_int, c_uint32, c_uint64, c_char_p, _OUT),
    "dfs_release": (_HANDLE,),
    "dfs_read": (_HANDLE, _HANDLE, POINTER(_Sgl), c_uint64, POINTER(c_uint64), c_void_p),
    "dfs_write": (_HANDLE, _HANDLE, POINTER(_Sgl), c_uint64, c_void_p),
    "dfs_get_size": (_HANDLE, _HANDLE, POINTER(c_uint64)),
    "dfs_obj2id": (_HANDLE, POINTER(_ObjectId)),
    "dfs_obj_get_info": (_HANDLE, _HANDLE, POINTER(_ObjectInfo)),
    "dfs_mkdir": (_HANDLE, _HANDLE, c_char_p, c_uint32, c_uint32),
    "dfs_remove": (_HANDLE, _HANDLE, c_char_p, ctypes.c_bool, c_void_p),
    "dfs_readdir": (_HANDLE, _HANDLE, POINTER(_Anchor), POINTER(c_uint32), POINTER(_Dirent)),
    "dfs_stat": (_HANDLE, _HANDLE, c_char_p, POINTER(_Stat)),
    "dfs_setxattr": (_HANDLE, _HANDLE, c_char_p, c_void_p, c_uint64, c_int),
    "dfs_getxattr": (_HANDLE, _HANDLE, c_char_p, c_void_p, POINTER(c_uint64)),
    "dfs_suggest_oclass": (_HANDLE, c_char_p, POINTER(c_uint32)),
    "daos_oclass_name2id": (c_char_p,),  # of libdaos, which libdfs is linked with
    "daos_oclass_id2name": (c_uint32, c_char_p),
}


class Object(NamedTuple):
    """An open file or directory: its handle, and its type and permissions as in `struct stat`."""

    handle: int
    mode: int

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        """A directory."""
        return stat.S_ISDIR(self.mode)


class Status(NamedTuple):
    """What dfs_stat tells: type and permissions, size in bytes, last write in seconds since 1970."""

    mode: int
    size: int
    modified: float


class Library:
    """The loaded library.

    Args:
        path: what dlopen(3) takes.

    Raises:
        OSError: it cannot be loaded.
        ConfigError: it lacks a call.
    """

    def __init__(self, path: str) -> None:
        loaded = ctypes.CDLL(path)
        self.path = path
        for name, arguments in _CALLS.items():
            try:
                function = getattr(loaded, name)
            except AttributeError:
                raise ConfigError(f"{path} has no {name}()", hint="DAOS 2.4 or newer is needed") from None
            function.argtypes, function.restype = arguments, c_int
        self.calls: Any = loaded

    def object_class(self, name: str) -> int:
        """The number of an object class; ConfigError where this DAOS knows none of that name."""
        found: int = self.calls.daos_oclass_name2id(name.encode())
        if not found:
            hint = "`daos object list-class` names those there are, for example SX, EC_8P2GX or RP_2G1"
            raise ConfigError(f"DAOS knows no object class {name!r}", hint=hint)
        return found

    def class_name(self, number: int) -> str:
        """The name of an object class."""
        name = ctypes.create_string_buffer(128)  # MAX_OBJ_CLASS_NAME_LEN is 64
        return name.value.decode() if self.calls.daos_oclass_id2name(number, name) == 0 else f"class {number}"


class Mount:
    """A container that is open as a file system: libdfs' calls on it. All raise OSError with the errno they return.

    Args:
        library: libdfs.
        pool: label of the pool.
        container: label of the container.
        system: name of the DAOS system, or "".
        flags: os.O_RDWR or os.O_RDONLY.
    """

    def __init__(self, library: Library, pool: str, container: str, system: str, flags: int) -> None:
        self.library, self._calls = library, library.calls
        handle = c_void_p()
        name = system.encode() or None
        check(self._calls.dfs_connect(pool.encode(), name, container.encode(), flags, None, byref(handle)))
        self._dfs = handle

    def close(self) -> None:
        """Disconnect."""
        check(self._calls.dfs_disconnect(self._dfs))

    @contextmanager
    def lookup(self, path: str, flags: int = os.O_RDONLY) -> Iterator[Object]:
        """Open what an absolute path leads to."""
        handle, mode = c_void_p(), c_uint32()
        check(self._calls.dfs_lookup(self._dfs, path.encode(), flags, byref(handle), byref(mode), None))
        with self._released(handle, mode.value) as found:
            yield found

    @contextmanager
    def entry(self, directory: Object, name: str) -> Iterator[Object]:
        """Open an entry of a directory for reading; a symbolic link is opened itself."""
        handle, mode = c_void_p(), c_uint32()
        where = self._dfs, directory.handle, name.encode()
        check(self._calls.dfs_lookup_rel(*where, os.O_RDONLY, byref(handle), byref(mode), None))
        with self._released(handle, mode.value) as found:
            yield found

    @contextmanager
    def create(self, directory: Object, name: str, object_class: int, chunk: int, *, new: bool) -> Iterator[Object]:
        """Open a file for reading and writing, made if it is not there.

        Args:
            directory: where.
            name: of the file.
            object_class: for a new file; 0 is the directory's.
            chunk: bytes in a chunk of a new file; 0 is the directory's.
            new: EEXIST if it is there.
        """
        handle, mode = c_void_p(), stat.S_IFREG | 0o644
        flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0)
        where = self._dfs, directory.handle, name.encode()
        check(self._calls.dfs_open(*where, mode, flags, object_class, chunk, None, byref(handle)))
        with self._released(handle, mode) as made:
            yield made

    @contextmanager
    def _released(self, handle: c_void_p, mode: int) -> Iterator[Object]:
        try:
            yield Object(handle.value or 0, mode)
        finally:
            self._calls.dfs_release(handle)  # frees the handle whatever it returns

    def mkdir(self, directory: Object, name: str) -> None:
        """Make a directory; EEXIST where the name is taken."""
        check(self._calls.dfs_mkdir(self._dfs, directory.handle, name.encode(), 0o755, 0))

    def remove(self, directory: Object, name: str) -> None:
        """Remove a file or an empty directory; ENOTEMPTY."""
        check(self._calls.dfs_remove(self._dfs, directory.handle, name.encode(), False, None))

    def write(self, file: Object, part: memoryview, offset: int) -> None:
        """Write all of `part` at an offset."""
        check(self._calls.dfs_write(self._dfs, file.handle, byref(_sgl(part)), offset, None))

    def read(self, file: Object, part: memoryview, offset: int) -> int:
        """Read into `part` from an offset on; returns the bytes there were."""
        moved = c_uint64()
        check(self._calls.dfs_read(self._dfs, file.handle, byref(_sgl(part)), offset, byref(moved), None))
        return moved.value

    def size(self, file: Object) -> int:
        """Bytes of a file."""
        found = c_uint64()
        check(self._calls.dfs_get_size(self._dfs, file.handle, byref(found)))
        return found.value

    def identity(self, item: Object) -> tuple[int, int]:
        """What tells an object from all others that this container has or had."""
        found = _ObjectId()
        check(self._calls.dfs_obj2id(item.handle, byref(found)))
        return found.lo, found.hi

    def layout(self, file: Object) -> tuple[str, int]:
        """The object class of a file, by its name, and its chunk size in bytes."""
        found = _ObjectInfo()
        check(self._calls.dfs_obj_get_info(self._dfs, file.handle, byref(found)))
        return self.library.class_name(found.oclass), int(found.chunk)

    def names(self, directory: Object) -> Iterator[str]:
        """Names in a directory, in no order; undecodable bytes as lone surrogates."""
        anchor, entries = _Anchor(), (_Dirent * _ENTRIES)()
        while anchor.type != _ANCHOR_EOF:
            count = c_uint32(_ENTRIES)
            check(self._calls.dfs_readdir(self._dfs, directory.handle, byref(anchor), byref(count), entries))
            for number in range(min(count.value, _ENTRIES)):
                yield entries[number].name.decode("utf-8", "surrogateescape")

    def status(self, directory: Object, name: str) -> Status:
        """Stat an entry of a directory; a symbolic link itself."""
        found = _Stat()
        check(self._calls.dfs_stat(self._dfs, directory.handle, name.encode(), byref(found)))
        return Status(found.mode, found.size, found.times[2] + found.times[3] / 1e9)

    def set_attribute(self, item: Object, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, in one step; see dfs_setxattr for the flags."""
        check(self._calls.dfs_setxattr(self._dfs, item.handle, name, value, len(value), flags))

    def attribute(self, item: Object, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA where there is none."""
        value, size = ctypes.create_string_buffer(XATTR_MAX), c_uint64(XATTR_MAX)
        check(self._calls.dfs_getxattr(self._dfs, item.handle, name, value, byref(size)))
        return value.raw[: min(size.value, XATTR_MAX)]

    def suggested_class(self, hint: str) -> int:
        """The object class for "file:max" or "file:single" that keeps the container's redundancy."""
        found = c_uint32()
        check(self._calls.dfs_suggest_oclass(self._dfs, hint.encode(), byref(found)))
        return found.value


def check(number: int) -> None:
    """Raise the OSError of a call that returned an errno."""
    if number:
        raise OSError(number, os.strerror(number))


def _sgl(part: memoryview) -> _Sgl:
    """A scatter list of one range of memory, which must stay as long as the list."""
    address: int = np.frombuffer(part, np.uint8).__array_interface__["data"][0]
    return _Sgl(1, 0, ctypes.pointer(_Iov(address, part.nbytes, part.nbytes)))


def size_of_structures() -> Sequence[int]:
    """Bytes of stat, dirent, anchor, scatter list and object info, to be compared with what a C compiler says."""
    return [*(ctypes.sizeof(each) for each in (_Stat, _Dirent, _Anchor, _Sgl)), _ObjectInfo.later.offset]
