"""Snapshots on a disk of this node: written there first, drained to the durable store when the coordinator says so.

    arena -> local disk (the arena may be used again) -> durable store, unless the policy leaves it (control.tiering)

What lies there outlives this agent: the next one in the same directory reports it, and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ckptsvc.agent import reports
from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import Key, LocalJob
from ckptsvc.agent.worker.proxy import Note, WorkerProxy
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.config import check_place, limit_on, private_directory
from ckptsvc.control.room import Kept, Stage, expendable
from ckptsvc.errors import CkptsvcError, ConfigError, StoreError
from ckptsvc.pipeline.arena import Label, State
from ckptsvc.pipeline.local_copy import Copy, Mark
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import TierSettings
from ckptsvc.telemetry import Event, Tier, log

logger = logging.getLogger("ckptsvc.agent")

SCAN_TIMEOUT = 15.0
"""Seconds to find what an earlier agent has left; a disk that takes longer is not used."""

ORPHANED_AFTER = 3600.0
"""Seconds without a change after which a folder is taken over whose agent is gone."""

LAST_ONE = 10.0
"""Seconds for which the newest snapshot of a job without ranks is kept, until its coordinator has it drained."""


@dataclass(eq=False, slots=True)
class Held:
    """One copy.

    Attributes:
        copy: its record.
        disk: address of its job's folder.
        stage: how far its snapshot has come.
        durable: it is in the durable store, whole.
        result: what was reported when it had been drained for the save that is going on.
        since: when its snapshot was staged, CLOCK_MONOTONIC.
        fill: the number by which a drain that is in progress can be given up; 0: there is none.
        readers: restores that read it.
    """

    copy: Copy
    disk: str
    stage: Stage = Stage.PENDING
    durable: bool = False
    since: float = 0.0
    fill: int = 0
    readers: int = 0
    result: pb.Report | None = None

    @property
    def label(self) -> Label:
        """Whose it is."""
        return self.copy.label

    @property
    def key(self) -> Key:
        """Of its snapshot."""
        return self.label.epoch, self.label.step


@dataclass(slots=True)
class JobDisk:
    """What the disk has of one job."""

    copies: dict[tuple[int, int, int], Held] = field(default_factory=dict)  # epoch, step, rank
    complete: set[Key] = field(default_factory=set)  # snapshots that are whole on the job's disks
    writing: dict[int, int] = field(default_factory=dict)  # bytes of the shards that are being written

    def of(self, key: Key) -> list[Held]:
        """The copies of one snapshot."""
        return [held for held in self.copies.values() if held.key == key]


class LocalTier:
    """The local disk of one agent. Owned by its event loop; the worker of each job does what touches the disk.

    Args:
        local: the agent's state.
        workers: the I/O workers.
        settings: where, and how much.
        tag: sets the folder of this agent apart from others'.
        patience: seconds for which a job without ranks is waited for whose coordinator orders no drain.

    Attributes:
        on_drain: what to do when a snapshot's copies are to be drained.
        problem: why the disk is not used, or was not used for the last shard; "" if it is.
    """

    def __init__(self, local: Local, workers: Workers, settings: TierSettings, tag: str, patience: float) -> None:
        self._local, self._workers, self._settings, self._patience = local, workers, settings, patience
        self.root = Path(settings.local) / f"ckptsvc-{os.geteuid()}-{tag}"
        self.jobs: dict[str, JobDisk] = {}
        self.on_drain: Callable[[LocalJob, Key], None] = lambda job, key: None
        self.problem = "not opened"
        self._locks: dict[Path, int] = {}  # of the folders that are ours
        self._limit = 0
        self.share: int | None = None  # of the service of many users: what those of this user may take
        self._numbers = itertools.count(1)
        local.on_disk = self.resync

    async def open(self) -> list[tuple[str, bytes, list[str]]]:
        """Take possession of the folder; returns what an earlier agent has left there, for `recover`.

        The same goes for folders of this user's agents that are gone for good. A disk that cannot be used is reported,
        and done without.
        """
        worker = WorkerProxy("local disk")
        try:
            check_place(self._settings.local, "tiers.local")
            private_directory(self.root)
            self._locks[self.root] = _locked(self.root)
            orphans = [each for each in sorted(self.root.parent.glob(f"ckptsvc-{os.geteuid()}-*")) if self._adopt(each)]
            self._limit = limit_on(self._settings.local_limit, self.root, "tiers.local")
            call = worker.call("local_scan", {"directories": [str(each) for each in (self.root, *orphans)]})
            found = await asyncio.wait_for(call, SCAN_TIMEOUT)
        except (CkptsvcError, OSError) as error:
            why = f"no answer in {SCAN_TIMEOUT:g} s" if isinstance(error, TimeoutError) else error
            self.close()
            self._degraded(f"the local disk {self.root} is not used: {why}")
            return []
        finally:
            await worker.close()
        self.problem = ""
        for why in found["damaged"]:
            log(logger, logging.ERROR, Event.CHECKPOINT_REJECTED, "a copy on the local disk cannot be used: %s", why)
        return [(disk, record, marks) for disk, record, marks in found["copies"]]

    def _adopt(self, folder: Path) -> bool:
        """Take over the folder of an agent that is gone, unless that is this one's, or in use, or of late."""
        try:
            changed = max(each.lstat().st_mtime for each in (folder, *folder.iterdir()))
            if folder == self.root or time.time() - changed < ORPHANED_AFTER:
                return False
            private_directory(folder)
            self._locks[folder] = _locked(folder)
        except (CkptsvcError, OSError):
            return False
        return True

    def recover(self, found: list[tuple[str, bytes, list[str]]]) -> None:
        """Go on with the copies that were found."""
        for disk, record, marks in found:
            self._recover(Copy.decode(record, "record"), disk, {Mark(mark) for mark in marks})
        self.measure()

    def close(self) -> None:
        """Give the folders up; what is in them stays."""
        for folder, lock in self._locks.items():
            with contextlib.suppress(OSError):  # there is something in it
                for each in folder.iterdir():
                    if each.is_dir():
                        each.rmdir()
                (folder / "lock").unlink()
                folder.rmdir()
            os.close(lock)
        self._locks.clear()

    def _recover(self, copy: Copy, disk: str, marks: Collection[Mark]) -> None:
        label = copy.label
        try:
            job = self._local.job(label.job, label.coordinator, label.store)
        except ConfigError as error:
            logger.warning("job %s: %s", label.job, error)
            job = self._local.job(label.job, "", label.store)
        job.died, job.idle_since = True, time.monotonic()
        held = Held(copy, disk, durable=Mark.DURABLE in marks, since=time.monotonic())
        if Mark.COMMITTED in marks:
            held.stage = Stage.COMMITTED
            job.newest = max(job.newest, held.key)
        self._of(job.name).copies[(*held.key, label.rank)] = held
        log(logger, logging.INFO, Event.COPY_RECOVERED, "found the shard of step %d on the local disk", label.step,
            job=label.job, rank=label.rank, step=label.step)  # fmt: skip
        self._report(job, held, again=True)

    # ---- writing -----------------------------------------------------------------------------------------------------

    async def write(
        self, job: str, args: dict[str, Any], on_note: Note, direct: Callable[[], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Write a shard to the local disk or, where that is not possible, to the durable store.

        Args:
            job: whose it is.
            args: of the worker's `write`.
            on_note: see WorkerProxy.call.
            direct: writes it to the durable store.

        Returns:
            the worker's answer, and under "disk" the address of the folder, "" for the durable store.
        """
        number, nbytes = next(self._numbers), args["nbytes"]
        mine = self._of(job)
        if self._make_room(job, nbytes):
            mine.writing[number] = nbytes
            try:
                disk = self._folder(job)
                done = await self._workers.of(job).call("write", {**args, "disk": disk}, on_note)
            except StoreError as error:
                self._degraded(f"the local disk takes no shard: {error}")
            else:
                self.problem = ""
                return {**done, "disk": disk}
            finally:
                del mine.writing[number]
        return {**await direct(), "disk": ""}

    async def keep(self, job: LocalJob, label: Label, done: dict[str, Any]) -> bool:
        """A shard is on the disk: its arena may be used again. False where it must be written elsewhere after all."""
        held = Held(Copy(label=label, name=done["name"], digests=done["digests"]), done["disk"], since=time.monotonic())
        try:
            await self._tell(held, "local_keep")
        except CkptsvcError as error:
            self._degraded(f"the local disk takes no shard: {error}")
            return False
        self._of(job.name).copies[(*held.key, label.rank)] = held
        for arena in list(self._local.pool.arenas.values()):
            if arena.label is label and arena.state is State.STAGED:
                held.since = arena.since
                self._local.pool.keep(arena)
                self._local.arena_changed(label.job, label.rank)
        outcome = job.outcomes.get(held.key)
        if outcome is None:
            self._report(job, held)
        else:  # it was faster
            self._settle(job, held, outcome)
        self._prune(job.name, 0)
        return True

    def _make_room(self, job: str, nbytes: int) -> bool:
        """Whether so many bytes more are within the limit, once what may go has gone."""
        if not self._locks:
            return False
        limit = self._limit if self.share is None else min(self._limit, self.share)
        over = self._total() + nbytes - limit
        if over > 0:
            self._prune(job, over)
            over = self._total() + nbytes - limit
        if over > 0:
            whose = "tiers.local_limit" if limit == self._limit else "this user's share of tiers.local_limit"
            self._degraded(f"no room on the local disk: {whose} is {limit} bytes")
        return over <= 0

    def _total(self) -> int:
        kept = sum(held.label.nbytes for disk in self.jobs.values() for held in disk.copies.values())
        return kept + sum(nbytes for disk in self.jobs.values() for nbytes in disk.writing.values())

    # ---- what the coordinator says -----------------------------------------------------------------------------------

    def on_order(self, job: LocalJob, order: pb.Order) -> None:
        """A snapshot is whole on the disks of all nodes, or is to be drained."""
        kind = order.WhichOneof("effect")
        effect = order.local_complete if kind == "local_complete" else order.drain_shards
        key = (effect.epoch, effect.step)
        if kind == "local_complete":
            self._of(job.name).complete.add(key)
            self._prune(job.name, 0)
        else:
            for held in self.copies(job, key):
                if held.stage is Stage.COMMITTED:  # a new coordinator does not know
                    self._report(job, held, again=True)
            self.on_drain(job, key)

    def ended(self, job: LocalJob, outcome: agent_pb2.SaveOutcome) -> None:
        """A save has ended: keep its copies, or let them go."""
        for held in self._of(job.name).of((outcome.epoch, outcome.step)):
            self._settle(job, held, outcome)
        self._prune(job.name, 0)

    def _settle(self, job: LocalJob, held: Held, outcome: agent_pb2.SaveOutcome) -> None:
        job.results.pop((*held.key, held.label.rank), None)
        held.result = None
        worker = self._workers.running(job.name)
        if held.fill and worker is not None:
            self._local.spawn(worker.tell("cancel", {"fill": held.fill}))
        if outcome.outcome == agent_pb2.OUTCOME_COMMITTED:
            if held.stage is not Stage.COMMITTED:
                job.pace.saves.append(time.monotonic() - held.since)
                held.stage, held.durable = Stage.COMMITTED, True
                self._local.spawn(self._told(held, "local_mark", mark=Mark.COMMITTED.value))
        elif outcome.outcome == agent_pb2.OUTCOME_LOCAL:
            held.stage = Stage.LOCAL
        elif held.stage is Stage.PENDING:  # what was left local is whole, and stays, whatever became of it since
            self.remove(job, held)

    def remove(self, job: LocalJob, held: Held) -> None:
        """Let a copy go."""
        mine = self._of(job.name)
        if mine.copies.pop((*held.key, held.label.rank), None) is not None:
            if not mine.of(held.key):
                mine.complete.discard(held.key)
            self._report_gone(job, held)
            self._local.spawn(self._told(held, "local_remove", key=held.copy.key))
            self.measure()

    def _report_gone(self, job: LocalJob, held: Held) -> None:
        event = pb.LocalDropped(job=job.name, epoch=held.key[0], step=held.key[1], rank=held.label.rank)
        self._local.report(job, pb.Report(local_dropped=event))

    def _prune(self, name: str, over: int) -> None:
        """Remove what is no longer needed, and so many bytes more if they may go."""
        mine, job = self._of(name), self._local.jobs.get(name)
        if job is None:
            return
        kept = []
        for key in {held.key for held in mine.copies.values()}:
            copies = mine.of(key)
            used = any(held.fill or held.readers for held in copies)
            stage = max((held.stage for held in copies), key=lambda s: s is Stage.PENDING)
            kept.append(Kept(key, stage, sum(held.label.nbytes for held in copies), used))
        for key in expendable(kept, mine.complete, self._settings.local_keep, over):
            for held in mine.of(key):
                self.remove(job, held)
        self.measure()

    def copies(self, job: LocalJob, key: Key) -> list[Held]:
        """The copies of one snapshot."""
        return self.jobs[job.name].of(key) if job.name in self.jobs else []

    def has(self, label: Label) -> bool:
        """Whether a shard is on the disk."""
        return (label.epoch, label.step, label.rank) in self._of(label.job).copies

    # ---- what others ask ---------------------------------------------------------------------------------------------

    def busy(self, job: LocalJob) -> bool:
        """Whether something of a job is to be drained yet."""
        now, mine = time.monotonic(), self._of(job.name)
        newest = max(mine.complete, default=(0, -1))
        last = newest > job.newest and now - job.idle_since < LAST_ONE  # the coordinator may want it yet
        pending = [held for held in mine.copies.values() if held.stage is Stage.PENDING]
        heard = any(held.fill for held in pending) or now - job.idle_since < self._patience
        return bool(mine.writing) or last or (bool(pending) and heard)

    @property
    def idle(self) -> bool:
        """Nothing is to be drained any more."""
        return not any(self.busy(job) for job in self._local.jobs.values() if job.name in self.jobs)

    async def forget(self, job: LocalJob) -> None:
        """A job is over: what is in the durable store, or older than that, goes; what else there is stays on disk."""
        copies = list(self.jobs.pop(job.name, JobDisk()).copies.values())
        self.measure()
        for held in copies:
            self._report_gone(job, held)
            if held.stage is Stage.COMMITTED or held.key < job.newest:
                await self._told(held, "local_remove", key=held.copy.key)
        if self._locks:  # what a worker that was killed has left half written
            worker = self._workers.running(job.name)
            if worker is not None:
                await worker.tell("local_tidy", {"disk": self._folder(job.name)})

    def resync(self, way: str) -> Iterator[pb.Report]:
        """What a coordinator that knows nothing must hear."""
        for job in self._local.jobs.values():
            if job.coordinator == way and job.name in self.jobs:
                for held in sorted(self.jobs[job.name].copies.values(), key=lambda h: (h.key, h.label.rank)):
                    yield self._kept(held, again=True)

    def _report(self, job: LocalJob, held: Held, *, again: bool = False) -> None:
        self._local.report(job, self._kept(held, again=again))
        self.measure()

    def _kept(self, held: Held, *, again: bool) -> pb.Report:
        return reports.local_kept(self._local.name, held.label, held.stage, again=again)

    async def _told(self, held: Held, op: str, **more: Any) -> None:
        """Have the worker do what nobody waits for."""
        try:
            await self._tell(held, op, **more)
        except CkptsvcError as error:
            logger.warning("the local disk of job %s: %s", held.label.job, error)

    async def _tell(self, held: Held, op: str, **more: Any) -> dict[str, Any]:
        args = {"disk": held.disk, "record": held.copy.encode(), **more}
        return await self._workers.of(held.label.job).call(op, args)

    def _folder(self, job: str) -> str:
        return f"file://{self.root}/{xxhash.xxh3_64_hexdigest(job.encode())}"

    def _of(self, job: str) -> JobDisk:
        return self.jobs.setdefault(job, JobDisk())

    def _degraded(self, why: str) -> None:
        if self.problem != why:
            log(logger, logging.WARNING, Event.STORE_DEGRADED, "%s; snapshots go to the durable store directly", why)
        self.problem = why
        self._local.metrics.local_refused.inc()

    def measure(self) -> None:
        """Set the metrics; ages grow by themselves."""
        copies = [held for disk in self.jobs.values() for held in disk.copies.values()]
        waiting = [held for held in copies if held.stage is Stage.PENDING and not held.durable]
        metrics, now = self._local.metrics, time.monotonic()
        metrics.tier_bytes.labels(Tier.LOCAL).set(sum(held.label.nbytes for held in copies))
        newest = {
            (job, Tier.LOCAL): max(held.key for held in disk.copies.values())[1]
            for job, disk in self.jobs.items()
            if disk.copies and job in self._local.jobs
        }
        metrics.hold(newest, (Tier.LOCAL,))
        metrics.drain_backlog.set(sum(held.label.nbytes for held in waiting))
        metrics.drain_age.set(max((now - held.since for held in waiting), default=0.0))


def _locked(folder: Path) -> int:
    """The lock of an agent's folder, taken.

    Raises:
        OSError: another agent has it.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
