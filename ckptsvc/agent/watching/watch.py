"""Watches the heartbeat pages of this node's ranks; obeys the orders to examine ranks, and to kill one.

What is normal and what is not is decided in control.stalls; who is to blame, by the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ckptsvc.agent.aside import aside
from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import LocalJob, Session
from ckptsvc.agent.watching import evidence, procfs
from ckptsvc.agent.watching.evidence import Target
from ckptsvc.control.pace import BRIEF_FROM, stalls_within
from ckptsvc.control.stalls import Limits, Sight, Stalls
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import HealthSettings
from ckptsvc.telemetry import Event, Fields, log

logger = logging.getLogger("ckptsvc.agent")

LOOK_EVERY = 0.25
"""Seconds between looks at the pages."""

ACTIVITY_MOST = 0.5
"""Seconds to find out what a rank reads and writes."""

Key = tuple[str, int]
"""(job, attempt)."""


def limits_of(settings: HealthSettings) -> Limits:
    """What the settings call normal."""
    return Limits(settings.floor, settings.factor, settings.startup)


class Watch:
    """The health of this node's ranks.

    Args:
        local: the agent's state.
        limits: what is normal.
        enabled: False: nobody is ever reported; orders are obeyed all the same.
        nics: finds one sentence for each network card that is not well.
        clock: seconds that do not stand still or go back.

    Attributes:
        log_of: the file with a rank's output, if somebody keeps it.
        on_kill: called with a job, a rank that is killed because it hangs, and the reason.
    """

    def __init__(
        self,
        local: Local,
        limits: Limits,
        *,
        enabled: bool,
        nics: Callable[[], list[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local, self._limits, self._enabled, self._nics, self._clock = local, limits, enabled, nics, clock
        self.log_of: Callable[[Session], Path | None] = lambda session: None
        self.on_kill: Callable[[str, int, str], None] = lambda job, rank, reason: None
        self._stalls: dict[Key, Stalls] = {}
        local.stalled = self.resync

    def change(self, limits: Limits, *, enabled: bool) -> None:
        """Go by other limits from now on."""
        self._limits, self._enabled = limits, enabled
        for stalls in self._stalls.values():
            stalls.limits = limits

    async def run(self) -> None:
        """Look at the pages, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self.look(self._clock())

    def look(self, now: float) -> None:
        """One look at all pages; tells the coordinators what has changed."""
        ranks: dict[Key, dict[int, Session]] = {}
        for session in self._local.sessions.values():
            if session.page.get("at"):  # else it has not begun to beat
                ranks.setdefault((session.reg.job, session.reg.attempt), {})[session.reg.rank] = session
        for key in self._stalls.keys() - ranks.keys():
            del self._stalls[key]
        for (job, attempt), sessions in ranks.items():
            stalls = self._stalls.get((job, attempt))
            if stalls is None:
                nodes = next(iter(sessions.values())).reg.world_size / len(sessions)
                patience = random.uniform(0, stalls_within(nodes)) if nodes > BRIEF_FROM else 0.0
                stalls = Stalls(job, self._local.name, attempt, self._limits, LOOK_EVERY, patience)
                self._stalls[job, attempt] = stalls
            suspicious = [r for r in stalls.suspicious() if r in sessions]
            stopped = [r for r in suspicious if procfs.state(sessions[r].pid) == "T"]
            found = stalls.look({r: _sight(s) for r, s in sessions.items()}, now, stopped)
            for report in found if self._enabled else ():
                self._say(report)
                self._local.report(self._local.jobs[job], report)

    def resync(self, coordinator: str) -> Iterator[pb.Report]:
        """What a coordinator that connects anew must hear."""
        for (name, _), stalls in self._stalls.items():
            job = self._local.jobs.get(name)
            if job is not None and job.coordinator == coordinator and self._enabled:
                yield from stalls.standing()

    def order(self, job: LocalJob, order: pb.Order) -> None:
        """An order to examine ranks, or to kill one."""
        if order.WhichOneof("effect") == "examine":
            self._local.spawn(self._examine(job, order.examine))
        else:
            self._kill(job, order.kill)

    async def _examine(self, job: LocalJob, order: pb.Examine) -> None:
        sessions = self._sessions(job, order.attempt)
        targets = [Target.of(s, log=self.log_of(s), phase=s.page.phase) for s in sessions.values()]
        try:
            examined = await evidence.examine(order, job.name, self._local.name, targets, self._nics)
        except Exception:
            # No evidence is an answer too: the coordinator must not wait for it.
            logger.exception("the ranks of %s could not be examined", job.name)
            examined = pb.Examined(job=job.name, attempt=order.attempt, incident=order.incident, node=self._local.name)
        examined.round = order.round
        stalls = self._stalls.get((job.name, order.attempt))
        for one in examined.ranks:
            if stalls is not None and one.rank in sessions:
                one.stalled, one.threshold = stalls.quiet(one.rank), stalls.allowed(one.rank)
        await asyncio.gather(*map(_note_activity, examined.ranks))
        self._local.report(job, pb.Report(examined=examined))

    def hangs(self, job: str, attempt: int, rank: int) -> bool:
        """Whether a rank was without progress for too long when last looked at."""
        stalls = self._stalls.get((job, attempt))
        return stalls is not None and stalls.quiet(rank) > stalls.allowed(rank)

    def _kill(self, job: LocalJob, order: pb.Kill) -> None:
        self.look(self._clock())
        session = self._sessions(job, order.attempt).get(order.rank)
        if session is None:
            return
        still = not order.state or procfs.state(session.pid) == order.state
        if not still or not self.hangs(job.name, order.attempt, order.rank):
            log(logger, logging.WARNING, Event.RANK_MOVED, "rank %d was to be killed and is on its way again: it lives",
                order.rank, job=job.name, attempt=order.attempt, rank=order.rank)  # fmt: skip
            return
        log(logger, logging.ERROR, Event.RANK_HUNG, "SIGKILL to rank %d: %s", order.rank, order.reason,
            job=job.name, attempt=order.attempt, rank=order.rank)  # fmt: skip
        if session.pidfd < 0:
            logger.error("rank %d is a process of another pid namespace, out of this agent's reach", order.rank)
            return
        self.on_kill(job.name, order.rank, order.reason)
        try:
            signal.pidfd_send_signal(session.pidfd, signal.SIGKILL)
        except OSError as error:  # it has ended, or changed its user
            logger.warning("rank %d: %s", order.rank, error.strerror)

    def _say(self, report: pb.Report) -> None:
        if report.HasField("slowed"):
            slowed = report.slowed
            log(logger, logging.WARNING, Event.JOB_SLOWED, "steps take %.2g s, and took %.2g s", slowed.seconds,
                slowed.usual, job=slowed.job, attempt=slowed.attempt)  # fmt: skip
            return
        event = report.stalled if report.HasField("stalled") else report.moved
        about = Fields(job=event.job, attempt=event.attempt, rank=event.rank)
        if isinstance(event, pb.Stalled):
            log(logger, logging.WARNING, Event.RANK_STALLED,
                "rank %d has made no progress for %.1f s in phase %s after step %d (%.1f s are allowed)",
                event.rank, event.seconds, event.phase or "unknown", event.step, event.threshold, **about)  # fmt: skip
        else:
            log(logger, logging.INFO, Event.RANK_MOVED, "rank %d makes progress again", event.rank, **about)

    def _sessions(self, job: LocalJob, attempt: int) -> dict[int, Session]:
        return {
            session.reg.rank: session
            for session in self._local.sessions.values()
            if (session.reg.job, session.reg.attempt) == (job.name, attempt)
        }


async def _note_activity(evidence: pb.RankEvidence) -> None:
    with contextlib.suppress(TimeoutError):  # then nothing is known of it
        look = partial(procfs.activity, evidence.pid)
        evidence.io_bytes, evidence.children_cpu = await aside(look, ACTIVITY_MOST)


def _sight(session: Session) -> Sight:
    page = session.page
    phases = page.get("phases")
    return Sight(page.told("step"), page.get("at") / 1e9, phases, page.get("since") / 1e9, page.phase)
