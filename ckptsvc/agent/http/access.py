"""Who may read what an agent serves over HTTP: whoever has the token.

Loopback is open to every user of the host, and the page names jobs, stores and nodes. So all but /healthz asks for the
token, in one of three ways:

    Authorization: Bearer TOKEN      programs: Prometheus (`credentials_file`), curl
    ?token=TOKEN                     a person, once: answered by a cookie, and by the same address without the token
    the cookie                       the browser from then on, `SESSION` seconds long

The cookie holds no token but what the agent derives from it, so that it survives a restart of the agent, and ends when
the token's file is replaced. A name in `Host` that is not this host's is refused: a page from elsewhere whose name has
been pointed here (DNS rebinding) would be read by a browser as the agent's own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from ckptsvc.agent.http.httpd import Request
from ckptsvc.config import agents_directory
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address
from ckptsvc.rpc.secret import is_loopback, shared_secret
from ckptsvc.settings import Settings

FILE = "http-token"
"""Name of the file in the directory of the user's agents, which share it, as they share the secret."""

SESSION = 12 * 3600
"""Seconds for which a cookie is good."""

MIN_TOKEN, MAX_TOKEN = 16, 512
"""Characters of a token in a file that a setting names."""

_TOKEN = re.compile(r"[!-~]+")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def http_token(settings: Settings, environ: Mapping[str, str]) -> str:
    """The token: of the file that `agent.http_token_file` names, else of one that is made where it is missing.

    Raises:
        ConfigError: the file cannot be read, others can read or change it, or it holds no token.
    """
    named = settings.agent.http_token_file
    if not named:
        return shared_secret(agents_directory(settings, environ), FILE)
    about = f"agent.http_token_file: {named}"
    try:
        with open(os.open(named, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), errors="replace") as file:
            status = os.fstat(file.fileno())
            token = file.read(MAX_TOKEN + 2).strip()
    except OSError as error:
        hint = f"openssl rand -hex 32 > {named}; chmod 600 {named}"
        raise ConfigError(f"{about}: {error.strerror or error}", hint=hint) from None
    # Its group may read it: Prometheus runs as a user of its own.
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o037:
        raise ConfigError(f"{about} can be read by everybody, or changed by others", hint=f"chmod 640 {Path(named)}")
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN or not _TOKEN.fullmatch(token):
        raise ConfigError(f"{about} holds no token: {MIN_TOKEN} to {MAX_TOKEN} letters, digits and signs in one line")
    return token


def require_certificates(address: Address, *, there: bool) -> bool:
    """Whether what is served at an address is encrypted: it is, where other hosts reach it.

    Raises:
        ConfigError: it would be, and there are no certificates.
    """
    encrypted = not is_loopback(address.host)
    if encrypted and not there:
        hint = "to be read from other hosts it is encrypted: set tls.ca_file, tls.cert_file and tls.key_file"
        raise ConfigError(f"agent.metrics_listen is {address}, which is not loopback", hint=hint)
    return encrypted


class Access:
    """The door of one server.

    Args:
        token: see above.
        port: where it listens. Cookies are sent to all ports of a host, so it is part of their name.
        host: the name or address that is listened at.
        encrypted: whether connections are.
        clock: Unix seconds.
    """

    def __init__(
        self, token: str, port: int, host: str, *, encrypted: bool, clock: Callable[[], float] = time.time
    ) -> None:
        self._token, self._clock = token, clock
        self._cookie = f"ckptsvc-{port}"
        self._more = "; Secure" if encrypted else ""
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}

    def is_for_us(self, request: Request) -> bool:
        """Whether the request was meant for this host, by a name that nobody else can point here."""
        found = _HOST.fullmatch(request.headers.get("host", ""))
        if found is None:
            return False
        host = found[1].strip("[]").lower()
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self._names
        return True

    def is_known(self, request: Request) -> bool:
        """Whether whoever asks has the token, or a cookie that was given for it."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.is_token(given.strip())
        for pair in request.headers.get("cookie", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self._cookie and self._is_good(value):
                return True
        return False

    def is_token(self, given: str) -> bool:
        """Whether that is the token; how long the answer takes says nothing about it."""
        return _same(given, self._token)

    def set_cookie(self) -> tuple[str, str]:
        """The header that lets a browser in from now on."""
        until = f"{self._clock() + SESSION:.0f}"
        attributes = f"Max-Age={SESSION}; Path=/; HttpOnly; SameSite=Strict{self._more}"
        return "Set-Cookie", f"{self._cookie}={until}.{self._seal(until)}; {attributes}"

    def _is_good(self, value: str) -> bool:
        until, _, seal = value.partition(".")
        return _same(seal, self._seal(until)) and self._clock() < int(until)  # sealed: it is a number

    def _seal(self, until: str) -> str:
        return hmac.new(self._token.encode(), f"{self._cookie} {until}".encode(), hashlib.sha256).hexdigest()


def sign_in(address: str, token: str) -> str:
    """The address by which a browser gets in."""
    return f"{address}/?token={quote(token, safe='')}"


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(one.encode()).digest(), hashlib.sha256(other.encode()).digest())
