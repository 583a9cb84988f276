"""Channels and servers: limits, deadlines, and errors carried as a code in the trailers.

An error raised in a servicer as `CkptsvcError` arrives at the caller as the same class with the same message.
"""

from __future__ import annotations

import json

import grpc

from ckptsvc.errors import BY_CODE, GRPC_STATUS, AgentUnavailable, CkptsvcError

MAX_MESSAGE = 256 << 20
"""Largest message in bytes: the columns of a shard with three million regions."""

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is not meant for a loopback or cluster address
]


def _keepalive(idle: int) -> list[tuple[str, int]]:
    """Ping after so many milliseconds without a word."""
    return [
        ("grpc.keepalive_time_ms", idle),
        ("grpc.keepalive_timeout_ms", 1200),
        ("grpc.http2.ping_timeout_ms", 1200),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


SERVER_KEEPALIVE, KEEPALIVE = _keepalive(800), _keepalive(1000)
"""For streams between agents, at the coordinator's end and at the other: a lease of two seconds, kept up by pings of
gRPC's own threads. A busy interpreter neither delays them nor pays for them. Without `ping_timeout_ms` a frozen peer is
not noticed. One end hears the pings of the other and keeps its own, which each cost a coordinator 30 microseconds: with
ten thousand agents, a third of a core."""

BETWEEN = [
    ("grpc.http2.min_ping_interval_without_data_ms", 300),  # one that pings more often is taken for an attacker
    ("grpc.max_concurrent_streams", 128),  # of one connection: a stream for each job, and calls; more of them wait
    ("grpc.server_handshake_timeout_ms", 3000),  # who connects and says nothing is not waited for
    ("grpc.max_connection_idle_ms", 10_000),  # without a call; agents always have one
    ("grpc.so_reuseport", 0),  # one process listens at an address, as rpc.proof needs it
]
"""For the server at which agents look for a coordinator."""

LOCAL = [*(each for each in OPTIONS if "receive" not in each[0]), ("grpc.max_receive_message_length", 32 << 20)]
"""For the server at which the ranks and launchers of a node call, and for who asks another user's: little is said."""

MAX_CALLS = 65536
"""Calls to that server that may wait for an answer; each rank has a handful."""

MAX_WHAT = 800
"""Characters of an error's message that travel."""

_HANDSHAKE = ("erification", "CERTIFICATE", "Handshake", "handshake")
_CERTIFICATES = "certificates of both ends must be of one authority and one user, and valid now: `ckptsvc certs show`"
MAX_DETAILS = 200
"""Characters of what gRPC has to say of a handshake that are repeated."""

ERROR_KEY = "ckptsvc-error-bin"
TOKEN_KEY = "ckptsvc-token"
FOR_KEY = "ckptsvc-for"
"""For whom root passes an order on, as JSON: {"uid", "name"}. Nobody else is believed."""


def trailers_of(error: CkptsvcError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """The status, its details and the trailing metadata that carry an error: the arguments of `context.abort`."""
    # gRPC drops a call whose metadata exceed 8 KiB: a message that long is cut.
    body = {"code": error.code, "what": error.what[:MAX_WHAT], "hint": error.hint[: MAX_WHAT // 2]}
    trailers = ((ERROR_KEY, json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")),)
    return grpc.StatusCode[GRPC_STATUS[error.code]], error.what[: MAX_WHAT // 8], trailers


def error_of(failure: grpc.RpcError) -> CkptsvcError:
    """The error a call ended with; a lost connection or a deadline is `AgentUnavailable`."""
    for key, value in failure.trailing_metadata() or ():
        if key == ERROR_KEY:
            try:
                body = json.loads(value)
                return BY_CODE.get(body["code"], CkptsvcError)(str(body["what"]), hint=str(body.get("hint", "")))
            except (ValueError, KeyError, TypeError):
                break
    details = failure.details() or ""
    if any(word in details for word in _HANDSHAKE):
        why = details.rpartition("error: ")[2] or details
        return AgentUnavailable(f"no secure connection: {why[:MAX_DETAILS]}", hint=_CERTIFICATES)
    # grpc.aio: the connection broke under a read or a write.
    broken = failure.code() is grpc.StatusCode.INTERNAL and failure.details() == "Internal error from Core"
    if broken or failure.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return AgentUnavailable("the agent does not answer", hint="is it running? see `ckptsvc status`")
    if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return AgentUnavailable("the agent did not answer in time")
    return CkptsvcError(f"call failed: {failure.code().name}: {failure.details()}")
