"""The system service of a node, for many users: a small process of root's that starts each user's own agent.

It listens, knows who calls by what the kernel says, and answers with the directory of the caller's agent (rpc.service
has the protocol). It serves no gRPC, touches no store, and opens nothing that a user could have put there: all of that
is done by agents, each under the rights of its user. It may end at any time: agents live on, and the next one finds
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ckptsvc.agent.process.limits import raise_open_files
from ckptsvc.agent.process.notify import Notifier
from ckptsvc.agent.process.trial import obstacle
from ckptsvc.agent.supervisor.accounts import Accounts
from ckptsvc.agent.supervisor.agents import Agents
from ckptsvc.agent.supervisor.board import Board, group_of
from ckptsvc.agent.supervisor.gate import Gate, Visit
from ckptsvc.config import limit_on, load
from ckptsvc.control.shares import Node
from ckptsvc.errors import CkptsvcError, ConfigError, InvalidInput, LimitReached, RunBusy
from ckptsvc.rpc.identity import peer_of, send_answer
from ckptsvc.rpc.service import MAX_REQUEST, SOCKET
from ckptsvc.settings import Settings

logger = logging.getLogger("ckptsvc.supervisor")

BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel allows net.core.somaxconn of them."""

QUIET = 10.0
"""Seconds for which a connection may say nothing; not that of an agent."""

TELL_EVERY = 60.0
"""Seconds between two lines in the log about the same user, who asks too often."""

ACCEPT_AGAIN = 0.2
"""Seconds after which a service that was out of descriptors looks again who calls."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOT_PASSED_ON = ("CKPTSVC_AGENT_SOCKET_DIR", "CKPTSVC_AGENT_INCIDENTS_DIR")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that anybody may say; see rpc.service."""

    op: Literal["agent", "agents", "serve", "state"]
    ranks: int = 0
    busy: bool = False
    page: Annotated[str, msgspec.Meta(max_length=300)] = ""


@dataclass(slots=True)
class _Peer:
    """Who is at the other end of a connection."""

    sock: socket.socket
    pid: int
    uid: int
    gid: int
    is_agent: bool = False
    visit: Visit = field(init=False)
    serving: asyncio.Task[None] | None = None


