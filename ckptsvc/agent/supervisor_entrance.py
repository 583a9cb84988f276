"""Where root becomes a user: a process of the system service that drops all rights and becomes that user's agent.

    python -m ckptsvc.agent.supervisor_entrance '{"uid": 1000, ...}'

Its environment becomes the agent's. It looks up the account (which may take long: those of many sites are on a
network), makes the user's directory, gives up every right, opens the log, and executes the agent. What the supervisor
is told comes through a socket, a line of JSON each: {user} when all is well so far, {code, what, hint} where it is not.
It is closed when the agent begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import grp
import os
import pwd
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from ckptsvc.agent import supervisor_records as records
from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError, StoreDenied

LOG = "agent.log"
LOG_BYTES = 8 << 20
"""Bytes from which on a log is put aside when an agent starts; one older is kept."""

_PR_SET_NO_NEW_PRIVS = 38
NOBODY = 65534
_LAST_ID = (1 << 32) - 1
"""(uid_t) -1: it means "do not change" to the system calls, and is nobody."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor wants started.

    Attributes:
        directory: of the service.
        arenas: where the directory of all users' arenas is.
        uid, gid: of the process that asked, as the kernel says.
        users, min_uid: who may have an agent (settings.SystemSettings).
        umask: of the agent.
        arguments: for ckptsvc.agent.server.
        report: descriptor of the socket.
    """

    directory: str
    arenas: str
    uid: int
    gid: int
    users: list[str]
    min_uid: int
    umask: int
    arguments: list[str]
    report: int


@dataclass(frozen=True, slots=True)
class Account:
    """A user as the system knows him."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def account_of(uid: int, gid: int) -> Account:
    """The account of a user; one without any has the group he came with, no other, and no home.

    Raises:
        OSError: the accounts cannot be read.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account("", uid, gid, (gid,), "/")
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Account(entry.pw_name, uid, entry.pw_gid, tuple(groups), entry.pw_dir)


def is_listed(account: Account, names: list[str] | tuple[str, ...]) -> bool:
    """Whether a list of users and "@group"s has him: by name, by number, by group."""
    for name in names:
        if name.startswith("@"):
            with contextlib.suppress(KeyError):
                if grp.getgrnam(name[1:]).gr_gid in account.groups:
                    return True
        elif name in (account.name, str(account.uid)):
            return True
    return False


def check(account: Account, order: Order) -> None:
    """Refuse who may have no agent here.

    Raises:
        StoreDenied: he may not.
    """
    who = account.name or f"number {account.uid}"
    if account.uid == 0 or is_listed(account, order.users):
        return
    if order.users:
        raise StoreDenied(f"user {who} may not use this node's service", hint="an operator can add to system.users")
    if account.uid < order.min_uid or account.uid == NOBODY:
        raise StoreDenied(f"user {who} is of the system itself: people have numbers from {order.min_uid} on",
            hint="an operator can name it in system.users")  # fmt: skip
    if not account.name:
        hint = "an operator can list the number in system.users; he has one group then, that with which he came"
        raise StoreDenied(f"user {who} has no account on this node, so nobody knows his groups", hint=hint)


def enter(order: Order) -> NoReturn:
    """Become the agent of that user.

    Raises:
        CkptsvcError: he may not have one, or it cannot be started.
    """
    if not (0 <= order.uid < _LAST_ID and 0 <= order.gid < _LAST_ID):
        raise StoreDenied(f"user {order.uid} is nobody")
    account = account_of(order.uid, order.gid)
    check(account, order)
    users, kept = records.open_directories(Path(order.directory))
    held = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=kept)
    fcntl.flock(held, fcntl.LOCK_EX)  # of a service that was killed, an entrance may be on its way
    earlier = records.read(kept, account.uid)
    if earlier is not None and (living := records.watch(earlier)) >= 0 and earlier.pid != os.getpid():
        os.close(living)
        raise AgentUnavailable(f"the agent of user {account.uid} runs already: process {earlier.pid}")
    own = records.user_directory(users, account.uid, account.gid)
    records.user_directory(records.open_arenas(Path(order.arenas)), account.uid, account.gid)
    name = account.name or str(account.uid)
    records.write(kept, account.uid, records.Record(os.getpid(), records.began(os.getpid()), name, order.gid))
    _say(order.report, {"user": name})
    drop(account)
    os.umask(order.umask)
    _open_log(own)
    directory = f"{order.directory}/users/{account.uid}"
    mine = {
        "HOME": account.home, "USER": name, "LOGNAME": name, "CKPTSVC_AGENT_SOCKET_DIR": directory,
        "CKPTSVC_ARENA_DIR": f"{order.arenas}/{records.ARENAS}/{account.uid}",
    }  # fmt: skip
    command = [sys.executable, "-P", "-m", "ckptsvc.agent.server", "--dir", directory, *order.arguments]
    try:
        os.execve(command[0], command, os.environ | mine)
    except OSError as error:
        raise ConfigError(f"user {name} cannot execute {command[0]}: {error.strerror}",
            hint="users of the service must be able to read the interpreter and its packages") from error  # fmt: skip


def drop(account: Account) -> None:
    """Give up every right but those of the user, for good.

    Raises:
        ConfigError: that is not possible.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")  # what the service is spared, its users are not
    try:
        os.setgroups(account.groups)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    except OSError as error:
        raise ConfigError(f"cannot become user {account.uid}: {error.strerror}") from error
    ids = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    if ids != ((account.uid,) * 3, (account.gid,) * 3, sorted(set(account.groups))):
        raise ConfigError(f"could not become user {account.uid} altogether: {ids}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise ConfigError(f"prctl(PR_SET_NO_NEW_PRIVS): {os.strerror(ctypes.get_errno())}")


def _open_log(own: int) -> None:
    """Send what the agent says to a file in its directory; as the user, for the directory is his."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(LOG, dir_fd=own, follow_symlinks=False).st_size > LOG_BYTES:
                os.rename(LOG, f"{LOG}.1", src_dir_fd=own, dst_dir_fd=own)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(LOG, flags, 0o600, dir_fd=own)
    except OSError as error:
        raise ConfigError(f"the agent's log cannot be written: {error.strerror}") from error
    for number in (1, 2):
        os.dup2(fd, number)
    os.close(fd)


def _say(report: int, fields: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # a supervisor that was killed hears nothing, and finds the agent later
        os.write(report, msgspec.json.encode(fields) + b"\n")


def main() -> int:
    """Become an agent, or say why not."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    os.set_inheritable(order.report, False)
    try:
        enter(order)
    except CkptsvcError as error:
        _say(order.report, {"code": error.code, "what": error.what, "hint": error.hint})
    except OSError as error:
        what = f"the agent of user {order.uid} cannot be started: {error.strerror or error}"
        _say(order.report, {"code": AgentUnavailable.code, "what": what, "hint": ""})
    return 1


if __name__ == "__main__":
    sys.exit(main())
