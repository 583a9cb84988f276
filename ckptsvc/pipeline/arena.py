"""Arenas: shared-memory files that a rank copies its snapshot into and that are written to the store as they are.

An arena is a file of whole pages in a directory of the agent (on tmpfs). Its pages are allocated when it is made, so
that running out of memory is an error here and never a SIGBUS in the training process, and so that the copy in the
training loop never pays for fresh pages (measured: 1.6 GB/s into fresh pages, 17 into touched ones). Beside a filled
arena lies a small JSON file; from these two a restarted agent knows every snapshot it held.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import mmap
import os
import secrets
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ckptsvc.config import private_directory
from ckptsvc.errors import ArenaExhausted, InvalidInput, RunBusy

HUGE_PAGE = 2 << 20
"""Sizes of arenas are multiples of this many bytes."""

TAIL = mmap.PAGESIZE
"""Bytes at the end of an arena that no snapshot uses; the last eight say how many bytes of the snapshot that is being
copied in are final (see `filled_word`)."""

WAITING = "an order to copy"
"""What an arena that a rank has filled for its twin waits for (tiers.twins). It may be taken for anything before."""


class State(enum.Enum):
    """What an arena is doing."""

    FREE = "free"
    FILLING = "filling"  # a rank copies into it
    STAGED = "staged"  # a whole snapshot, being saved
    KEPT = "kept"  # its save has ended; the snapshot stays as the memory tier until the arena is needed


class Kept(msgspec.Struct, frozen=True):
    """A shard that a part of a parity was made with."""

    rank: int
    nbytes: int
    digests: bytes


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """What a part of a group's parity belongs to: the nodes of the group, in order, and what each of them held."""

    losses: int
    digests: bytes
    members: list[tuple[str, list[Kept]]]


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What a filled arena holds; the JSON file beside it.

    A copy of another node's snapshot has `guest` set; a part of a parity (its rank is -1) has `parity` too.
    """

    job: str
    store: str
    coordinator: str
    attempt: int
    epoch: int
    step: int
    rank: int
    world_size: int
    nbytes: int
    extent: int
    aliases: dict[str, str]
    metrics: dict[str, str] = {}
    kept: bool = False
    guest: bool = False
    parity: Parity | None = None


class _Owner(msgspec.Struct, frozen=True):
    """Whose free arena it is, in a file beside it from one agent's end to the start of the next."""

    job: str
    rank: int


_OWNER_SUFFIX = ".free"


@dataclass(slots=True)
class Arena:
    """One arena; `label` is set while it is STAGED or KEPT, `epoch` from when it is acquired on.

    `capacity` is what a snapshot may take.
    """

    name: str
    path: Path
    capacity: int
    job: str
    rank: int
    state: State = State.FREE
    step: int = -1
    epoch: int = 0
    label: Label | None = None
    holder: str = ""  # who fills it
    since: float = 0.0  # when it was staged; while a rank fills it, when that began; CLOCK_MONOTONIC
    guest: bool = False  # it is for what belongs to other nodes

    @property
    def key(self) -> tuple[int, int]:
        """(epoch, step) of the snapshot in it; without one it comes before all that have one."""
        return (self.label.epoch, self.label.step) if self.label else (0, -1)


