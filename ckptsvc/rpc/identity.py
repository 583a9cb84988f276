"""The identity socket: who is calling, proven by the kernel, and descriptors for shared memory.

grpcio gives no peer credentials on unix sockets, so a training process first connects here (SOCK_SEQPACKET; the agent
reads SO_PEERCRED). One packet is one JSON message; descriptors travel beside the answer. The connection stays open for
the life of the session.

    register  {op, job, store, attempt, rank, world_size, epoch, every_steps, every_seconds, keep, extent, coordinator,
               ends}
              -> {ok, token, node} + descriptor of the heartbeat page
    map       {op, slot} -> {ok, capacity} + descriptor of the arena
    yield     {op} -> {ok}: the agent ends at once, for a service that wants to serve here; a service refuses

A second connection of the same process turns round after its one message: from then on the agent asks (rpc.testimony).

    witness   {op, token} -> {ok}

Who gives an order (`ckptsvc pause`) says here who he is, and leaves the connection open until he has his answer.

    caller    {op} -> {ok, token, node}
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec

from ckptsvc.errors import BY_CODE, AgentUnavailable, CkptsvcError

MAX_STEP = 1 << 53
"""Of steps, and of epochs: one more is a number of its own in JSON as well."""

MAX_PACKET = 64 << 10
"""Bytes in one message."""

PAGE = struct.Struct("<qQqqqqqqqq32sqqqqqqq")
"""The heartbeat page: steps done, CLOCK_MONOTONIC nanoseconds of the last sign of life (written by the rank); step to
save at, step to stop at, last committed step, last step whose save failed (written by the agent; -1 means none); how
many phases the rank has gone through, when the present one began, how far it is, the number of the signal by which it
was asked to stop (or 0), and the phase's name; so far: nanoseconds for which snapshots have held the loop up, and for
which it has waited for saves, how many snapshots that were, and how many could not be taken because no agent was there;
steps done when the rank began to step, restored or afresh, or -1 (written by the rank); the step from which on it takes
no automatic snapshots, and the one from which on it takes them again (written by the agent; 0 means none).
The words are aligned: each is read and written whole. A phase's number is written last: with it, its name is there."""

PAGE_BYTES = 4096
PHASE_BYTES = 32
"""Bytes in the name of a phase, padded with zeros."""

_FIELDS = {
    "step": 0, "at": 8, "save_at": 16, "stop_at": 24, "committed": 32, "failed": 40,
    "phases": 48, "since": 56, "progress": 64, "signal": 72,
    "blocked": 112, "waited": 120, "snapshots": 128, "missed": 136, "began": 144,
    "paused": 152, "resumed": 160,
}  # fmt: skip
_AT, _PHASES, _SINCE, _PROGRESS, _NAME = 1, 6, 7, 8, 80


