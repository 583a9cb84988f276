"""A server between a client and a real one that does as it is told to chosen requests.

It takes requests apart far enough to tell them from each other, passes each on over a connection of its own, and hands
the answer back as it came. It has a thread for each connection.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_LARGEST_HEAD = 64 << 10
_BLOCK = 256 << 10


@dataclass
class Rule:
    """What happens to which requests.

    Attributes:
        pattern: searched for in "METHOD target", for example "PUT .*partNumber=2".
        signed: likewise searched for in what is sent as credentials: the header `authorization`, or the target.
        answer: (status, body) to answer with instead of asking the server.
        lose_request: reset the connection before the server has seen the request.
        lose_answer: let the server do it, then reset the connection.
        cut_body: pass on so many bytes of the answer's body, then reset the connection.
        hang: neither pass on nor answer, until the proxy closes.
        delay: seconds to wait first.
        headers: to change or add on the way to the server.
        adapt: changes all headers of a request, names in lower case, before they go to the server.
        answer_headers: to change or add on the way back.
        change: makes another body of the one that comes from the server (of the same length).
        times: how many requests it happens to; 0 is all.
        met: how many it has happened to.
    """

    pattern: str
    signed: str = ""
    answer: tuple[int, bytes] | None = None
    lose_request: bool = False
    lose_answer: bool = False
    cut_body: int | None = None
    hang: bool = False
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    adapt: Callable[[dict[str, str]], None] | None = None
    answer_headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] | None = None
    times: int = 0
    met: int = 0


class Proxy:
    """Listens on loopback, with TLS where there is a context for it, and asks the server at `target` (host, port).

    Attributes:
        rules: in force; tests change them.
        endpoint: its address.
        seen: "METHOD target" of every request, in order.
        headers: of the last request, names in lower case.
        busiest: most requests that were under way at a time.
    """

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
        self._target, self._tls = target, tls
        self.rules: list[Rule] = []
        self.seen: list[str] = []
        self.busiest = self._busy = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.headers: dict[str, str] = {}
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Let go of everything."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._sockets.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                self._converse(sock)
                return
            with self._tls.wrap_socket(sock, server_side=True) as wrapped:  # which takes the descriptor over
                with self._lock:
                    self._sockets.add(wrapped)
                self._converse(wrapped)

    def _converse(self, client: socket.socket) -> None:
        source = client.makefile("rb")
        while head := _head(source):
            line, headers = head
            with self._lock:
                self._busy += 1
                self.busiest = max(self.busiest, self._busy)
            try:
                if not self._request(client, source, line, headers):
                    return
            finally:
                with self._lock:
                    self._busy -= 1

    def _request(self, client: socket.socket, source: socket.SocketIO, line: str, headers: dict[str, str]) -> bool:
        """Deal with one request; whether the connection goes on."""
        rule = self._due(line.rpartition(" ")[0], headers.get("authorization", ""))
        self.headers = dict(headers)
        body = source.read(int(headers.get("content-length", 0)))
        if rule and rule.delay:
            self._closed.wait(rule.delay)
        if rule and rule.hang:
            self._closed.wait()
            return False
        if rule and rule.lose_request:
            return _reset(client)
        if rule and rule.answer:
            status, text = rule.answer
            client.sendall(f"HTTP/1.1 {status} Told To\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
            return True
        if rule:
            headers |= rule.headers
            if rule.adapt:
                rule.adapt(headers)
        with socket.create_connection(self._target, 30) as server:
            server.sendall(_join(line, headers | {"connection": "close"}) + body)
            answered = server.makefile("rb")
            found = _head(answered)
            if found is None:
                return _reset(client)
            status_line, sent = found
            content = b"" if line.startswith("HEAD") else answered.read()
        if rule and rule.lose_answer:
            return _reset(client)
        if rule and rule.change:
            content = rule.change(content)
        if rule:
            sent |= rule.answer_headers
        sent.pop("connection", None)
        if not line.startswith("HEAD"):
            sent.pop("transfer-encoding", None)
            sent["content-length"] = str(len(content))
        client.sendall(_join(status_line, sent))
        if rule and rule.cut_body is not None:
            client.sendall(content[: rule.cut_body])
            time.sleep(0.05)  # so that it arrives
            return _reset(client)
        client.sendall(content)
        return True

    def _due(self, request: str, signature: str) -> Rule | None:
        with self._lock:
            self.seen.append(request)
            for rule in self.rules:
                meant = re.search(rule.pattern, request) and re.search(rule.signed, signature + request)
                if meant and (rule.times == 0 or rule.met < rule.times):
                    rule.met += 1
                    return rule
        return None


def _head(source: socket.SocketIO) -> tuple[str, dict[str, str]] | None:
    """The first line and the headers of a message; None at the end."""
    line = source.readline(_LARGEST_HEAD)
    if not line:
        return None
    headers: dict[str, str] = {}
    while (header := source.readline(_LARGEST_HEAD)) not in (b"\r\n", b""):
        name, _, value = header.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return line.decode("latin-1").strip(), headers


def _join(line: str, headers: dict[str, str]) -> bytes:
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


def _reset(client: socket.socket) -> bool:
    """Make the kernel send a reset, not a good-bye."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    return False


@contextlib.contextmanager
def proxy(target: tuple[str, int], tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy before a server."""
    between = Proxy(target, tls)
    try:
        yield between
    finally:
        between.close()
