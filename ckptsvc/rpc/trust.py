"""How two agents know that they belong to one user: by a secret on one host, by certificates between hosts.

On one host all of a user's agents can read one private file (rpc.proof). Between hosts, both ends show a certificate
of one authority that names the same user (rpc.certificates), and all they say is encrypted: TLS 1.2 or newer, by gRPC.
Certificates are read anew when their files change (`Trust.run`): what is connected stays, what connects shows the new
one. Nothing else touches the files: they may be on a file system that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from ckptsvc.errors import ConfigError, StoreDenied
from ckptsvc.quantities import Address, parse_address
from ckptsvc.rpc import proof
from ckptsvc.rpc.certificates import Identity, check_authority, identity_of
from ckptsvc.rpc.channel import trailers_of
from ckptsvc.rpc.secret import numeric
from ckptsvc.rpc.tls import Shown

log = logging.getLogger("ckptsvc.agent")

SOON = 7 * 86400.0
"""Seconds before its end from which on a certificate is warned of."""

REMIND_EVERY = 86400.0
"""Seconds between two such warnings."""

LOOK_EVERY = 2.0
"""Seconds between two looks whether the files have changed."""

MAX_FILE = 1 << 20
"""Bytes of a file of certificates."""

_KEY = re.compile(r"[0-9a-f]{64}")

Options = Sequence[tuple[str, Any]]


class Admission(Protocol):
    """For one call: the metadata to make it with, and the look at what comes back."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of the call."""

    async def check(self, call: Any) -> None:
        """Wait until the listener has proved itself on this call; else CkptsvcError."""


class Trust(Protocol):
    """What an agent goes by when it meets others."""

    def spelled(self, address: str) -> str:
        """The address of an agent in its one spelling; ConfigError where agents must not be looked for."""

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """A new connection to the agent at an address."""

    def shown(self) -> object:
        """What a new connection would show of us: when it is another thing, a channel is to be made anew."""

    async def ask(self, channel: grpc.aio.Channel, address: str, method: str) -> Admission:
        """Prepare a call; raises CkptsvcError where that shows already that the listener is none of ours."""

    def gate(self, refused: Callable[[], None]) -> Any:
        """Keeps others out of a server (an interceptor); its `address` is set before the server starts."""

    def open_port(self, server: grpc.aio.Server, address: Address) -> tuple[int, str]:
        """Listen; returns the port, and the host by which others reach it.

        Raises:
            ConfigError: not there.
        """

    def seal(self, *facts: str) -> str:
        """Marks facts as stated by an agent of ours, where others may write too."""

    def is_sealed(self, given: str, *facts: str) -> bool:
        """Whether they are; no more than a hint (`ask` decides)."""

    def new_key(self, ticket: str) -> tuple[str, str]:
        """The key that goes with a ticket which is given to another agent, and what that one is told of it."""

    def key_of(self, ticket: str, told: str) -> str:
        """The key that goes with a ticket which another agent has given; ConfigError where there is none."""

    def certificates(self) -> Shown | None:
        """For connections that are not gRPC's; None: they need no TLS, for all are on one host."""

    async def run(self) -> None:
        """Keep up with what changes, until cancelled."""


class BySecret:
    """On one host: agents listen on loopback only."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def spelled(self, address: str) -> str:
        """See `Trust`."""
        return numeric(address)

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """See `Trust`."""
        return grpc.aio.insecure_channel(address, options=list(options))

    def shown(self) -> object:
        """See `Trust`."""
        return None

    async def ask(self, channel: grpc.aio.Channel, address: str, method: str) -> proof.Admission:
        """See `Trust`."""
        return await proof.ask(channel, address, self._secret, method)

    def gate(self, refused: Callable[[], None]) -> proof.Gate:
        """See `Trust`."""
        return proof.Gate(self._secret, refused)

    def open_port(self, server: grpc.aio.Server, address: Address) -> tuple[int, str]:
        """See `Trust`."""
        return _opened(lambda: server.add_insecure_port(numeric(str(address))), address), address.host

    def seal(self, *facts: str) -> str:
        """See `Trust`."""
        return proof.proof(self._secret, "coordinates", *facts)

    def is_sealed(self, given: str, *facts: str) -> bool:
        """See `Trust`."""
        return proof.same(given, self.seal(*facts))

    def new_key(self, ticket: str) -> tuple[str, str]:
        """See `Trust`: both derive it from the secret."""
        return self.key_of(ticket, ""), ""

    def key_of(self, ticket: str, told: str) -> str:
        """See `Trust`."""
        text = b"ckptsvc transfer, version 1\0" + ticket.encode()
        return hmac.new(self._secret.encode(), text, hashlib.sha256).hexdigest()

    def certificates(self) -> None:
        """See `Trust`."""

    async def run(self) -> None:
        """A secret does not change."""


@dataclass(frozen=True, slots=True)
class _Held:
    """The contents of the three files, and what they say."""

    authority: bytes
    certificate: bytes
    key: bytes
    identity: Identity


@dataclass(frozen=True, slots=True)
class _Handshake:
    """TLS has done all there is to do before the call."""

    metadata: tuple[tuple[str, str], ...] = ()

    async def check(self, call: Any) -> None:
        """Nothing was sent before the listener's certificate had been checked."""


