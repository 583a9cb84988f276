"""Saves of what local ranks have staged: arena -> worker -> store, and what becomes of the arena afterwards."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ckptsvc.agent import reports
from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.workers import Workers
from ckptsvc.errors import CkptsvcError, InvalidInput
from ckptsvc.pipeline.arena import Arena, Label, State
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Event, Outcome, Phase, log

logger = logging.getLogger("ckptsvc.agent")

DIGEST_TIMEOUT = 60.0
"""Seconds a restore from memory waits for the checksums of a snapshot that was staged just now."""


class Saves:
    """The saves of one agent."""

    def __init__(self, local: Local, workers: Workers) -> None:
        self._local, self._workers = local, workers

    def submit(self, token: str, slot: str, step: int, nbytes: int, aliases: dict[str, str]) -> None:
        """The arena holds a whole shard image: it is ours now."""
        session = self._local.session(token)
        reg = session.reg
        arena = self._local.pool.arenas.get(slot)
        if arena is None or (arena.holder, arena.state, arena.step) != (token, State.FILLING, step):
            raise InvalidInput(f"arena {slot!r} was not acquired for step {step}")
        label = Label(
            job=reg.job,
            store=reg.store,
            coordinator=reg.coordinator,
            attempt=reg.attempt,
            epoch=self._local.jobs[reg.job].attempt(reg.attempt).epoch,
            step=step,
            rank=reg.rank,
            world_size=reg.world_size,
            nbytes=nbytes,
            extent=reg.extent,
            aliases=aliases,
        )
        failpoint("before_label")
        self._local.pool.stage(arena, label)
        failpoint("after_label")
        self._begin_save(arena, label)

    def recover(self, arenas: list[Arena]) -> None:
        """Go on with the snapshots an earlier agent left in its arenas."""
        for arena in arenas:
            assert arena.label is not None
            label = arena.label
            job = self._local.job(label.job, label.coordinator, label.store)
            job.died = True
            job.idle_since = time.monotonic()
            log(logger, logging.INFO, Event.ARENA_RECOVERED, "found the snapshot of step %d", label.step,
                job=label.job, rank=label.rank, step=label.step)  # fmt: skip
            if arena.state is State.STAGED:
                self._begin_save(arena, label, again=True)
            else:
                self._local.spawn(self._digest(job, arena, label))
                self._local.report(job, reports.staged(self._local.name, label, ended=True, again=True))

    def _begin_save(self, arena: Arena, label: Label, *, again: bool = False) -> None:
        job = self._local.jobs[label.job]
        job.digests[arena.name] = asyncio.get_running_loop().create_future()
        self._local.report(job, reports.staged(self._local.name, label, again=again))
        self._local.spawn(self._save(job, arena, label))

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
            self._local.metrics.store_errors.labels(_scheme(label.store), error.code).inc()
            self._tell(job, label, reports.shard_failed(label, error.code, str(error)))
            return
        self._local.metrics.save_duration.labels(Phase.WRITE).observe(time.monotonic() - started)
        self._local.metrics.written_bytes.labels(_scheme(label.store)).inc(done["nbytes"])
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
        self._tell(job, label, pb.Report(durable=durable))

    def _tell(self, job: LocalJob, label: Label, result: pb.Report) -> None:
        """Report what became of a shard, now and again to a coordinator that connects anew while the save runs."""
        if (label.epoch, label.step) not in job.outcomes:
            job.results[label.epoch, label.step, label.rank] = result
        self._local.report(job, result)

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
        reg = self._local.session(token).reg
        job = self._local.jobs[reg.job]
        while True:
            outcome = job.outcomes.get((job.attempt(reg.attempt).epoch, step))
            if outcome is not None:
                return outcome
            await job.ended.wait()

    async def list_snapshots(self, token: str) -> list[agent_pb2.Snapshot]:
        """Complete snapshots of this rank's job in memory, with the shards that are on this node."""
        job = self._local.jobs[self._local.session(token).reg.job]
        found = await self._local.uplink(job.coordinator).list_complete(job.name)
        for snapshot in found:
            for arena in list(self._local.pool.arenas.values()):
                label = arena.label
                if label is None or (label.job, label.epoch, label.step) != (
                    job.name,
                    snapshot.epoch,
                    snapshot.step,
                ):
                    continue
                try:
                    digests = await asyncio.wait_for(asyncio.shield(job.digests[arena.name]), DIGEST_TIMEOUT)
                except (KeyError, TimeoutError, CkptsvcError):
                    continue  # without checksums it cannot be trusted: the ranks find the snapshot incomplete
                snapshot.local.add(
                    rank=label.rank, slot=arena.name, bytes=label.nbytes, extent=label.extent, digests=digests
                )
        return found

    def ended(self, job: LocalJob, outcome: agent_pb2.SaveOutcome) -> None:
        """The coordinator says how a save ended: keep the snapshot as memory tier, or let it go."""
        key = (outcome.epoch, outcome.step)
        committed = outcome.outcome == agent_pb2.OUTCOME_COMMITTED
        if committed:
            job.newest = max(job.newest, key)
        if key not in job.outcomes:
            self._count(job, outcome, committed)
        job.record(outcome)
        for arena in list(self._local.pool.arenas.values()):
            label = arena.label
            if (
                label is None
                or arena.state is not State.STAGED
                or (label.job, label.epoch, label.step) != (job.name, *key)
            ):
                continue
            job.results.pop((*key, label.rank), None)
            if committed:
                job.pace.saves.append(time.monotonic() - arena.since)
            if (key in job.complete and outcome.code != "layout") or committed:
                self._local.pool.keep(arena)
            else:
                self._local.pool.release(arena)
                self._local.dropped(job, label)
            self._local.arena_changed(label.job, label.rank)
        for session in self._local.sessions.values():
            reg = session.reg
            if reg.job == job.name and job.attempt(reg.attempt).epoch == outcome.epoch:
                if committed:
                    session.page.put("committed", job.newest[1])
                else:
                    session.page.put("failed", outcome.step)

    def _count(self, job: LocalJob, outcome: agent_pb2.SaveOutcome, committed: bool) -> None:
        if committed:
            self._local.metrics.committed(job.name, job.newest[1], time.time())
            self._local.metrics.save_duration.labels(Phase.COMMIT).observe(outcome.seconds)
            log(logger, logging.INFO, Event.SAVE_COMMITTED, "step %d committed, %d bytes in %.2f s", outcome.step,
                outcome.bytes, outcome.seconds, job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip
            return
        fenced = outcome.outcome == agent_pb2.OUTCOME_FENCED
        self._local.metrics.saves.labels(Outcome.FENCED if fenced else Outcome.FAILED).inc()
        log(logger, logging.ERROR, Event.SAVE_FAILED, "step %d not saved: %s", outcome.step, outcome.reason,
            job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip


def _scheme(store: str) -> str:
    return store.split("://", 1)[0] if "://" in store else "file"
