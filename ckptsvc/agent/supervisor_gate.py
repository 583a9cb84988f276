"""How much of the service's attention one user gets: connections at a time, and requests in a second."""

from __future__ import annotations

from dataclasses import dataclass

RATE, BURST = 100.0, 2048.0
"""Connections and requests of one user in a second, and how many at once: the ranks of a large node all come at the
same instant."""

CONNECTIONS = 1024
"""Connections that one user may have open."""

ALL_CONNECTIONS = 8192
"""Those of all users but root."""

REMEMBERED = 1024
"""Users whose requests are counted; those who have asked for nothing lately are forgotten."""


@dataclass(slots=True)
class _Caller:
    tokens: float
    at: float
    connections: int = 0


class Gate:
    """Counts; the caller gives the time (CLOCK_MONOTONIC).

    Attributes:
        most: connections that may be open, of all users.
    """

    def __init__(self) -> None:
        self.most = ALL_CONNECTIONS
        self._callers: dict[int, _Caller] = {}
        self._open = 0

    def enter(self, uid: int, now: float) -> str:
        """Count a new connection; returns why it is one too many, or "" (then `leave` must follow)."""
        caller = self._caller(uid, now)
        if not self._pay(caller, now):
            return f"user {uid} asks too often"
        if caller.connections >= CONNECTIONS:
            return f"user {uid} has {CONNECTIONS} connections open"
        if uid and self._open >= self.most:
            return "too many connections are open"
        caller.connections += 1
        self._open += 1
        return ""

    def leave(self, uid: int) -> None:
        """One of the connections has ended."""
        self._callers[uid].connections -= 1
        self._open -= 1

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
                kept = {u: c for u, c in self._callers.items() if c.connections or now - c.at < quiet}
                self._callers = kept
            caller = self._callers[uid] = _Caller(BURST, now)
        return caller
