"""The node's own affairs: local ranks, their arenas, the saves of what they stage, and the coordinator's orders.

Everything here runs in the agent's event loop and returns at once; what takes time is awaited or runs in a worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

from ckptsvc.agent.identity import Registration
from ckptsvc.agent.runner import CoordinatorShell
from ckptsvc.agent.sessions import Attempt, LocalJob, Session
from ckptsvc.agent.uplink import LocalUplink, RemoteUplink, Uplink
from ckptsvc.agent.workers import Workers
from ckptsvc.errors import (
    BY_CODE,
    AgentUnavailable,
    ArenaExhausted,
    CkptsvcError,
    InvalidInput,
    StoreDenied,
)
from ckptsvc.pipeline.arena import Arena, ArenaPool, Label, State, populate
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import ArenaState, Event, Metrics, Outcome, Phase, Skip, log

logger = logging.getLogger("ckptsvc.agent")

PROGRESS_EVERY = 0.25
"""Seconds between looks at the heartbeat pages."""

DIGEST_TIMEOUT = 60.0
"""Seconds a restore from memory waits for the checksums of a snapshot that was staged just now."""

_ARENA_STATES = {
    State.FREE: ArenaState.FREE,
    State.FILLING: ArenaState.STAGING,
    State.STAGED: ArenaState.WRITING,
    State.KEPT: ArenaState.KEPT,
}


class Node:
    """One agent's local state. `slots` is the number of arenas for each rank, `linger` the seconds for which the memory
    of a job whose ranks died is kept.
    """

    def __init__(
        self,
        name: str,
        pool: ArenaPool,
        workers: Workers,
        shell: CoordinatorShell,
        metrics: Metrics,
        *,
        slots: int,
        linger: float,
    ) -> None:
        self.name, self.pool, self.metrics = name, pool, metrics
        self.sessions: dict[str, Session] = {}
        self.jobs: dict[str, LocalJob] = {}
        self.launchers: Callable[[str], Iterator[pb.Report]] = lambda coordinator: iter(())
        self.launch_order: Callable[[pb.Order], None] = lambda order: None
        self.last_active = time.monotonic()
        self._workers, self._shell, self._slots, self._linger = workers, shell, slots, linger
        self._uplinks: dict[str, Uplink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._populating = asyncio.Semaphore(2)

    # ---- ranks come and go -------------------------------------------------------------------------------------------

    def register(self, registration: Registration, pid: int) -> tuple[str, str, int]:
        """Take a rank in (identity socket). A rank that registers again replaces its earlier session."""
        for token, old in list(self.sessions.items()):
            if (old.reg.job, old.reg.attempt, old.reg.rank) == (
                registration.job,
                registration.attempt,
                registration.rank,
            ):
                if old.pid != pid and not _exited(old.pidfd):
                    raise InvalidInput(
                        f"rank {registration.rank} of job {registration.job} is registered: process {old.pid}"
                    )
                self._forget(token)
        session = Session.open(registration, pid)
        self.sessions[session.token] = session
        job = self._job(registration.job, registration.coordinator, registration.store)
        attempt = job.attempt(registration.attempt)
        attempt.epoch = max(attempt.epoch, registration.epoch)
        if session.pidfd >= 0:
            asyncio.get_running_loop().add_reader(session.pidfd, self._exited, session.token)
        self.metrics.sessions.set(len(self.sessions))
        log(logger, logging.INFO, Event.RANK_REGISTERED, "rank %d registered, process %d", registration.rank, pid,
            job=registration.job, attempt=registration.attempt, rank=registration.rank)  # fmt: skip
        self._report(job, self._joined(session))
        return session.token, self.name, session.page_fd_copy()

    def unregister(self, token: str) -> None:
        """The identity connection has ended: the rank is ending, or has closed its session."""
        session = self.sessions.get(token)
        if session is None:
            return
        if session.pidfd >= 0 and not session.left and not _exited(session.pidfd):
            # A killed process closes its sockets a moment before its end can be seen.
            asyncio.get_running_loop().call_later(2.0, self._gone, token, session.left, "closed its connection")
        else:
            self._gone(token, session.left, "ended")

    def leave(self, token: str) -> None:
        """A rank ends in good order."""
        session = self.session(token)
        session.left = True
        self._gone(token, True, "")

    def session(self, token: str) -> Session:
        """The session of a token; InvalidInput where there is none."""
        session = self.sessions.get(token)
        if session is None:
            raise AgentUnavailable(
                "this agent does not know the session", hint="the agent was restarted: register again"
            )
        return session

    def _exited(self, token: str) -> None:
        self._gone(token, False, "process ended")

    def _gone(self, token: str, in_order: bool, detail: str) -> None:
        session = self._forget(token)
        if session is None:
            return
        reg = session.reg
        job = self.jobs[reg.job]
        job.died = job.died or not in_order
        job.idle_since = self.last_active = time.monotonic()
        for arena in self.pool.of(reg.job, reg.rank):
            if arena.state is State.FILLING and not session.preparing:
                self.pool.release(arena)
        event = Event.RANK_LEFT if in_order else Event.RANK_DIED
        log(logger, logging.INFO, event, "rank %d %s", reg.rank, "left" if in_order else "died",
            job=reg.job, attempt=reg.attempt, rank=reg.rank)  # fmt: skip
        left = pb.RankLeft(
            job=reg.job, node=self.name, attempt=reg.attempt, rank=reg.rank, died=not in_order, detail=detail
        )
        self._report(job, pb.Report(rank_left=left))

    def _forget(self, token: str) -> Session | None:
        session = self.sessions.pop(token, None)
        if session is None:
            return None
        if session.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(session.pidfd)
        session.close()
        self.metrics.sessions.set(len(self.sessions))
        return session

    # ---- arenas ------------------------------------------------------------------------------------------------------

    async def prepare(self, token: str, digest: str, generation: int, timeout: float) -> tuple[list[int], bool]:
        """Wait until the attempt is fenced and every rank has announced.

        Returns:
            (ranks with the same digest, whether every rank has answered).
        """
        session = self.session(token)
        session.announced = (generation, digest)
        job = self.jobs[session.reg.job]
        attempt = job.attempt(session.reg.attempt)
        self._report(job, self._announcement(session))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if attempt.refused:
                raise attempt.refused
            if generation in attempt.groups and (attempt.epoch or attempt.epoch_error):
                for group in attempt.groups[generation]:
                    if session.reg.rank in group:
                        return group, True
            await _wait(attempt.changed, deadline - time.monotonic())
        return [session.reg.rank], False

    async def provide(self, token: str, nbytes: int, timeout: float) -> list[str]:
        """Set up arenas of that size; returns those that are there when all are, or when the time is over."""
        session = self.session(token)
        self._provide(session, nbytes)
        deadline = time.monotonic() + timeout
        while session.preparing and time.monotonic() < deadline:
            await _wait(session.arena_changed, deadline - time.monotonic())
        ready = self.pool.of(session.reg.job, session.reg.rank)
        return [a.name for a in ready if a.capacity >= nbytes and (a.state is not State.FILLING or a.step >= 0)]

    def _provide(self, session: Session, nbytes: int) -> None:
        reg = session.reg
        lacking = self.pool.plan(reg.job, reg.rank, nbytes, self._slots)
        for _ in range(lacking):
            try:
                arena, fd = self.pool.make(reg.job, reg.rank, nbytes)
            except ArenaExhausted as error:
                log(logger, logging.WARNING, Event.SNAPSHOT_SKIPPED, "%s", error, job=reg.job, rank=reg.rank)
                return
            session.preparing += 1
            self._spawn(self._populate(session, arena, fd))

    async def _populate(self, session: Session, arena: Arena, fd: int) -> None:
        try:
            async with self._populating:
                await asyncio.get_running_loop().run_in_executor(None, populate, fd, arena.capacity)
            self.pool.release(arena)
        except ArenaExhausted as error:
            log(logger, logging.WARNING, Event.SNAPSHOT_SKIPPED, "%s", error, job=arena.job, rank=arena.rank)
            self.pool.remove(arena)
        finally:
            os.close(fd)
            session.preparing -= 1
            self._arena_changed(arena.job, arena.rank)

    async def acquire(self, token: str, step: int, nbytes: int, timeout: float) -> tuple[Arena, int]:
        """An arena for a snapshot, and the epoch to label it with; on failure the save is skipped on every rank.

        Raises:
            CkptsvcError: why there is none.
        """
        session = self.session(token)
        reg = session.reg
        job = self.jobs[reg.job]
        attempt = job.attempt(reg.attempt)
        deadline = time.monotonic() + timeout
        error: CkptsvcError = ArenaExhausted("no arena became free in time")
        try:
            while True:
                epoch = _epoch(attempt)
                if epoch:
                    try:
                        arena, evicted = self.pool.acquire(reg.job, reg.rank, nbytes, step)
                    except ArenaExhausted as full:
                        error = full
                        if not session.preparing:
                            self._provide(session, nbytes)
                    else:
                        self._dropped(job, evicted)
                        return arena, epoch
                left = deadline - time.monotonic()
                if left <= 0:
                    raise error
                await _wait(session.arena_changed if epoch else attempt.changed, left)
        except (CkptsvcError, asyncio.CancelledError) as failure:
            self._skip(job, reg, step, str(failure) or "the trainer did not wait for an arena")
            raise

    def abandon(self, token: str, slot: str, step: int, reason: str) -> None:
        """A rank cannot take this snapshot."""
        session = self.session(token)
        arena = self.pool.arenas.get(slot)
        if arena and arena.state is State.FILLING and (arena.job, arena.rank) == (session.reg.job, session.reg.rank):
            self.pool.release(arena)
        self._skip(self.jobs[session.reg.job], session.reg, step, reason)

    def arena_fd(self, token: str, slot: str) -> tuple[int, int]:
        """A new descriptor of an arena of this rank's job (the identity socket passes and closes it)."""
        session = self.session(token)
        arena = self.pool.arenas.get(slot)
        if arena is None or arena.job != session.reg.job:
            raise InvalidInput(f"there is no arena {slot!r} of job {session.reg.job}")
        mode = os.O_RDWR if arena.rank == session.reg.rank else os.O_RDONLY
        return os.open(arena.path, mode | os.O_CLOEXEC), arena.capacity

    def _skip(self, job: LocalJob, reg: Registration, step: int, why: str) -> None:
        epoch = job.attempt(reg.attempt).epoch
        self.metrics.snapshots_skipped.labels(Skip.NO_ARENA).inc()
        log(logger, logging.WARNING, Event.SNAPSHOT_SKIPPED, "snapshot of step %d skipped: %s", step, why,
            job=reg.job, rank=reg.rank, step=step)  # fmt: skip
        skipped = pb.Skipped(job=reg.job, attempt=reg.attempt, epoch=epoch, step=step, rank=reg.rank, why=why)
        self._report(job, pb.Report(skipped=skipped))

    def _dropped(self, job: LocalJob, label: Label | None) -> None:
        if label is not None:
            dropped = pb.Dropped(job=job.name, epoch=label.epoch, step=label.step, rank=label.rank)
            self._report(job, pb.Report(dropped=dropped))

    def _arena_changed(self, job: str, rank: int) -> None:
        for session in self.sessions.values():
            if (session.reg.job, session.reg.rank) == (job, rank):
                session.arena_changed.set()
                session.arena_changed = asyncio.Event()
        held = dict.fromkeys(State, 0)
        for arena in self.pool.arenas.values():
            held[arena.state] += arena.capacity
        for state, nbytes in held.items():
            self.metrics.arena_bytes.labels(_ARENA_STATES[state]).set(nbytes)

    # ---- saves -------------------------------------------------------------------------------------------------------

    def submit(self, token: str, slot: str, step: int, nbytes: int, aliases: dict[str, str]) -> None:
        """The arena holds a whole shard image: it is ours now."""
        session = self.session(token)
        reg = session.reg
        arena = self.pool.arenas.get(slot)
        if arena is None or (arena.job, arena.rank, arena.state, arena.step) != (
            reg.job,
            reg.rank,
            State.FILLING,
            step,
        ):
            raise InvalidInput(f"arena {slot!r} was not acquired for step {step}")
        label = Label(
            job=reg.job,
            store=reg.store,
            coordinator=reg.coordinator,
            attempt=reg.attempt,
            epoch=self.jobs[reg.job].attempt(reg.attempt).epoch,
            step=step,
            rank=reg.rank,
            world_size=reg.world_size,
            nbytes=nbytes,
            extent=reg.extent,
            aliases=aliases,
        )
        self.pool.stage(arena, label)
        self._begin_save(arena, label)

    def recover(self, arenas: list[Arena]) -> None:
        """Go on with the snapshots an earlier agent left in its arenas."""
        for arena in arenas:
            assert arena.label is not None
            label = arena.label
            job = self._job(label.job, label.coordinator, label.store)
            job.died = True
            job.idle_since = time.monotonic()
            job.attempt(label.attempt).epoch = label.epoch
            log(logger, logging.INFO, Event.ARENA_RECOVERED, "found the snapshot of step %d", label.step,
                job=label.job, rank=label.rank, step=label.step)  # fmt: skip
            if arena.state is State.STAGED:
                self._begin_save(arena, label)
            else:
                self._spawn(self._digest(job, arena, label))
                self._report(job, self._staged(label, ended=True))

    def _begin_save(self, arena: Arena, label: Label) -> None:
        job = self.jobs[label.job]
        job.digests[arena.name] = asyncio.get_running_loop().create_future()
        self._report(job, self._staged(label))
        self._spawn(self._save(job, arena, label))

    async def _save(self, job: LocalJob, arena: Arena, label: Label) -> None:
        started = time.monotonic()
        future = job.digests[arena.name]

        def on_note(note: dict[str, Any]) -> None:
            if "digests" in note and not future.done():
                future.set_result(note["digests"])

        args = {
            "path": str(arena.path),
            "nbytes": label.nbytes,
            "store": label.store,
            "extent": label.extent,
            "epoch": label.epoch,
            "step": label.step,
            "rank": label.rank,
        }
        try:
            done = await self._workers.of(label.job).call("write", args, on_note)
        except CkptsvcError as error:
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody need ask
            log(logger, logging.ERROR, Event.SAVE_FAILED, "shard not written: %s", error,
                job=label.job, rank=label.rank, step=label.step)  # fmt: skip
            self.metrics.store_errors.labels(_scheme(label.store), error.code).inc()
            failed = pb.ShardFailed(
                job=label.job,
                epoch=label.epoch,
                step=label.step,
                rank=label.rank,
                code=error.code,
                what=str(error),
            )
            self._report(job, pb.Report(shard_failed=failed))
            return
        self.metrics.save_duration.labels(Phase.WRITE).observe(time.monotonic() - started)
        self.metrics.written_bytes.labels(_scheme(label.store)).inc(done["nbytes"])
        durable = pb.Durable(
            job=label.job,
            epoch=label.epoch,
            step=label.step,
            rank=label.rank,
            name=done["name"],
            nbytes=done["nbytes"],
            extent=label.extent,
            digests=done["digests"],
            columns=done["columns"],
        )
        job.durable[label.epoch, label.step, label.rank] = durable
        self._report(job, pb.Report(durable=durable))

    async def _digest(self, job: LocalJob, arena: Arena, label: Label) -> None:
        future = job.digests[arena.name] = asyncio.get_running_loop().create_future()
        args = {"path": str(arena.path), "nbytes": label.nbytes, "extent": label.extent}
        try:
            future.set_result((await self._workers.of(job.name).call("digest", args))["digests"])
        except CkptsvcError as error:
            future.set_exception(error)
            future.exception()

    async def wait_save(self, token: str, step: int) -> agent_pb2.SaveOutcome:
        """Wait until the save of that step has ended."""
        reg = self.session(token).reg
        job = self.jobs[reg.job]
        while True:
            outcome = job.outcomes.get((job.attempt(reg.attempt).epoch, step))
            if outcome is not None:
                return outcome
            await job.ended.wait()

    async def list_snapshots(self, token: str) -> list[agent_pb2.Snapshot]:
        """Complete snapshots of this rank's job in memory, with the shards that are on this node."""
        job = self.jobs[self.session(token).reg.job]
        found = await self._uplink(job).list_complete(job.name)
        for snapshot in found:
            for arena in list(self.pool.arenas.values()):
                label = arena.label
                if label is None or (label.job, label.epoch, label.step) != (
                    job.name,
                    snapshot.epoch,
                    snapshot.step,
                ):
                    continue
                digests = await asyncio.wait_for(asyncio.shield(job.digests[arena.name]), DIGEST_TIMEOUT)
                snapshot.local.add(
                    rank=label.rank, slot=arena.name, bytes=label.nbytes, extent=label.extent, digests=digests
                )
        return found

    # ---- the coordinator's orders ------------------------------------------------------------------------------------

    def on_order(self, order: pb.Order) -> None:
        """Obey one order."""
        kind = order.WhichOneof("effect")
        if kind in ("start", "stop", "end"):
            self.launch_order(order)
            return
        job = self.jobs.get(order.job)
        if job is None or kind is None:
            return
        effect = getattr(order, kind)
        if kind in ("save_at", "stop_at"):
            for session in self.sessions.values():
                if session.reg.job == job.name and session.reg.attempt == effect.attempt:
                    session.page.put(kind, effect.step)
        elif kind == "save_ended":
            self._save_ended(job, effect.outcome)
        elif kind == "snapshot_complete":
            job.complete.add((effect.epoch, effect.step))
        else:
            self._attempt_order(job.attempt(effect.attempt), kind, effect)

    def _attempt_order(self, attempt: Attempt, kind: str, effect: Any) -> None:
        if kind == "epoch_allotted":
            attempt.epoch = effect.epoch
            attempt.epoch_error = None if effect.epoch else BY_CODE[effect.code](effect.why)
        elif kind == "job_refused":
            attempt.refused = BY_CODE[effect.code](effect.why)
        elif kind == "holders":
            attempt.groups[effect.generation] = [list(group.ranks) for group in effect.groups]
        attempt.wake()

    def _save_ended(self, job: LocalJob, outcome: agent_pb2.SaveOutcome) -> None:
        key = (outcome.epoch, outcome.step)
        committed = outcome.outcome == agent_pb2.OUTCOME_COMMITTED
        if key not in job.outcomes:
            self._count(job, outcome, committed)
        job.record(outcome)
        for arena in list(self.pool.arenas.values()):
            label = arena.label
            if (
                label is None
                or arena.state is not State.STAGED
                or (label.job, label.epoch, label.step) != (job.name, *key)
            ):
                continue
            job.durable.pop((*key, label.rank), None)
            if key in job.complete or committed:
                self.pool.keep(arena)
            else:
                self.pool.release(arena)
                self._dropped(job, label)
            self._arena_changed(label.job, label.rank)
        for session in self.sessions.values():
            if session.reg.job == job.name:
                session.page.put("committed" if committed else "failed", outcome.step)

    def _count(self, job: LocalJob, outcome: agent_pb2.SaveOutcome, committed: bool) -> None:
        if committed:
            self.metrics.committed(job.name, outcome.step, time.time())
            self.metrics.save_duration.labels(Phase.COMMIT).observe(outcome.seconds)
            log(logger, logging.INFO, Event.SAVE_COMMITTED, "step %d committed, %d bytes in %.2f s", outcome.step,
                outcome.bytes, outcome.seconds, job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip
            return
        fenced = outcome.outcome == agent_pb2.OUTCOME_FENCED
        self.metrics.saves.labels(Outcome.FENCED if fenced else Outcome.FAILED).inc()
        log(logger, logging.ERROR, Event.SAVE_FAILED, "step %d not saved: %s", outcome.step, outcome.reason,
            job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip

    # ---- telling the coordinator -------------------------------------------------------------------------------------

    def _job(self, name: str, coordinator: str, store: str) -> LocalJob:
        job = self.jobs.get(name)
        if job is None:
            job = self.jobs[name] = LocalJob(name, coordinator, store)
        job.store = store
        self._uplink_to(coordinator)
        return job

    def uplink_to(self, coordinator: str) -> Uplink:
        """The way to a coordinator; "" is the one in this process."""
        return self._uplink_to(coordinator)

    def _uplink_to(self, address: str) -> Uplink:
        if address not in self._uplinks:
            self._uplinks[address] = (
                RemoteUplink(self.name, address, self.on_order, lambda: self.resync(address))
                if address
                else LocalUplink(self.name, self._shell, self.on_order)
            )
        return self._uplinks[address]

    def _uplink(self, job: LocalJob) -> Uplink:
        return self._uplink_to(job.coordinator)

    def _report(self, job: LocalJob, report: pb.Report) -> None:
        self._uplink(job).report(report)

    def resync(self, coordinator: str) -> Iterator[pb.Report]:
        """Everything a coordinator that knows nothing must hear of this node."""
        yield from self.launchers(coordinator)
        for session in self.sessions.values():
            if session.reg.coordinator == coordinator:
                yield self._joined(session)
                if session.announced:
                    yield self._announcement(session)
        for arena in self.pool.arenas.values():
            job = self.jobs.get(arena.job)
            if arena.label is not None and job is not None and job.coordinator == coordinator:
                yield self._staged(arena.label, ended=arena.state is State.KEPT)
        for job in self.jobs.values():
            if job.coordinator == coordinator:
                yield from (pb.Report(durable=d) for d in job.durable.values())

    def _joined(self, session: Session) -> pb.Report:
        reg = session.reg
        joined = pb.RankJoined(
            job=reg.job,
            node=self.name,
            store=reg.store,
            attempt=reg.attempt,
            rank=reg.rank,
            world_size=reg.world_size,
            epoch=self.jobs[reg.job].attempt(reg.attempt).epoch,
            every_steps=reg.every_steps,
            every_seconds=reg.every_seconds,
            keep=reg.keep,
        )
        return pb.Report(rank_joined=joined)

    @staticmethod
    def _announcement(session: Session) -> pb.Report:
        reg = session.reg
        generation, digest = session.announced or (0, "")
        announced = pb.Announced(job=reg.job, attempt=reg.attempt, rank=reg.rank, digest=digest, generation=generation)
        return pb.Report(announced=announced)

    def _staged(self, label: Label, ended: bool = False) -> pb.Report:
        staged = pb.Staged(
            job=label.job,
            node=self.name,
            epoch=label.epoch,
            step=label.step,
            attempt=label.attempt,
            rank=label.rank,
            world_size=label.world_size,
            nbytes=label.nbytes,
            aliases=label.aliases,
            store=label.store,
            ended=ended,
        )
        return pb.Report(staged=staged)

    # ---- time --------------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Report progress and let go of jobs that are over, until cancelled."""
        while True:
            await asyncio.sleep(PROGRESS_EVERY)
            self._report_progress()
            for job in list(self.jobs.values()):
                await self._retire(job)

    def _report_progress(self) -> None:
        steps: dict[tuple[str, int], list[int]] = {}
        oldest = 0.0
        for session in self.sessions.values():
            steps.setdefault((session.reg.job, session.reg.attempt), []).append(session.page.get("step"))
            at = session.page.get("at")
            if at:
                oldest = max(oldest, time.monotonic() - at / 1e9)
        self.metrics.heartbeat_age.set(oldest)
        for (name, attempt), done in steps.items():
            progressed = pb.Progressed(job=name, attempt=attempt, node=self.name, lowest=min(done), highest=max(done))
            self._report(self.jobs[name], pb.Report(progressed=progressed))

    async def _retire(self, job: LocalJob) -> None:
        """Free the memory of a job without ranks: at once if it ended in good order, else after `linger` seconds."""
        if any(s.reg.job == job.name for s in self.sessions.values()):
            return
        arenas = [a for a in self.pool.arenas.values() if a.job == job.name]
        if any(a.state is State.STAGED for a in arenas):
            self.last_active = time.monotonic()
            return
        if job.died and time.monotonic() - job.idle_since < self._linger:
            return
        for arena in arenas:
            self._dropped(job, arena.label)
        self.pool.drop(job.name)
        self.metrics.forget(job.name)
        del self.jobs[job.name]
        await self._workers.close(job.name)

    @property
    def idle(self) -> bool:
        """No ranks and nothing being saved."""
        return not self.sessions and not any(a.state is State.STAGED for a in self.pool.arenas.values())

    async def stop(self) -> None:
        """Stop all activity; what is staged stays in its arenas."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for uplink in self._uplinks.values():
            await uplink.close()
        for token in list(self.sessions):
            self._forget(token)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _epoch(attempt: Attempt) -> int:
    if attempt.refused:
        raise attempt.refused
    if attempt.epoch_error and not attempt.epoch:
        raise StoreDenied(f"saves are off: {attempt.epoch_error}")
    return attempt.epoch


def _exited(pidfd: int) -> bool:
    return pidfd >= 0 and bool(select.select([pidfd], [], [], 0)[0])


async def _wait(event: asyncio.Event, timeout: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), max(timeout, 0.001))
    except TimeoutError:
        pass


def _scheme(store: str) -> str:
    return store.split("://", 1)[0] if "://" in store else "file"
