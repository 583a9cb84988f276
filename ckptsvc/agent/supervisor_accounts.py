"""Who a user of the node is, and whether he may have an agent of the system service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ckptsvc.errors import AgentUnavailable, StoreDenied
from ckptsvc.rpc.accounts import Account, account_of, is_listed

NOBODY = 65534

KNOWN_FOR = 30.0
"""Seconds for which an account is not looked up again."""

REMEMBERED = 4096
"""Accounts that are remembered."""

PATIENCE = 20.0
"""Seconds that a look-up may take."""


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


class Accounts:
    """Looks accounts up in threads, and whether they are in lists; remembers both for a while.

    Args:
        users: who may have an agent.
        min_uid: the same, where nobody is listed.
        operators: who may see those of others.
    """

    def __init__(self, users: Sequence[str], min_uid: int, operators: Sequence[str]) -> None:
        self._users, self._min_uid, self._operators = users, min_uid, operators
        self._known: dict[int, tuple[float, StoreDenied | None, bool]] = {}

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

    async def _look(self, uid: int, gid: int) -> tuple[StoreDenied | None, bool]:
        found = self._known.get(uid)
        if found is None or time.monotonic() - found[0] > KNOWN_FOR:
            looking = asyncio.get_running_loop().run_in_executor(None, self._judge, uid, gid)
            try:
                judged = await asyncio.wait_for(looking, PATIENCE)
            except (TimeoutError, OSError) as error:
                why = str(error) or "no answer"
                raise AgentUnavailable(f"the account of user {uid} cannot be looked up: {why}") from None
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[uid] = (time.monotonic(), *judged)
        return found[1], found[2]

    def _judge(self, uid: int, gid: int) -> tuple[StoreDenied | None, bool]:
        account = account_of(uid, gid)
        try:
            check(account, self._users, self._min_uid)
        except StoreDenied as refusal:
            return refusal, is_listed(account, self._operators)
        return None, is_listed(account, self._operators)
