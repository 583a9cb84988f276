"""Layouts on Lustre: asked for before a file has its first byte, and always read back.

    attribute   mknod, setxattr "lustre.lov", open: works for every user and without any library
    ioctl       open with O_LOV_DELAY_CREATE, LL_IOC_LOV_SETSTRIPE; refused where an administrator has locked it
    directory   the default of the directory, which new files inherit

Lustre ignores a layout that comes too late and cuts down what is too large, both without an error: so what counts
is what is read back. A way that does not work here is not tried again. When none is left, files have the default.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from ckptsvc.storage.api import Layout
from ckptsvc_drivers.linux import System
from ckptsvc_drivers.lustre_layout import (
    ALL_TARGETS,
    END,
    MAX_STRIPES,
    OVERSTRIPED,
    RAID0,
    Component,
    decode,
    difference,
    encode,
    encode_directories,
)
from ckptsvc_drivers.striping import Created, StripingOptions, plan

SUPER_MAGIC = 0x0BD00BD0
"""f_type of a Lustre mount, see statfs(2)."""

ATTRIBUTE = "lustre.lov"

SETSTRIPE, SET_DEFAULT_DIRECTORIES, COUNT_TARGETS = 0x4008669A, 0xC03066F6, 0x800866A8
"""Requests of ioctl(2): LL_IOC_LOV_SETSTRIPE, LL_IOC_LMV_SET_DEFAULT_STRIPE, LL_IOC_GETOBDCOUNT."""

DELAY_CREATE = os.O_NOCTTY | 0o20000
"""O_LOV_DELAY_CREATE: O_NOCTTY and FASYNC, with which a new file gets no objects yet."""

_HERE = os.O_RDONLY | os.O_DIRECTORY
_NAMES_PER_SERVER = 10_000
"""Files in a directory from which on its names go to several metadata servers."""

_NEVER = """EOPNOTSUPP ENOTTY ENOSYS EPERM EACCES EINVAL EBADF ERANGE E2BIG ENODATA"""
_FOR_GOOD = {getattr(errno, name) for name in _NEVER.split()}  # met once, always met


class _Refused(Exception):
    """A way to ask for a layout did not work; the file does not exist."""

    def __init__(self, error: OSError, what: str) -> None:
        super().__init__(f"{what}: {os.strerror(error.errno or errno.EIO)}")
        self.for_good = error.errno in _FOR_GOOD


class LustreStriping:
    """See `striping.Striping`.

    Args:
        system: the calls to make.
        options: what the operator wants.
        block: bytes of one transfer.
    """

    def __init__(self, system: System, options: StripingOptions, block: int) -> None:
        self._system, self._options = system, options
        self._stripe_size = options.stripe_size or block
        self._ways: tuple[Callable[[str, int, int, bytes], int], ...] = (
            self._by_attribute,
            self._by_ioctl,
            self._by_directory,
        )
        self._targets: int | None = None
        self._problems: tuple[str, ...] = ()
        self._prepared: tuple[int, int] | None = None  # the directory whose default was set last

    def create(self, name: str, flags: int, directory: int, nbytes: int, writers: int) -> Created:
        """See `Striping.create`."""
        if self._targets is None:
            self._targets = self._count(directory, servers=False)
        asked = self._plan(nbytes, writers)
        layout, problem = encode(asked), ""
        for way in self._ways:
            try:
                fd = way(name, flags, directory, layout)
            except _Refused as refused:
                problem = str(refused)
                if refused.for_good:
                    self._give_up(way, problem)
                continue
            given = self._read_back(fd, asked)
            if given is not None:
                return Created(fd, given)
            problem = "a layout was set and had no effect"
            self._give_up(way, problem)
            os.close(fd)
            os.unlink(name, dir_fd=directory)
        fd = self._system.open(name, flags, directory)
        given = self._read_back(fd, ()) or Layout(0, 0, (), "")
        return Created(fd, given._replace(problem=f"the directory's default holds: {problem or self._problems[-1]}"))

    def _plan(self, nbytes: int, writers: int) -> Sequence[Component]:
        """What to ask for."""
        pattern = RAID0 | OVERSTRIPED if self._options.overstripe else RAID0
        components: list[Component] = []
        for end, stripes in plan(nbytes, writers, self._targets or 0, self._stripe_size, self._options):
            components.append(
                Component(
                    ALL_TARGETS if stripes < 0 else min(stripes, MAX_STRIPES),
                    self._stripe_size,
                    components[-1].end if components else 0,
                    END if end is None else end,
                    RAID0 if stripes < 0 else pattern,
                    self._options.pool,
                )
            )
        return components

    def _read_back(self, fd: int, asked: Sequence[Component]) -> Layout | None:
        """Return how a file is laid out in fact; None if what was asked for had no effect."""
        try:
            given = decode(self._system.get_attribute(fd, ATTRIBUTE))
        except (OSError, ValueError) as error:
            return Layout(0, 0, (), f"the layout cannot be read back: {error}")
        problem, ineffective = difference(asked, given) if asked else ("", False)
        if ineffective:
            return None
        if problem and len(asked) == 1 and not self._targets:
            self._targets = given[0].stripes  # there are no more: the next file asks for so many
        stripes = max((each.stripes for each in given if each.stripes != ALL_TARGETS), default=0)
        targets = tuple(target for each in given for target in each.targets)
        return Layout(stripes, given[0].stripe_size, targets, problem)

    # --- three ways to ask ----------------------------------------------------------------------------------

    def _by_attribute(self, name: str, flags: int, directory: int, layout: bytes) -> int:
        try:
            self._system.mknod(name, directory)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise _Refused(error, "mknod") from error
            raise
        with _removing(name, directory):
            try:
                self._system.set_attribute_of(name, directory, ATTRIBUTE, layout)
            except OSError as error:
                raise _Refused(error, f"extended attribute {ATTRIBUTE}") from error
            return self._open_mine(name, flags & ~(os.O_CREAT | os.O_EXCL), directory)

    def _open_mine(self, name: str, flags: int, directory: int) -> int:
        """Open the file that was just made: what somebody has put in its place since then is not written to."""
        fd = self._system.open(name, flags | os.O_NONBLOCK, directory)  # a named pipe must not hang us
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_nlink == 1:
            os.set_blocking(fd, True)  # to Lustre, O_NONBLOCK means not to wait for locks
            return fd
        os.close(fd)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)

    def _by_ioctl(self, name: str, flags: int, directory: int, layout: bytes) -> int:
        fd = self._system.open(name, flags | DELAY_CREATE, directory)
        try:
            self._system.ioctl(fd, SETSTRIPE, bytearray(layout))
        except OSError as error:
            os.close(fd)
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise _Refused(error, "ioctl LL_IOC_LOV_SETSTRIPE") from error
        return fd

    def _by_directory(self, name: str, flags: int, directory: int, layout: bytes) -> int:
        status = os.fstat(directory)
        if self._prepared != (status.st_dev, status.st_ino):
            try:
                self._system.set_attribute_of(".", directory, ATTRIBUTE, layout)
            except OSError as error:
                raise _Refused(error, f"extended attribute {ATTRIBUTE} of the directory") from error
            self._prepared = status.st_dev, status.st_ino
        return self._system.open(name, flags, directory)

    def _give_up(self, way: object, why: str) -> None:
        self._ways = tuple(each for each in self._ways if each != way)
        if why not in self._problems:
            self._problems = (*self._problems, why)

    # --- directories, and what a person may know ------------------------------------------------------------

    def root_made(self, directory: int, writers: int) -> None:
        """See `Striping.root_made`: every directory below is made on a metadata server of its own."""
        servers = self._count(directory, servers=True)
        if servers < 2 or not self._options.spread_directories:
            return
        stripes = min(servers, 1 + writers // _NAMES_PER_SERVER)
        try:
            with self._opened(directory) as fd:
                self._system.ioctl(fd, SET_DEFAULT_DIRECTORIES, bytearray(encode_directories(stripes)))
        except OSError as error:
            why = f"directories are not spread over {servers} metadata servers: {os.strerror(error.errno or 0)}"
            self._problems = (*self._problems, why)

    def _count(self, directory: int, *, servers: bool) -> int:
        """Return how many metadata servers, or targets, there are; 0 if unknown."""
        answer = bytearray(struct.pack("=q", int(servers)))
        try:
            with self._opened(directory) as fd:
                self._system.ioctl(fd, COUNT_TARGETS, answer)
        except OSError:
            return 0
        (found,) = struct.unpack_from("=i", answer)
        return found if 0 < found <= 0xFFFF else 0

    @contextmanager
    def _opened(self, directory: int) -> Iterator[int]:
        """The directory, opened so that ioctl(2) takes it."""
        fd = self._system.open(".", _HERE, directory)
        try:
            yield fd
        finally:
            os.close(fd)

    def notes(self) -> Sequence[str]:
        """See `Striping.notes`."""
        if self._targets is None:
            return ("Lustre: large files are striped",)
        targets = f"{self._targets} targets, " if self._targets else ""
        return (f"Lustre: {targets}stripes of {self._stripe_size} bytes", *self._problems)


@contextmanager
def _removing(name: str, directory: int) -> Iterator[None]:
    """Unlink a file that has just been made if it does not come to be used."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=directory)
        raise