class ByCertificate:
    """Between hosts.

    Args:
        authority, certificate, key: PEM files: of those who sign, our own, and its private key (no password).
        on_expiry: told until when our certificate is valid, unix seconds, whenever it has been read.

    Raises:
        ConfigError: one of them cannot be read or is not what it should be, or the certificate has expired.
    """

    def __init__(
        self, authority: str, certificate: str, key: str, on_expiry: Callable[[float], None] = lambda when: None
    ) -> None:
        self._paths = {"tls.ca_file": authority, "tls.cert_file": certificate, "tls.key_file": key}
        self._on_expiry = on_expiry
        self._warned, self._expired = 0.0, False
        self._seen = self._stamp()
        self._held = self._read()

    @property
    def name(self) -> str:
        """The DNS name that stands for our user; peers must show it too."""
        return self._held.identity.name

    def spelled(self, address: str) -> str:
        """See `Trust`."""
        return str(parse_address(address))

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """See `Trust`."""
        held = self._held
        shown = grpc.ssl_channel_credentials(held.authority, held.key, held.certificate)
        # The name is that of the user, not of the host: whoever has a certificate of another user is not let pass.
        options = [*options, ("grpc.ssl_target_name_override", held.identity.name)]
        # By name: "unix:80" is the path of a socket to gRPC.
        return grpc.aio.secure_channel(f"dns:///{address}", shown, options=options)

    def shown(self) -> object:
        """See `Trust`."""
        return self._held

    async def ask(self, channel: grpc.aio.Channel, address: str, method: str) -> _Handshake:
        """See `Trust`; the other end does not say why it hangs up on a certificate that is not valid."""
        _check_time(self._held.identity, "our own certificate")
        return _Handshake()

    def gate(self, refused: Callable[[], None]) -> CertificateGate:
        """See `Trust`."""
        return CertificateGate(lambda: self.name, refused)

    def open_port(self, server: grpc.aio.Server, address: Address) -> tuple[int, str]:
        """See `Trust`."""

        def shown(held: _Held) -> Any:
            return grpc.ssl_server_certificate_configuration([(held.key, held.certificate)], held.authority)

        given = self._held

        def renewed() -> Any:  # called by a thread of gRPC's, before every handshake
            nonlocal given
            now = self._held
            if now is given:
                return None
            given = now
            return shown(now)

        credentials = grpc.dynamic_ssl_server_credentials(shown(given), renewed, True)
        bound, host = _reachable(address)
        return _opened(lambda: server.add_secure_port(str(bound), credentials), address), host

    def seal(self, *facts: str) -> str:
        """See `Trust`."""
        return ""

    def is_sealed(self, given: str, *facts: str) -> bool:
        """See `Trust`: agents of other hosts have no secret in common; whoever listens there shows a certificate."""
        return True

    def new_key(self, ticket: str) -> tuple[str, str]:
        """See `Trust`: it is told, over a connection that nobody else can read."""
        key = secrets.token_hex(32)
        return key, key

    def key_of(self, ticket: str, told: str) -> str:
        """See `Trust`."""
        if not _KEY.fullmatch(told):
            raise ConfigError("an agent has given a ticket without a key")
        return told

    def certificates(self) -> Shown:
        """See `Trust`."""
        held = self._held
        return Shown(held.authority, held.certificate, held.key, held.identity.name)

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        stamps = []
        for path in self._paths.values():
            try:
                status = os.stat(path)
                stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
            except OSError:
                stamps.append((0, 0, 0))
        return tuple(stamps)

    async def run(self) -> None:
        """See `Trust`."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the files if they have changed; what they held before counts, where that is of no use."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._held = self._read()
                log.info("certificates were read anew; ours is of %s", self.name)
            except ConfigError as error:  # one file of two has been replaced, maybe
                log.warning("new certificates are not used: %s", error)
        self._remind(self._held.identity)

    def _read(self) -> _Held:
        authority, certificate, key = (
            contents(setting, path, private=setting == "tls.key_file") for setting, path in self._paths.items()
        )
        check_authority(authority, self._paths["tls.ca_file"])
        identity = identity_of(certificate, key, self._paths["tls.cert_file"])
        what = f"tls.cert_file: the certificate in {self._paths['tls.cert_file']}"
        _check_time(identity, what)
        try:
            Shown(authority, certificate, key, identity.name).check()
        except ssl.SSLError as error:
            why = f"{what} is not one that others would let in: {error.reason or error}"
            raise ConfigError(why, hint=f"it is signed by {identity.issuer}; is that in tls.ca_file?") from None
        self._on_expiry(identity.not_after)
        self._warned = 0.0
        self._remind(identity)
        return _Held(authority, certificate, key, identity)

    def _remind(self, identity: Identity) -> None:
        now = time.time()
        expired = now >= identity.not_after
        if expired and not self._expired:
            self._warned = 0.0
        self._expired = expired
        if identity.not_after - now < SOON and now - self._warned > REMIND_EVERY:
            self._warned = now
            how = "has expired, what is connected stays and nothing new is let in: that was" if expired else "expires"
            log.warning("tls.cert_file: the certificate %s on %s", how, _date(identity.not_after))


class CertificateGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets in the calls of those whose certificate names our user; those of no authority of ours do not get so far.

    Args:
        name: the DNS name that stands for the user.
        refused: called for each call that is turned away.
    """

    def __init__(self, name: Callable[[], str], refused: Callable[[], None]) -> None:
        self._name, self._refused = name, refused
        self.address = ""

    async def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Called by gRPC before it reads anything of a call but its metadata."""
        handler = await continuation(details)
        if handler is None:
            return None
        decode = handler.request_deserializer

        async def serve(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            # Messages come as bytes: nothing is parsed of a stranger's.
            shown = context.auth_context().get("peer_dns", ())  # other kinds of names are not looked at by who signs
            if self._name().encode() not in shown:
                self._refused()
                error = StoreDenied("this port is for the agents of another user", hint="see tls.cert_file")
                await context.abort(*trailers_of(error))
            decoded = (decode(message) async for message in requests)
            if handler.response_streaming:
                async with contextlib.aclosing(handler.stream_stream(decoded, context)) as responses:
                    async for response in responses:
                        yield response
            else:
                async for request in decoded:
                    yield await handler.unary_unary(request, context)
                    return

        if handler.request_streaming != handler.response_streaming:
            raise NotImplementedError("agents have no calls with a stream one way")
        return grpc.stream_stream_rpc_method_handler(serve, None, handler.response_serializer)


def _check_time(identity: Identity, what: str) -> None:
    if time.time() >= identity.not_after:
        raise ConfigError(f"{what} has expired on {_date(identity.not_after)}",
            hint="get a new one; with an authority of your own: `ckptsvc certs issue`")  # fmt: skip
    if time.time() < identity.not_before:
        raise ConfigError(f"{what} is valid from {_date(identity.not_before)} on", hint="is the clock right?")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _reachable(address: Address) -> tuple[Address, str]:
    """Where to listen, and the host by which others reach it."""
    try:
        anywhere = ipaddress.ip_address(address.host).is_unspecified
    except ValueError:
        return address._replace(host=bind_host(address.host)), address.host
    return address, socket.gethostname() if anywhere else address.host


def bind_host(host: str) -> str:
    """What to listen at so that others reach a host by that name or address.

    A name is not resolved: on many hosts /etc/hosts gives its own as a loopback address.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host == "localhost":
            return host
        return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    return host


def _opened(listen: Callable[[], int], address: Address) -> int:
    try:
        return listen()
    except RuntimeError:  # grpc has no other, and tells the reason to standard error only
        why = f"agent.listen: cannot listen at {address}"
        raise ConfigError(why, hint="has another program that port? is it an address of this host?") from None


def contents(setting: str, path: str, *, private: bool) -> bytes:
    """A file of certificates, or one that is private: a key, a password.

    Raises:
        ConfigError: it cannot be read, or is private and others can read it.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if private and (status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077):
                what = f"{setting}: {path} is not readable by its owner alone"
                raise ConfigError(what, hint=f"chmod 600 {Path(path)}")
            return file.read(MAX_FILE)
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror or error}") from None
