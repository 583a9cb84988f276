"""The few calls of etcd that an election needs, over grpc.aio.

Every call has its own deadline and goes to the next server when one does not answer. A watch is only waited on for so
long and is then made anew, so that a server that is frozen or cut off is found out without keepalive pings (etcd closes
connections that ping more often than it likes).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import grpc
import grpc.aio

from ckptsvc.errors import ConfigError, CoordinationUnavailable
from ckptsvc.rpc.secret import is_loopback
from ckptsvc.rpc.v1 import etcd_pb2 as pb

CALL_TIMEOUT = 1.0
"""Seconds for one call to one server."""

OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),  # the default is two minutes: too long for who waits for a coordinator
]

TOKEN = "token"
"""Metadata key of etcd's login token."""

MAX_URL = 300

_CREATE_REVISION = 1  # EtcdCompare.target
_ENDPOINT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._-]+)+")
_TOKEN_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)
_MAYBE_LATER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


class EtcdUrl(NamedTuple):
    """Servers ("host:port") and the prefix of all keys."""

    servers: tuple[str, ...]
    prefix: str

    def __str__(self) -> str:
        return f"etcd://{','.join(self.servers)}{self.prefix}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing leaves this machine."""
        return all(is_loopback(server.rpartition(":")[0].strip("[]")) for server in self.servers)


def parse_url(text: str) -> EtcdUrl:
    """Read "etcd://host:port[,host:port...][/prefix]"; two that mean the same become equal.

    Raises:
        ConfigError: it is not such a URL. The message does not repeat it where it may contain a password.
    """
    example = "for example etcd://10.0.0.1:2379,10.0.0.2:2379/ckptsvc"
    if "@" in text:
        raise ConfigError("the URL of etcd has a name or password in it", hint="use etcd.user and etcd.password_file")
    scheme, _, rest = text.partition("://")
    hosts, slash, path = rest.partition("/")
    servers, prefix = tuple(sorted(set(hosts.split(",")))), slash + path.rstrip("/")
    if scheme != "etcd" or len(text) > MAX_URL or (prefix.strip("/") and not _PREFIX.fullmatch(prefix)):
        raise ConfigError(f"{text[:MAX_URL]!r} is not a URL of etcd", hint=example)
    for server in servers:
        if not _ENDPOINT.fullmatch(server) or int(server.rpartition(":")[2]) > 65535:
            raise ConfigError(f"{server!r} in {text[:MAX_URL]!r} is not HOST:PORT", hint=example)
    return EtcdUrl(servers, prefix if prefix.strip("/") else "/ckptsvc")


@dataclass(frozen=True, slots=True)
class Login:
    """How to prove to etcd who we are. `tls` is None for a connection that is not encrypted."""

    tls: grpc.ChannelCredentials | None = None
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:  # no log shows the password
        return f"Login(user={self.user!r})"


class Found(NamedTuple):
    """A key, or that there is none (`value` is None), as of `revision` of the whole store."""

    revision: int
    value: bytes | None = None
    created: int = 0
    lease: int = 0


class Granted(NamedTuple):
    """A lease and the seconds it lives, which may be more than was asked for."""

    lease: int
    ttl: float


