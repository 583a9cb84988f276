"""An agent's connection to the system service that has started it: how much there is to do, what it may take.

While there is none, the agent goes on with what it was told last (rpc.service has the protocol).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from ckptsvc.agent.local import Local
from ckptsvc.agent.tiers.local_tier import LocalTier
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.shares import Share
from ckptsvc.errors import AgentUnavailable
from ckptsvc.rpc.identity import MAX_PACKET, peer_of
from ckptsvc.rpc.service import SOCKET, is_there

logger = logging.getLogger("ckptsvc.agent")

TELL_EVERY = 0.5
"""Seconds between looks whether there is more, or less, to do."""

RECONNECT = 0.5
"""Seconds between attempts to reach the service."""

ANSWER_TIMEOUT = 10.0


class Told(msgspec.Struct, frozen=True):
    """What the service says."""

    ok: bool = True
    op: Literal["", "shares", "wanted"] = ""
    what: str = ""
    memory: int = 0
    write_rate: int = 0
    jobs: int = 0
    ranks: int = 0
    scrape: str = ""
    local: int = 0


class Tenancy:
    """Keeps the connection.

    Args:
        directory: of the service.
        local: the agent's state, whose limits change.
        workers: whose rate changes.
        is_idle: whether the agent has nothing to do.
        tier: the local disk, whose limit changes, if it is used.

    Attributes:
        page: where the agent serves HTTP, for the service to tell a Prometheus; "" for nowhere.
        on_scrape: hears what token that Prometheus will show.
    """

    def __init__(
        self, directory: Path, local: Local, workers: Workers, is_idle: Callable[[], bool], tier: LocalTier | None
    ) -> None:
        self._tier = tier
        self._directory, self._local, self._workers, self._is_idle = directory, local, workers, is_idle
        self._own = Share(local.pool.limit, workers.max_write_rate or 0, local.most_jobs, local.most_ranks)
        self._told: Told | None = None
        self.page = ""
        self.on_scrape: Callable[[str], None] = lambda token: None

    def settings_changed(self, memory: int | None, write_rate: int | None) -> None:
        """The agent's own limits have been read again (None: that of memory has not changed, no rate)."""
        memory = self._own.memory if memory is None else memory
        self._own = replace(self._own, memory=memory, write_rate=write_rate or 0)
        self._apply()

    async def run(self) -> None:
        """Connect, again and again, until cancelled."""
        said = ""
        while True:
            try:
                await self._talk()
                said = ""
            except (OSError, TimeoutError, AgentUnavailable, msgspec.MsgspecError) as error:
                why = str(error) or "no answer"
                if why != said:
                    logger.warning("not connected to the system service in %s: %s", self._directory, why)
                said = why
            await asyncio.sleep(RECONNECT)

    async def _talk(self) -> None:
        """One connection, to its end."""
        if not is_there(self._directory):
            raise AgentUnavailable("it is not there")
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
            await asyncio.wait_for(loop.sock_connect(sock, str(self._directory / SOCKET)), ANSWER_TIMEOUT)
            if peer_of(sock)[1] != 0:
                raise AgentUnavailable("who listens there is not root")
            sock.send(b'{"op":"serve"}')
            page = self._greeted(await asyncio.wait_for(loop.sock_recv(sock, MAX_PACKET), ANSWER_TIMEOUT))
            told = (-1, False)
            reading = asyncio.ensure_future(loop.sock_recv(sock, MAX_PACKET))
            try:
                while True:
                    state = (len(self._local.sessions), not self._is_idle())
                    if state != told:
                        sock.send(msgspec.json.encode({"op": "state", "ranks": state[0], "busy": state[1], **page}))
                        told = state
                    await asyncio.wait((reading,), timeout=TELL_EVERY)
                    if reading.done():
                        self._obey(reading.result())
                        reading = asyncio.ensure_future(loop.sock_recv(sock, MAX_PACKET))
            finally:
                reading.cancel()

    def _greeted(self, data: bytes) -> dict[str, str]:
        """Take the service's first answer; what it wants to hear of the page (one of an earlier version: nothing)."""
        told = self._obey(data)
        self.on_scrape(told.scrape)
        return {"page": self.page} if told.scrape else {}

    def _obey(self, data: bytes) -> Told:
        if not data:
            raise AgentUnavailable("it has closed the connection")
        told = msgspec.json.decode(data, type=Told)
        if not told.ok:
            raise AgentUnavailable(told.what)
        if told.op == "wanted":
            self._local.last_active = time.monotonic()
        else:
            self._told = told
            self._apply()
        return told

    def _apply(self) -> None:
        own, told, local = self._own, self._told, self._local
        if told is None:
            return
        local.pool.limit = min(own.memory, told.memory)
        self._workers.max_write_rate = min(filter(None, (own.write_rate, told.write_rate)), default=None)
        if self._tier is not None:
            self._tier.share = told.local or None
        local.most_jobs, local.most_ranks = min(own.jobs, told.jobs), min(own.ranks, told.ranks)
