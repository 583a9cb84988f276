"""What an agent serves over HTTP: the status page and its events, incidents, metrics.

/                the page, which shows what /events tells
/events          server-sent events: "status", the document, when it has changed; "alive", when it has not
/status.json     the document (see agent/status/document.py)
/incidents/ID    the report of an incident, as a page
/metrics         for Prometheus
/healthz         whether the agent serves; the only one without a token
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from http import HTTPStatus
from importlib import resources
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ckptsvc.agent.aside import aside
from ckptsvc.agent.http import incident_page
from ckptsvc.agent.http.access import Access, require_certificates
from ckptsvc.agent.http.httpd import HttpServer, Request, Response, said
from ckptsvc.agent.status.recent import Recent
from ckptsvc.errors import CkptsvcError, NotFound
from ckptsvc.html import frame, policy
from ckptsvc.quantities import Address
from ckptsvc.rpc.tls import Shown

EVERY = 1.0
"""Seconds between two documents."""

SHARE = 50.0
"""Times as long as it takes to make a document passes until the next one: the agent has other things to do."""

LONGEST = 5.0
"""Seconds between two documents at most, however long they take."""

ALIVE_EVERY = 5.0
"""Seconds without a change after which the page is told that all is as it was."""

ASIDE_TIME = 10.0
"""Seconds to read an incident, or to write down the metrics."""

HTML = "text/html; charset=utf-8"

_SCRIPTS = ("page_text.js", "page_grid.js", "page_job.js", "page.js")


class Feed:
    """The status document, made when somebody looks, and not more often than it is worth.

    Args:
        make: makes it.
        clock: seconds that do not go back.
    """

    def __init__(self, make: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.monotonic) -> None:
        self._make, self._clock = make, clock
        self._due, self._number = 0.0, 0
        self._same, self._text = b"", b""

    def document(self) -> bytes:
        """The document as JSON, `EVERY` seconds old at most, `LONGEST` where there is much in it."""
        began = self._clock()
        if began >= self._due:
            made = self._make()
            same = msgspec.json.encode(made | {"time": 0})
            if same != self._same:
                self._same, self._number = same, self._number + 1
            self._text = msgspec.json.encode(made)
            self._due = began + min(max(EVERY, SHARE * (self._clock() - began)), LONGEST)
        return self._text

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events for one reader; one that is slow gets the newest document when he is ready."""
        yield b"retry: 2000\n\n"
        number, said_at = 0, 0.0
        while True:
            text, now = self.document(), self._clock()
            if number != self._number:
                number, said_at = self._number, now
                yield b"event: status\nid: %d\ndata: %s\n\n" % (number, text)
            elif now - said_at >= ALIVE_EVERY:
                said_at = now
                yield b": keep-alive\nevent: alive\ndata: %.3f\n\n" % time.time()
            await asyncio.sleep(max(self._due - self._clock(), 0.05))


