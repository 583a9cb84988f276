"""The agent's end of the identity socket: registers ranks by kernel credentials, hands out shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import socket
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol

import msgspec

from ckptsvc.agent.watching.witness import Witness
from ckptsvc.config import LARGEST_EXTENT, PAGE
from ckptsvc.errors import CkptsvcError, InvalidInput, StoreDenied
from ckptsvc.pipeline.retention import Policy
from ckptsvc.rpc.bounds import COUNT, MOST_RANKS, NAME, PATH, SECONDS, STEP, WHOLE
from ckptsvc.rpc.identity import MAX_PACKET, peer_of, send_answer
from ckptsvc.storage import canonical

log = logging.getLogger("ckptsvc.agent")

ACCEPT_AGAIN = 0.2
"""Seconds after which an agent that was out of descriptors looks again who wants to register."""


QUIET = 30.0
"""Seconds after which a connection that has said nothing is closed: each takes a descriptor."""


class Registration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a rank says of itself. `keep` is how many checkpoints stay at least; `retention` says which others do.

    `coordinator` is "" for this very agent; `ends` is when the scheduler ends the job, in seconds of CLOCK_MONOTONIC,
    or 0 where that is not known.
    """

    op: str
    job: str
    store: str
    attempt: int
    rank: int
    world_size: int
    epoch: int = 0
    every_steps: int = 0
    every_seconds: float = 0.0
    keep: int = 0
    retention: Policy = Policy()
    extent: int = 1 << 20
    coordinator: str = ""
    ends: float = 0.0

    def check(self) -> None:
        """Raise InvalidInput where the numbers cannot be."""
        if not 0 <= self.rank < self.world_size <= MOST_RANKS:
            raise InvalidInput(f"rank {self.rank} of {self.world_size} is impossible")
        if not self.job or not NAME(self.job) or not self.store or not PATH(self.store):
            raise InvalidInput("a job needs a name of at most 256 printable, and a store of at most 4096 characters")
        if canonical(self.store) != self.store:
            raise InvalidInput(f"the store {self.store[:200]!r} is no URL: an agent has a working directory of its own")
        if len(self.coordinator) > 300:
            raise InvalidInput("an address has at most 300 characters")
        # What goes into a report must fit its fields (rpc.bounds).
        counts = COUNT(self.attempt) and WHOLE(self.keep) and STEP(self.epoch) and STEP(self.every_steps)
        if not counts or not SECONDS(self.every_seconds) or not NAME(self.retention.metric):
            raise InvalidInput("attempt, epoch, keep, every_steps, every_seconds or retention is out of range")
        if not 0 <= self.ends < math.inf:
            raise InvalidInput("the time at which the job ends is out of range")
        if not 0 < self.extent <= LARGEST_EXTENT or self.extent % PAGE:
            raise InvalidInput(f"an extent of {self.extent} bytes is impossible")


class MapRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for an arena's descriptor."""

    op: str
    slot: str


class CallerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say who one is, for an order that is about to be given."""

    op: str


class WitnessRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offer to answer questions about the process of a session."""

    op: str
    token: str


class YieldRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask an agent that a job has started to make way for a service."""

    op: str


class Owner(Protocol):
    """What the identity socket needs of the node."""

    def register(self, registration: Registration, pid: int) -> tuple[str, str, int]:
        """Take a rank in: returns its token, the node's name and a descriptor of its heartbeat page."""

    def unregister(self, token: str) -> None:
        """The connection has ended."""

    def arena_fd(self, token: str, slot: str) -> tuple[int, int]:
        """A new descriptor of an arena of the rank's job, and its capacity."""

    def hear(self, token: str, pid: int, witness: Witness) -> None:
        """Keep the way to ask the process of a session."""

    def give_way(self) -> None:
        """End, and leave everything to another agent; InvalidInput if this is a service."""


class Admits(Protocol):
    """What the identity socket needs of those who give orders."""

    async def admit(self, uid: int, pid: int) -> str:
        """Give a token to a process of a user, or raise StoreDenied."""

    def dismiss(self, token: str) -> None:
        """The connection has ended."""


