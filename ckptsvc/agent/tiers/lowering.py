"""Draining: copies on the local disk -> durable store, a few at a time, for as long as it takes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time

from ckptsvc.agent import reports
from ckptsvc.agent.layouts import Layouts
from ckptsvc.agent.local import Local, wait_for
from ckptsvc.agent.sessions import Key, LocalJob
from ckptsvc.agent.tiers.local_tier import Held, LocalTier
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.backoff import Backoff
from ckptsvc.control.room import Stage
from ckptsvc.errors import CkptsvcError, Damaged, SaveFailed
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Event, log
from ckptsvc.telemetry.traces import About, Trace

logger = logging.getLogger("ckptsvc.agent")

AT_A_TIME = 4
"""Shards that a node drains at the same time when all is well; each of them is written by several threads."""


class Lowering:
    """Drains what the coordinator names. A store that fails or is slow is left more and more alone, never given up.

    Attributes:
        backoff: how many shards at a time.
        problem: what is the matter with the store; "" if all is well.
    """

    def __init__(self, local: Local, workers: Workers, tier: LocalTier) -> None:
        self._local, self._workers, self._tier = local, workers, tier
        self._numbers = itertools.count(1 << 40)  # beside those of agent.saves
        self._under_way = 0
        self._changed = asyncio.Event()
        self.backoff = Backoff(AT_A_TIME)
        self._layouts = Layouts(local.metrics)
        local.metrics.drains_allowed.set(AT_A_TIME)
        self.problem, self._trouble = "", ""
        tier.on_drain = self.start

    def start(self, job: LocalJob, key: Key) -> None:
        """Drain all copies of a snapshot that are not being drained already."""
        for held in self._tier.copies(job, key):
            if held.stage is Stage.LOCAL:
                held.stage = Stage.PENDING  # somebody waits for it after all
            if not held.fill:
                held.fill = next(self._numbers)
                self._local.spawn(self._drain(job, held))

    async def _drain(self, job: LocalJob, held: Held) -> None:
        try:
            while self._is_wanted(job, held):
                await self._turn()
                try:
                    if not self._is_wanted(job, held) or await self._try(job, held):
                        return
                finally:
                    self._under_way -= 1
                    self._wake()
                if self.backoff.pause:
                    await asyncio.sleep(self.backoff.pause)
        finally:
            held.fill = 0

    def _is_wanted(self, job: LocalJob, held: Held) -> bool:
        return held.stage is Stage.PENDING and held in self._tier.copies(job, held.key)

    async def _turn(self) -> None:
        while self._under_way >= self.backoff.allowed:
            await wait_for(self._changed, 1.0)
        self._under_way += 1

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _try(self, job: LocalJob, held: Held) -> bool:
        """Drain one copy; False if it is to be tried again."""
        label, under_way = held.label, self._under_way
        if held.result is not None:  # a new coordinator does not know of it
            self._report(job, held, held.result)
            return True
        args = {
            "disk": held.disk,
            "store": label.store,
            "record": held.copy.encode(),
            "durable": held.durable,
            "fill": held.fill,
            "committed": job.newest,
        }
        try:
            done = await self._workers.write(job.name, "drain", args)
        except CkptsvcError as error:
            return self._failed(job, held, error)
        if not held.durable:
            working = done["seconds"] - done["held_back"]
            if working > done["seconds"] / 2:  # else it is the limit that makes it slow
                self.backoff.wrote(done["stored"], working, under_way)
            metrics, scheme = self._local.metrics, label.store.partition("://")[0]
            metrics.written_bytes.labels(scheme).inc(done["stored"])
            metrics.spared_bytes.labels(scheme).inc(max(label.nbytes - done["stored"], 0))
            metrics.write_held_back.inc(done["held_back"])
            self._layouts.note(scheme, label, done["layout"])
            job.compression.note(label, done["verdict"], time.monotonic())
        self._note()
        now, trace = time.monotonic(), Trace.save(label.job, label.epoch, label.step)
        about: About = {"node": self._local.name, "bytes": label.nbytes}
        self._local.traces.add(trace, "drain", now - done["seconds"], now, rank=label.rank, about=about)
        held.durable = not done["segments"]  # else what it refers to may be gone when it is wanted again
        durable = pb.Durable(
            job=label.job,
            epoch=label.epoch,
            step=label.step,
            rank=label.rank,
            name=done["name"],
            nbytes=label.nbytes,
            extent=label.extent,
            digests=held.copy.digests,
            columns=done["columns"],
            segments=done["segments"],
        )
        if held.stage is Stage.PENDING:
            # else it was given up too late: what it refers to may be gone when it is wanted
            held.result = pb.Report(durable=durable)
            self._report(job, held, held.result)
        return True

    def _report(self, job: LocalJob, held: Held, result: pb.Report) -> None:
        job.results[(*held.key, held.label.rank)] = result
        self._local.report(job, result)

    def _failed(self, job: LocalJob, held: Held, error: CkptsvcError) -> bool:
        label = held.label
        if isinstance(error, SaveFailed):
            return False  # it was given up, maybe to be wanted again by now
        self._local.metrics.store_errors.labels(label.store.partition("://")[0], error.code).inc()
        if not isinstance(error, Damaged):
            self.backoff.failed()
            self._note(f": {error}")
            return False
        log(logger, logging.ERROR, Event.CHECKPOINT_REJECTED, "the copy on the local disk cannot be drained: %s", error,
            job=label.job, rank=label.rank, step=label.step)  # fmt: skip
        self._local.report(job, reports.shard_failed(label, error.code, str(error)))
        self._tier.remove(job, held)
        return True

    def _note(self, more: str = "") -> None:
        trouble, allowed = self.backoff.trouble, self.backoff.allowed
        if trouble != self._trouble:
            words = f"the store {trouble}{more}; shards drained at a time: {allowed}" if trouble else "drains go on"
            level = logging.INFO if trouble in ("", "recovers") else logging.WARNING
            log(logger, level, Event.STORE_DEGRADED, "%s", words)
        self._trouble = trouble
        self.problem = f"the store {trouble}{more}" if trouble else ""
        self._local.metrics.drains_allowed.set(allowed)
