"""How bytes of arenas go from one node to another: a connection between two couriers, opened with a ticket.

The agent that wants to read asks the other for a ticket, over the calls that agents prove themselves on (rpc.trust).
To the ticket belongs a key, which no connection between couriers carries: on one host both derive it from their secret,
between hosts it comes with the ticket, encrypted. Between hosts, all of this goes over TLS, with the certificates that
the agents themselves show each other (rpc.tls). Integers are little-endian:

    reader -> holder   MAGIC, ticket (32), nonce (32), proof("reads")
    holder -> reader   proof("serves")
    reader -> holder   Request: number of the file, offset, length      again and again
    holder -> reader   so many bytes, as they lie in the file

    proof(role) = HMAC-SHA256(key, role, ticket, nonce)

A ticket is good for the files it was given for, for `MAX_STREAMS` connections, each with a nonce of its own, that begin
within `TICKET_SECONDS`. Whoever comes without one
is told nothing, and held for `HELLO_SECONDS` at most. The reader knows the checksum of every extent from the agents'
call: what does not match is not taken, whether the arena was filled anew meanwhile or somebody else answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import xxhash

from ckptsvc.errors import AgentUnavailable, ArenaExhausted, Damaged, InvalidInput, SaveFailed
from ckptsvc.quantities import parse_address
from ckptsvc.rpc.tls import Shown

MAGIC = b"ckptsvc transfer 1\n".ljust(32, b"\0")
REQUEST = struct.Struct("<IQQ")

MAX_STREAMS = 8
"""Connections over which one transfer goes at a time, at most: one core each, at either end."""

TICKET_BYTES = 32
_HELLO = struct.Struct("<32s32s32s32s")

TICKET_SECONDS = 60.0
HELLO_SECONDS = 10.0
IDLE_SECONDS = 120.0
"""Seconds in which a reader takes nothing after which it is given up; one that is held back takes less."""

SILENT_SECONDS = 15.0
"""Seconds without a byte after which a holder is given up: nothing holds it back."""

MAX_TICKETS = 1 << 12
"""Tickets that wait for their connection; beyond, the oldest is forgotten."""

MAX_CONNECTIONS = 256
"""Served at a time; who comes then is turned away."""

LOW_PRIORITY = 0x04
"""The DSCP "lower effort" (RFC 8622) in the byte it is set by: networks that know it let all else pass first."""

_MOST = 1 << 30
"""Bytes that are asked of the kernel at a time."""

_ENCRYPTED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """An arena, and how many of its bytes may be read."""

    path: str
    nbytes: int


def new_ticket() -> str:
    """One that nobody has."""
    return secrets.token_hex(TICKET_BYTES)


def _proof(key: str, role: bytes, ticket: bytes, nonce: bytes) -> bytes:
    return hmac.new(bytes.fromhex(key), role + ticket + nonce, hashlib.sha256).digest()


@dataclass(slots=True)
class _Ticket:
    key: str
    files: list[File]
    until: float
    nonces: set[bytes] = field(default_factory=set)


class Tickets:
    """Those that have been given out. Safe to use from several threads."""

    def __init__(self) -> None:
        self._open: dict[bytes, _Ticket] = {}
        self._lock = threading.Lock()

    def admit(self, ticket: str, key: str, files: list[File]) -> None:
        """Let who shows this ticket and knows its key read these files."""
        with self._lock:
            now = time.monotonic()
            for old in [raw for raw, known in self._open.items() if known.until < now]:
                del self._open[old]
            while len(self._open) >= MAX_TICKETS:
                del self._open[next(iter(self._open))]
            self._open[bytes.fromhex(ticket)] = _Ticket(key, files, now + TICKET_SECONDS)

    def take(self, ticket: bytes, nonce: bytes, proof: bytes) -> tuple[bytes, list[File]] | None:
        """The answer to a reader who has proved that the ticket is his, and what he may read; None for anybody else."""
        with self._lock:
            known = self._open.get(ticket)
            if known is None or time.monotonic() > known.until or nonce in known.nonces:
                return None
            if not hmac.compare_digest(proof, _proof(known.key, b"reads", ticket, nonce)):
                return None
            known.nonces.add(nonce)
            if len(known.nonces) == MAX_STREAMS:
                del self._open[ticket]
        return _proof(known.key, b"serves", ticket, nonce), known.files


class Listener:
    """Serves connections in threads of their own; `port` is where.

    Attributes:
        shown: certificates for those that connect from now on; None: without TLS, on one host.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, host: str, tickets: Tickets, shown: Shown | None = None) -> None:
        self.shown = shown
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
        self._tickets = tickets
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, name="ckptsvc-listen", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # no descriptors, or a connection that has ended again
                time.sleep(0.1)
                continue
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="ckptsvc-serve", daemon=True).start()
            except RuntimeError:  # no more threads; who reads will be heard another time
                self._free.release()
                connection.close()
                time.sleep(0.1)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError, InvalidInput):
                stack.enter_context(connection)
                if self.shown is not None:
                    connection.settimeout(HELLO_SECONDS)
                    connection = stack.enter_context(self.shown.accepted(connection))
                files = self._admit(connection)
                if files is not None:
                    yield_to_others(connection)
                    connection.settimeout(IDLE_SECONDS)
                    _answer(connection, files)
        finally:
            self._free.release()

    def _admit(self, connection: socket.socket) -> list[File] | None:
        hello = bytearray(_HELLO.size)
        _receive(connection, memoryview(hello), time.monotonic() + HELLO_SECONDS)
        magic, ticket, nonce, proof = _HELLO.unpack(hello)
        taken = self._tickets.take(ticket, nonce, proof) if magic == MAGIC else None
        if taken is None:
            return None
        connection.sendall(taken[0])
        return taken[1]