@dataclass(slots=True)
class ArenaPool:
    """All arenas of one agent, below `limit` bytes. Not thread-safe: the agent's event loop owns it.

    Args:
        root: directory of this agent; created with mode 0700.
        limit: bytes of shared memory all arenas together may take.
        on_removed: told of every arena that is removed: who maps it must let go, or its memory stays.
        on_given_up: told of an arena whose snapshot nobody wants any more, whether it is complete or not.
    """

    root: Path
    limit: int
    on_removed: Callable[[Arena], None] = lambda arena: None
    on_given_up: Callable[[Arena], None] = lambda arena: None
    arenas: dict[str, Arena] = field(default_factory=dict)
    _lock: int = -1

    def open(self) -> list[Arena]:
        """Take possession of the directory and return the snapshots an earlier agent left in it.

        Raises:
            RunBusy: another live agent owns the directory.
            ConfigError: the directory is not this user's alone.
        """
        # In /dev/shm anybody may have made it before us, with snapshots of his own in it.
        private_directory(self.root)
        self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise RunBusy(f"another agent uses the arenas in {self.root}", hint="give this one another name") from None
        found = []
        for path in sorted(self.root.glob("*.arena")):
            label, capacity = _read_label(path), path.stat().st_size - TAIL
            owner = _read_owner(path) if label is None else None
            if owner is not None and capacity > 0:
                free = Arena(path.stem, path, capacity, owner.job, owner.rank, since=time.monotonic())
                self.arenas[free.name] = free
                continue
            if label is None or label.nbytes > capacity:
                path.unlink()
                continue
            arena = Arena(path.stem, path, capacity, label.job, label.rank, guest=label.guest)
            arena.state = State.KEPT if label.kept else State.STAGED
            arena.step, arena.label, arena.since = label.step, label, time.monotonic()
            self.arenas[arena.name] = arena
            found.append(arena)
        for path in self.root.iterdir():  # labels without an arena, torn ones, and whose arenas were free
            label_of_none = path.suffix == ".json" and path.stem not in self.arenas
            if label_of_none or path.suffix in (".new", _OWNER_SUFFIX):
                path.unlink()
        return found

    def close(self, *, remove: bool, keep_free: bool = False) -> None:
        """Give the directory up; with `remove`, and everything in it, without it, and what holds no snapshot.

        With `keep_free`, the next agent finds the free arenas as well: making them takes long.
        """
        for arena in list(self.arenas.values()):
            is_free = arena.state is State.FREE and not arena.guest
            if remove or (arena.label is None and not (keep_free and is_free and _write_owner(arena))):
                self.remove(arena)
        if self._lock >= 0:
            if remove:
                with contextlib.suppress(OSError):
                    (self.root / "lock").unlink()
                    self.root.rmdir()
            os.close(self._lock)
            self._lock = -1

    @property
    def total(self) -> int:
        """Bytes of shared memory in use."""
        return sum(a.capacity + TAIL for a in self.arenas.values())

    def of(self, job: str, rank: int) -> list[Arena]:
        """A rank's own arenas."""
        return [a for a in self.arenas.values() if a.job == job and a.rank == rank and not a.guest]

    def plan(self, job: str, rank: int, nbytes: int, count: int) -> int:
        """How many arenas of `nbytes` a rank still lacks; unusable small free ones are removed first."""
        for arena in self.of(job, rank):
            if arena.state is State.FREE and arena.capacity < nbytes:
                self.remove(arena)
        return count - sum(1 for a in self.of(job, rank) if a.capacity >= nbytes)

    def is_beyond(self, job: str, nbytes: int, most: int) -> bool:
        """Whether one more arena would take a job's own beyond so many bytes."""
        return (
            sum(a.capacity + TAIL for a in self.arenas.values() if a.job == job and not a.guest) + _size(nbytes) > most
        )

    def make(
        self, job: str, rank: int, nbytes: int, most: int | None = None, *, guest: bool = False
    ) -> tuple[Arena, int]:
        """Reserve one more arena of at least `nbytes` bytes; `populate` must follow, with the descriptor returned.

        Args:
            job: whose it is.
            rank: whose in that.
            nbytes: what it is for.
            most: bytes that the job's arenas may take; None: the pool's limit is the only one.
            guest: it is for what belongs to another node.

        Raises:
            ArenaExhausted: a limit does not allow it.
        """
        size = _size(nbytes)
        if most is not None and self.is_beyond(job, nbytes, most):
            raise ArenaExhausted(f"an arena of {size >> 20} MiB takes the job beyond its share, {most >> 20} MiB",
                hint="raise arena.job_limit or arena.limit, or run fewer jobs on a node")  # fmt: skip
        if self.total + size > self.limit:
            taken = f"{self.total >> 20} of {self.limit >> 20} MiB are taken"
            raise ArenaExhausted(
                f"an arena of {size >> 20} MiB does not fit: {taken}",
                hint="raise arena.limit, or lower arena.slots",
            )
        name = f"{'guest' if guest else f'{rank:05d}'}-{secrets.token_hex(8)}"
        path = self.root / f"{name}.arena"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArenaExhausted(f"no arena can be made in {self.root}: {error.strerror}") from error
        arena = Arena(name, path, size - TAIL, job, rank, State.FILLING, guest=guest)
        self.arenas[name] = arena
        return arena, fd

    def acquire(self, job: str, rank: int, nbytes: int, step: int, holder: str) -> tuple[Arena, Label | None]:
        """A free arena for a snapshot; if there is none, the oldest one that is only kept as memory tier.

        It is `holder`'s until it is staged or released: nobody else may fill it.

        Returns:
            the arena, and the label of the snapshot that had to go for it.

        Raises:
            ArenaExhausted: all are busy, or too small.
        """
        fit = [a for a in self.of(job, rank) if a.capacity >= nbytes]
        free = [a for a in fit if a.state is State.FREE] or [a for a in fit if a.state is State.KEPT]
        if not free:
            busy = sum(1 for a in fit if a.state is State.STAGED)
            raise ArenaExhausted(f"no free arena of {nbytes >> 20} MiB for rank {rank}: {busy} are still being saved")
        arena = min(free, key=lambda a: a.key)  # after a rewind the older one may be of a later step
        evicted = arena.label
        try:
            self._set_filled(arena, 0)
        except FileNotFoundError as error:  # somebody has tidied up in /dev/shm
            self.remove(arena)
            raise ArenaExhausted(f"the arena of rank {rank} is gone: {error}") from error
        except OSError as error:
            raise ArenaExhausted(f"the arena of rank {rank} cannot be opened: {error.strerror}") from error
        self.release(arena)
        arena.state, arena.step, arena.holder, arena.since = State.FILLING, step, holder, time.monotonic()
        return arena, evicted

    def stage(self, arena: Arena, label: Label) -> None:
        """The arena holds a whole snapshot now; remember that beyond this process.

        Raises:
            InvalidInput: it is too small for that.
            OSError: it could not be written down, and is as before.
        """
        if not 0 < label.nbytes <= arena.capacity:
            raise InvalidInput(f"a snapshot of {label.nbytes} bytes cannot be in an arena of {arena.capacity}")
        self._set_filled(arena, label.nbytes)
        _write_label(arena.path, label)
        arena.label, arena.state, arena.holder, arena.since = label, State.STAGED, "", time.monotonic()

    def _set_filled(self, arena: Arena, nbytes: int) -> None:
        fd = os.open(arena.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, struct.pack("q", nbytes), arena.capacity + TAIL - 8)
        finally:
            os.close(fd)

    def keep(self, arena: Arena) -> None:
        """The save has ended; the snapshot stays as the memory tier."""
        if arena.label is not None:
            arena.label = msgspec.structs.replace(arena.label, kept=True)
            arena.state = State.KEPT
            with contextlib.suppress(OSError):  # the next agent saves it once more, and finds it saved
                _write_label(arena.path, arena.label)

    def keep_guest(self, arena: Arena, label: Label) -> None:
        """The arena holds, whole and verified, what belongs to other nodes; remember that beyond this process."""
        arena.label, arena.state, arena.step, arena.holder = label, State.KEPT, label.step, ""
        _write_label(arena.path, label)

    def release(self, arena: Arena) -> None:
        """Forget what the arena holds; it can be filled again."""
        with contextlib.suppress(FileNotFoundError):
            arena.path.with_suffix(".json").unlink()
        self.on_given_up(arena)
        arena.label, arena.state, arena.step, arena.holder = None, State.FREE, -1, ""

    def drop(self, job: str, rank: int | None = None) -> None:
        """Remove a job's arenas (of one rank), except those that are still being saved."""
        for arena in list(self.arenas.values()):
            if arena.job == job and (rank is None or arena.rank == rank) and arena.state is not State.STAGED:
                self.remove(arena)

    def remove(self, arena: Arena) -> None:
        """Remove one arena and its memory (once nobody maps it any more)."""
        for path in (arena.path.with_suffix(".json"), arena.path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self.arenas.pop(arena.name, None)
        self.on_given_up(arena)
        self.on_removed(arena)


def _size(nbytes: int) -> int:
    """Bytes of an arena that is to hold so many."""
    return -(-(max(nbytes, 1) + TAIL) // HUGE_PAGE) * HUGE_PAGE


def filled_word(arena: memoryview) -> memoryview:
    """The word of a mapped arena that says how many of its first bytes are final; one item.

    The rank that copies writes it, in growing steps; the worker that writes the shard reads it.
    """
    return arena[-8:].cast("q")


def populate(fd: int, capacity: int) -> None:
    """Allocate every page of a new arena; slow (about 1.7 GB/s), so call it where nobody waits.

    Raises:
        ArenaExhausted: the memory is not there.
    """
    try:
        os.posix_fallocate(fd, 0, capacity + TAIL)
    except OSError as error:
        raise ArenaExhausted(
            f"no memory for an arena of {capacity >> 20} MiB: {error.strerror}",
            hint="give the arena directory (usually /dev/shm) more room, or lower arena.slots",
        ) from error


@dataclass(slots=True)
class _Mapping:
    memory: mmap.mmap
    users: int = 0
    forgotten: bool = False


class Mappings:
    """Arenas of this process's agent, read-only, mapped once and kept.

    Direct I/O takes every page of a new mapping as a fault: that costs half as much again as writing them does, at
    each save. A kept mapping keeps the memory of an arena that is removed, so whoever removes one must tell.
    """

    def __init__(self) -> None:
        self._maps: dict[str, _Mapping] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def pages(self, path: str, nbytes: int) -> Iterator[memoryview]:
        """An arena's whole pages that hold the first `nbytes` bytes.

        Raises:
            InvalidInput: it is smaller.
            OSError: it is not there.
        """
        with self._lock:
            mapping = self._maps.get(path)
            if mapping is None:
                mapping = self._maps[path] = _Mapping(_map(path))
            mapping.users += 1
        try:
            size = len(mapping.memory) - TAIL
            if not 0 < nbytes <= size:
                raise InvalidInput(f"{path} has {size} bytes; {nbytes} were asked for")
            with (
                memoryview(mapping.memory) as whole,
                whole[: min(size, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)] as view,
            ):
                yield view
        finally:
            with self._lock:
                mapping.users -= 1
                self._close(mapping)

    def filled(self, path: str) -> int:
        """How many of the first bytes of an arena are final; only inside of `pages` of it."""
        with memoryview(self._maps[path].memory) as whole, whole[-8:] as word:
            return int.from_bytes(word, sys.byteorder)

    def touch(self, path: str) -> None:
        """Map all of an arena now, so that its first save finds it mapped."""
        with self.pages(path, 1):
            memory = self._maps[path].memory
            for start in range(0, len(memory), _TOUCHED_AT_ONCE):  # it holds the interpreter lock
                with contextlib.suppress(OSError):  # a kernel before 5.14
                    memory.madvise(_MADV_POPULATE_READ, start, min(_TOUCHED_AT_ONCE, len(memory) - start))
                time.sleep(0)

    def forget(self, path: str) -> None:
        """The arena has been removed: let its memory go, as soon as nobody reads it any more."""
        with self._lock:
            mapping = self._maps.pop(path, None)
            if mapping is not None:
                mapping.forgotten = True
                self._close(mapping)

    def close(self) -> None:
        """Forget all: a process that cannot end for a hanging store must not keep the memory."""
        for path in list(self._maps):
            self.forget(path)

    def _close(self, mapping: _Mapping) -> None:
        if mapping.forgotten and not mapping.users:
            with contextlib.suppress(BufferError):  # an error on its way up still has views: it goes with them
                mapping.memory.close()


_MADV_POPULATE_READ = 22
_TOUCHED_AT_ONCE = 16 << 20


def _map(path: str) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)


def _read_label(path: Path) -> Label | None:
    try:
        return msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Label)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None  # not staged, or torn by a crash while being labelled: not a snapshot


def _read_owner(path: Path) -> _Owner | None:
    try:
        return msgspec.json.decode(path.with_suffix(_OWNER_SUFFIX).read_bytes(), type=_Owner)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None


def _write_owner(arena: Arena) -> bool:
    """Write down whose free arena it is; False if that is not possible."""
    try:
        arena.path.with_suffix(_OWNER_SUFFIX).write_bytes(msgspec.json.encode(_Owner(arena.job, arena.rank)))
    except OSError:
        return False
    return True


def _write_label(path: Path, label: Label) -> None:
    target = path.with_suffix(".json")
    fresh = target.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(label))
    fresh.rename(target)
