"""The agents of the users of a system service: started, watched, started again; and what each of them may take."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ckptsvc.agent.process.own_log import NAME as LOG
from ckptsvc.agent.supervisor import records
from ckptsvc.agent.supervisor.entrance import Order
from ckptsvc.control.shares import Node, Share, share_of
from ckptsvc.errors import BY_CODE, AgentUnavailable, CkptsvcError, LimitReached, StoreDenied
from ckptsvc.rpc import service
from ckptsvc.rpc.service import MAX_REQUEST
from ckptsvc.settings import SystemSettings
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.supervisor")

ENTER_TIMEOUT = 20.0
"""Seconds for what root does at the start of an agent: most of all, to look up an account."""

START_TIMEOUT = 30.0
"""Seconds from then on until it must have connected."""

CALL_TIMEOUT = 40.0
"""Seconds that a caller waits for all that; less than service.PATIENCE."""

AWAY_PATIENCE = 5.0
"""Seconds that a caller waits for an agent which lives and is not connected: it comes back, ends, or is frozen."""

BACKOFF, MAX_BACKOFF = 0.5, 60.0
"""Seconds until an agent that has failed is started again; doubled with every failure in a row."""

HEALTHY = 60.0
"""Seconds after which an agent that ends has not failed in a row."""

DIVIDE_AFTER = 0.5
"""Seconds after which all hear what they may take, when somebody has begun to do something, or has ended."""

STARTING = 8
"""Agents that are started at the same time."""

REAP_EVERY = 5.0
"""Seconds between looks at processes that have ended while their user's debugger holds on to them."""

_UNKNOWN = -1
"""Exit status of a process that was another's child."""


@dataclass(slots=True)
class User:
    """One user, and his agent.

    Attributes:
        name: "" until his account has been looked up.
        gid: of whoever asked first.
        pid, pidfd: of the agent; -1: it does not run.
        link: its connection.
        starting: it has been started, and has not connected yet.
        served: it has.
        ranks: registered there.
        busy: it has something to do.
        page: where it serves HTTP, as it says; "" for nowhere.
        scrape: the token that opens its metrics; a new one for each connection of its.
        waiting: callers that wait for it.
        since: when its present state began, unix seconds.
        failures: in a row.
        not_before: when it may be started again (CLOCK_MONOTONIC).
        problem: why it does not run.
    """

    uid: int
    gid: int
    name: str = ""
    pid: int = -1
    pidfd: int = -1
    process: subprocess.Popen[bytes] | None = None
    link: socket.socket | None = None
    ranks: int = 0
    busy: bool = False
    page: str = ""
    scrape: str = ""
    waiting: int = 0
    starting: bool = False
    served: bool = False
    since: float = field(default_factory=time.time)
    began: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    problem: CkptsvcError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> str:
        """As in rpc.service."""
        if self.link is not None:
            return "serves"
        if self.starting:
            return "starts"
        if self.pidfd >= 0:
            return "away"
        return "failed" if self.problem else "ended"

    def wake(self) -> None:
        """Let those who wait look again."""
        self.since = time.time()
        self.changed.set()
        self.changed = asyncio.Event()


