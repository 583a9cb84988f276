"""Where root becomes a user: a process of the system service that drops all rights and becomes that user's agent.

    python -m ckptsvc.agent.supervisor.entrance DESCRIPTOR

Its environment becomes the agent's. It looks up the account (which may take long: those of many sites are on a
network), makes the user's directory, gives up every right, opens the log, and executes the agent. What it is to do
comes through a socket, up to the end of what can be read, for anybody may read a command line. What the supervisor is
told goes the other way, a line of JSON each: {user} when all is well so far, {code, what, hint} where it is not. The
socket is closed when the agent begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from ckptsvc.agent.process.own_log import NAME as LOG
from ckptsvc.agent.supervisor import records
from ckptsvc.agent.supervisor.accounts import check
from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError, StoreDenied
from ckptsvc.rpc.accounts import Account, account_of

_PR_SET_NO_NEW_PRIVS = 38
_KEYCTL = {"x86_64": 250, "aarch64": 219}
"""Number of the system call on each machine (asm/unistd.h): the C library has no name for it."""

_KEYCTL_JOIN_SESSION_KEYRING = 1
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
    """

    directory: str
    arenas: str
    uid: int
    gid: int
    users: list[str]
    min_uid: int
    umask: int
    arguments: list[str]


def enter(order: Order, report: int) -> NoReturn:
    """Become the agent of that user.

    Args:
        order: whose, and how.
        report: descriptor of the socket.

    Raises:
        CkptsvcError: he may not have one, or it cannot be started.
    """
    if not (0 <= order.uid < _LAST_ID and 0 <= order.gid < _LAST_ID):
        raise StoreDenied(f"user {order.uid} is nobody")
    account = account_of(order.uid, order.gid)
    check(account, order.users, order.min_uid)
    users, kept = records.open_directories(Path(order.directory))
    held = records.locked(kept, account.uid)  # of a service that was killed, an entrance may be on its way
    earlier = records.read(kept, account.uid)
    if earlier is not None and (living := records.watch(earlier)) >= 0 and earlier.pid != os.getpid():
        os.close(living)
        raise AgentUnavailable(f"the agent of user {account.uid} runs already: process {earlier.pid}")
    own = records.user_directory(users, account.uid, account.gid)
    records.user_directory(records.open_arenas(Path(order.arenas)), account.uid, account.gid)
    name = account.name or str(account.uid)
    records.write(kept, account.uid, records.Record(os.getpid(), records.began(os.getpid()), name, order.gid))
    os.close(held)  # from now on he may stop this process, and nothing of root's must wait for it
    _say(report, {"user": name})
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
        hint = "users of the service must be able to read the interpreter and its packages"
        if error.errno == errno.EAGAIN:
            hint = "he has as many processes and threads as he may (LimitNPROC of the service)"
        raise ConfigError(f"user {name} cannot execute {command[0]}: {error.strerror}", hint=hint) from error


def drop(account: Account) -> None:
    """Give up every right but those of the user, for good.

    Raises:
        ConfigError: that is not possible.
    """
    with contextlib.suppress(OSError):
        # What the service is spared, its users are not. With CAP_SYS_RESOURCE this is also the least they can set.
        Path("/proc/self/oom_score_adj").write_text("0")
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
    _leave_session_keyring(libc)


def _leave_session_keyring(libc: ctypes.CDLL) -> None:
    """Begin a keyring of the user's own (keyrings(7)): the service's would be all users' in common."""
    machine = os.uname().machine
    if machine not in _KEYCTL:
        raise ConfigError(f"the number of keyctl(2) on {machine} is not known")
    joined = libc.syscall(ctypes.c_long(_KEYCTL[machine]), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None)
    if joined == -1 and (number := ctypes.get_errno()) != errno.ENOSYS:  # a kernel without keys has none to share
        raise ConfigError(f"keyctl(KEYCTL_JOIN_SESSION_KEYRING): {os.strerror(number)}")


def _open_log(own: int) -> None:
    """Send what the agent says to a file in its directory; as the user, for the directory is his."""
    try:
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
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    try:
        enter(_order(report), report)
    except CkptsvcError as error:
        _say(report, {"code": error.code, "what": error.what, "hint": error.hint})
    except OSError as error:
        what = f"the agent cannot be started: {error.strerror or error}"
        _say(report, {"code": AgentUnavailable.code, "what": what, "hint": ""})
    return 1


def _order(report: int) -> Order:
    text = b""
    while data := os.read(report, 1 << 16):
        text += data
    try:
        return msgspec.json.decode(text, type=Order)
    except (msgspec.MsgspecError, UnicodeError):  # torn: the service ended while it wrote
        raise AgentUnavailable("the service has not said what agent it wants") from None


if __name__ == "__main__":
    sys.exit(main())