def _answer(connection: socket.socket, files: Sequence[File]) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(file.path, "rb", buffering=0)) for file in files]
        request = bytearray(REQUEST.size)
        while True:
            _receive(connection, memoryview(request))
            number, offset, length = REQUEST.unpack(request)
            if number >= len(files) or offset + length > files[number].nbytes:
                raise InvalidInput("a request for what the ticket is not for")
            while length:
                sent = _send(connection, opened[number], offset, length)
                if not sent:
                    raise InvalidInput("the arena has become shorter")
                offset, length = offset + sent, length - sent


def _send(connection: socket.socket, file: BinaryIO, offset: int, length: int) -> int:
    """Send some of so many bytes of a file, at least one if there is any; returns how many."""
    if not isinstance(connection, ssl.SSLSocket):
        return connection.sendfile(file, offset, min(length, _MOST))
    block = os.pread(file.fileno(), min(length, _ENCRYPTED_AT_ONCE), offset)
    connection.sendall(block)
    return len(block)


def yield_to_others(connection: socket.socket) -> None:
    """Ask the network to let all other traffic pass first."""
    with contextlib.suppress(OSError):
        if connection.family is socket.AF_INET6:
            connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, LOW_PRIORITY)
        else:
            connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, LOW_PRIORITY)


class Reader:
    """The reader's end of a connection; `nbytes` counts what has come; `shown` as in `Listener`.

    Raises:
        AgentUnavailable: nobody answers there, or who does has not proved to know the ticket's key.
    """

    def __init__(self, address: str, ticket: str, key: str, shown: Shown | None = None) -> None:
        self._address, self.nbytes = address, 0
        host, port = parse_address(address)
        nonce = secrets.token_bytes(32)
        raw = bytes.fromhex(ticket)
        hello = _HELLO.pack(MAGIC, raw, nonce, _proof(key, b"reads", raw, nonce))
        answer = bytearray(32)
        try:
            self._socket = socket.create_connection((host, port), HELLO_SECONDS)
        except OSError as error:
            raise AgentUnavailable(f"the transfer from {address} did not begin: {error}") from error
        try:
            yield_to_others(self._socket)
            if shown is not None:
                self._socket = shown.connected(self._socket)
            self._socket.sendall(hello)
            _receive(self._socket, memoryview(answer), time.monotonic() + HELLO_SECONDS)
            self._socket.settimeout(SILENT_SECONDS)
        except OSError as error:
            self._socket.close()
            raise AgentUnavailable(f"the transfer from {address} did not begin: {error}") from error
        if not hmac.compare_digest(bytes(answer), _proof(key, b"serves", raw, nonce)):
            self._socket.close()
            raise AgentUnavailable(f"what listens at {address} is no agent of ours")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, number: int, offset: int, length: int) -> None:
        """Have so many bytes of a file sent; `take` must take them all, in the order in which they were asked for."""
        try:
            self._socket.sendall(REQUEST.pack(number, offset, length))
        except OSError as error:
            raise self._broken(error) from error

    def take(self, into: memoryview) -> None:
        """The next bytes.

        Raises:
            SaveFailed: the connection has broken.
        """
        try:
            _receive(self._socket, into)
        except OSError as error:
            raise self._broken(error) from error
        self.nbytes += len(into)

    def _broken(self, error: OSError) -> SaveFailed:
        return SaveFailed(f"the transfer from {self._address} broke off: {error}")


