"""Saves of what local ranks have staged: arena -> worker -> store, and what becomes of the arena afterwards."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, NamedTuple

from ckptsvc.agent import reports
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.layouts import Layouts
from ckptsvc.agent.local import Local, wait_for
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.tiers.local_tier import LocalTier
from ckptsvc.agent.worker.proxy import Note
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.errors import CkptsvcError, ConfigError, InvalidInput, SaveFailed
from ckptsvc.pipeline.arena import Arena, Label, State
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Event, Outcome, Phase, log
from ckptsvc.telemetry.traces import Trace

logger = logging.getLogger("ckptsvc.agent")

EARLY_BYTES = 64 << 20
"""Snapshots of so many bytes are written while they are copied: of smaller ones the copy takes no time."""

WANTED_AGAIN = 5.0
"""Seconds after which a coordinator, maybe another one by now, is told again that somebody waits for a save."""

MOST_STAGING = 3600.0
"""Seconds for which a rank may say that it has copied."""

_ENDS = {agent_pb2.OUTCOME_SKIPPED: Outcome.SKIPPED, agent_pb2.OUTCOME_FENCED: Outcome.FENCED}

DIGEST_TIMEOUT = 60.0
"""Seconds a restore from memory waits for the checksums of a snapshot that was staged just now."""


class _Early(NamedTuple):
    """A shard that is being written while its rank still copies; `fill` is the number by which it can be given up."""

    fill: int
    nbytes: int
    written: asyncio.Task[dict[str, Any]]


class Saves:
    """The saves of one agent.

    Args:
        local: the agent's state.
        workers: the I/O workers.
        early: large snapshots are written while they are copied.
        tier: the local disk, where there is one: shards are written there first.
    """

    def __init__(self, local: Local, workers: Workers, *, early: bool, tier: LocalTier | None = None) -> None:
        self._local, self._workers, self._is_early, self._tier = local, workers, early, tier
        self._early: dict[str, _Early] = {}  # arena -> the writing of what a rank copies into it
        self._fills = itertools.count(1)
        self._layouts = Layouts(local.metrics)
        local.pool.on_given_up = self._give_up

    def expect(self, token: str, arena: Arena, epoch: int, nbytes: int) -> None:
        """A rank begins to copy into an arena: a large snapshot is written from its first byte on, beside the copy."""
        if nbytes < EARLY_BYTES or not self._is_early:
            return
        reg = self._local.session(token).reg
        job, fill = self._local.jobs[reg.job], next(self._fills)
        args = _what(reg, epoch, arena.step, nbytes, arena, fill, job.newest)
        task = asyncio.ensure_future(self._write(job, arena, args))
        early = self._early[arena.name] = _Early(fill, nbytes, task)

        def ended(task: asyncio.Task[dict[str, Any]]) -> None:
            if not task.cancelled():
                task.exception()  # nobody need ask
            if self._early.get(arena.name) is early and arena.state is not State.FILLING:
                del self._early[arena.name]

        task.add_done_callback(ended)

    def _give_up(self, arena: Arena) -> None:
        early = self._early.pop(arena.name, None)
        if early is not None:
            if early.written.done():
                return
            early.written.cancel()
            worker = self._workers.running(arena.job)
            if worker is not None:
                self._local.spawn(worker.tell("cancel", {"fill": early.fill}))

    def submit(
        self,
        token: str,
        slot: str,
        step: int,
        nbytes: int,
        aliases: dict[str, str],
        metrics: dict[str, str],
        staging: float = 0.0,
    ) -> None:
        """The arena holds a whole shard image: it is ours now. `staging`: seconds since the rank began with it."""
        session = self._local.session(token)
        reg = session.reg
        arena = self._local.pool.arenas.get(slot)
        if arena is None or (arena.holder, arena.state, arena.step) != (token, State.FILLING, step):
            raise InvalidInput(f"arena {slot!r} was not acquired for step {step}")
        epoch = self._local.jobs[reg.job].attempt(reg.attempt).epoch
        if epoch != arena.epoch:
            raise SaveFailed(f"another rank has begun a new epoch; this snapshot is of epoch {arena.epoch}")
        label = Label(
            job=reg.job,
            store=reg.store,
            coordinator=reg.coordinator,
            attempt=reg.attempt,
            epoch=epoch,
            step=step,
            rank=reg.rank,
            world_size=reg.world_size,
            nbytes=nbytes,
            extent=reg.extent,
            aliases=aliases,
            metrics=metrics if reg.rank == 0 else {},
        )
        failpoint("before_label")
        began = arena.since
        self._local.pool.stage(arena, label)
        self._local.metrics.save_duration.labels(Phase.STAGE).observe(arena.since - began)
        self._local.metrics.staged_bytes.inc(nbytes)
        if 0 < staging < MOST_STAGING:
            began = arena.since - staging
        self._trace(label, "stage", began, parent="shard")
        failpoint("after_label")
        self._begin_save(arena, label, began)

    def recover(self, arenas: list[Arena]) -> None:
        """Go on with the snapshots an earlier agent left in its arenas; those on the local disk are known already."""
        for arena in arenas:
            assert arena.label is not None
            label = arena.label
            try:
                job = self._local.job(label.job, label.coordinator, label.store)
            except ConfigError as error:  # the settings have changed: what is here alone may still be complete
                logger.warning("job %s: %s", label.job, error)
                job = self._local.job(label.job, "", label.store)
            job.died = True
            job.idle_since = time.monotonic()
            log(logger, logging.INFO, Event.ARENA_RECOVERED, "found the snapshot of step %d", label.step,
                job=label.job, rank=label.rank, step=label.step)  # fmt: skip
            if self._tier is not None and self._tier.has(label):
                self._local.pool.keep(arena)
            if arena.state is State.STAGED:
                self._begin_save(arena, label, arena.since, again=True)
            else:
                if label.parity is None:
                    self._local.spawn(self._digest(job, arena, label))
                self._local.report(job, reports.staged(self._local.name, label, ended=True, again=True))

    def _begin_save(self, arena: Arena, label: Label, began: float, *, again: bool = False) -> None:
        job = self._local.jobs[label.job]
        if arena.name in self._early and self._early[arena.name].nbytes != label.nbytes:
            self._give_up(arena)
        early = self._early.get(arena.name)  # until it has ended: the arena may be let go before
        if early is None:
            written: Awaitable[dict[str, Any]] = self._write(
                job, arena, _what(label, label.epoch, label.step, label.nbytes, arena, 0, job.newest)
            )
        else:
            written = early.written
            if early.written.done():
                del self._early[arena.name]
        self._local.report(job, reports.staged(self._local.name, label, again=again))
        self._local.spawn(self._save(job, label, arena, written, began))

    def _write(self, job: LocalJob, arena: Arena, args: dict[str, Any]) -> Coroutine[Any, Any, dict[str, Any]]:
        """Have the shard written; its checksums are known from `job.digests` before that."""
        digests = job.digests[arena.name] = asyncio.get_running_loop().create_future()
        return self._written(job.name, args, digests)

    async def _written(self, job: str, args: dict[str, Any], future: asyncio.Future[bytes]) -> dict[str, Any]:
        def on_note(note: dict[str, Any]) -> None:
            if "digests" in note and not future.done():
                future.set_result(note["digests"])

        def direct() -> Coroutine[Any, Any, dict[str, Any]]:
            return self._write_directly(job, args, on_note)

        try:
            return await (self._tier.write(job, args, on_note, direct) if self._tier else direct())
        except BaseException as error:
            if not future.done():
                why = error if isinstance(error, CkptsvcError) else SaveFailed("the snapshot was given up")
                future.set_exception(why)
                future.exception()  # nobody need ask
            raise

    def _write_directly(
        self, job: str, args: dict[str, Any], on_note: Note | None = None
    ) -> Coroutine[Any, Any, dict[str, Any]]:
        """Have a shard written to the durable store."""
        more: dict[str, Any] = {"disk": ""}
        if self._tier is not None:
            # Whole, as if nothing older were committed: its save may wait long for drains, and retention deletes what
            # it would refer to meanwhile.
            more["committed"] = (args["epoch"], args["step"])
        return self._workers.write(job, "write", args | more, on_note)

    async def _save(
        self, job: LocalJob, label: Label, arena: Arena, written: Awaitable[dict[str, Any]], began: float
    ) -> None:
        started = time.monotonic()
        try:
            done = await written
            if self._tier is not None and done["disk"]:
                if await self._tier.keep(job, label, done):
                    return
                args = _what(label, label.epoch, label.step, label.nbytes, arena, 0, job.newest)
                done = await self._write_directly(job.name, args)
        except CkptsvcError as error:
            log(logger, logging.ERROR, Event.SAVE_FAILED, "shard not written: %s", error,
                job=label.job, rank=label.rank, step=label.step)  # fmt: skip
            self._local.metrics.store_errors.labels(_scheme(label.store), error.code).inc()
            self._trace(label, "write", started, parent="shard", error=str(error))
            self._tell(job, label, reports.shard_failed(label, error.code, str(error)))
            return
        self._local.metrics.save_duration.labels(Phase.WRITE).observe(time.monotonic() - started)
        self._trace(label, "write", started, parent="shard", stored=done["stored"])
        self._trace(label, "shard", began)
        self._local.metrics.written_bytes.labels(_scheme(label.store)).inc(done["stored"])
        self._local.metrics.spared_bytes.labels(_scheme(label.store)).inc(max(done["nbytes"] - done["stored"], 0))
        self._local.metrics.write_held_back.inc(done["held_back"])
        self._layouts.note(_scheme(label.store), label, done["layout"])
        job.compression.note(label, done["verdict"], time.monotonic())
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
            segments=done["segments"],
        )
        self._tell(job, label, pb.Report(durable=durable))

    def _trace(self, label: Label, name: str, begin: float, *, parent: str = "", error: str = "", **about: int) -> None:
        """A part of a save that has begun then (CLOCK_MONOTONIC, seconds) and ends now, or a shard that is durable."""
        if self._local.traces.is_on:
            trace = Trace.save(label.job, label.epoch, label.step)
            self._local.traces.add(
                trace, name, begin, time.monotonic(), parent=parent, rank=label.rank, error=error,
                about={"node": self._local.name, "bytes": label.nbytes, **about},
            )  # fmt: skip

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
            epoch = job.attempt(reg.attempt).epoch
            outcome = job.outcomes.get((epoch, step))
            if outcome is not None and outcome.outcome != agent_pb2.OUTCOME_LOCAL:
                return outcome
            if self._tier is not None or outcome is not None:
                wanted = pb.DurableWanted(
                    job=job.name, node=self._local.name, epoch=epoch, step=step, left_local=outcome is not None
                )
                self._local.report(job, pb.Report(durable_wanted=wanted))
            await wait_for(job.ended, WANTED_AGAIN)

    async def list_snapshots(self, token: str) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of this rank's job in memory, with the shards that are on this node."""
        job = self._local.jobs[self._local.session(token).reg.job]
        found = await self._local.uplink(job.coordinator).list_complete(job.name)
        for snapshot in found.snapshots:
            await self.fill_in(job, snapshot)
        return found

    async def fill_in(self, job: LocalJob, snapshot: agent_pb2.Snapshot) -> None:
        """Say which shards of a snapshot are in arenas of this node."""
        for arena in list(self._local.pool.arenas.values()):
            label = arena.label
            if label is None or label.parity is not None:
                continue
            if (label.job, label.epoch, label.step) != (job.name, snapshot.epoch, snapshot.step):
                continue
            try:
                digests = await asyncio.wait_for(asyncio.shield(job.digests[arena.name]), DIGEST_TIMEOUT)
            except (KeyError, TimeoutError, CkptsvcError):
                continue  # without checksums it cannot be trusted: the ranks find the snapshot incomplete
            snapshot.local.add(
                rank=label.rank, slot=arena.name, bytes=label.nbytes, extent=label.extent, digests=digests
            )

    def ended(self, job: LocalJob, outcome: agent_pb2.SaveOutcome) -> None:
        """The coordinator says how a save ended: keep the snapshot as memory tier, or let it go."""
        key = (outcome.epoch, outcome.step)
        committed = outcome.outcome == agent_pb2.OUTCOME_COMMITTED
        if committed:
            job.newest = max(job.newest, key)
        before = job.outcomes.get(key)
        if before is None or (before.outcome == agent_pb2.OUTCOME_LOCAL and before.outcome != outcome.outcome):
            self._count(job, outcome, committed)
        job.record(outcome)
        if self._tier is not None:
            self._tier.ended(job, outcome)
        no_checkpoint = outcome.code == "layout"  # the shards do not fit together, nor would they in a restore
        for arena in list(self._local.pool.arenas.values()):
            label = arena.label
            if (
                label is None
                or not (arena.state is State.STAGED or no_checkpoint)
                or (label.job, label.epoch, label.step) != (job.name, *key)
            ):
                continue
            job.results.pop((*key, label.rank), None)
            if committed:
                job.pace.saves.append(time.monotonic() - arena.since)
            if (key in job.complete and not no_checkpoint) or committed:
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
                elif outcome.outcome != agent_pb2.OUTCOME_LOCAL:
                    session.page.put("failed", outcome.step)

    def _count(self, job: LocalJob, outcome: agent_pb2.SaveOutcome, committed: bool) -> None:
        if committed:
            self._local.metrics.committed(job.name, job.newest[1], time.time())
            self._local.metrics.save_duration.labels(Phase.COMMIT).observe(outcome.seconds)
            log(logger, logging.INFO, Event.SAVE_COMMITTED, "step %d committed, %d bytes in %.2f s", outcome.step,
                outcome.bytes, outcome.seconds, job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip
            return
        if outcome.outcome == agent_pb2.OUTCOME_LOCAL:
            self._local.metrics.saves.labels(Outcome.LOCAL).inc()
            log(logger, logging.INFO, Event.SAVE_LEFT_LOCAL, "step %d: %s", outcome.step, outcome.reason,
                job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip
            return
        ended = Outcome.TIMED_OUT if outcome.timed_out else _ENDS.get(outcome.outcome, Outcome.FAILED)
        self._local.metrics.saves.labels(ended).inc()
        level = logging.WARNING if ended is Outcome.SKIPPED else logging.ERROR
        log(logger, level, Event.SAVE_FAILED, "step %d not saved: %s", outcome.step, outcome.reason,
            job=job.name, step=outcome.step, epoch=outcome.epoch)  # fmt: skip


def _what(
    of: Label | Registration, epoch: int, step: int, nbytes: int, arena: Arena, fill: int, committed: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of the worker's `write`; `committed` is the newest checkpoint (epoch, step) known to be."""
    return {
        "path": str(arena.path),
        "nbytes": nbytes,
        "store": of.store,
        "extent": of.extent,
        "epoch": epoch,
        "step": step,
        "rank": of.rank,
        "writers": of.world_size,
        "fill": fill,
        "committed": committed,
    }


def _scheme(store: str) -> str:
    return store.split("://", 1)[0] if "://" in store else "file"
