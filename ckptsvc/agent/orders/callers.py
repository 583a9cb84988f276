"""Who gives orders to this agent: known by the kernel at the identity socket, and bound to his calls by a token.

grpcio has no peer credentials, so `ckptsvc pause` asks there for a token first; it is good while that connection lasts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio
import msgspec

from ckptsvc.agent.aside import aside
from ckptsvc.agent.logtail import one_line
from ckptsvc.errors import CkptsvcError, InvalidInput, StoreDenied
from ckptsvc.rpc.accounts import account_of, is_listed, user_name
from ckptsvc.rpc.channel import FOR_KEY, TOKEN_KEY, trailers_of
from ckptsvc.rpc.roles import ROLES, VERBS, Role

MAX_CALLERS = 256
"""Tokens at a time: people do not order so much at once."""

LOOK_UP = 5.0
"""Seconds for a look at the accounts: those of many sites are on a network."""

ROOT = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        uid, pid: as the kernel says.
        name: of the user, or the number of one that has no name here.
        roles: what he may do.
        via: who has passed the order on for him, "" for nobody.
    """

    uid: int
    pid: int
    name: str
    roles: frozenset[Role]
    via: str = ""


class _Claim(msgspec.Struct, frozen=True):
    """For whom root passes an order on."""

    uid: int
    name: str


class Callers:
    """Those of one agent.

    Args:
        operators: users and "@group"s that operate the machine beside root.

    Attributes:
        on_stranger: told of a user who wants a token and gets none.
    """

    def __init__(self, operators: Sequence[str] = ()) -> None:
        self._operators = operators
        self.on_stranger: Callable[[int, str], None] = lambda uid, name: None
        self._by_token: dict[str, Caller] = {}
        self._names: dict[int, str] = {}  # of the owner and of root

    async def admit(self, uid: int, pid: int) -> str:
        """Give a token to a process of a user.

        Raises:
            StoreDenied: the agent is another user's, and he does not operate the machine.
            InvalidInput: too many have one.
        """
        name, roles = await self._who(uid)
        if not roles:
            self.on_stranger(uid, name)
            owner = self._names.get(os.geteuid(), str(os.geteuid()))
            raise StoreDenied(
                f"this agent serves user {owner}, not {name}", hint="root may give orders to others' agents"
            )
        if len(self._by_token) >= MAX_CALLERS:
            raise InvalidInput("too many callers at a time")
        token = secrets.token_hex(16)
        self._by_token[token] = Caller(uid, pid, name, roles)
        return token

    def dismiss(self, token: str) -> None:
        """The connection has ended."""
        self._by_token.pop(token, None)

    def of(self, metadata: Any) -> Caller | None:
        """Who makes the call with this metadata; None where it has no token of a caller."""
        said = {str(key): value for key, value in metadata or ()}
        caller = self._by_token.get(str(said.get(TOKEN_KEY, "")))
        if caller is None or FOR_KEY not in said or caller.uid != ROOT:
            return caller
        try:  # who has become root to give this order: root is believed
            claim = msgspec.json.decode(said[FOR_KEY], type=_Claim)
        except (msgspec.MsgspecError, UnicodeError):
            return None
        return Caller(claim.uid, caller.pid, one_line(claim.name)[:64], caller.roles, via=caller.name)

    async def _who(self, uid: int) -> tuple[str, frozenset[Role]]:
        """Name and roles of a user."""
        roles = {ROOT: frozenset({Role.OPERATOR}), os.geteuid(): frozenset(Role)}.get(uid, frozenset())
        if uid in self._names:
            return self._names[uid], roles
        try:
            name, is_operator = await aside(partial(_look_up, uid, () if roles else self._operators), LOOK_UP)
        except OSError:  # nobody says who that is: whom we know without gives his orders all the same
            return str(uid), roles
        if roles:
            self._names[uid] = name
        return name, frozenset({Role.OPERATOR}) if is_operator else roles


def _look_up(uid: int, operators: Sequence[str]) -> tuple[str, bool]:
    return user_name(uid), bool(operators) and is_listed(account_of(uid), operators)


class RoleGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets a call through to a method whose role its caller has.

    Args:
        callers: who gives orders; None: others have looked who calls (rpc.trust).
        refused: told of a call that is not let through: by whom (None: not known), and of which method.
    """

    def __init__(self, callers: Callers | None, refused: Callable[[Caller | None, str], None]) -> None:
        self._callers, self._refused = callers, refused

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Called by gRPC before it reads anything of a call but its metadata."""
        method = str(details.method)
        caller = self._callers.of(details.invocation_metadata) if self._callers is not None else None
        error = self._reason_against(method, caller)
        if error is None:
            return await continuation(details)
        self._refused(caller, method)

        async def refuse(_requests: Any, context: Any) -> None:
            await context.abort(*trailers_of(error))

        return grpc.stream_stream_rpc_method_handler(refuse)  # whatever the method: for it, grpc reads no message

    def _reason_against(self, method: str, caller: Caller | None) -> CkptsvcError | None:
        role, name = ROLES.get(method), method.rpartition("/")[2]
        if role is None:
            return StoreDenied(f"{name[:80]} is a method that nobody may call")
        if caller is not None and role not in caller.roles:
            return StoreDenied(f"{name} is for the owner of the agent, not for {caller.name}")
        if caller is None and self._callers is not None and method in VERBS:
            return StoreDenied(f"{name} needs to know who calls", hint="ask the identity socket for a token first")
        return None
