"""A small HTTP server in the agent's event loop: GET and HEAD, one request a connection, every amount bounded.

Whoever connects has `REQUEST_TIME` to say what he wants, and `WRITE_TIME` to take what he gets. Of those that have not
said it yet, the oldest makes room for the newest: who only connects keeps nobody else out. Nor does who may not be
answered: until the door has let him in, and while he takes his refusal, he is one of those who wait.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl

from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address
from ckptsvc.rpc.trust import bind_host

log = logging.getLogger("ckptsvc.agent")

MAX_HEAD = 16 << 10
"""Bytes of a request."""

MAX_HEADERS = 64

MAX_WAITING = 32
"""Connections that have not sent their request."""

MAX_SERVED = 64
"""Connections that are being answered, streams included."""

TURN = 0.05
"""Seconds that each of them has at least, however many come: the handshake of TLS takes a hundredth."""

REQUEST_TIME = 5.0
"""Seconds for a request to come, the handshake of TLS included."""

WRITE_TIME = 20.0
"""Seconds for an answer, or one message of a stream, to be taken."""

NO_DESCRIPTORS = 0.3
"""Seconds after which to try again to accept a connection."""

BUFFERED = 64 << 10
"""Bytes of a stream that wait for its reader before the next message is made."""

POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""What browsers may do with an answer that says nothing else: nothing."""

_ALWAYS = (
    "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nX-Frame-Options: DENY\r\n"
    "Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n"
    "Cross-Origin-Opener-Policy: same-origin\r\nConnection: close\r\n"
)
_REQUEST = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([ -~\t]*)")


class Request(NamedTuple):
    """What was asked for; names of headers are in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer.

    Attributes:
        status: of HTTP.
        body: all of it, unless there is a `stream`.
        kind: its Content-Type.
        headers: further ones.
        policy: its Content-Security-Policy.
        stream: what follows, piece by piece, until it ends or the reader has gone.
    """

    status: int
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    policy: str = POLICY
    stream: AsyncIterator[bytes] | None = None