class Agents:
    """All of them. Owned by the event loop of the supervisor.

    Args:
        directory: of the service.
        arenas: where the directory of all users' arenas is.
        settings: who may have one, and how many there may be.
        node: what is divided among them.
        arguments: for every agent.
        environ: of the service itself.
    """

    def __init__(
        self, directory: Path, arenas: str, settings: SystemSettings, node: Node, arguments: Sequence[str],
        environ: dict[str, str],
    ) -> None:  # fmt: skip
        self._arenas = arenas
        self._directory, self._settings, self._node = directory, settings, node
        self._arguments, self._environ = list(arguments), environ
        self._users: dict[int, User] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Semaphore(STARTING)
        self._dividing: asyncio.TimerHandle | None = None
        self._reaping: asyncio.TimerHandle | None = None
        self._unreaped: list[Callable[[], int | None]] = []
        self._records = -1
        self.starts = self.failures = 0
        """Of processes, since the service began."""

    def open(self) -> None:
        """Make the directories, and find the agents of an earlier service that live.

        Raises:
            ConfigError: the directories are not root's alone.
        """
        users, self._records = records.open_directories(self._directory)
        os.close(users)
        os.close(records.open_arenas(Path(self._arenas)))
        for uid in records.all_of(self._records):
            self._find(uid)

    def _find(self, uid: int) -> User | None:
        """The living agent of a user that an earlier service has started: then it is on record."""
        record = records.read(self._records, uid)
        pidfd = -1 if record is None else records.watch(record)
        if record is None or pidfd < 0:
            return None
        user = self._users.setdefault(uid, User(uid, record.gid))
        user.name, user.pid, user.pidfd, user.served = record.user, record.pid, pidfd, True
        self._watch(user)
        logger.info("found the agent of %s: process %d", user.name, user.pid)
        return user

    def close(self) -> None:
        """Let go of all agents: they live on, and a later service finds them."""
        for task in self._tasks:
            task.cancel()
        for timer in (self._dividing, self._reaping):
            if timer is not None:
                timer.cancel()
        for user in self._users.values():
            if user.pidfd >= 0:
                asyncio.get_running_loop().remove_reader(user.pidfd)
                os.close(user.pidfd)
        os.close(self._records)

    def signal(self, number: int) -> None:
        """Send a signal to the agents that serve."""
        for user in self._users.values():
            if user.link is not None and user.pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(user.pidfd, number)

    def users(self) -> list[User]:
        """All of whom there is anything to say, by number; nobody who may have no agent."""
        return sorted((user for user in self._users.values() if user.name), key=lambda each: each.uid)

    def summary(self) -> str:
        """One line."""
        serving = [user for user in self._users.values() if user.link is not None]
        return f"{sum(user.ranks for user in serving)} ranks of {len(serving)} users' agents"

    # ---- for callers -------------------------------------------------------------------------------------------------

    def serves(self, uid: int) -> bool:
        """Whether a user's agent is connected."""
        return uid in self._users and self._users[uid].link is not None

    async def agent_of(self, uid: int, gid: int) -> Path:
        """The directory of a user's agent, once that serves.

        Raises:
            StoreDenied: he may not have one.
            LimitReached: there are too many users.
            AgentUnavailable: it does not start.
        """
        user = self._user(uid, gid)
        user.waiting += 1
        try:
            if user.link is not None:
                _push(user.link, {"op": "wanted"})
            await asyncio.wait_for(self._until_served(user), CALL_TIMEOUT)
        except TimeoutError:
            raise AgentUnavailable(f"the agent of {_who(user)} does not answer") from None
        finally:
            user.waiting -= 1
        return service.directory_of(self._directory, uid)

    async def _until_served(self, user: User) -> None:
        away = time.monotonic() + AWAY_PATIENCE
        while user.link is None:
            if user.pidfd < 0 and not user.starting:
                left = user.not_before - time.monotonic()
                if left > 0:
                    raise user.problem or AgentUnavailable(f"the agent of {_who(user)} has ended")
                self._start(user)
            patience = None if user.starting else max(away - time.monotonic(), 0.0)
            if patience == 0.0:
                return  # it is frozen, perhaps: the caller sees for himself
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(user.changed.wait(), patience)
            if user.pidfd < 0 and not user.starting and user.problem is not None:
                raise user.problem

    def _user(self, uid: int, gid: int) -> User:
        user = self._users.get(uid)
        if user is None:
            if len(self._users) >= self._settings.max_users:
                self._forget_one()
            user = self._users[uid] = User(uid, gid)
        return user

    def _forget_one(self) -> None:
        for user in self._users.values():
            over = user.not_before <= time.monotonic()
            if user.pidfd < 0 and not user.starting and not user.waiting and over:
                del self._users[user.uid]
                return
        raise LimitReached(f"this node's service serves {self._settings.max_users} users already",
            hint="an operator can raise system.max_users")  # fmt: skip

    def listed(self, uid: int | None = None) -> Iterator[dict[str, Any]]:
        """What there is to say of every agent, or of one user's; nothing of users who may have none."""
        for user in self.users():
            if uid in (None, user.uid):
                yield {
                    "uid": user.uid,
                    "user": user.name,
                    "directory": str(service.directory_of(self._directory, user.uid)),
                    "pid": user.pid,
                    "state": user.state,
                    "ranks": user.ranks,
                    "since": user.since,
                    "problem": user.problem.what[:200] if user.problem else "",
                }

    # ---- for agents --------------------------------------------------------------------------------------------------

    def connected(self, uid: int, pid: int, link: socket.socket) -> dict[str, Any]:
        """An agent's own connection, which takes the place of an earlier one; returns what it is told.

        Raises:
            StoreDenied: it is not the process that was started for that user.
        """
        user = self._users.get(uid)
        if user is None or user.pidfd < 0:
            user = self._find(uid)
        if user is None or user.pid != pid:
            raise StoreDenied(f"process {pid} is not the agent that was started for user {uid}")
        if user.link is not None:
            with contextlib.suppress(OSError):
                user.link.shutdown(socket.SHUT_RDWR)
        user.link, user.starting, user.served, user.problem = link, False, True, None
        user.scrape, user.page = secrets.token_hex(32), ""  # where the one before listened, anybody may by now
        user.wake()
        log(logger, logging.INFO, Event.AGENT_STARTED, "the agent of %s serves, process %d", _who(user), pid)
        return {**asdict(self._share()), "scrape": user.scrape}

    def told(self, uid: int, link: socket.socket, ranks: int, busy: bool, page: str) -> None:
        """An agent has said how much it has to do."""
        user = self._users.get(uid)
        if user is None or user.link is not link:
            return
        before, user.ranks, user.busy, user.page = user.busy, ranks, busy, page
        if busy != before:
            self._divide()

    def disconnected(self, uid: int, link: socket.socket) -> None:
        """Such a connection has ended; its process may live on."""
        user = self._users.get(uid)
        if user is not None and user.link is link:
            user.link = None
            user.wake()

    def _share(self) -> Share:
        return share_of(self._node, sum(user.busy for user in self._users.values()))

    def _divide(self) -> None:
        """Tell every agent what it may take, in a moment: not each time that one agent says it is idle, or busy."""
        if self._dividing is None:
            self._dividing = asyncio.get_running_loop().call_later(DIVIDE_AFTER, self._tell)

    def _tell(self) -> None:
        self._dividing = None
        told = {"op": "shares", **asdict(self._share())}
        for user in self._users.values():
            if user.link is not None:
                _push(user.link, told)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def _start(self, user: User) -> None:
        user.starting, user.served, user.problem = True, False, None
        self.starts += 1
        user.wake()
        self._spawn(self._begin(user))

    async def _begin(self, user: User) -> None:
        entered = False
        try:
            async with contextlib.AsyncExitStack() as slot:
                await slot.enter_async_context(self._starting)
                await asyncio.wait_for(self._enter(user, slot), ENTER_TIMEOUT)
            entered = True
            await asyncio.wait_for(self._until_connected(user), START_TIMEOUT)
        except TimeoutError:
            self._failed(user, AgentUnavailable(f"the agent of {_who(user)} does not start"))
            if not entered and user.process is not None:
                user.process.kill()  # it waits for the accounts, as root
        except CkptsvcError as error:
            self._failed(user, error)
        except OSError as error:
            self._failed(user, AgentUnavailable(f"the agent of {_who(user)} cannot be started: {error.strerror}"))

    async def _until_connected(self, user: User) -> None:
        while user.starting:
            if user.pidfd < 0:
                hint = f"{service.directory_of(self._directory, user.uid)}/{LOG} says why"
                raise AgentUnavailable(f"the agent of {_who(user)} did not start", hint=hint)
            await user.changed.wait()

    async def _enter(self, user: User, slot: contextlib.AsyncExitStack) -> None:
        """Start the process that becomes the agent, and hear what it says until it is one.

        `slot` is left at its first word: from then on its user may stop it, and nobody else's start waits for that.
        """
        loop, found = asyncio.get_running_loop(), b""
        ours, report = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with report:
                self._execute(user, report.fileno())
            await loop.sock_sendall(ours, msgspec.json.encode(self._order(user)))
            ours.shutdown(socket.SHUT_WR)
            while data := await loop.sock_recv(ours, MAX_REQUEST):
                found = (found + data)[-4 * MAX_REQUEST :]
                await slot.aclose()
        for line in found.splitlines():
            said = msgspec.json.decode(line, type=dict[str, str])
            if "code" in said:
                raise BY_CODE.get(said["code"], AgentUnavailable)(said["what"], hint=said["hint"])
            user.name = said["user"]

    def _order(self, user: User) -> Order:
        settings = self._settings
        return Order(
            directory=str(self._directory), arenas=self._arenas, uid=user.uid, gid=user.gid,
            users=list(settings.users), min_uid=settings.min_uid, umask=settings.umask, arguments=self._arguments,
        )  # fmt: skip

    def _execute(self, user: User, report: int) -> None:
        user.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ckptsvc.agent.supervisor.entrance", str(report)], pass_fds=(report,),
            stdin=subprocess.DEVNULL, cwd="/", start_new_session=True, env=self._environ, umask=0o077,
        )  # fmt: skip
        user.pid, user.began = user.process.pid, time.monotonic()
        user.pidfd = os.pidfd_open(user.pid)
        self._watch(user)

    def _watch(self, user: User) -> None:
        asyncio.get_running_loop().add_reader(user.pidfd, self._ended, user)

    def _ended(self, user: User) -> None:
        """The process of an agent, or the one that was to become it, is gone."""
        asyncio.get_running_loop().remove_reader(user.pidfd)
        os.close(user.pidfd)
        status = self._reaped(user.process.poll if user.process is not None else partial(_status, user.pid))
        busy = user.busy or user.waiting > 0
        user.pidfd = user.pid = -1
        user.process, user.link, user.ranks = None, None, 0
        if user.busy:
            user.busy = False
            self._divide()
        if user.starting:
            user.wake()  # `_begin` has more to say of it
        elif status == 0 or not busy or not user.served:
            if user.served:
                log(logger, logging.INFO, Event.AGENT_STOPPED, "the agent of %s has ended", _who(user))
            user.wake()
        else:
            if time.monotonic() - user.began > HEALTHY:
                user.failures = 0
            self._failed(user, AgentUnavailable(f"the agent of {_who(user)} died"))
            self._spawn(self._again(user))

    def _reaped(self, status_of: Callable[[], int | None]) -> int | None:
        """The exit status of a process that has ended.

        Never waits: one that is traced is its tracer's to reap first, who may take as long as he likes (ptrace(2)).
        """
        status = status_of()
        if status is None:
            self._unreaped.append(status_of)
            self._reap_later()
        return status

    def _reap_later(self) -> None:
        if self._reaping is None:
            self._reaping = asyncio.get_running_loop().call_later(REAP_EVERY, self._reap)

    def _reap(self) -> None:
        self._reaping = None
        self._unreaped = [status_of for status_of in self._unreaped if status_of() is None]
        if self._unreaped:
            self._reap_later()

    def _failed(self, user: User, error: CkptsvcError) -> None:
        user.starting, user.problem = False, error
        user.failures += 1
        self.failures += 1
        user.not_before = time.monotonic() + min(BACKOFF * 2 ** (user.failures - 1), MAX_BACKOFF)
        logger.warning("%s%s", error.what, f" ({user.failures} times in a row)" if user.failures > 1 else "")
        user.wake()

    async def _again(self, user: User) -> None:
        """Start an agent again whose ranks run on without it."""
        await asyncio.sleep(max(user.not_before - time.monotonic(), 0.0))
        if user.pidfd < 0 and not user.starting:
            self._start(user)

    def _spawn(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _status(pid: int) -> int | None:
    """The exit status of a child that another program of this process has started; None where it cannot be had yet."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return _UNKNOWN
    return os.waitstatus_to_exitcode(status) if reaped else None


def _who(user: User) -> str:
    return f"user {user.name or user.uid}"


def _push(link: socket.socket, message: dict[str, Any]) -> None:
    try:
        link.send(msgspec.json.encode(message))
    except OSError:  # it does not read what it is told: it has to connect anew, and hears it then
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)
