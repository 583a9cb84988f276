"""The node: ranks that come and go, the coordinator's orders, and what time alone brings.

Everything here runs in the agent's event loop and returns at once; what takes time is awaited, or runs in a worker.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from ckptsvc.agent import reports
from ckptsvc.agent.arenas import Arenas
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.local import Local, wait_for
from ckptsvc.agent.saves import Saves
from ckptsvc.agent.sessions import REMEMBERED, Attempt, LocalJob, Session
from ckptsvc.agent.stops import Stops
from ckptsvc.agent.tiers.local_tier import LocalTier
from ckptsvc.agent.tiers.refills import Refills
from ckptsvc.agent.tiers.twins import Twins
from ckptsvc.agent.watching.pages import Pages
from ckptsvc.agent.watching.procfs import has_ended
from ckptsvc.agent.watching.witness import Witness
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.pace import PROGRESS_EVERY, progress_every
from ckptsvc.control.restart import launched_as
from ckptsvc.control.runs import ranks_of
from ckptsvc.errors import BY_CODE, CkptsvcError, Fenced, InvalidInput, LimitReached
from ckptsvc.pipeline.arena import State
from ckptsvc.quantities import ALL, Limit
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

OVERDUE = 1.5
"""Times `save_timeout` after which an agent stops waiting for the coordinator to end a save."""

_FEWER = "an operator sets what one user may have: system.user_jobs, system.user_ranks"

LOOK_EVERY = PROGRESS_EVERY
"""Seconds between looks at the heartbeat pages."""


class Node:
    """One agent's local affairs.

    Args:
        local: the shared state.
        workers: the I/O workers.
        slots: arenas for each rank.
        job_limit: what the arenas of one job may take.
        linger: seconds for which the memory of a job whose ranks died is kept.
        save_timeout: seconds after which the coordinator gives a save up.
        margin: seconds to spare at the end of a job's time; None: jobs are not stopped before it.
        early: write large snapshots while they are copied.
        tier: the node's local disk, where snapshots go first; None: they go to the durable store.

    Attributes:
        arenas, saves, twins: the parts that ranks call through the servicer.
        launch_order: what to do with an order for a launcher.
        watch_order: what to do with an order about ranks that hang.
        partner_order: what to do with an order about what other nodes hold.
        on_yield: another agent, a service, wants to take over; None: this one is a service.
        people_order: what to do with an order that answers, or comes from, a person.
        on_filling: a rank has begun, or ended, to copy into an arena.
    """

    def __init__(
        self,
        local: Local,
        workers: Workers,
        *,
        slots: int,
        job_limit: Limit = ALL,
        linger: float,
        save_timeout: float,
        margin: float | None = None,
        early: bool = False,
        tier: LocalTier | None = None,
    ) -> None:
        self.twins = Twins(local)
        self.arenas = Arenas(local, workers, slots, self.twins, job_limit)
        self.saves = Saves(local, workers, early=early, tier=tier)
        self.refills = Refills(local, workers, tier, self.saves)
        self.tier = tier
        self.launch_order: Callable[[pb.Order], None] = lambda order: None
        self.watch_order: Callable[[LocalJob, pb.Order], None] = lambda job, order: None
        self.partner_order: Callable[[LocalJob, pb.Order], None] = lambda job, order: None
        self.on_yield: Callable[[], None] | None = None
        self.people_order: Callable[[pb.Order], None] = lambda order: None
        self.on_filling: Callable[[], None] = lambda: None
        self._local, self._workers = local, workers
        self.stops = Stops(local, margin)
        self._pages = Pages(local.metrics)
        self._progress: dict[tuple[str, int, int], float] = {}  # job, attempt, ranks -> when to tell how far they are
        self._linger, self._save_timeout = linger, save_timeout
        local.on_order = self.on_order

    def register(self, registration: Registration, pid: int) -> tuple[str, str, int]:
        """Take a rank in (identity socket). A rank that registers again replaces its earlier session."""
        for token, old in list(self._local.sessions.items()):
            if (old.reg.job, old.reg.attempt, old.reg.rank) == (
                registration.job,
                registration.attempt,
                registration.rank,
            ):
                if old.pid != pid and not (old.pidfd >= 0 and has_ended(old.pidfd)):
                    raise InvalidInput(
                        f"rank {registration.rank} of job {registration.job} is registered: process {old.pid}"
                    )
                self._forget(token)
        self._admit(registration)
        for other in self._local.sessions.values():
            if other.reg.job == registration.job and other.reg.attempt < registration.attempt:
                over = self._local.jobs[registration.job].attempt(other.reg.attempt)
                over.refused = Fenced(f"attempt {other.reg.attempt} is over; attempt {registration.attempt} runs")
                over.wake()
        self._check_vacated(registration)
        job = self._local.job(registration.job, registration.coordinator, registration.store)
        session = Session.open(registration, pid)
        self._local.standing.apply(session)
        self._local.sessions[session.token] = session
        attempt = job.attempt(registration.attempt)
        attempt.epoch = max(attempt.epoch, registration.epoch)
        if session.pidfd >= 0:
            asyncio.get_running_loop().add_reader(session.pidfd, self._exited, session.token)
        self._local.metrics.sessions.set(len(self._local.sessions))
        log(logger, logging.INFO, Event.RANK_REGISTERED, "rank %d registered, process %d", registration.rank, pid,
            job=registration.job, attempt=registration.attempt, rank=registration.rank)  # fmt: skip
        self._local.metrics.paused.labels(job.name).set(self._local.standing.is_paused(job.name))
        for report in self._local.standing.report(job.name):
            self._local.report(job, report)
        self._local.report(job, reports.joined(self._local.name, registration, registration.epoch))
        return session.token, self._local.name, session.page_fd_copy()

    def _admit(self, registration: Registration) -> None:
        """Make room for one more rank, or refuse it.

        Raises:
            LimitReached: there are as many ranks or jobs as there may be.
        """
        local = self._local
        if len(local.sessions) >= local.most_ranks:
            raise LimitReached(f"{local.most_ranks} ranks are registered with this agent already", hint=_FEWER)
        if registration.job in local.jobs or len(local.jobs) < local.most_jobs:
            return
        for job in sorted(local.jobs.values(), key=lambda each: each.idle_since):
            self._retire(job, patience=0.0)  # one that has ended, and whose memory is kept a while
            if len(local.jobs) < local.most_jobs:
                return
        raise LimitReached(f"this agent has {local.most_jobs} jobs already", hint=_FEWER)

    def _check_vacated(self, registration: Registration) -> None:
        """Refuse a new job on a node that is being drained; launchers are asked for themselves (agent.launches)."""
        if registration.job not in self._local.jobs and not registration.attempt and not registration.epoch:
            self._local.standing.check_open()

    def unregister(self, token: str) -> None:
        """The identity connection has ended: the rank is ending, or has closed its session."""
        session = self._local.sessions.get(token)
        if session is None:
            return
        if session.pidfd >= 0 and not session.left and not has_ended(session.pidfd):
            # A killed process closes its sockets a moment before its end can be seen.
            asyncio.get_running_loop().call_later(2.0, self._closed, token)
        else:
            self._gone(token, session.left, "ended")

    def leave(self, token: str) -> None:
        """A rank ends in good order."""
        session = self._local.session(token)
        session.left = True
        self._gone(token, True, "")

    def _exited(self, token: str) -> None:
        self._gone(token, False, "process ended")

    def _closed(self, token: str) -> None:
        session = self._local.sessions.get(token)
        if session is not None:
            alive = session.pidfd >= 0 and not has_ended(session.pidfd)
            self._gone(token, session.left or alive, "closed its connection" if alive else "ended")

    def _gone(self, token: str, in_order: bool, detail: str) -> None:
        session = self._local.sessions.get(token)
        if session is None:
            return
        if in_order and session.pidfd >= 0 and not has_ended(session.pidfd):
            # It may still be copying into what it was filling: nobody else may have that.
            for arena in self._local.pool.of(session.reg.job, session.reg.rank):
                if arena.holder == token:
                    self._local.pool.remove(arena)
        self._forget(token)
        reg = session.reg
        job = self._local.jobs[reg.job]
        job.died = job.died or not in_order
        job.idle_since = self._local.last_active = time.monotonic()
        event = Event.RANK_LEFT if in_order else Event.RANK_DIED
        log(logger, logging.INFO, event, "rank %d %s", reg.rank, "left" if in_order else "died",
            job=reg.job, attempt=reg.attempt, rank=reg.rank)  # fmt: skip
        self._local.report(job, reports.left(self._local.name, reg, not in_order, detail))
        others = (s.reg for s in self._local.sessions.values())
        if not any((r.job, r.attempt) == (reg.job, reg.attempt) for r in others):
            # A launcher that does not count its restarts comes again with the same number: all is agreed anew then.
            job.attempts.pop(reg.attempt, None)

    def _forget(self, token: str) -> Session | None:
        session = self._local.sessions.pop(token, None)
        if session is None:
            return None
        self.arenas.let_go(session)
        if session.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.pidfd)
        session.close()
        self._local.metrics.sessions.set(len(self._local.sessions))
        return session

    def arena_fd(self, token: str, slot: str) -> tuple[int, int]:
        """See Arenas.fd (identity socket)."""
        return self.arenas.fd(token, slot)

    def hear(self, token: str, pid: int, witness: Witness) -> None:
        """Keep the way to ask a rank's process where it is (identity socket)."""
        session = self._local.session(token)
        if session.pid != pid:
            raise InvalidInput(f"process {pid} cannot answer for process {session.pid}")
        if session.witness is not None:
            session.witness.close()
        session.witness = witness

    def give_way(self) -> None:
        """End, and leave everything to another agent (identity socket)."""
        if self.on_yield is None:
            raise InvalidInput("this agent is a service and makes way for no other")
        self.on_yield()

    async def prepare(self, token: str, digest: str, generation: int, timeout: float) -> tuple[list[int], bool, int]:
        """Wait until the attempt is fenced and every rank has announced.

        Returns:
            (ranks with the same digest, whether every rank has answered, the epoch or 0).
        """
        session = self._local.session(token)
        session.announced = (generation, digest)
        job = self._local.jobs[session.reg.job]
        attempt = job.attempt(session.reg.attempt)
        self._local.report(job, reports.announced(session))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if attempt.refused:
                raise attempt.refused
            if generation in attempt.groups and (attempt.epoch or attempt.epoch_error):
                for group in attempt.groups[generation]:
                    if session.reg.rank in group:
                        return group, True, attempt.epoch
            await wait_for(attempt.changed, deadline - time.monotonic())
        return [session.reg.rank], False, attempt.epoch

    async def rewind(self, token: str, count: int, timeout: float) -> int:
        """The attempt has gone back to an earlier checkpoint; returns its new epoch, 0 if there is none in time."""
        reg = self._local.session(token).reg
        job = self._local.jobs[reg.job]
        attempt = job.attempt(reg.attempt)
        if count > attempt.rewinds:
            attempt.rewinds, attempt.epoch, attempt.epoch_error = count, 0, None
            self._local.report(job, reports.rewound(reg, count))
        deadline = time.monotonic() + timeout
        while not attempt.epoch and not attempt.epoch_error and time.monotonic() < deadline:
            await wait_for(attempt.changed, deadline - time.monotonic())
        return attempt.epoch

    def on_order(self, order: pb.Order) -> None:
        """Obey one order."""
        kind = order.WhichOneof("effect")
        if kind in ("start", "stop", "end"):
            self.launch_order(order)
            return
        if kind in ("answered", "vacate"):
            self.people_order(order)
            return
        job = self._local.jobs.get(order.job)
        if job is None or kind is None:
            return
        if kind in ("examine", "kill"):
            self.watch_order(job, order)
            return
        if kind in ("protect", "rebuild"):
            self.partner_order(job, order)
            return
        effect = getattr(order, kind)
        if kind in ("save_at", "stop_at"):
            for session in self._local.sessions.values():
                if session.reg.job == job.name and session.reg.attempt == effect.attempt:
                    session.page.put(kind, effect.step)
        elif kind == "pausing":
            self._local.standing.take(effect)
            self._local.metrics.paused.labels(job.name).set(self._local.standing.is_paused(job.name))
            for session in self._local.sessions.values():
                if session.reg.job == job.name:
                    self._local.standing.apply(session)
        elif kind == "save_ended":
            self.saves.ended(job, effect.outcome)
        elif kind == "snapshot_complete":
            job.complete.add((effect.epoch, effect.step))
        elif kind in ("local_complete", "drain_shards"):
            if self.tier is not None:
                self.tier.on_order(job, order)
        else:
            self._attempt_order(job.attempt(effect.attempt), kind, effect)

    def _attempt_order(self, attempt: Attempt, kind: str, effect: Any) -> None:
        if kind == "epoch_allotted" and effect.rewinds < attempt.rewinds:
            return  # of before the attempt went back
        if kind == "epoch_allotted":
            attempt.rewinds = max(attempt.rewinds, effect.rewinds)  # another node's rank was faster than ours
            attempt.epoch = effect.epoch
            attempt.epoch_error = None if effect.epoch else _error(effect)
        elif kind == "job_refused":
            attempt.refused = _error(effect)
        elif kind == "holders":
            attempt.groups[effect.generation] = [ranks_of(group.runs) for group in effect.groups]
            while len(attempt.groups) > REMEMBERED:
                del attempt.groups[min(attempt.groups)]
        attempt.wake()

    async def watch(self) -> None:
        """Report progress and let go of jobs that are over, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self._report_progress(time.monotonic())
            self.stops.look()
            self._give_up_overdue()
            if self.tier is not None:
                self.tier.measure()
            for job in list(self._local.jobs.values()):
                self._retire(job, self._linger)
            self._remove_unclaimed()
            self._local.hang_up_unused(time.monotonic())
            for name in self._workers.jobs():
                # Of a job that this agent coordinates and has no ranks of.
                if name not in self._local.jobs and not self._local.coordinates(name):
                    self._local.spawn(self._workers.close(name))

    def _give_up_overdue(self) -> None:
        """Free arenas whose save nobody ends: their coordinator is gone for good, or does not know them."""
        for arena in list(self._local.pool.arenas.values()):
            label = arena.label
            if label is None or arena.state is not State.STAGED:
                continue
            if time.monotonic() - arena.since > OVERDUE * self._save_timeout:
                why = f"nobody has ended this save in {OVERDUE * self._save_timeout:g} s"
                failed = agent_pb2.OUTCOME_FAILED
                outcome = agent_pb2.SaveOutcome(
                    epoch=label.epoch, step=label.step, outcome=failed, code="save-failed", reason=why
                )
                self.saves.ended(self._local.jobs[label.job], outcome)

    def _report_progress(self, now: float) -> None:
        steps: dict[tuple[str, int, int], dict[int, Session]] = {}
        for session in self._local.sessions.values():
            reg = session.reg
            steps.setdefault((reg.job, reg.attempt, reg.world_size), {})[reg.rank] = session
        self._pages.count(self._local.sessions.values(), now)
        for name, attempt, world in self._progress.keys() - steps.keys():
            del self._progress[name, attempt, world]
        for (name, attempt, world), done in steps.items():
            period = progress_every(world / len(done))
            # The first time at once or, of many, each at a time of its own.
            due = self._progress.setdefault((name, attempt, world), now + random.uniform(0, period - PROGRESS_EVERY))
            if now < due:
                continue
            self._progress[name, attempt, world] = due + period if now - due < period else now + period
            pages = [done[rank].page for rank in sorted(done)]
            self._local.report(self._local.jobs[name], reports.progressed(self._local.name, name, attempt, pages))

    def _retire(self, job: LocalJob, patience: float) -> None:
        """Free the memory of a job without ranks: at once if it ended in good order, else after `patience` seconds."""
        if any(s.reg.job == job.name for s in self._local.sessions.values()):
            return
        if self._local.launched(launched_as(job.name)):
            return  # the next attempt restores from here
        if self._local.saving(job.name):
            return
        arenas = [a for a in self._local.pool.arenas.values() if a.job == job.name]
        if any(a.state is State.STAGED for a in arenas) or (self.tier is not None and self.tier.busy(job)):
            self._local.last_active = time.monotonic()
            return
        if job.died and time.monotonic() - job.idle_since < patience:
            return
        for arena in arenas:
            self._local.dropped(job, arena.label)
        self._local.pool.drop(job.name)
        self._pages.forget(job.name)
        self.twins.forget(job.name)
        self._local.metrics.forget(job.name)
        del self._local.jobs[job.name]
        self._local.standing.forget(job.name)
        self._local.spawn(self._let_go(job))

    def _remove_unclaimed(self) -> None:
        """Free arenas that an earlier agent has left, and for which no rank has come back."""
        for arena in list(self._local.pool.arenas.values()):
            claimed = arena.job in self._local.jobs or arena.guest or arena.state is not State.FREE
            if not claimed and time.monotonic() - arena.since > self._linger:
                self._local.pool.remove(arena)

    async def _let_go(self, job: LocalJob) -> None:
        if self.tier is not None:
            await self.tier.forget(job)
        await self._workers.close(job.name)

    @property
    def idle(self) -> bool:
        """No ranks and nothing being saved."""
        if self._local.sessions or (self.tier is not None and not self.tier.idle):
            return False
        return not any(a.state is State.STAGED for a in self._local.pool.arenas.values())

    async def stop(self) -> None:
        """Stop all activity; what is staged stays in its arenas."""
        await self._local.close()
        for arena in list(self._local.pool.arenas.values()):
            if arena.state is State.FILLING:  # its rank may go on copying: nobody else may have it
                self._local.pool.remove(arena)
        for token in list(self._local.sessions):
            self._forget(token)


def _error(told: Any) -> CkptsvcError:
    """What a coordinator says is wrong; one of a later version may know more codes."""
    return BY_CODE.get(told.code, CkptsvcError)(told.why)
