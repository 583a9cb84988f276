"""Files over several targets: how a large file is to be spread, and the file systems that can be told so.

A file system with many servers spreads a file over some of them in stripes. That is decided when the file is made
and cannot be changed once it has bytes. `Striping` is the one thing the posix driver asks for a new large file.
Whatever goes wrong with a layout is remembered and told; it never fails a write.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Annotated, NamedTuple, Protocol

import msgspec

from ckptsvc.storage.api import Layout
from ckptsvc_drivers.linux import System

SMALLEST = 1 << 20
"""Bytes of the smallest file whose layout is chosen: below, the default of its directory costs nothing."""

_GIB = 1 << 30
_FEW, _MANY = 4, 8  # stripes of a file at most: by many writers, and where there are more targets than writers
_LARGEST_OBJECT = 1 << 40  # bytes of a file on one target; beyond that some targets fill up before others
_STEPS = ((_GIB // 4, 1), (4 * _GIB, 4))  # of a progressive layout: up to so many bytes, so many stripes


class StripingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How large files are spread over the targets of a file system that has several.

    Attributes:
        striping: choose the layout; without it the default of the directory holds.
        stripes: of a file; 0 chooses by its size and by how many write at once, -1 is one on every target.
        stripe_size: in bytes, a multiple of 64 KiB; 0 is the size of a transfer, so that each goes to one target.
        pool: of targets (OST pool of Lustre, data pool of CephFS), or "".
        overstripe: `stripes` may be more than there are targets (Lustre).
        progressive: few stripes for the first bytes of a file, more further on (Lustre).
        writers: how many write at once; 0 is not known. The agent says it by itself.
        spread_directories: a new run's directories go to several metadata servers (Lustre).
    """

    striping: bool = True
    stripes: Annotated[int, msgspec.Meta(ge=-1, le=2000)] = 0
    stripe_size: Annotated[int, msgspec.Meta(ge=0, le=1 << 30, multiple_of=1 << 16)] = 0
    pool: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{0,15}$")] = ""
    overstripe: bool = False
    progressive: bool = False
    writers: Annotated[int, msgspec.Meta(ge=0)] = 0
    spread_directories: bool = True


class Piece(NamedTuple):
    """The bytes of a file up to `end` (None: all that follow), over so many stripes (-1: every target)."""

    end: int | None
    stripes: int


def plan(nbytes: int, writers: int, targets: int, stripe_size: int, options: StripingOptions) -> Sequence[Piece]:
    """Choose how a file is spread.

    One file a rank: the files together load all targets, so one stripe for each GiB is enough, 4 at most, and a
    single one where there are more writers than targets. Where targets outnumber writers, up to 8.

    Args:
        nbytes: size of the file.
        writers: how many such files are written at once; 0 is not known.
        targets: how many there are; 0 is not known.
        stripe_size: in bytes.
        options: what the operator wants.
    """
    if options.progressive and not options.stripes:
        ends = [(math.ceil(end / stripe_size) * stripe_size, stripes) for end, stripes in _STEPS]
        first = [Piece(end, stripes) for end, stripes in ends if end < nbytes]
        return [*first, Piece(None, -1 if len(first) == len(ends) else ends[len(first)][1])]
    if options.stripes:
        stripes = options.stripes
    else:
        share = min(_MANY, max(1, targets // writers)) if targets and writers else _FEW
        stripes = max(1, min(math.ceil(nbytes / _GIB), share), math.ceil(nbytes / _LARGEST_OBJECT))
    if targets and not options.overstripe:
        stripes = min(stripes, targets)  # more would be cut down, silently
    return [Piece(None, stripes)]


class Created(NamedTuple):
    """A new, empty file: its descriptor, and how it is spread."""

    fd: int
    layout: Layout


class Striping(Protocol):
    """A way to lay out files on one kind of file system."""

    def create(self, name: str, flags: int, directory: int, nbytes: int, writers: int) -> Created:
        """Create a file that must not exist and is going to have `nbytes`.

        Args:
            name: of the file.
            flags: of open(2), with O_CREAT and O_EXCL.
            directory: descriptor of its directory.
            nbytes: its size, in bytes.
            writers: how many write at once; 0 is not known.

        Raises:
            OSError: as creating any file does; not because of the layout.
        """

    def root_made(self, directory: int, writers: int) -> None:
        """Hear that the root of a store has just been made: its directories can be spread."""

    def notes(self) -> Sequence[str]:
        """Return what a person may want to know."""


def aligned_block(block: int, stripe: int) -> int:
    """Return the size of a transfer, at most `block` bytes, with which none crosses the border of a stripe twice."""
    if stripe <= 0:
        return block
    return block // stripe * stripe if stripe <= block else math.gcd(block, stripe)


class CephStriping:
    """CephFS: "ceph.file.layout" of an empty file; see "File layouts" at docs.ceph.com.

    A file goes to one object after the other, each on a server of its own. So an object as long as a transfer is all
    that is needed for several threads to meet several servers. More than one stripe only where somebody asks for it:
    when a client dies, the servers make a file in several stripes longer than it was (seen with 16.2, up to the end of
    a stripe), though what was in it stays.
    """

    _ATTRIBUTE = "ceph.file.layout"
    _STRIPES_PER_OBJECT = 4
    _LARGEST_OBJECT = 128 << 20  # what the object servers take by default

    def __init__(self, system: System, options: StripingOptions, block: int) -> None:
        self._system, self._options = system, options
        self._stripe_size = min(options.stripe_size or block, self._LARGEST_OBJECT)

    def create(self, name: str, flags: int, directory: int, nbytes: int, writers: int) -> Created:
        """See `Striping.create`."""
        fd = self._system.open(name, flags, directory)
        stripes = self._options.stripes or 1
        problem = self._ask(fd, _FEW if stripes < 0 else stripes)
        try:
            given = dict(
                word.split("=", 1) for word in self._system.get_attribute(fd, self._ATTRIBUTE).decode().split()
            )
            size, count = int(given["stripe_unit"]), int(given["stripe_count"])
        except (OSError, ValueError, KeyError) as error:
            return Created(fd, Layout(0, 0, (), problem or f"the layout cannot be read back: {error}"))
        return Created(fd, Layout(count, size, (), problem))

    def _ask(self, fd: int, stripes: int) -> str:
        """Set the layout; returns why that was not possible, or ""."""
        unit = self._stripe_size
        whole = min(self._STRIPES_PER_OBJECT * unit, self._LARGEST_OBJECT // unit * unit) if stripes > 1 else unit
        wanted = f"stripe_unit={unit} stripe_count={stripes} object_size={whole}"
        if self._options.pool:
            wanted += f" pool={self._options.pool}"
        try:
            self._system.set_attribute(fd, self._ATTRIBUTE, wanted.encode())
        except OSError as error:
            return f"CephFS refuses the layout {wanted}: {os.strerror(error.errno or 0)}"
        return ""

    def root_made(self, directory: int, writers: int) -> None:
        """Directories spread by themselves."""

    def notes(self) -> Sequence[str]:
        """See `Striping.notes`."""
        return (f"large files in stripes of {self._stripe_size} bytes ({self._ATTRIBUTE})",)