class Page:
    """The heartbeat page of one rank, shared by the rank and the agent."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory[: PAGE.size].cast("q")
        self._name = memory[_NAME : _NAME + PHASE_BYTES]

    @staticmethod
    def blank() -> bytes:
        """The page before anything has happened."""
        return PAGE.pack(0, 0, -1, -1, -1, -1, 0, 0, 0, 0, b"", 0, 0, 0, 0, -1, 0, 0)

    def get(self, name: str) -> int:
        """Read one word."""
        return self._words[_FIELDS[name] // 8]

    def told(self, name: str) -> int:
        """Read one word that a rank has written, as far as it can be: nobody passes on anything else (rpc.bounds)."""
        return min(max(self.get(name), 0), MAX_STEP)

    def put(self, name: str, value: int) -> None:
        """Write one word."""
        self._words[_FIELDS[name] // 8] = value

    @property
    def phase(self) -> str:
        """Name of the phase the rank is in; "" before the first."""
        raw = bytes(self._name).split(b"\0", 1)[0]
        return "".join(c if c.isprintable() else "?" for c in raw.decode("ascii", "replace"))

    def enter(self, name: bytes, now: int) -> None:
        """Begin a phase (`name` of PHASE_BYTES) at `now`, in CLOCK_MONOTONIC nanoseconds."""
        words = self._words
        self._name[:] = name
        words[_SINCE] = words[_AT] = now
        words[_PROGRESS] = 0
        words[_PHASES] += 1

    def advance(self, amount: int, now: int) -> None:
        """Note that the phase is `amount` further, in whatever unit it counts."""
        self._words[_PROGRESS] += amount
        self._words[_AT] = now

    def is_paused(self, step: int) -> bool:
        """Whether an automatic snapshot of this step is not to be taken; every rank finds the same."""
        paused, resumed = self.get("paused"), self.get("resumed")
        return 0 < paused <= step and not paused < resumed <= step

    def carry(self, older: Page) -> None:
        """Take over what the rank has written to another page, unless this one is further; and an order to pause."""
        self.put("signal", self.get("signal") or older.get("signal"))
        for word in ("blocked", "waited", "snapshots", "missed", "began"):
            self.put(word, max(self.get(word), older.get(word)))
        if not self.get("paused"):  # an agent that knows of none has been restarted, and may not have heard of it yet
            self.put("resumed", older.get("resumed"))
            self.put("paused", older.get("paused"))
        if (older.get("phases"), older.get("at")) > (self.get("phases"), self.get("at")):
            self._name[:] = older._name
            for word in ("step", "at", "since", "progress", "phases"):
                self.put(word, older.get(word))


class IdentityClient:
    """The end of a training process, or of one that gives orders.

    Args:
        path: of the socket.
        timeout: seconds for one answer.
        of_anybody: root may speak to another user's agent.

    Attributes:
        peer: process id of the agent; 0 where it is of another pid namespace.
        owner: user id of the agent: this user's, or 0.
    """

    def __init__(self, path: str, timeout: float = 10.0, *, of_anybody: bool = False) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(timeout)
        try:
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise AgentUnavailable(f"no agent answers on {path}: {error.strerror or error}") from error
        self.peer, self.owner, _ = peer_of(self._sock)
        if self.owner not in (os.geteuid(), 0) and not (of_anybody and os.geteuid() == 0):
            self._sock.close()
            raise AgentUnavailable(f"the process that listens on {path} belongs to user {self.owner}")

    def call(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Send one message; returns the answer and the descriptor that came with it (the caller closes it), or -1.

        Raises:
            AgentUnavailable: the agent is gone or does not answer.
            CkptsvcError: what the agent refused with.
        """
        try:
            self._sock.send(msgspec.json.encode(message))
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_PACKET, 1)
        except OSError as error:
            raise AgentUnavailable(f"the agent does not answer: {error.strerror or error}") from error
        if not data:
            raise AgentUnavailable("the agent has closed the connection")
        answer = msgspec.json.decode(data)
        fd = fds[0] if fds else -1
        if not answer.get("ok"):
            if fd >= 0:
                os.close(fd)
            error_type = BY_CODE.get(answer.get("code", ""), CkptsvcError)
            raise error_type(answer.get("what", "refused"), hint=answer.get("hint", ""))
        return answer, fd

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer what the agent asks, until it hangs up."""
        self._sock.settimeout(None)
        with self._sock:
            while True:
                try:
                    question = self._sock.recv(MAX_PACKET)
                    if not question:
                        return
                    self._sock.send(answer(question))
                except OSError:
                    return

    def wait_closed(self) -> None:
        """Block until the connection has ended, from either side."""
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLRDHUP)
            poll.poll()
        except (OSError, ValueError):
            return  # closed already

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes `wait_closed`, which closing alone would not
        self._sock.close()


def peer_of(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end, as the kernel knows them."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def send_answer(sock: socket.socket, answer: dict[str, Any], fd: int = -1) -> None:
    """Send one answer, with a descriptor if there is one."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())] if fd >= 0 else []
    sock.sendmsg([msgspec.json.encode(answer)], rights)
