"""Ranges of objects, read from a connection straight into the caller's memory.

obstore hands a body over in pieces of its own that have to be copied, and its threads and ours take turns at the
interpreter's lock: twice the CPU time without TLS, three times with it (decision 024). So ranges are asked for over
connections of our own, at addresses that obstore has signed ("query string authentication" at S3, a shared access
signature at Azure). Only what goes well is done here: whatever else a server answers, the caller asks for the same
range through obstore, which follows redirects, renews credentials, and has its errors told.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
import urllib.request
from datetime import timedelta
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import SplitResult, urlsplit

from ckptsvc_drivers.object_clients import CONNECT_TIMEOUT, Clients

_SIGNED_FOR = timedelta(minutes=10)
_ADDRESSES = 64  # signed ones that are kept: of the objects read last
_REST = 60.0  # seconds without signed addresses after one was refused
_IDLE = 16  # connections kept open at least
_PLAIN = re.compile(r"[A-Za-z0-9._~/-]*")  # names that obstore signs rightly for Azure: it signs others as escaped


class Ranges:
    """Reads ranges of the objects of one place; its methods may be called from several threads.

    Args:
        clients: of the place.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._lock = threading.Lock()
        self._idle: list[HTTPConnection] = []
        self._signed: dict[str, tuple[float, SplitResult]] = {}
        # Google's signatures may cost a request each, and no server here could show that they are right.
        self._rests_until = float("inf") if clients.place.scheme == "gs" or clients.options.anonymous else 0.0
        self._tls: ssl.SSLContext | None = None

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def renew(self) -> None:
        """Have addresses signed anew: the credentials are others."""
        with self._lock:
            self._signed.clear()
            if self._rests_until != float("inf"):
                self._rests_until = 0.0

    def fill(self, name: str, offset: int, view: memoryview) -> bool:
        """Fill `view` with an object's bytes from `offset` on; False: ask for them in the usual way.

        Raises:
            TimeoutError: the time of a request has passed.
            CkptsvcError: as `Clients.plain`.
        """
        address = self._address(name)
        if address is None:
            return False
        deadline = time.monotonic() + self._clients.options.timeout
        connection = self._take(address)
        while True:
            was_open = connection.sock is not None
            try:
                filled = self._exchange(connection, address, offset, view, deadline)
            except TimeoutError:
                connection.close()
                raise
            except (OSError, HTTPException):
                connection.close()
                if was_open and time.monotonic() < deadline:
                    continue  # the server may have closed it while it was idle: once more, on a new one
                return False
            self._give(connection)
            return filled

    def _exchange(
        self, connection: HTTPConnection, address: SplitResult, offset: int, view: memoryview, deadline: float
    ) -> bool:
        """One request, and its answer if that is the range that was asked for, all of it, and in one piece."""
        if connection.sock is None:
            connection.timeout = min(CONNECT_TIMEOUT, _left(deadline))
            connection.connect()
        sock, wanted = connection.sock, f"bytes {offset}-{offset + len(view) - 1}"
        sock.settimeout(_left(deadline))
        headers = {"Range": wanted.replace(" ", "=")}
        connection.request("GET", f"{address.path}?{address.query}", headers=headers)
        with connection.getresponse() as answer:
            found = answer.getheader("Content-Range", "").partition("/")[0]
            if answer.status != 206 or found != wanted or answer.length != len(view):
                self._refused(answer.status)
                connection.close()
                return False
            done = 0
            while done < len(view):
                sock.settimeout(_left(deadline))
                with view[done:] as rest:
                    got = answer.fp.readinto1(rest)  # from the socket, without a copy between
                if not got:
                    raise ConnectionError
                done += got
        return True

    def _address(self, name: str) -> SplitResult | None:
        """A signed address, which is used for half of its time; None if there is none now."""
        import obstore

        if self._clients.place.scheme == "az" and not _PLAIN.fullmatch(name):
            return None
        now = time.monotonic()
        with self._lock:
            if now < self._rests_until:
                return None
            until, address = self._signed.get(name, (0.0, None))
        if address is not None and now < until:
            return address
        client = self._clients.plain
        try:
            address = urlsplit(obstore.sign(client, "GET", name, _SIGNED_FOR))
        except Exception:  # noqa: BLE001  no credentials, or such as cannot sign; obstore's own request tells why
            self._refused(0)
            return None
        if _proxy_for(address):  # obstore speaks with those
            with self._lock:
                self._rests_until = float("inf")
            return None
        with self._lock:
            if len(self._signed) >= _ADDRESSES:
                self._signed.clear()
            self._signed[name] = (now + _SIGNED_FOR.total_seconds() / 2, address)
        return address

    def _refused(self, status: int) -> None:
        """Rest, if it is the signature or the way of asking that the server does not take.

        Such are: ranges that it ignores (200), redirects (3xx), what it does not understand or allow (400 to 403).
        """
        if status < 404 and status != 206:
            with self._lock:
                self._signed.clear()
                self._rests_until = max(self._rests_until, time.monotonic() + _REST)

    def _take(self, address: SplitResult) -> HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            host, port = address.hostname or "", address.port
            if address.scheme != "https":
                return HTTPConnection(host, port)
            if self._tls is None:
                self._tls = self._clients.tls()
            return HTTPSConnection(host, port, context=self._tls)

    def _give(self, connection: HTTPConnection) -> None:
        with self._lock:
            if connection.sock is not None and len(self._idle) < max(_IDLE, self._clients.options.connections):
                self._idle.append(connection)
                return
        connection.close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _proxy_for(address: SplitResult) -> bool:
    proxies = urllib.request.getproxies()
    named = address.scheme in proxies or "all" in proxies
    return named and not urllib.request.proxy_bypass(address.netloc)