class IdentityServer:
    """Listens on the identity socket within the agent's event loop."""

    def __init__(self, path: str, owner: Owner, callers: Admits) -> None:
        self._path = path
        self._owner, self._callers = owner, callers
        self._tasks: set[asyncio.Task[None]] = set()
        self._sock: socket.socket | None = None
        self._stopped = False

    async def start(self) -> None:
        """Begin to listen; the caller owns the directory, so a file of that name is a dead agent's."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._sock.bind(self._path)
        os.chmod(self._path, 0o600)
        self._sock.listen(128)
        self._spawn(self._accept(self._sock))

    async def stop(self) -> None:
        """Close all connections; the ranks go on, and register with the next agent."""
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._sock:
            self._sock.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop, said = asyncio.get_running_loop(), ""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        while True:
            await asyncio.sleep(0)  # where many wait in line, nothing else would run
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, for now
                if str(error) != said:
                    log.warning("ranks cannot be let in: %s; trying again until they can", error)
                said = str(error)
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            if said:
                log.warning("ranks can be let in again")
                said = ""
            if len(self._tasks) > most:
                sock.close()  # what is left is for arenas, pages and stores
                continue
            sock.setblocking(False)
            self._spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        token = caller = ""
        try:
            pid, uid, _ = peer_of(sock)
            while True:
                receiving = loop.sock_recv(sock, MAX_PACKET)
                data = await (receiving if token else asyncio.wait_for(receiving, QUIET))
                if not data:
                    return
                try:
                    reply = await self._answer(data, sock, pid, uid, token)
                    token = reply.token
                    if reply.caller:
                        self._callers.dismiss(caller)
                        caller = reply.caller
                except CkptsvcError as error:
                    reply = _refusal(error.code, error.what, error.hint)
                except OSError as error:  # no descriptors, no memory
                    log.warning("process %d is refused: %s", pid, error)
                    reply = _refusal("internal", f"the agent cannot: {error.strerror or error}")
                except Exception as error:
                    log.exception("a message of process %d failed", pid)
                    reply = _refusal("internal", f"{type(error).__name__}: {error}")
                try:
                    send_answer(sock, reply.fields, reply.fd)
                finally:
                    if reply.fd >= 0:
                        os.close(reply.fd)
                if reply.witness is not None:
                    await reply.witness.closed()  # from now on we ask
                    return
        except (ConnectionError, BlockingIOError, TimeoutError):
            pass  # the peer is gone, does not read its answers, or never said what it wants
        finally:
            sock.close()
            if token and not self._stopped:
                self._owner.unregister(token)
            if caller:
                self._callers.dismiss(caller)

    async def _answer(self, data: bytes, sock: socket.socket, pid: int, uid: int, token: str) -> _Reply:
        try:
            op = msgspec.json.decode(data, type=dict).get("op")
            wanted: Registration | MapRequest | WitnessRequest | YieldRequest
            if op == "caller":
                msgspec.json.decode(data, type=CallerRequest)
                caller = await self._callers.admit(uid, pid)
                return _Reply({"ok": True, "token": caller}, token=token, caller=caller)
            if uid != os.geteuid():
                raise StoreDenied(f"this agent serves user {os.geteuid()}, not user {uid}")
            if op == "register" and not token:
                wanted = msgspec.json.decode(data, type=Registration)
            elif op == "map" and token:
                wanted = msgspec.json.decode(data, type=MapRequest)
            elif op == "witness" and not token:
                wanted = msgspec.json.decode(data, type=WitnessRequest)
            elif op == "yield" and not token:
                wanted = msgspec.json.decode(data, type=YieldRequest)
            else:
                raise InvalidInput(f"{op!r} is not understood here")
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise InvalidInput(f"malformed message: {error}") from None
        if isinstance(wanted, Registration):
            wanted.check()
            token, node, fd = self._owner.register(wanted, pid)
            return _Reply({"ok": True, "token": token, "node": node}, fd, token)
        if isinstance(wanted, MapRequest):
            fd, capacity = self._owner.arena_fd(token, wanted.slot)
            return _Reply({"ok": True, "capacity": capacity}, fd, token)
        if isinstance(wanted, YieldRequest):
            self._owner.give_way()
            return _Reply({"ok": True})
        witness = Witness(sock)
        self._owner.hear(wanted.token, pid, witness)
        return _Reply({"ok": True}, witness=witness)


class _Reply(NamedTuple):
    fields: dict[str, object]
    fd: int = -1
    token: str = ""  # of the session that this connection has
    caller: str = ""  # the token of one who gives orders
    witness: Witness | None = None


def _refusal(code: str, what: str, hint: str = "") -> _Reply:
    return _Reply({"ok": False, "code": code, "what": what, "hint": hint})
