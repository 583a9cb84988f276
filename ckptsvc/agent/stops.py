"""What makes a node ask for a stop: a signal to one of its ranks, or the end of the scheduler's time.

The coordinator orders it, for all ranks at the same step.
"""

from __future__ import annotations

import signal
import time

from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import Session
from ckptsvc.control.deadline import Limit, reason, stop_at
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

AGAIN = 5.0
"""Seconds after which a wish is repeated while the ranks go on: the coordinator may have changed."""


class Stops:
    """Looks after all local ranks.

    Args:
        local: the agent's state.
        margin: seconds to spare between the last save and the end of the job's time; None: time is not watched.
    """

    def __init__(self, local: Local, margin: float | None) -> None:
        self._local, self.margin = local, margin
        self._first: dict[str, tuple[float, int]] = {}  # session -> when and at which step it was first seen
        self._asked: dict[str, float] = {}  # job -> when

    def look(self) -> None:
        """Ask for the stops that are due; call it a few times a second."""
        now = time.monotonic()
        sessions = self._local.sessions
        self._first = {token: self._first.get(token) or (now, s.page.get("step")) for token, s in sessions.items()}
        self._asked = {job: at for job, at in self._asked.items() if job in self._local.jobs}
        for token, session in sessions.items():
            why = self._why(token, session, now)
            job = session.reg.job
            if why and now - self._asked.get(job, -AGAIN) >= AGAIN:
                self._asked[job] = now
                wanted = pb.StopRequested(job=job, reason=why)
                self._local.report(self._local.jobs[job], pb.Report(stop_requested=wanted))

    def _why(self, token: str, session: Session, now: float) -> str:
        """Why this rank's job should stop; "" if it should not."""
        number = session.page.get("signal")
        if number in (signal.SIGTERM, signal.SIGUSR1):
            return f"{signal.Signals(number).name} to rank {session.reg.rank} on {self._local.name}"
        if self.margin is None or not session.reg.ends:
            return ""
        began, step = self._first[token]
        pace = self._local.jobs[session.reg.job].pace
        steps = session.page.get("step") - step
        pace.step = (now - began) / steps if steps > 0 else 0.0
        limit = Limit(began, session.reg.ends, self.margin)
        return reason(limit, pace, now) if now >= stop_at(limit, pace) else ""
