"""How much of the service's attention one user gets: connections at a time, and requests in a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

RATE, BURST = 100.0, 2048.0
"""Connections and requests of one user in a second, and how many at once: the ranks of a large node all come at the
same instant."""

CONNECTIONS = 1024
"""Connections that one user may have open."""

ALL_CONNECTIONS = 8192
"""Those of all users but root."""

STRANGERS = 512
"""Those of all users together of whom it is not known that they may have an agent: one person may have many numbers
(user namespaces)."""

REMEMBERED = 1024
"""Users whose requests are counted; those who have asked for nothing lately are forgotten."""


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """A connection.

    Attributes:
        uid: whose it is.
        hang_up: ends it, for it has to make room.
    """

    uid: int
    hang_up: Callable[[], None]


@dataclass(slots=True)
class _Caller:
    """One user.

    Attributes:
        tokens: requests that he has left.
        at: when they were counted.
        known: he may have an agent.
        visits: his connections.
        idle: those of them that could be hung up on, the oldest first.
    """

    tokens: float
    at: float
    known: bool = False
    visits: set[Visit] = field(default_factory=set)
    idle: dict[Visit, None] = field(default_factory=dict)


class Gate:
    """Counts; the caller gives the time (CLOCK_MONOTONIC).

    Where there is no room, a connection makes way on which nobody waits for an agent: the oldest, of the user who has
    most.

    Attributes:
        most: connections that may be open, of all users.
    """

    def __init__(self) -> None:
        self.most = ALL_CONNECTIONS
        self._callers: dict[int, _Caller] = {}
        self._open = {False: 0, True: 0}
        """How many, by whether their users are known."""

    def enter(self, visit: Visit, known: bool, now: float) -> str:
        """Count a new connection; returns why it is one too many, or "" (then `leave` must follow)."""
        caller = self._caller(visit.uid, now)
        if not self._pay(caller, now):
            return f"user {visit.uid} asks too often"
        if len(caller.visits) >= CONNECTIONS:
            return f"user {visit.uid} has {CONNECTIONS} connections open"
        if known:
            self._admit(caller)
        elif not caller.visits:
            caller.known = False
        most = self.most if caller.known else min(self.most, STRANGERS)
        if visit.uid and self._open[caller.known] >= most and not self._make_room(caller.known):
            return "too many connections are open"
        caller.visits.add(visit)
        caller.idle[visit] = None
        self._open[caller.known] += 1
        return ""

    def _make_room(self, known: bool) -> bool:
        found = [c for uid, c in self._callers.items() if uid and c.idle and c.known is known]
        if not found:
            return False
        oldest = next(iter(max(found, key=lambda caller: len(caller.idle)).idle))
        self.leave(oldest)
        oldest.hang_up()
        return True

    def _admit(self, caller: _Caller) -> None:
        """None of a user's connections is a stranger's any more."""
        if not caller.known:
            caller.known = True
            self._open[False] -= len(caller.visits)
            self._open[True] += len(caller.visits)

    def keep(self, visit: Visit) -> None:
        """Its user may have an agent, and waits for it there, or this is the agent: it makes no room for others."""
        caller = self._callers[visit.uid]
        self._admit(caller)
        caller.idle.pop(visit, None)

    @contextlib.contextmanager
    def waiting(self, visit: Visit) -> Iterator[None]:
        """The same, for a while."""
        self.keep(visit)
        try:
            yield
        finally:
            caller = self._callers[visit.uid]
            if visit in caller.visits:
                caller.idle[visit] = None

    def leave(self, visit: Visit) -> None:
        """It has ended, if it had not been hung up on."""
        caller = self._callers.get(visit.uid)
        if caller is not None and visit in caller.visits:
            caller.visits.remove(visit)
            caller.idle.pop(visit, None)
            self._open[caller.known] -= 1

    def asks(self, uid: int, now: float) -> bool:
        """Count a request; whether it may be answered."""
        return self._pay(self._caller(uid, now), now)

    def _pay(self, caller: _Caller, now: float) -> bool:
        caller.tokens = min(BURST, caller.tokens + RATE * max(now - caller.at, 0.0))
        caller.at = now
        if caller.tokens < 1.0:
            return False
        caller.tokens -= 1.0
        return True

    def _caller(self, uid: int, now: float) -> _Caller:
        caller = self._callers.get(uid)
        if caller is None:
            if len(self._callers) >= REMEMBERED:
                quiet = BURST / RATE  # by then, all is as if he had never asked
                kept = {u: c for u, c in self._callers.items() if c.visits or now - c.at < quiet}
                self._callers = kept
            caller = self._callers[uid] = _Caller(BURST, now)
        return caller