class Site:
    """The server.

    Args:
        status: makes the status document.
        registry: the metrics.
        recent: the incidents.
        token: lets people and programs in (see agent.http.access).
        certificates: what to show beyond loopback; None: there is nothing to show.
    """

    def __init__(
        self,
        status: Callable[[], dict[str, Any]],
        registry: CollectorRegistry,
        recent: Recent,
        token: str,
        certificates: Callable[[], Shown | None],
    ) -> None:
        self._feed, self._registry, self._recent, self._token = Feed(status), registry, recent, token
        self._certificates = certificates
        self._context: tuple[Shown, ssl.SSLContext] | None = None
        self._access: Access | None = None
        self._server: HttpServer | None = None
        self._page, self._policy = _page()
        self._sign, self._sign_policy = _sign()

    def open(self, address: Address) -> tuple[str, str]:
        """Listen; returns the address in use, and the same as the beginning of URLs.

        Raises:
            ConfigError: that is not possible, or the address is not loopback and there are no certificates.
        """
        encrypted = require_certificates(address, there=self._certificates() is not None)
        self._server = HttpServer(self._answer, self._door, self._tls if encrypted else None)
        listening = self._server.open(address)
        self._access = Access(self._token, listening.port, address.host, encrypted=encrypted)
        host = address.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        elif host == "localhost":  # two addresses, and at the other one anybody may listen
            host = listening.host
        where = str(Address(host, listening.port))
        return where, f"{'https' if encrypted else 'http'}://{where}"

    def let_scrape(self, token: str) -> None:
        """From now on this opens the metrics, and nothing else; what did so before does not any more."""
        if self._access is not None:
            self._access.scrape = token

    async def close(self) -> None:
        """Hang up on everybody."""
        if self._server is not None:
            await self._server.close()

    def _tls(self) -> ssl.SSLContext:
        shown = self._certificates()
        assert shown is not None
        if self._context is None or self._context[0] != shown:
            self._context = shown, shown.for_browsers()
        return self._context[1]

    def _door(self, request: Request) -> Response | None:
        access = self._access
        assert access is not None
        if not access.is_for_us(request):
            return said(HTTPStatus.MISDIRECTED_REQUEST, "this host has other names: use its address")
        if request.path == "/healthz":
            return Response(HTTPStatus.OK, b"ok\n")
        if "token" in request.query:
            if not access.is_token(request.query["token"]):
                return self._refused(request)
            return Response(HTTPStatus.SEE_OTHER, headers=(("Location", request.path), access.set_cookie()))
        return None if access.is_known(request) or access.may_scrape(request) else self._refused(request)

    def _refused(self, request: Request) -> Response:
        said_how = "`ckptsvc status --url` prints the address with its token"
        response = said(HTTPStatus.UNAUTHORIZED, said_how, ("WWW-Authenticate", 'Bearer realm="ckptsvc"'))
        if "text/html" not in request.headers.get("accept", ""):
            return response
        return Response(response.status, self._sign, HTML, response.headers, self._sign_policy)

    async def _answer(self, request: Request) -> Response:
        if request.path == "/":
            return Response(HTTPStatus.OK, self._page, HTML, policy=self._policy)
        if request.path == "/events":
            return Response(HTTPStatus.OK, kind="text/event-stream", stream=self._feed.events())
        if request.path == "/status.json":
            return Response(HTTPStatus.OK, self._feed.document(), "application/json")
        if request.path == "/metrics":
            return await self._metrics(request)
        if request.path.startswith("/incidents/"):
            return await self._incident(request.path.removeprefix("/incidents/"))
        return said(HTTPStatus.NOT_FOUND, "there is nothing here")

    async def _metrics(self, request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(HTTPStatus.OK, await aside(partial(encode, self._registry), ASIDE_TIME), kind)

    async def _incident(self, wanted: str) -> Response:
        kept = self._recent.kept
        try:
            if kept is None:
                raise NotFound("incidents are not kept")
            found = await aside(partial(kept.find, wanted), ASIDE_TIME)
            if isinstance(found.incident, CkptsvcError):
                raise found.incident
        except CkptsvcError as error:
            return said(HTTPStatus.NOT_FOUND, str(error))
        text = incident_page.page(found.incident, found.key)
        return Response(HTTPStatus.OK, text.encode(), HTML, policy=incident_page.POLICY)


def _sign() -> tuple[bytes, str]:
    style = _asset("page.css")
    body = (
        '<main class="door"><h1>This page asks for a token</h1><p>Who runs jobs on this machine gets the address with'
        " its token from:</p><p><code>ckptsvc status --url</code></p></main>"
    )
    return frame("ckptsvc", style, body).encode(), policy(style)


def _page() -> tuple[bytes, str]:
    style, script = _asset("page.css"), "".join(map(_asset, _SCRIPTS))
    text = frame("ckptsvc", style, _asset("page.html"), script)
    return text.encode(), policy(style, script)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
