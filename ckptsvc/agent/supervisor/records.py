"""The agents that a system service has started, on record in a directory that only root can enter.

A record is DIR/agents/UID: process, when that began, its user's name and group. With the process's own time of start it
names one process and no later one, so a service that starts anew finds the living agents of the one before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

import msgspec

from ckptsvc.errors import ConfigError
from ckptsvc.rpc.service import USERS

RECORDS = "agents"
ARENAS = "ckptsvc"
MAX_RECORD = 4096


class Record(msgspec.Struct, frozen=True):
    """One agent.

    Attributes:
        pid: of its process.
        began: when that began, in clock ticks since the start of the system (proc(5), field 22 of stat).
        user: name of its user.
        gid: group of the process that asked for it.
    """

    pid: int
    began: int
    user: str
    gid: int


def open_directories(directory: Path) -> tuple[int, int]:
    """Make the service's directory and those in it, or check that they are root's; returns descriptors.

    Returns:
        of the directory of users' directories, and of that of records.

    Raises:
        ConfigError: somebody else could write there.
    """
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        above = opened(str(directory), None, 0o755)
        try:
            found = []
            for name, mode in ((USERS, 0o711), (RECORDS, 0o700)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=above)
                found.append(opened(name, above, mode))
        finally:
            os.close(above)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}", hint="system.directory must be root's") from error
    return found[0], found[1]


def opened(name: str, above: int | None, mode: int) -> int:
    """Open a directory that is root's alone, and give it a mode; returns a descriptor.

    Raises:
        OSError: it is no directory.
        ConfigError: somebody else could write there.
    """
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise ConfigError(f"{name} is not root's alone", hint="remove it, or give it to root")
    os.fchmod(fd, mode)
    return fd


def open_arenas(directory: Path) -> int:
    """Make the directory of all users' arenas, or check that it is root's; returns a descriptor.

    In /dev/shm anybody may make a directory of any name. Below one of root's, nobody takes the place of another's.

    Raises:
        ConfigError: somebody else was there first.
    """
    path = directory / ARENAS
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o711)
        return opened(str(path), None, 0o711)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="remove it, if a user has made it") from error


def user_directory(above: int, uid: int, gid: int) -> int:
    """Make a user's directory, or check that it is his alone; returns a descriptor.

    Args:
        above: descriptor of the directory above, which is root's.
        uid: whose it is.
        gid: his group.

    Raises:
        ConfigError: something else is there. Only root could have put it there.
    """
    name = str(uid)
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as error:
        raise ConfigError(f"the service's place for user {name} is no directory: {error.strerror}") from error
    owner = os.fstat(fd).st_uid
    if owner not in (0, uid):
        os.close(fd)
        raise ConfigError(f"the service's place for user {name} belongs to user {owner}")
    os.fchown(fd, uid, gid)
    os.fchmod(fd, 0o700)
    return fd


def locked(records: int, uid: int) -> int:
    """Wait until nobody else starts an agent for a user; returns the descriptor that keeps others waiting."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(f"{uid}.lock", flags, 0o600, dir_fd=records)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def read(records: int, uid: int) -> Record | None:
    """The record of a user's agent, alive or not; None where there is none."""
    try:
        fd = os.open(str(uid), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=records)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        return msgspec.json.decode(os.read(fd, MAX_RECORD), type=Record)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None  # torn: its writer was killed, before it started anything
    finally:
        os.close(fd)


def write(records: int, uid: int, record: Record) -> None:
    """Put an agent on record."""
    fresh = f"{uid}.new"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=records)
    try:
        os.write(fd, msgspec.json.encode(record))
    finally:
        os.close(fd)
    os.rename(fresh, str(uid), src_dir_fd=records, dst_dir_fd=records)


def all_of(records: int) -> list[int]:
    """Every user with a record."""
    return sorted(int(name) for name in os.listdir(records) if name.isdecimal())


def watch(record: Record) -> int:
    """A pidfd of the process on record, or -1 where it has ended (its number may be another's by now)."""
    try:
        fd = os.pidfd_open(record.pid)
    except OSError:
        return -1
    if began(record.pid) != record.began:
        os.close(fd)
        return -1
    return fd


def began(pid: int) -> int:
    """When a process began, in clock ticks; -1 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(text[text.rindex(")") + 2 :].split()[19])
