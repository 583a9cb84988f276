"""What ranks count on their heartbeat pages, as metrics of the node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ckptsvc.agent.sessions import Session
from ckptsvc.telemetry import Metrics, Skip

LONGEST = 86400.0
"""Seconds for which a snapshot may have held a loop up; more is what a rank has written there by mistake."""

MOST = 1000
"""Snapshots between two looks; more are not counted one by one."""

Rank = tuple[str, int, int, int]
"""Job, attempt, rank and process: what they count goes on when they register again."""


class Told(NamedTuple):
    """What a rank has counted so far: nanoseconds, snapshots taken, and not taken for want of an agent."""

    blocked: int = 0
    snapshots: int = 0
    missed: int = 0


class Pages:
    """Reads all pages of the node; a rank may write there what it likes, and what makes no sense is not counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: dict[Rank, Told] = {}

    def count(self, sessions: Iterable[Session], now: float) -> None:
        """Count what is new; `now` is CLOCK_MONOTONIC in seconds."""
        oldest = 0.0
        for session in sessions:
            reg, page = session.reg, session.page
            if at := page.get("at"):
                oldest = max(oldest, now - at / 1e9)
            taken = page.get("snapshots")  # read first: with it, the time it took is there
            told = Told(page.get("blocked"), taken, page.get("missed"))
            rank = (reg.job, reg.attempt, reg.rank, session.pid)
            before = self._told.get(rank, Told())
            if told.snapshots == before.snapshots:  # the time is written before the number
                told = told._replace(blocked=before.blocked)
            if told != before:
                self._told[rank] = told
                self._add(before, told)
        self._metrics.heartbeat_age.set(oldest)

    def forget(self, job: str) -> None:
        """A job has left the node."""
        for rank in [rank for rank in self._told if rank[0] == job]:
            del self._told[rank]

    def _add(self, before: Told, told: Told) -> None:
        snapshots, missed = told.snapshots - before.snapshots, told.missed - before.missed
        seconds = (told.blocked - before.blocked) / 1e9
        if 0 < snapshots <= MOST and 0 <= seconds / snapshots <= LONGEST:
            for _ in range(snapshots):
                self._metrics.blocked.observe(seconds / snapshots)
        if 0 < missed <= MOST:
            self._metrics.snapshots_skipped.labels(Skip.NO_AGENT).inc(missed)