def _receive(connection: socket.socket, into: memoryview, deadline: float | None = None) -> None:
    """Fill the buffer; with a deadline (CLOCK_MONOTONIC), however slowly the bytes come.

    Raises:
        OSError: the other side has ended, or takes too long.
    """
    while into:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        got = connection.recv_into(into)
        if not got:
            raise ConnectionResetError("the other side has closed the connection")
        into = into[got:]


class Pace:
    """How fast this process may read from others: a rate for all connections together, and now and then not at all.

    Args:
        rate: bytes per second; 0: as fast as it goes.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._due = rate, time.monotonic()
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._going.set()

    def hold(self, *, on: bool) -> None:
        """Stand still, or go on."""
        if on:
            self._going.clear()
        else:
            self._going.set()

    def wait(self, nbytes: int) -> None:
        """Wait until so many bytes more may be read."""
        self._going.wait(HOLD_SECONDS)
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now - _BURST) + nbytes / self._rate
            wait = self._due - now
        if wait > 0:
            time.sleep(wait)


HOLD_SECONDS = 30.0
"""The longest that `Pace.hold` holds anybody: less than `IDLE_SECONDS`."""

_BURST = 0.05
"""Seconds of the rate that may be made up for at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file that a ticket is for, and the checksums of its extents."""

    number: int
    nbytes: int
    extent: int
    digests: bytes

    @property
    def extents(self) -> int:
        """How many it has."""
        return -(-self.nbytes // self.extent)


def open_arena(path: str) -> int:
    """An arena to write to; the caller closes the descriptor.

    Raises:
        ArenaExhausted: it is not there any more.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ArenaExhausted(f"the arena {path} is gone: {error.strerror}") from error


def runs(pieces: Sequence[Piece], first: int, count: int) -> Iterator[tuple[Piece, int, int]]:
    """The parts of a row of pieces that extents `first` to `first + count` lie in: (piece, its first extent, count)."""
    start = 0
    for piece in pieces:
        low, high = max(first, start), min(first + count, start + piece.extents)
        if low < high:
            yield piece, low - start, high - low
        start += piece.extents


def matches(block: memoryview, piece: Piece, extent: int) -> bool:
    """Whether this is that extent, by its checksum."""
    return xxhash.xxh3_64_digest(block)[::-1] == piece.digests[8 * extent : 8 * extent + 8]


def check(block: memoryview, piece: Piece, extent: int, what: str) -> None:
    """Compare an extent with its checksum.

    Raises:
        Damaged: they differ.
    """
    if not matches(block, piece, extent):
        raise Damaged(f"{what}: extent {extent} does not match its checksum")