class Etcd:
    """A client of one etcd cluster; make and use it within one event loop.

    Every method raises CoordinationUnavailable when no server answers, and ConfigError when they refuse us.
    """

    def __init__(self, url: EtcdUrl, login: Login) -> None:
        self.url = url
        self._login = login
        self._token = ""
        self._channels = [_channel(server, login) for server in url.servers]
        self._current = 0

    async def get(self, key: str) -> Found:
        """Read a key, as a quorum knows it."""
        answer = await self._call("KV/Range", pb.EtcdRange(key=key.encode()), pb.EtcdRangeAnswer)
        if not answer.kvs:
            return Found(answer.header.revision)
        kv = answer.kvs[0]
        return Found(answer.header.revision, kv.value, kv.create_revision, kv.lease)

    async def create(self, key: str, value: bytes, lease: int) -> int:
        """Make a key that lives as long as the lease; returns the revision it was made at, 0 if there is one."""
        name = key.encode()
        put = pb.EtcdOperation(put=pb.EtcdPut(key=name, value=value, lease=lease))
        absent = pb.EtcdCompare(target=_CREATE_REVISION, key=name, create_revision=0)
        try:
            answer = await self._call("KV/Txn", pb.EtcdTxn(compare=[absent], success=[put]), pb.EtcdTxnAnswer)
        except LookupError:
            return 0
        return int(answer.header.revision) if answer.succeeded else 0

    async def changed(self, key: str, after: int, timeout: float) -> bool:
        """Wait until a key changes after that revision, or for so many seconds; returns whether it has."""
        channel = self._channels[self._current]
        watch = channel.stream_stream(
            "/etcdserverpb.Watch/Watch", pb.EtcdWatch.SerializeToString, pb.EtcdWatchAnswer.FromString
        )
        # hasleader: a server that is cut off from the others ends the call instead of keeping silent.
        wanted = pb.EtcdWatch(create=pb.EtcdWatchCreate(key=key.encode(), start_revision=after + 1))
        ended = asyncio.Event()
        call = watch(_one(wanted, ended), metadata=(*self._metadata(), ("hasleader", "true")))
        answer = None
        try:
            async with asyncio.timeout(timeout):  # not a deadline of the call: etcd ends that as a failure of its own
                async for answer in call:
                    if answer.events:
                        return True
                    if answer.canceled:
                        break
                why = answer.cancel_reason if answer else "the call has ended"
                raise CoordinationUnavailable(f"etcd at {self.url} does not say when {key} changes: {why}")
        except TimeoutError:
            return False
        except grpc.aio.AioRpcError as error:
            self._next()
            raise _unavailable(self.url, error) from None
        finally:
            ended.set()
            call.cancel()

    async def grant(self, ttl: float) -> Granted:
        """A new lease."""
        answer = await self._call("Lease/LeaseGrant", pb.EtcdGrant(ttl=round(ttl)), pb.EtcdGrantAnswer)
        return Granted(answer.id, float(answer.ttl))

    async def keep_alive(self, lease: int) -> float:
        """Renew a lease; returns the seconds it lives from now on, 0 if it has ended."""
        answer = await self._call("Lease/LeaseKeepAlive", pb.EtcdLease(id=lease), pb.EtcdKeepAliveAnswer, stream=True)
        return float(max(answer.ttl, 0))

    async def revoke(self, lease: int) -> None:
        """End a lease, and its keys with it; one that has ended is no error."""
        with contextlib.suppress(LookupError):
            await self._call("Lease/LeaseRevoke", pb.EtcdLease(id=lease), pb.EtcdRevokeAnswer)

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()

    async def _call(self, method: str, request: Any, answer: Any, *, stream: bool = False) -> Any:
        """One call to the first server that answers, logged in if we are to; LookupError for an ended lease."""
        if self._login.user and not self._token:
            await self._authenticate()
        try:
            return await self._try_all(method, request, answer, stream=stream)
        except grpc.aio.AioRpcError as error:
            # A token that has grown too old, or is of before etcd was started anew: etcd has two ways to say so.
            if not self._login.user or error.code() not in _TOKEN_REFUSED:
                self._refuse(error)
        await self._authenticate()
        try:
            return await self._try_all(method, request, answer, stream=stream)
        except grpc.aio.AioRpcError as error:
            self._refuse(error)

    async def _authenticate(self) -> None:
        self._token = ""
        login = pb.EtcdLogin(name=self._login.user, password=self._login.password)
        try:
            self._token = (await self._try_all("Auth/Authenticate", login, pb.EtcdLoginAnswer)).token
        except grpc.aio.AioRpcError as error:
            self._refuse(error)

    async def _try_all(self, method: str, request: Any, answer: Any, *, stream: bool = False) -> Any:
        last: grpc.aio.AioRpcError | None = None
        for _ in self._channels:
            channel = self._channels[self._current]
            try:
                return await self._once(channel, f"/etcdserverpb.{method}", request, answer, stream=stream)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _MAYBE_LATER:
                    raise
                last = error
                self._next()
        raise _unavailable(self.url, last)

    async def _once(self, channel: grpc.aio.Channel, path: str, request: Any, answer: Any, *, stream: bool) -> Any:
        kind = channel.stream_stream if stream else channel.unary_unary
        method = kind(path, type(request).SerializeToString, answer.FromString)
        if not stream:
            return await method(request, timeout=CALL_TIMEOUT, metadata=self._metadata())
        ended = asyncio.Event()
        call = method(_one(request, ended), timeout=CALL_TIMEOUT, metadata=self._metadata())
        try:
            first = await call.read()
        finally:
            ended.set()
            call.cancel()
        if first is grpc.aio.EOF:
            raise _unavailable(self.url, None)
        return first

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((TOKEN, self._token),) if self._token else ()

    def _next(self) -> None:
        self._current = (self._current + 1) % len(self._channels)

    def _refuse(self, error: grpc.aio.AioRpcError) -> NoReturn:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise LookupError(error.details()) from None
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise ConfigError(f"what listens at {self.url} is not etcd 3", hint="see agent.coordination") from None
        what = f"etcd at {self.url} refuses us: {error.details()}"
        raise ConfigError(what, hint="see etcd.user, etcd.password_file and the roles of that user") from None


async def check_reachable(url: EtcdUrl, login: Login) -> None:
    """Raise CoordinationUnavailable or ConfigError unless etcd answers us now."""
    etcd = Etcd(url, login)
    try:
        await etcd.get(f"{url.prefix}/")
    finally:
        with contextlib.suppress(Exception):
            await etcd.close()


async def _one(request: Any, ended: asyncio.Event) -> AsyncIterator[Any]:
    """One message of a stream that stays open: etcd ends a call when its caller has finished sending."""
    yield request
    await ended.wait()


def _channel(server: str, login: Login) -> grpc.aio.Channel:
    if login.tls is None:
        return grpc.aio.insecure_channel(server, options=OPTIONS)
    return grpc.aio.secure_channel(server, login.tls, options=OPTIONS)


def _unavailable(url: EtcdUrl, error: grpc.aio.AioRpcError | None) -> CoordinationUnavailable:
    why = f" ({error.details()})" if error is not None and error.details() else ""
    return CoordinationUnavailable(f"etcd does not answer at {url}{why}", hint="is it running? see agent.coordination")
