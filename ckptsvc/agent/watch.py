"""Watches the heartbeat pages of this node's ranks; obeys the orders to examine ranks, and to kill one.

What is normal and what is not is decided in control.stalls; who is to blame, by the coordinator.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterator

from ckptsvc.agent import examine
from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import LocalJob, Session
from ckptsvc.control.stalls import Limits, Sight, Stalls
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Event, Fields, log

logger = logging.getLogger("ckptsvc.agent")

LOOK_EVERY = 0.25
"""Seconds between looks at the pages."""

EXAMINE_MOST = 10.0
"""Seconds that an examination may take, whatever the order says."""

Key = tuple[str, int]
"""(job, attempt)."""


class Watch:
    """The health of this node's ranks.

    Args:
        local: the agent's state.
        limits: what is normal.
        enabled: False: nobody is ever reported; orders are obeyed all the same.
    """

    def __init__(self, local: Local, limits: Limits, *, enabled: bool) -> None:
        self._local, self._limits, self._enabled = local, limits, enabled
        self._stalls: dict[Key, Stalls] = {}
        local.stalled = self.resync

    async def run(self) -> None:
        """Look at the pages, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self.look(time.monotonic())

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
                stalls = Stalls(job, self._local.name, attempt, self._limits, LOOK_EVERY)
                self._stalls[job, attempt] = stalls
            suspicious = [r for r in stalls.suspicious() if r in sessions]
            stopped = [r for r in suspicious if examine.process_state(sessions[r].pid) == "T"]
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
        chosen = [
            session.reg.rank
            for session in self._sessions(job, order.attempt).values()
            if not order.ranks or session.reg.rank in order.ranks
        ]
        seconds = min(max(order.seconds, 0.1), EXAMINE_MOST)
        evidence = await self._collect(job, order.attempt, chosen, seconds)
        stalls = self._stalls.get((job.name, order.attempt))
        sessions = self._sessions(job, order.attempt)
        evidence = [one for one in evidence if one.rank in sessions]
        for one in evidence:
            page = sessions[one.rank].page
            one.phase, one.step = page.phase, page.get("step")
            one.io_bytes, one.children_cpu = examine.activity(one.pid)
            if stalls is not None:
                one.stalled, one.threshold = stalls.quiet(one.rank), stalls.allowed(one.rank)
        examined = pb.Examined(
            job=job.name,
            attempt=order.attempt,
            incident=order.incident,
            round=order.round,
            node=self._local.name,
            ranks=evidence,
        )
        self._local.report(job, pb.Report(examined=examined))

    async def _collect(self, job: LocalJob, attempt: int, ranks: list[int], seconds: float) -> list[pb.RankEvidence]:
        sessions = self._sessions(job, attempt)
        targets = [examine.Target(rank, sessions[rank].pid) for rank in ranks]
        try:
            return await asyncio.wait_for(examine.collect(targets, seconds), seconds + 1.0)
        except Exception as error:
            # No evidence is an answer too: the others' is not to wait for it.
            logger.exception("the ranks of %s could not be examined", job.name)
            notes = [f"not examined: {type(error).__name__}: {error}"]
            return [pb.RankEvidence(rank=t.rank, pid=t.pid, enqueued=-1, completed=-1, notes=notes) for t in targets]

    def hangs(self, job: str, attempt: int, rank: int) -> bool:
        """Whether a rank was without progress for too long when last looked at."""
        stalls = self._stalls.get((job, attempt))
        return stalls is not None and stalls.quiet(rank) > stalls.allowed(rank)

    def _kill(self, job: LocalJob, order: pb.Kill) -> None:
        self.look(time.monotonic())
        session = self._sessions(job, order.attempt).get(order.rank)
        if session is None:
            return
        if not self.hangs(job.name, order.attempt, order.rank):
            log(logger, logging.WARNING, Event.RANK_MOVED, "rank %d was to be killed and is on its way again: it lives",
                order.rank, job=job.name, attempt=order.attempt, rank=order.rank)  # fmt: skip
            return
        log(logger, logging.ERROR, Event.RANK_HUNG, "SIGKILL to rank %d: %s", order.rank, order.reason,
            job=job.name, attempt=order.attempt, rank=order.rank)  # fmt: skip
        if session.pidfd < 0:
            logger.error("rank %d is a process of another pid namespace, out of this agent's reach", order.rank)
            return
        try:
            signal.pidfd_send_signal(session.pidfd, signal.SIGKILL)
        except OSError as error:  # it has ended, or changed its user
            logger.warning("rank %d: %s", order.rank, error.strerror)

    def _say(self, report: pb.Report) -> None:
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


def _sight(session: Session) -> Sight:
    page = session.page
    phases = page.get("phases")
    return Sight(page.get("step"), page.get("at") / 1e9, phases, page.get("since") / 1e9, page.phase)
