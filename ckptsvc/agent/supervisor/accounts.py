"""Who a user of the node is, and whether he may have an agent of the system service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ckptsvc.errors import AgentUnavailable, StoreDenied
from ckptsvc.rpc.accounts import Account, account_of, is_listed

NOBODY = 65534

KNOWN_FOR = 30.0
"""Seconds for which an account is not looked up again."""

REMEMBERED = 4096
"""Accounts that are remembered."""

PATIENCE = 20.0
"""Seconds that a look-up may take."""

LOOKING = 32
"""Accounts that are looked up at the same time: mostly this is waiting for a network."""

_Judged = tuple[StoreDenied | None, bool]
"""Why he may have no agent, and whether he is an operator."""


def check(account: Account, users: Sequence[str], min_uid: int) -> None:
    """Refuse who may have no agent here (settings.SystemSettings).

    Raises:
        StoreDenied: he may not.
    """
    who = account.name or f"number {account.uid}"
    if account.uid == 0 or is_listed(account, users):
        return
    if users:
        raise StoreDenied(f"user {who} may not use this node's service", hint="an operator can add to system.users")
    if account.uid < min_uid or account.uid == NOBODY:
        hint = "an operator can name it in system.users"
        raise StoreDenied(f"user {who} is of the system itself: people have numbers from {min_uid} on", hint=hint)
    if not account.name:
        hint = "an operator can list the number in system.users; he has one group then, that with which he came"
        raise StoreDenied(f"user {who} has no account on this node, so nobody knows his groups", hint=hint)


@dataclass(slots=True)
class _Look:
    """A look-up under way, and how many wait for it."""

    work: Future[_Judged]
    done: asyncio.Future[_Judged]
    waiting: int = 0


class Accounts:
    """Looks accounts up in threads, and whether they are in lists; remembers both for a while.

    However many ask for one user, his account is looked up once at a time.

    Args:
        users: who may have an agent.
        min_uid: the same, where nobody is listed.
        operators: who may see those of others.
    """

    def __init__(self, users: Sequence[str], min_uid: int, operators: Sequence[str]) -> None:
        self._users, self._min_uid, self._operators = users, min_uid, operators
        self._known: dict[int, tuple[float, _Judged]] = {}
        self._looking: dict[int, _Look] = {}
        self._threads = ThreadPoolExecutor(LOOKING, "accounts")

    async def admit(self, uid: int, gid: int) -> None:
        """Refuse who may have no agent.

        Raises:
            StoreDenied: he may not.
            AgentUnavailable: his account could not be looked up in time.
        """
        refusal, _ = await self._look(uid, gid)
        if refusal is not None:
            raise StoreDenied(refusal.what, hint=refusal.hint)

    async def is_operator(self, uid: int, gid: int) -> bool:
        """Whether he may see the agents of others; AgentUnavailable as above."""
        return uid == 0 or (bool(self._operators) and (await self._look(uid, gid))[1])

    def admits(self, uid: int) -> bool:
        """Whether it is known, without a look-up, that he may have an agent."""
        found = self._remembered(uid)
        return found is not None and found[0] is None

    def _remembered(self, uid: int) -> _Judged | None:
        found = self._known.get(uid)
        return None if found is None or time.monotonic() - found[0] > KNOWN_FOR else found[1]

    async def _look(self, uid: int, gid: int) -> _Judged:
        if (found := self._remembered(uid)) is not None:
            return found
        look = self._looking.get(uid)
        if look is None:
            work = self._threads.submit(self._judge, uid, gid)
            look = self._looking[uid] = _Look(work, asyncio.wrap_future(work))
            look.done.add_done_callback(lambda done: self._looked(uid, done))
        look.waiting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(look.done), PATIENCE)
        except (TimeoutError, OSError) as error:
            why = str(error) or "no answer"
            raise AgentUnavailable(f"the account of user {uid} cannot be looked up: {why}") from None
        finally:
            look.waiting -= 1
            if not look.waiting and look.work.cancel():  # it has not begun, and makes room for others
                del self._looking[uid]

    def _looked(self, uid: int, done: asyncio.Future[_Judged]) -> None:
        if done.cancelled():
            return
        del self._looking[uid]
        if done.exception() is not None:
            return
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[uid] = (time.monotonic(), done.result())

    def _judge(self, uid: int, gid: int) -> _Judged:
        account = account_of(uid, gid)
        try:
            check(account, self._users, self._min_uid)
        except StoreDenied as refusal:
            return refusal, is_listed(account, self._operators)
        return None, is_listed(account, self._operators)
