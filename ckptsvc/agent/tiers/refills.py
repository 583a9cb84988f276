"""Back into memory: what the local disk has of a snapshot, verified, for a restore."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable

from ckptsvc.agent import reports
from ckptsvc.agent.local import Local
from ckptsvc.agent.saves import Saves
from ckptsvc.agent.sessions import Key, LocalJob
from ckptsvc.agent.tiers.local_tier import Held, LocalTier
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.errors import ArenaExhausted, CkptsvcError, Damaged
from ckptsvc.pipeline.arena import WAITING, Arena, State, populate
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")


def may_go(arenas: Iterable[Arena], job: str, key: Key) -> list[Arena]:
    """The arenas that may make room for a snapshot, in this order: free ones, older snapshots of its job, other jobs'.

    Never a part of the same snapshot, nor a newer one.
    """
    ranked = []
    for arena in arenas:
        label = arena.label
        if arena.state is State.FREE or arena.holder == WAITING:
            ranked.append((0, (0, 0), arena))
        elif arena.state is State.KEPT and label is not None:
            own, at = label.job == job, (label.epoch, label.step)
            if not own or at < key:
                ranked.append((1 if own else 2, at, arena))
    return [arena for *_, arena in sorted(ranked, key=lambda each: each[:2])]


class Refills:
    """Refills of one agent; the ranks of a node that ask for the same wait for the same one."""

    def __init__(self, local: Local, workers: Workers, tier: LocalTier | None, saves: Saves) -> None:
        self._local, self._workers, self._tier, self._saves = local, workers, tier, saves
        self._running: dict[tuple[str, Key], asyncio.Task[None]] = {}

    async def refill(self, token: str, key: Key) -> agent_pb2.Snapshot:
        """Bring a snapshot's copies into arenas; returns what is in the arenas of this node then.

        What cannot be read or verified is reported and left out: the ranks find the snapshot incomplete.
        """
        job = self._local.jobs[self._local.session(token).reg.job]
        if self._tier is not None:
            name = (job.name, key)
            task = self._running.get(name)
            if task is None:
                task = self._running[name] = asyncio.ensure_future(self._refill(self._tier, job, key))
                task.add_done_callback(lambda _: self._running.pop(name, None))
            await asyncio.shield(task)  # who asked may give up; it will ask again
        snapshot = agent_pb2.Snapshot(epoch=key[0], step=key[1])
        await self._saves.fill_in(job, snapshot)
        return snapshot

    async def _refill(self, tier: LocalTier, job: LocalJob, key: Key) -> None:
        copies = tier.copies(job, key)
        for held in copies:
            held.readers += 1
        try:
            for held in copies:
                try:
                    await self._bring(job, held)
                except Damaged as error:
                    self._complain(held, error)
                    self._local.report(job, reports.shard_failed(held.label, error.code, str(error)))
                    tier.remove(job, held)
                except CkptsvcError as error:
                    self._complain(held, error)
        finally:
            for held in copies:
                held.readers -= 1

    async def _bring(self, job: LocalJob, held: Held) -> None:
        label = held.label
        args = {"disk": held.disk, "record": held.copy.encode()}
        for arena in self._local.pool.of(job.name, label.rank):
            if arena.label is None or (arena.label.epoch, arena.label.step) != held.key:
                continue
            if arena.state is State.STAGED:
                return  # it is being saved from there
            look = {**args, "path": str(arena.path), "compare": True}
            if (await self._workers.of(job.name).call("refill", look))["same"]:
                return
            self._let_go(job, arena)
        arena, fd = self._room(job, held)
        try:
            await asyncio.get_running_loop().run_in_executor(None, populate, fd, arena.capacity)
            await self._workers.of(job.name).call("refill", {**args, "path": str(arena.path), "compare": False})
        except BaseException:
            self._local.pool.remove(arena)
            raise
        finally:
            os.close(fd)
        self._local.pool.stage(arena, label)
        self._local.pool.keep(arena)
        arena.step, arena.epoch = label.step, label.epoch
        digests = job.digests[arena.name] = asyncio.get_running_loop().create_future()
        digests.set_result(held.copy.digests)
        self._local.report(job, reports.staged(self._local.name, label, ended=True, again=True))
        self._local.arena_changed(job.name, label.rank)
        log(logger, logging.INFO, Event.RESTORE_DONE, "step %d is back in memory from the local disk", label.step,
            job=job.name, rank=label.rank, step=label.step)  # fmt: skip

    def _room(self, job: LocalJob, held: Held) -> tuple[Arena, int]:
        """A new arena; what is older, or another job's, goes for it where there is no room."""
        pool = self._local.pool
        spare = iter(may_go(pool.arenas.values(), job.name, held.key))
        while True:
            try:
                return pool.make(job.name, held.label.rank, held.label.nbytes)
            except ArenaExhausted:
                arena = next(spare, None)
                if arena is None:
                    raise
            self._let_go(self._local.jobs.get(arena.job), arena)

    def _let_go(self, job: LocalJob | None, arena: Arena) -> None:
        if job is not None:
            self._local.dropped(job, arena.label)
        self._local.pool.remove(arena)

    def _complain(self, held: Held, error: CkptsvcError) -> None:
        label = held.label
        log(logger, logging.ERROR, Event.CHECKPOINT_REJECTED, "the copy on the local disk cannot be restored: %s",
            error, job=label.job, rank=label.rank, step=label.step)  # fmt: skip
