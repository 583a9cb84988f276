"""The training process's connection to its agent: registration, calls with deadlines, and the mapped arenas."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A forked child (a data loader's worker) never uses this process's channel: without this, grpc stops the whole
# process at every fork to find that out.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

import grpc

from ckptsvc.client.witness import testify
from ckptsvc.errors import AgentUnavailable
from ckptsvc.rpc.channel import OPTIONS, TOKEN_KEY, error_of
from ckptsvc.rpc.dial import sockets
from ckptsvc.rpc.identity import PAGE_BYTES, IdentityClient, Page
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

CALL_TIMEOUT = 5.0
"""Seconds for a call that the agent answers at once; a loop never waits longer for a dead one."""

ACQUIRE_TIMEOUT = 2.0
"""The same for an arena, on top of the patience: for so long a frozen agent holds up the training, and not so long that
the other ranks' agents take it for a hang."""

ASK_AGAIN = 10.0
"""Seconds the agent may take to answer how a save has ended: its answers show that it is there."""

_MADV_POPULATE_WRITE = 23


@dataclass(slots=True)
class Mapped:
    """An arena in this process's memory."""

    slot: str
    memory: mmap.mmap

    @property
    def view(self) -> memoryview:
        """All of it."""
        return memoryview(self.memory)


class AgentLink:
    """One rank's session at its agent.

    Args:
        directory: of the agent.
        registration: sent as it is (see rpc.identity).

    Attributes:
        identity: the connection; None while the agent is away.
        page: the heartbeat page.
    """

    def __init__(self, directory: Path, registration: dict[str, Any]) -> None:
        self.directory = directory
        self.registration = registration
        self.node = ""
        self.identity: IdentityClient | None = None
        self._channel: grpc.Channel | None = None
        self._stub: Any = None
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._page_memory = bytearray(Page.blank().ljust(PAGE_BYTES, b"\0"))
        self.page = Page(memoryview(self._page_memory))
        self._mapped: dict[str, Mapped] = {}
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._connecting = threading.Lock()

    def connect(self) -> None:
        """Register (again) unless connected; what the heartbeat page said is carried over.

        Raises:
            AgentUnavailable: nobody answers.
            CkptsvcError: the agent refuses.
        """
        with self._connecting:
            if self.identity is None:
                self._connect()

    def wait_gone(self) -> None:
        """Block until there is no connection (any more)."""
        identity = self.identity
        if identity is not None:
            identity.wait_closed()
            if self.identity is identity:
                self.disconnect()

    def _connect(self) -> None:
        grpc_path, identity_path = sockets(self.directory)
        identity = IdentityClient(identity_path)
        try:
            answer, fd = identity.call(self.registration)
        except BaseException:
            identity.close()
            raise
        if fd < 0:
            identity.close()
            raise AgentUnavailable("the agent sent no heartbeat page: out of descriptors?")
        memory = mmap.mmap(fd, PAGE_BYTES)
        os.close(fd)
        page, before = Page(memoryview(memory)), self.page
        page.carry(before)
        self.page = page
        page.carry(before)  # what the training thread has written meanwhile (see client.phases)
        self.node = answer["node"]
        self._metadata = ((TOKEN_KEY, answer["token"]),)
        self._channel = grpc.insecure_channel(f"unix:{grpc_path}", options=OPTIONS)
        self._stub = agent_pb2_grpc.AgentServiceStub(self._channel)
        self.identity = identity
        testify(identity_path, answer["token"])

    def disconnect(self) -> None:
        """Drop the connection; arenas stay mapped."""
        identity, channel = self.identity, self._channel
        self.identity = self._channel = self._stub = None
        if identity:
            identity.close()
        if channel:
            channel.close()

    def call(self, method: str, request: Any, timeout: float = CALL_TIMEOUT) -> Any:
        """One call.

        Raises:
            AgentUnavailable: no answer in time; the link is down until `connect`.
            CkptsvcError: what the agent answered.
        """
        stub = self._stub
        if stub is None:
            raise AgentUnavailable("not connected to the agent")
        try:
            return getattr(stub, method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as failure:
            error = error_of(failure)
            if isinstance(error, AgentUnavailable):
                self.disconnect()
            raise error from None

    def prepare(self, digest: str, generation: int, timeout: float) -> tuple[tuple[int, ...], bool]:
        """See agent.proto: (ranks with the same plain tensors, whether all have answered)."""
        request = agent_pb2.PrepareRequest(plain_digest=digest, generation=generation)
        answer = self.call("Prepare", request, timeout)
        self.registration["epoch"] = answer.epoch  # a new agent, or coordinator, learns it from us
        return tuple(answer.same_plain), answer.complete

    def rewind(self, count: int, timeout: float) -> None:
        """What is saved from now on belongs to a new epoch, for the count-th time in this attempt."""
        self.registration["epoch"] = self.call("Rewind", agent_pb2.RewindRequest(count=count), timeout).epoch

    def provide(self, nbytes: int, timeout: float) -> set[str]:
        """Have arenas set up, and map them, so that the first snapshots need not; returns them.

        Others are unmapped: the agent has given them up, and their memory is free only when nobody maps it.
        """
        slots = set(self.call("Provide", agent_pb2.ProvideRequest(bytes=nbytes), timeout).slots)
        for slot in slots:
            self.arena(slot)
        with self._lock:
            self._mapped = {slot: mapped for slot, mapped in self._mapped.items() if slot in slots}
        return slots

    def acquire(self, step: int, nbytes: int, patience: float) -> agent_pb2.AcquireResponse:
        """A free arena, waited for at most `patience` seconds."""
        request = agent_pb2.AcquireRequest(step=step, bytes=nbytes, patience=patience)
        answer: agent_pb2.AcquireResponse = self.call("Acquire", request, patience + ACQUIRE_TIMEOUT)
        self.registration["epoch"] = answer.epoch
        return answer

    def submit(self, request: agent_pb2.SubmitRequest) -> None:
        """The arena holds a whole shard image."""
        self.call("Submit", request)

    def is_mapped(self, slot: str) -> bool:
        """Whether `arena` returns at once."""
        return slot in self._mapped

    def unmap(self, slot: str) -> None:
        """Let an arena's memory go, once nobody looks at it."""
        with self._lock:
            self._mapped.pop(slot, None)

    def abandon(self, slot: str, step: int, reason: str, code: str = "") -> None:
        """This rank cannot take the snapshot; `code` is that of an error."""
        self.call("Abandon", agent_pb2.AbandonRequest(slot=slot, step=step, reason=reason, code=code))

    def add(self, word: str, amount: int) -> None:
        """Count something on the heartbeat page."""
        page = self.page
        page.put(word, page.get(word) + amount)

    def wait_save(
        self, step: int, timeout: float, progress: Callable[[], None] = lambda: None
    ) -> agent_pb2.SaveOutcome:
        """How the save ended; OUTCOME_UNSPECIFIED if it is still running after `timeout` seconds.

        `progress` is called with every answer of an agent that is still saving.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = min(max(deadline - time.monotonic(), 0.1), ASK_AGAIN)
            outcome: agent_pb2.SaveOutcome = self.call(
                "WaitSave", agent_pb2.WaitSaveRequest(step=step), left + 1.0
            ).outcome
            if outcome.outcome or time.monotonic() >= deadline:
                return outcome
            progress()

    def snapshots(self, timeout: float) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of this job in memory, newest first, and what had to be said about others."""
        answer: agent_pb2.ListSnapshotsResponse = self.call("ListSnapshots", agent_pb2.ListSnapshotsRequest(), timeout)
        return answer

    def refill(
        self, epoch: int, step: int, timeout: float, progress: Callable[[], None] = lambda: None
    ) -> agent_pb2.Snapshot:
        """Have the agent bring a snapshot from the local disk into memory; returns the shards that are there then.

        `progress` is called with every answer of an agent that is still at it.

        Raises:
            AgentUnavailable: it is not there, or not ready within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        request = agent_pb2.RefillRequest(epoch=epoch, step=step)
        while time.monotonic() < deadline:
            answer = self.call("Refill", request, ASK_AGAIN + 1.0)
            if answer.done:
                found: agent_pb2.Snapshot = answer.snapshot
                return found
            progress()
        raise AgentUnavailable(f"step {step} is not back in memory after {timeout:g} s")

    def leave(self) -> None:
        """End in good order."""
        self.call("Leave", agent_pb2.LeaveRequest())

    def arena(self, slot: str, *, writable: bool = True) -> Mapped:
        """An arena of this job in memory; pages are mapped before it is handed out.

        Raises:
            AgentUnavailable: the agent is gone.
        """
        with self._lock:
            known = self._mapped.get(slot)
        if known is not None:
            return known
        mapped = Mapped(slot, self._map(slot, writable))  # without the lock: large ones take a while
        if not writable:
            return mapped
        with self._lock:
            return self._mapped.setdefault(slot, mapped)

    def _map(self, slot: str, writable: bool) -> mmap.mmap:
        identity = self.identity
        if identity is None:
            raise AgentUnavailable("not connected to the agent")
        with self._asking:
            answer, fd = identity.call({"op": "map", "slot": slot})
        if fd < 0:
            raise AgentUnavailable("the agent sent no descriptor of the arena: out of descriptors?")
        try:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            memory = mmap.mmap(fd, answer["capacity"], mmap.MAP_SHARED, access)
        finally:
            os.close(fd)
        _populate(memory, writable)
        return memory


_libc = ctypes.CDLL(None, use_errno=True)


def _populate(memory: mmap.mmap, writable: bool) -> None:
    """Enter every page in the page tables now, not in the middle of a copy; older kernels (< 5.14) do it then."""
    if not writable:
        return  # the address of a read-only mapping is not to be had; a restore faults them in once
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), _MADV_POPULATE_WRITE)
