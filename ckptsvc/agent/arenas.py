"""Arenas for ranks: made in the background, handed out for a snapshot, taken back."""

from __future__ import annotations

import asyncio
import logging
import os
import time

from ckptsvc.agent import reports
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.local import Local, wait_for
from ckptsvc.agent.sessions import Attempt, LocalJob, Session
from ckptsvc.agent.tiers.twins import Twins
from ckptsvc.agent.watching.procfs import has_ended
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.errors import ArenaExhausted, CkptsvcError, InvalidInput, StoreDenied, UnsupportedObject
from ckptsvc.pipeline.arena import TAIL, WAITING, Arena, State, populate
from ckptsvc.quantities import ALL, Limit
from ckptsvc.telemetry import Event, Skip, log

logger = logging.getLogger("ckptsvc.agent")

UNMAP_PATIENCE = 1.0
"""Seconds a new arena waits for the memory of removed ones."""


class Arenas:
    """Hands out the arenas of one agent.

    Args:
        local: the agent's state.
        workers: the I/O workers.
        slots: arenas for each rank.
        twins: which rank keeps a copy of which other's snapshot.
        job_limit: what those of one job may take.
    """

    def __init__(self, local: Local, workers: Workers, slots: int, twins: Twins, job_limit: Limit = ALL) -> None:
        self._local, self._workers, self._twins = local, workers, twins
        self.slots, self._job_limit = slots, job_limit
        self._populating = asyncio.Semaphore(2)
        self._unmapping: set[asyncio.Task[None]] = set()
        local.pool.on_removed = self._removed

    async def provide(self, token: str, nbytes: int, timeout: float) -> list[str]:
        """Set up arenas of that size; returns those that are there when all are, or when the time is over."""
        session = self._local.session(token)
        self._provide(session, nbytes)
        deadline = time.monotonic() + timeout
        while session.preparing and time.monotonic() < deadline:
            await wait_for(session.arena_changed, deadline - time.monotonic())
        ready = self._local.pool.of(session.reg.job, session.reg.rank)
        return [a.name for a in ready if a.capacity >= nbytes and (a.state is not State.FILLING or a.step >= 0)]

    def _provide(self, session: Session, nbytes: int) -> ArenaExhausted | None:
        """Begin to make the arenas that a rank lacks; returns why not all of them."""
        reg = session.reg
        lacking = self._local.pool.plan(reg.job, reg.rank, nbytes, self.slots)
        for left in range(lacking, 0, -1):
            try:
                arena, fd = self._make(reg, nbytes, first=left == self.slots)
            except ArenaExhausted as error:
                log(logger, logging.WARNING, Event.SNAPSHOT_SKIPPED, "%s", error, job=reg.job, rank=reg.rank)
                return error
            session.preparing += 1
            self._local.spawn(self._populate(session, arena, fd))
        return None

    def _most(self, *, first: bool) -> int:
        """What one job's arenas may take: for more than one of each rank, no more than an even part."""
        pool, jobs = self._local.pool, len({s.reg.job for s in self._local.sessions.values()})
        most = self._job_limit.of(pool.limit)
        return most if first else min(most, pool.limit // max(jobs, 1))

    def _make(self, reg: Registration, nbytes: int, *, first: bool) -> tuple[Arena, int]:
        """A new arena; for its sake, snapshots in memory go whose arenas nobody will use again."""
        most = self._most(first=first)
        pool, live = self._local.pool, {(s.reg.job, s.reg.rank) for s in self._local.sessions.values()}
        # Own ones that are too small, then those of ranks that are gone; what live ranks keep is left to them.
        idle = (State.KEPT, State.FREE)
        kept = [a for a in pool.arenas.values() if a.state in idle or a.holder == WAITING]
        small = [a for a in kept if (a.job, a.rank) == (reg.job, reg.rank) and a.capacity < nbytes and not a.guest]
        gone = (a for a in kept if a.guest or (a.job, a.rank) not in live)
        orphaned = sorted(gone, key=lambda a: (not a.guest, a.key))  # copies of what others hold come first
        spare = [*small, *orphaned]
        while True:
            try:
                return pool.make(reg.job, reg.rank, nbytes, most)
            except ArenaExhausted:
                alone = pool.is_beyond(reg.job, nbytes, most)  # then it does not help that others go
                arena = next((each for each in spare if each.job == reg.job or not alone), None)
                if arena is None:
                    raise
            spare.remove(arena)
            job = self._local.jobs.get(arena.job)
            if job is not None:
                self._local.dropped(job, arena.label)
            pool.remove(arena)
            if arena.guest:
                self._local.metrics.guests_dropped.inc()
                logger.warning("rank %d needs the memory in which a copy or parity of other nodes was", reg.rank)

    async def _populate(self, session: Session, arena: Arena, fd: int) -> None:
        try:
            async with self._populating:
                if self._unmapping:  # what was removed for this one still has its memory
                    await asyncio.wait(list(self._unmapping), timeout=UNMAP_PATIENCE)
                await asyncio.get_running_loop().run_in_executor(None, populate, fd, arena.capacity)
            self._local.pool.release(arena)
            self._local.spawn(self._workers.of(arena.job).tell("map", {"path": str(arena.path)}))
        except ArenaExhausted as error:
            log(logger, logging.WARNING, Event.SNAPSHOT_SKIPPED, "%s", error, job=arena.job, rank=arena.rank)
            self._local.pool.remove(arena)
        finally:
            os.close(fd)
            session.preparing -= 1
            self._local.arena_changed(arena.job, arena.rank)

    def _removed(self, arena: Arena) -> None:
        job = self._local.jobs.get(arena.job)
        if job is not None:
            job.digests.pop(arena.name, None)
        worker = self._workers.running(arena.job)
        if worker is not None:
            task = asyncio.ensure_future(worker.tell("unmap", {"path": str(arena.path)}))
            self._unmapping.add(task)
            task.add_done_callback(self._unmapping.discard)

    async def acquire(self, token: str, step: int, nbytes: int, timeout: float) -> tuple[Arena, int]:
        """An arena for a snapshot, and the epoch to label it with; on failure the save is skipped on every rank.

        Raises:
            CkptsvcError: why there is none.
        """
        session = self._local.session(token)
        reg = session.reg
        job = self._local.jobs[reg.job]
        attempt = job.attempt(reg.attempt)
        deadline = time.monotonic() + timeout
        error: CkptsvcError = ArenaExhausted("no arena became free in time")
        self.give_back(session)  # of a snapshot that the rank has given up: it takes one at a time
        try:
            while True:
                epoch = _epoch(attempt)
                if epoch:
                    try:
                        arena, evicted = self._local.pool.acquire(reg.job, reg.rank, nbytes, step, session.token)
                    except ArenaExhausted as full:
                        error = full
                        if not session.preparing:
                            error = self._provide(session, nbytes) or full
                    else:
                        self._local.dropped(job, evicted)
                        arena.epoch = epoch
                        return arena, epoch
                left = deadline - time.monotonic()
                if left <= 0:
                    raise error
                await wait_for(session.arena_changed if epoch else attempt.changed, left)
        except (CkptsvcError, asyncio.CancelledError) as failure:
            late = isinstance(failure, ArenaExhausted | asyncio.CancelledError)
            reason = Skip.NO_ARENA if late else Skip.NO_EPOCH
            why = str(failure) or "the trainer did not wait for an arena"
            self._skip(job, session, attempt.epoch, step, why, reason)
            raise

    def abandon(self, token: str, slot: str, step: int, reason: str, code: str = "") -> None:
        """A rank cannot take this snapshot; `code` is that of the error."""
        session = self._local.session(token)
        job = self._local.jobs[session.reg.job]
        epoch = job.attempt(session.reg.attempt).epoch
        arena = self._local.pool.arenas.get(slot)
        if arena and arena.state is State.FILLING and arena.holder == token:
            epoch = arena.epoch
        self.give_back(session)
        kind = Skip.UNSUPPORTED if code == UnsupportedObject.code else Skip.FAILED
        self._skip(job, session, epoch, step, reason, kind)

    def give_back(self, session: Session) -> None:
        """Free what a session was filling; it does not write there any more."""
        for arena in list(self._local.pool.arenas.values()):
            if arena.state is State.FILLING and arena.holder == session.token:
                self._local.pool.release(arena)

    def let_go(self, session: Session) -> None:
        """The session is over, but its process may go on copying: what it was filling for its twin, nobody else may."""
        if session.pidfd < 0 or not has_ended(session.pidfd):
            for arena in list(self._local.pool.arenas.values()):
                if arena.guest and arena.holder == session.token:
                    self._local.pool.remove(arena)
        self.give_back(session)

    def fd(self, token: str, slot: str) -> tuple[int, int]:
        """A new descriptor of an arena of this rank's job, which the caller closes, and the size of the file."""
        session = self._local.session(token)
        arena = self._local.pool.arenas.get(slot)
        if arena is None or arena.job != session.reg.job:
            raise InvalidInput(f"there is no arena {slot!r} of job {session.reg.job}")
        mine = self._twins.of(session) if arena.guest else session.reg.rank
        mode = os.O_RDWR if arena.rank == mine else os.O_RDONLY
        return os.open(arena.path, mode | os.O_CLOEXEC), arena.capacity + TAIL

    def _skip(self, job: LocalJob, session: Session, epoch: int, step: int, why: str, reason: Skip) -> None:
        reg = session.reg
        if session.skipped != (epoch, step):  # a rank that was refused an arena says that it cannot go on
            session.skipped = (epoch, step)
            self._local.metrics.snapshots_skipped.labels(reason).inc()
        log(logger, logging.WARNING, Event.SNAPSHOT_SKIPPED, "snapshot of step %d skipped: %s", step, why,
            job=reg.job, rank=reg.rank, step=step)  # fmt: skip
        report = reports.skipped(reg, epoch, step, why)
        job.skip((epoch, step), report)
        self._local.report(job, report)


def _epoch(attempt: Attempt) -> int:
    if attempt.refused:
        raise attempt.refused
    if attempt.epoch_error and not attempt.epoch:
        raise StoreDenied(f"saves are off: {attempt.epoch_error}")
    return attempt.epoch
