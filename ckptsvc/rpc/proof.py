"""How two agents prove to each other that they know their user's secret (rpc.secret), which itself is never sent.

All of it is metadata of the calls, in hexadecimal; N and M are 32 random bytes, each for one call only:

    caller -> listener   Challenge: N
    listener -> caller   M, proof(listens, address, N, M)
    caller -> listener   any other call: M, proof(calls, address, method, N, M)
    listener -> caller   on that call, before anything else: proof(accepts, address, method, N, M)

    proof(role, ...) = HMAC-SHA256(secret, [LABEL, role, ...] as JSON)

The adversary is another user of this host. He may connect to an agent's port, listen at an address where agents look
for one that has ended, pass on to one agent what another sends him, write into etcd, and keep all he sees. He cannot
read or change what goes between two other processes over loopback: who can is root, and has the file. So:

- who listens without the secret gets no proof and no report, and nothing he says is obeyed: the last proof is on the
  very call that is then used, because a channel may have connected anew, to another listener, meanwhile. All that one
  can get who takes the port over between the proof and the call is the request of a call with one message each way,
  which is sent at once: the name and the term of a job;
- proofs that are passed on are of no use: they hold for one address, and only one process can listen there;
- nor are recorded ones: N and M are new for each call, and M is forgotten when it has been used, or after a time;
- who calls without the secret costs nothing but his connection: his call is refused by its metadata alone. Its body is
  neither parsed nor waited for, and of the answer to a challenge nothing can be derived.

Whatever etcd or a flag says of where a coordinator is, is a hint: the agent there has to prove itself. Who squats on
its address can keep agents from it, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from ckptsvc.errors import AgentUnavailable, StoreDenied
from ckptsvc.rpc.channel import error_of, trailers_of
from ckptsvc.rpc.v1 import coordinator_pb2

LABEL = "ckptsvc agents, version 1"
"""First in all that is proved; another one is another protocol."""

SERVICE = f"/{coordinator_pb2.DESCRIPTOR.services_by_name['CoordinatorService'].full_name}/"
CHALLENGE = f"{SERVICE}Challenge"

NONCE_KEY, CHALLENGE_KEY, PROOF_KEY = "ckptsvc-nonce", "ckptsvc-challenge", "ckptsvc-proof"
"""Metadata: N, M, and the proof of whoever sends it."""

PATIENCE = 60.0
"""Seconds in which all of it must have happened; ten thousand agents may come to a new coordinator at once."""

MAX_OPEN = 1 << 16
"""Challenges that wait for their call, 200 bytes each. Beyond, the oldest is forgotten, and its caller begins anew."""

_LAST_WORD = 1.0
"""Seconds for the status of a call that has come without a proof."""

_NONCE = re.compile(r"[0-9a-f]{64}")


def proof(secret: str, role: str, *facts: str) -> str:
    """Shows, to who knows the secret too, that these facts were stated by one who does, in that role."""
    return hmac.new(secret.encode(), json.dumps([LABEL, role, *facts]).encode(), hashlib.sha256).hexdigest()


def same(given: str, expected: str) -> bool:
    """Whether two proofs are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _metadata(pairs: Any) -> dict[str, str]:
    return {str(key): value if isinstance(value, str) else "" for key, value in pairs or ()}


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """The listener's side: lets in the calls that prove to come from an agent of ours, and answers them with a proof.

    Serves methods with one message each way, or a stream each way, as those between agents are.

    Args:
        secret: that of the user's agents.
        refused: called for each call that is turned away.
        clock: seconds.

    Attributes:
        address: where this process listens (secret.numeric); set it before the server starts.
    """

    def __init__(self, secret: str, refused: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._secret, self._refused, self._clock = secret, refused, clock
        self._open: OrderedDict[str, tuple[str, float]] = OrderedDict()  # M -> N, and until when
        self.address = ""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Called by gRPC before it reads anything of a call but its metadata."""
        said = _metadata(details.invocation_metadata)
        # Handlers of streams, whatever the method: for those grpc reads no message unless it is asked to.
        if details.method == CHALLENGE:
            return grpc.stream_stream_rpc_method_handler(_answering(self._challenge(said)))
        answer = self._admit(str(details.method), said)
        if answer is None:
            self._refused()
            return grpc.stream_stream_rpc_method_handler(_refuse)
        handler = await continuation(details)
        return None if handler is None else _after(answer, handler)

    def _challenge(self, said: dict[str, str]) -> tuple[tuple[str, str], ...]:
        nonce = said.get(NONCE_KEY, "")
        if not _NONCE.fullmatch(nonce):
            return ()
        now = self._clock()
        while self._open and (len(self._open) >= MAX_OPEN or next(iter(self._open.values()))[1] < now):
            self._open.popitem(last=False)
        challenge = secrets.token_hex(32)
        self._open[challenge] = nonce, now + PATIENCE
        own = proof(self._secret, "listens", self.address, nonce, challenge)
        return (CHALLENGE_KEY, challenge), (PROOF_KEY, own)

    def _admit(self, method: str, said: dict[str, str]) -> tuple[tuple[str, str], ...] | None:
        """The answer to a caller who has proved himself; None for anybody else."""
        challenge = said.get(CHALLENGE_KEY, "")
        nonce, until = self._open.get(challenge, ("", 0.0))
        facts = (self.address, method, nonce, challenge)
        if (
            not nonce
            or self._clock() > until
            or not same(said.get(PROOF_KEY, ""), proof(self._secret, "calls", *facts))
        ):
            return None
        del self._open[challenge]
        return ((PROOF_KEY, proof(self._secret, "accepts", *facts)),)


def _answering(metadata: tuple[tuple[str, str], ...]) -> Callable[[Any, Any], Awaitable[None]]:
    async def answer(_requests: Any, context: Any) -> None:
        context.set_trailing_metadata(metadata)

    return answer


async def _refuse(_requests: Any, context: Any) -> None:
    error = StoreDenied("this port is for the agents of its own user", hint="see agent.listen")
    await context.abort(*trailers_of(error))


def _after(metadata: tuple[tuple[str, str], ...], handler: Any) -> Any:
    """The handler, with this metadata sent first."""
    if handler.request_streaming != handler.response_streaming:
        raise NotImplementedError("agents have no calls with a stream one way")

    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata(metadata)
        async with contextlib.aclosing(handler.stream_stream(requests, context)) as responses:
            async for response in responses:
                yield response

    async def single(request: Any, context: Any) -> Any:
        await context.send_initial_metadata(metadata)
        return await handler.unary_unary(request, context)

    codecs = handler.request_deserializer, handler.response_serializer
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, *codecs)
    return grpc.unary_unary_rpc_method_handler(single, *codecs)


@dataclass(frozen=True, slots=True)
class Admission:
    """For one call: the metadata to make it with; `check` what comes back before anything else is done with it."""

    address: str
    metadata: tuple[tuple[str, str], ...]
    expected: str

    async def check(self, call: Any) -> None:
        """Wait until the listener has proved itself on this call.

        Raises:
            StoreDenied: it does not know the secret. The call is cancelled.
            CkptsvcError: what the call failed with.
        """
        proven = False
        try:
            async with _in_time(self.address):
                said = _metadata(await call.initial_metadata())
                proven = same(said.get(PROOF_KEY, ""), self.expected)
                if not proven:
                    await _raise_failure(call)
                    raise _impostor(self.address)
        finally:
            if not proven:
                call.cancel()


async def ask(channel: Any, address: str, secret: str, method: str) -> Admission:
    """Prepare a call of CoordinatorService to whoever listens at an address, once he has proved himself.

    Args:
        channel: to that address (grpc.aio).
        address: as `secret.numeric` spells it.
        secret: that of the user's agents.
        method: its name.

    Raises:
        StoreDenied: whoever listens there does not know the secret.
        AgentUnavailable: nobody listens there, or not in time.
    """
    nonce = secrets.token_hex(32)
    async with _in_time(address):
        call = channel.stream_stream(CHALLENGE)((), metadata=((NONCE_KEY, nonce),))
        try:
            # Not the first metadata: grpc.aio loses those of a call that ends as soon as it has begun.
            said = _metadata(await call.trailing_metadata())
            challenge = said.get(CHALLENGE_KEY, "")
            expected = proof(secret, "listens", address, nonce, challenge)
            if not _NONCE.fullmatch(challenge) or not same(said.get(PROOF_KEY, ""), expected):
                await _raise_failure(call)
                raise _impostor(address)
        finally:
            call.cancel()
    facts = (address, f"{SERVICE}{method}", nonce, challenge)
    own = (CHALLENGE_KEY, challenge), (PROOF_KEY, proof(secret, "calls", *facts))
    return Admission(address, own, proof(secret, "accepts", *facts))


@contextlib.asynccontextmanager
async def _in_time(address: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PATIENCE):
            yield
    except TimeoutError:
        raise AgentUnavailable(f"what listens at {address} does not answer as an agent does") from None


async def _raise_failure(call: Any) -> None:
    """Raise what a call has failed with, if it has."""
    try:
        async with asyncio.timeout(_LAST_WORD):
            code = await call.code()
    except TimeoutError:
        return
    if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED):  # some other program speaks gRPC too
        none = grpc.aio.Metadata()
        raise error_of(grpc.aio.AioRpcError(code, none, await call.trailing_metadata(), await call.details()))


def _impostor(address: str) -> StoreDenied:
    what = f"what listens at {address} is no agent of this user, or one of another version"
    return StoreDenied(what, hint="does another user of this host, or another program, have that port?")