class Supervisor:
    """The service; `run` is its whole life.

    Args:
        settings: of the node.
        arguments: for every agent (ckptsvc.agent.server), besides those about its directory.
        environ: of this process.
    """

    def __init__(self, settings: Settings, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        system = settings.system
        self._directory = Path(system.directory)
        self._accounts = Accounts(system.users, system.min_uid, system.operators)
        arguments = ["--service", system.directory, "--linger", f"{system.linger:g}s", *arguments]
        environment = environment_of(environ, system.environment)
        self._agents = Agents(self._directory, settings.arena.dir, system, node_of(settings), arguments, environment)
        self._board = Board(settings)
        self._gate = Gate()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused_at: dict[int, float] = {}
        self._trying = self._anew = False

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; the agents live on.

        On SIGHUP and SIGUSR2 this process executes its program anew, with new settings and code, and passes the signal
        on to the agents: they read their settings again, or do the same.

        Raises:
            ConfigError: this is not root, or the directory is not root's alone.
            RunBusy: another service serves this directory.
        """
        if os.geteuid() != 0:
            raise ConfigError("a service for all users must be started by root")
        raise_open_files()
        self._gate.most = min(self._gate.most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._agents.open()
        self._board.open()
        lock = _own(self._directory)
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        for number in (signal.SIGHUP, signal.SIGUSR2):
            loop.add_signal_handler(number, self._told_to_begin_anew, number, stopping)
        listener = _listening(self._directory / SOCKET)
        notifier, summary = Notifier.of(os.environ, os.getpid()), self._agents.summary
        lasting = [
            asyncio.ensure_future(c)
            for c in (self._accept(listener), notifier.beat(summary), self._board.run(self._agents))
        ]
        logger.info("the service of this node listens in %s", self._directory)
        notifier.ready(summary())
        try:
            await stopping.wait()
        finally:
            (notifier.reloading if self._anew else notifier.stopping)(summary())
            for task in (*lasting, *self._tasks):
                task.cancel()
            await asyncio.gather(*lasting, *self._tasks, return_exceptions=True)
            listener.close()
            self._agents.close()
            self._board.close()
            os.close(lock)
        if self._anew:
            # What comes is this process, and whoever watches it sees no end.
            for number in (signal.SIGHUP, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        logger.info("the service of this node has stopped; the agents of its users go on")

    def _told_to_begin_anew(self, number: int, stopping: asyncio.Event) -> None:
        if not self._trying:
            self._trying = True
            self._spawn(self._begin_anew(number, stopping))

    async def _begin_anew(self, number: int, stopping: asyncio.Event) -> None:
        """Give way to the program as it is installed now, if that starts and takes the settings."""
        try:
            why = await obstacle("--system")
            if not why:
                settings = load(os.environ)
                node_of(settings)
                group_of(settings.system.metrics_group)
        except ConfigError as error:
            why = str(error)
        self._trying = False
        if why:
            logger.warning("the service and its settings stay as they were: %s", why)
            return
        logger.info("the service of this node begins anew")
        self._agents.signal(number)
        self._anew = True
        stopping.set()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # where callers wait in line, accepting one waits for nothing, and nothing else runs
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, for now
                logger.warning("a caller could not be let in: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            sock.setblocking(False)
            pid, uid, gid = peer_of(sock)
            peer = _Peer(sock, pid, uid, gid)
            peer.visit = Visit(uid, partial(self._hang_up, peer))
            known = self._agents.serves(uid) or self._accounts.admits(uid)
            if why := self._gate.enter(peer.visit, known, time.monotonic()):
                with sock:
                    self._turn_away(peer, why)
                continue
            peer.serving = self._spawn(self._serve(peer))
            peer.serving.add_done_callback(partial(self._gone, peer))

    def _turn_away(self, peer: _Peer, why: str) -> None:
        with contextlib.suppress(OSError):
            send_answer(peer.sock, _refusal(LimitReached(why, hint="try again later")))
        now = time.monotonic()
        if now - self._refused_at.get(peer.uid, -TELL_EVERY) >= TELL_EVERY:
            if len(self._refused_at) >= BACKLOG:
                self._refused_at.clear()
            self._refused_at[peer.uid] = now
            logger.warning("callers are turned away: %s", why)

    def _hang_up(self, peer: _Peer) -> None:
        self._turn_away(peer, f"too many connections are open, and user {peer.uid} has most")
        if peer.serving is not None:
            peer.serving.cancel()

    def _gone(self, peer: _Peer, _: asyncio.Task[None]) -> None:
        self._gate.leave(peer.visit)
        if peer.is_agent:
            self._agents.disconnected(peer.uid, peer.sock)
        peer.sock.close()

    async def _serve(self, peer: _Peer) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                patience = None if peer.is_agent else QUIET
                data = await asyncio.wait_for(loop.sock_recv(peer.sock, MAX_REQUEST + 1), patience)
                if not data or not self._gate.asks(peer.uid, time.monotonic()):
                    return
                try:
                    answer = await self._answer(parse(data), peer)
                except CkptsvcError as error:
                    answer = _refusal(error)
                except Exception as error:
                    logger.exception("a request of process %d failed", peer.pid)
                    answer = {"ok": False, "code": "internal", "what": type(error).__name__, "hint": ""}
                if answer:
                    send_answer(peer.sock, answer)
                    if not answer["ok"]:
                        return
        except (OSError, TimeoutError):
            pass  # gone, silent, or it does not read its answers

    async def _answer(self, request: Request, peer: _Peer) -> dict[str, Any]:
        """The answer to a request, {} where there is to be none."""
        if peer.is_agent != (request.op == "state"):
            raise InvalidInput(f"{request.op!r} is not understood here")
        if request.op == "agent":
            if not self._agents.serves(peer.uid):
                await self._accounts.admit(peer.uid, peer.gid)
            with self._gate.waiting(peer.visit):
                return {"ok": True, "directory": str(await self._agents.agent_of(peer.uid, peer.gid))}
        if request.op == "agents":
            whose = None if await self._accounts.is_operator(peer.uid, peer.gid) else peer.uid
            return {"ok": True, "agents": list(self._agents.listed(whose))}
        if request.op == "serve":
            told = self._agents.connected(peer.uid, peer.pid, peer.sock)
            peer.is_agent = True
            self._gate.keep(peer.visit)
            return {"ok": True, **told}
        self._agents.told(peer.uid, peer.sock, request.ranks, request.busy, request.page)
        return {}


def parse(data: bytes) -> Request:
    """One packet.

    Raises:
        InvalidInput: it is no request.
    """
    if len(data) > MAX_REQUEST:
        raise InvalidInput(f"a request has at most {MAX_REQUEST} bytes")
    try:
        request = msgspec.json.decode(data, type=Request)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidInput(f"malformed message: {str(error)[:200]}") from None
    if not 0 <= request.ranks < 1 << 31:
        raise InvalidInput(f"{request.ranks} ranks are impossible")
    return request


def node_of(settings: Settings) -> Node:
    """What there is to divide on this node.

    Raises:
        ConfigError: the directory of the arenas is not there, or a setting does not go with several users.
    """
    for key, address in (("listen", settings.agent.listen), ("metrics_listen", settings.agent.metrics_listen)):
        if address is not None and address.port:
            raise ConfigError(f"agent.{key} is {address}: every user's agent needs a port of its own",
                hint=f'write port 0, as in "{address.host}:0"')  # fmt: skip
    memory = limit_on(settings.arena.limit, settings.arena.dir, "arena.dir")
    system, rate, local = settings.system, settings.store.max_write_rate or 0, 0
    if settings.tiers.local:
        with contextlib.suppress(OSError):  # a disk that is not there: every agent says so, and does without
            disk = os.statvfs(settings.tiers.local)
            local = settings.tiers.local_limit.of(disk.f_blocks * disk.f_frsize)
    return Node(memory, min(system.user_memory.of(memory), memory), rate, system.user_jobs, system.user_ranks, local)


def environment_of(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """What every agent has in its environment: nothing of the service's own but settings, and what is listed."""
    kept = {key: environ[key] for key in ("PYTHONPATH", "TZ", *names) if key in environ}
    settings = {k: v for k, v in environ.items() if k.startswith("CKPTSVC_") and k not in _NOT_PASSED_ON}
    return {"PATH": PATH, "LANG": "C.UTF-8", "PYTHONNOUSERSITE": "1"} | settings | kept


def _own(directory: Path) -> int:
    lock = os.open(directory / "service.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunBusy(f"another service serves {directory}") from None
    return lock


def _listening(path: Path) -> socket.socket:
    """Nobody but root writes where it is, so what is there is a dead service's."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o666)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _refusal(error: CkptsvcError) -> dict[str, Any]:
    return {"ok": False, "code": error.code, "what": error.what, "hint": error.hint}
