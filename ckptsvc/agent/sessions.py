"""What an agent knows of its local ranks and jobs: plain state, changed in the event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field

from ckptsvc.agent.compression import Compression
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.watching.witness import Witness
from ckptsvc.control.deadline import Pace
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.identity import PAGE_BYTES, Page
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

Key = tuple[int, int]
"""(epoch, step)."""

REMEMBERED = 64
"""Outcomes kept for a job, and groups of ranks for an attempt."""


@dataclass(slots=True)
class Session:
    """One registered rank."""

    token: str
    reg: Registration
    pid: int
    pidfd: int
    page_fd: int
    memory: mmap.mmap
    page: Page
    arena_changed: asyncio.Event = field(default_factory=asyncio.Event)
    announced: tuple[int, str] | None = None  # generation, digest
    preparing: int = 0
    left: bool = False
    skipped: Key = (0, -1)  # the snapshot that it was last known not to take
    witness: Witness | None = None

    @staticmethod
    def open(reg: Registration, pid: int) -> Session:
        """Make the heartbeat page and watch the process.

        Raises:
            OSError: no descriptors or memory left, or the process is gone already.
        """
        page_fd = os.memfd_create(f"ckptsvc-page-{reg.rank}", os.MFD_CLOEXEC)
        os.truncate(page_fd, PAGE_BYTES)
        os.pwrite(page_fd, Page.blank(), 0)
        memory = mmap.mmap(page_fd, PAGE_BYTES)
        try:
            pidfd = os.pidfd_open(pid) if pid > 0 else -1  # 0: a process of another pid namespace
        except OSError:
            pidfd = -1
        return Session(secrets.token_hex(16), reg, pid, pidfd, page_fd, memory, Page(memoryview(memory)))

    def page_fd_copy(self) -> int:
        """A descriptor of the page to give away."""
        return os.dup(self.page_fd)

    def close(self) -> None:
        """Give the descriptors back."""
        if self.witness is not None:
            self.witness.close()
        for fd in (self.page_fd, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.page_fd = self.pidfd = -1
        with contextlib.suppress(BufferError):
            self.memory.close()


@dataclass(slots=True)
class Attempt:
    """What the coordinator has decided about one attempt of a job."""

    epoch: int = 0
    rewinds: int = 0
    epoch_error: CkptsvcError | None = None
    refused: CkptsvcError | None = None
    groups: dict[int, list[list[int]]] = field(default_factory=dict)  # by generation
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Let those who wait look again."""
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(slots=True)
class LocalJob:
    """What this node knows of one job."""

    name: str
    coordinator: str
    store: str
    attempts: dict[int, Attempt] = field(default_factory=dict)
    outcomes: OrderedDict[Key, agent_pb2.SaveOutcome] = field(default_factory=OrderedDict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    results: dict[tuple[int, int, int], pb.Report] = field(default_factory=dict)  # Durable or ShardFailed, by shard
    skips: dict[Key, pb.Report] = field(default_factory=dict)  # Skipped; of saves that have not ended yet
    digests: dict[str, asyncio.Future[bytes]] = field(default_factory=dict)  # by arena
    complete: set[Key] = field(default_factory=set)
    newest: Key = (0, -1)  # of those that are known to be committed: saves may end in another order than they began
    idle_since: float = 0.0
    died: bool = False
    pace: Pace = field(default_factory=Pace)
    compression: Compression = field(default_factory=Compression)

    def attempt(self, number: int) -> Attempt:
        """The attempt of that number."""
        return self.attempts.setdefault(number, Attempt())

    def skip(self, key: Key, report: pb.Report) -> None:
        """Remember that a rank of this node cannot take a snapshot, until the save has ended."""
        self.skips[key] = report
        while len(self.skips) > REMEMBERED:
            del self.skips[next(iter(self.skips))]

    def record(self, outcome: agent_pb2.SaveOutcome) -> None:
        """Remember how a save ended and wake those who wait."""
        self.outcomes[outcome.epoch, outcome.step] = outcome
        self.skips.pop((outcome.epoch, outcome.step), None)
        while len(self.outcomes) > REMEMBERED:
            self.outcomes.popitem(last=False)
        self.ended.set()
        self.ended = asyncio.Event()
