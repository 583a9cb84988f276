"""The least of gRPC over HTTP/2 (RFC 9113) that ten thousand simulated agents need in one process.

grpcio takes about 100 KiB and 100 microseconds for what is 10 KiB and 10 microseconds here: one call in both directions
on a connection, messages that are bytes already, and an answer to every ping. The other side is the real thing.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW = 4
_HEAD = struct.Struct(">HBBBI")  # length (its upper 16 bits, its last 8), type, flags, stream
_SETTING = struct.Struct(">HI")
_PREFIX = struct.Struct(">BI")  # of a gRPC message: compressed or not, length

FRAME = 16384
"""Bytes of a frame that every receiver takes."""

WINDOW = 65535
"""Bytes that may be on their way before the receiver has said anything."""

_WIDE = (1 << 31) - 1


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return _HEAD.pack(len(body) >> 8, len(body) & 0xFF, kind, flags, stream) + body


def _literal(name: str, value: str) -> bytes:
    """A header that nobody needs to remember (RFC 7541, 6.2.2); both texts are shorter than 127 bytes."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


_PINGED, _PONG = _frame(_PING, 0, 0, bytes(8))[:9], _frame(_PING, _ACK, 0, bytes(8))[:9]
_PING_BYTES = 17

_READ = bytearray(1 << 16)

_HELLO = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(_SETTINGS, 0, 0, _SETTING.pack(_INITIAL_WINDOW, _WIDE))
    + _frame(_WINDOW_UPDATE, 0, 0, (_WIDE - WINDOW).to_bytes(4, "big"))
)


@dataclass(slots=True)
class Call:
    """One call on a connection.

    Attributes:
        on_message: called with every message of the server.
        on_end: called when the call or its connection has ended, unless we ended it.
    """

    number: int
    on_message: Callable[[bytes], None]
    on_end: Callable[[], None]
    window: int
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: deque[memoryview] = field(default_factory=deque)  # what the windows have not let through yet


class Connection(asyncio.BufferedProtocol):
    """One connection, with a call for each agent on it.

    Attributes:
        frozen: nothing is read or answered any more, as by a host that is cut off.
        ended: the connection is gone.
        received, sent: bytes.
    """

    def __init__(self, path: str) -> None:
        headers = {"content-type": "application/grpc", "te": "trailers"}
        # Indexed: POST and http.
        self._headers = b"\x83\x86" + b"".join(
            _literal(*pair) for pair in ((":path", path), (":authority", "coordinator"), *headers.items())
        )
        self.calls: dict[int, Call] = {}
        self.frozen = self.ended = False
        self.received = self.sent = 0
        self._next = 1
        self._window, self._stream_window = WINDOW, WINDOW
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def waiting(self) -> bool:
        """Whether anything has not been sent yet."""
        return any(call.outgoing for call in self.calls.values())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._write(_HELLO)

    def connection_lost(self, exc: Exception | None) -> None:
        """All calls on it have ended."""
        calls, self.calls, self._transport, self.ended = self.calls, {}, None, True
        for call in calls.values():
            call.on_end()

    def call(
        self,
        metadata: Iterable[tuple[str, str]],
        on_message: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> Call:
        """Begin a call."""
        call = Call(self._next, on_message, on_end, self._stream_window)
        self._next += 2
        self.calls[call.number] = call
        headers = self._headers + b"".join(_literal(*pair) for pair in metadata)
        self._write(_frame(_HEADERS, _END_HEADERS, call.number, headers))
        return call

    def send(self, call: Call, message: bytes) -> None:
        """Send one message of a call."""
        call.outgoing.append(memoryview(_PREFIX.pack(0, len(message)) + message))
        self._flush(call)

    def end(self, call: Call) -> None:
        """Break one call off, and the connection with its last one; `on_end` is not called."""
        if self.calls.pop(call.number, None) is None or self._transport is None:
            return
        if self.calls:
            self._write(_frame(_RST_STREAM, 0, call.number, (8).to_bytes(4, "big")))  # cancelled
        else:
            self._transport.abort()

    def freeze(self) -> None:
        """Read and answer nothing any more; the connection stays."""
        self.frozen = True
        if self._transport is not None:
            self._transport.pause_reading()

    def close(self) -> None:
        """Hang up; `on_end` is not called."""
        self.calls.clear()
        self.ended = True
        if self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> bytearray:
        """One for all connections: it is empty again before the next one reads."""
        return _READ

    def buffer_updated(self, nbytes: int) -> None:
        """Frames, or parts of them."""
        self.received += nbytes
        data = bytes(memoryview(_READ)[:nbytes])
        if data.startswith(_PINGED) and nbytes == _PING_BYTES and not self._buffer:  # nearly all there is to read
            self._write(_PONG + data[9:])
            return
        buffer, at = self._buffer, 0
        buffer += data
        while len(buffer) - at >= 9:
            high, low, kind, flags, stream = _HEAD.unpack_from(buffer, at)
            end = at + 9 + (high << 8 | low)
            if len(buffer) < end:
                break
            self._take(kind, flags, stream, bytes(buffer[at + 9 : end]))
            at = end
        del buffer[:at]

    def _take(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        call = self.calls.get(stream)
        if kind == _PING and not flags & _ACK:
            self._write(_frame(_PING, _ACK, 0, body))
        elif kind == _DATA and call is not None:
            self._messages(call, body)
        elif kind == _WINDOW_UPDATE:
            self._widen(call, int.from_bytes(body, "big")) if stream else self._widen_all(int.from_bytes(body, "big"))
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in _SETTING.iter_unpack(body):
                if name == _INITIAL_WINDOW:
                    change, self._stream_window = value - self._stream_window, value
                    for one in list(self.calls.values()):
                        self._widen(one, change)
            self._write(_frame(_SETTINGS, _ACK, 0, b""))
        elif call is not None and (kind == _RST_STREAM or (kind == _HEADERS and flags & _END_STREAM)):
            del self.calls[stream]
            call.on_end()
        elif kind == _GOAWAY and self._transport is not None:
            self.ended = True
            self._transport.close()

    def _messages(self, call: Call, body: bytes) -> None:
        incoming, at = call.incoming, 0
        incoming += body
        while len(incoming) - at >= 5:
            _, length = _PREFIX.unpack_from(incoming, at)
            if len(incoming) - at - 5 < length:
                break
            call.on_message(bytes(incoming[at + 5 : at + 5 + length]))
            at += 5 + length
        del incoming[:at]

    def _widen(self, call: Call | None, by: int) -> None:
        if call is not None:
            call.window += by
            self._flush(call)

    def _widen_all(self, by: int) -> None:
        self._window += by
        for call in list(self.calls.values()):
            self._flush(call)

    def _flush(self, call: Call) -> None:
        """Send what the windows let through."""
        frames = []
        while call.outgoing and (room := min(self._window, call.window, FRAME)) > 0:
            piece = call.outgoing.popleft()
            if len(piece) > room:
                call.outgoing.appendleft(piece[room:])
                piece = piece[:room]
            self._window -= len(piece)
            call.window -= len(piece)
            frames.append(_frame(_DATA, 0, call.number, bytes(piece)))
        if frames:
            self._write(b"".join(frames))

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self.frozen:
            self.sent += len(data)
            self._transport.write(data)