class Refused(Exception):
    """A request that is not answered as it wants."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.response = said(status, why)


def said(status: HTTPStatus, what: str, *headers: tuple[str, str]) -> Response:
    """An answer of one line for people."""
    return Response(status, f"{status} {status.phrase}: {what}\n".encode(), headers=headers)


class HttpServer:
    """Listens at one address.

    Args:
        handler: answers a request.
        door: looks at it first, and answers whom it does not let in; takes no time.
        tls: the context for the next connection; None: connections are not encrypted.
    """

    def __init__(
        self,
        handler: Callable[[Request], Awaitable[Response]],
        door: Callable[[Request], Response | None] = lambda request: None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._handler, self._door, self._tls = handler, door, tls
        self._waiting: dict[asyncio.Task[None], float] = {}  # oldest first, with when it came
        self._served: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def open(self, address: Address) -> Address:
        """Listen, and serve from now on; returns where, in numbers.

        Raises:
            ConfigError: that is not possible; as a rule the port is in use.
        """
        host = bind_host(address.host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (host, address.port), family=family, backlog=MAX_WAITING, dualstack_ipv6=host == "::"
            )
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"agent.metrics_listen: {address}: {why}", hint='another port, or "off"') from None
        self._listener.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept(self._listener))
        return Address(*self._listener.getsockname()[:2])

    async def close(self) -> None:
        """Hang up on everybody."""
        tasks = [*self._waiting, *self._served, *filter(None, (self._accepting,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(NO_DESCRIPTORS)
                continue
            task = asyncio.ensure_future(self._serve(connection))
            self._waiting[task] = loop.time()
            task.add_done_callback(self._done)
            await asyncio.sleep(0)  # where many wait in line, nothing else would run
            while len(self._waiting) > MAX_WAITING:
                oldest, came = next(iter(self._waiting.items()))
                if (left := came + TURN - loop.time()) > 0:
                    await asyncio.sleep(left)
                    continue
                del self._waiting[oldest]
                oldest.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._waiting.pop(task, None)
        self._served.discard(task)

    async def _serve(self, connection: socket.socket) -> None:
        writer: asyncio.StreamWriter | None = None
        try:
            try:
                async with asyncio.timeout(REQUEST_TIME):
                    reader, writer = await self._streams(connection)
                    head = await reader.readuntil(b"\r\n\r\n")
                request = parse(head)
                response = await self._answer(request)
            except asyncio.LimitOverrunError:
                request = None
                response = said(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has {MAX_HEAD} bytes at most")
            except Refused as error:
                request, response = None, error.response
            if writer is not None:
                await _send(reader, writer, response, head_only=request is not None and request.method == "HEAD")
        except (OSError, EOFError, TimeoutError):
            pass  # it has gone, or takes too long
        except Exception:
            log.exception("a request was not answered")
        finally:
            if writer is not None:
                writer.transport.abort()  # by now all has been taken, or nobody takes it
            else:
                connection.close()

    async def _streams(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        reader = asyncio.StreamReader(limit=MAX_HEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        tls = self._tls() if self._tls is not None else None
        times = {"ssl_handshake_timeout": REQUEST_TIME, "ssl_shutdown_timeout": 1.0} if tls else {}
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls, **times)
        transport.set_write_buffer_limits(high=BUFFERED)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _answer(self, request: Request) -> Response:
        if (refusal := self._door(request)) is not None:
            return refusal
        task = asyncio.current_task()
        assert task is not None
        self._waiting.pop(task, None)
        if len(self._served) >= MAX_SERVED:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_SERVED} others are being answered")
        self._served.add(task)
        return await self._handler(request)


def parse(head: bytes) -> Request:
    """A request from its bytes.

    Raises:
        Refused: it is none that is answered here.
    """
    lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    first = _REQUEST.fullmatch(lines[0])
    if first is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "that is no request of HTTP/1")
    if first[1] not in ("GET", "HEAD"):
        error = Refused(HTTPStatus.METHOD_NOT_ALLOWED, "there is only GET and HEAD")
        error.response = said(HTTPStatus.METHOD_NOT_ALLOWED, str(error), ("Allow", "GET, HEAD"))
        raise error
    headers: dict[str, str] = {}
    for line in lines[1:]:
        found = _HEADER.fullmatch(line)
        if found is None or len(headers) >= MAX_HEADERS:
            raise Refused(HTTPStatus.BAD_REQUEST, "that is no header, or there are too many")
        name = found[1].lower()
        if name in headers and name != "cookie":
            raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is there twice")
        value = found[2].strip(" \t")
        headers[name] = f"{headers[name]}; {value}" if name in headers else value
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise Refused(HTTPStatus.BAD_REQUEST, "a request here has no body")
    path, _, query = first[2].partition("?")
    try:
        fields = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=8))
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "there are too many fields") from None
    return Request(first[1], path, fields, headers)


async def _send(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, response: Response, *, head_only: bool
) -> None:
    status = HTTPStatus(response.status)
    lines = [f"{name}: {value}\r\n" for name, value in response.headers]
    if response.stream is None:
        lines.append(f"Content-Length: {len(response.body)}\r\n")
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {response.kind}\r\n"
        f"Content-Security-Policy: {response.policy}\r\n{_ALWAYS}{''.join(lines)}\r\n"
    )
    writer.write(head.encode("latin-1") + (b"" if head_only else response.body))
    if response.stream is not None and not head_only:
        # Whoever reads a stream says nothing more: if there is something to read, it is the end.
        pumping = asyncio.ensure_future(_pump(writer, response.stream))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((pumping, gone), return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                pumping.result()
        finally:
            gone.cancel()
            pumping.cancel()
            await asyncio.gather(gone, pumping, return_exceptions=True)
    async with asyncio.timeout(WRITE_TIME):
        await writer.drain()
        writer.close()
        await writer.wait_closed()


async def _pump(writer: asyncio.StreamWriter, stream: AsyncIterator[bytes]) -> None:
    async for piece in stream:
        writer.write(piece)
        async with asyncio.timeout(WRITE_TIME):
            await writer.drain()
