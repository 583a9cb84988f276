"""The coordinator's shell: feeds reports to the pure core and executes what it decides."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptsvc import telemetry
from ckptsvc.agent.coordination.books import Books
from ckptsvc.agent.coordination.drain import drain
from ckptsvc.agent.coordination.tracing import Tracing
from ckptsvc.agent.launcher.doorbell import ring
from ckptsvc.agent.worker.proxy import WorkerProxy
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import (
    AllotEpoch,
    Answer,
    Audit,
    Commit,
    CommitDone,
    Decision,
    Drain,
    Effect,
    EpochDone,
    KeepNodes,
    Lookup,
    LookupDone,
    NodesKept,
    NodesRead,
    Probe,
    Probed,
    ReadNodes,
    Record,
    Restarted,
    Resumed,
    Send,
)
from ckptsvc.control.health import Policy
from ckptsvc.control.nodes import Node
from ckptsvc.control.redundancy import PartnerPolicy
from ckptsvc.control.tiering import Draining
from ckptsvc.errors import BY_CODE, AgentUnavailable, CkptsvcError, StoreError
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.storage import canonical
from ckptsvc.telemetry import Event, IncidentKind, Metrics
from ckptsvc.telemetry.traces import Traces

log = logging.getLogger("ckptsvc.coordinator")

TICK = 0.2
"""Seconds between the core's ticks."""

KEPT_INCIDENTS = 256
"""Incidents kept in memory, of all jobs together."""

RINGS = 1024
"""Launchers that are looked after at the same time: when ten thousand agents are lost at once, descriptors are not."""

RING_RATE = 1000.0
"""Further ones in a second, a fifth of a core: those ten thousand want to come back meanwhile."""

INTRODUCTIONS = 16
"""Launchers at a time that are rung at for the first time, to see whether they can be: that may wait."""

NO_DESCRIPTORS = 0.3
"""Seconds after which to try again."""

LIST_TIMEOUT = 10.0
"""Seconds to read or write the list of nodes that have failed; it may be on a file system that hangs."""

MAX_SKEW = 30.0
"""Seconds by which a node's clock may differ unsaid: certificates, and what people make of two logs, need no better."""

Deliver = Callable[[pb.Order | None], None]
"""Takes an order to an agent; None when there will be no more."""


class CoordinatorShell:
    """Runs in every agent, idle where no agent attends; and once for each job that has elected this agent.

    Args:
        workers: the I/O workers.
        save_timeout: seconds after which a save that has not committed is given up.
        policy: what is done about ranks that hang.
        state: directory of the list of nodes that have failed; None: it is not kept.
        term: of an elected coordinator, 0 of any other; every order carries it.
        may_act: whether it may still decide; asked before every effect.
        drains: ask the scheduler to drain nodes that have failed too often.
        draining: which snapshots go on from the local disks to the durable store.
        metrics: where incidents and restarts are counted; None: nowhere.
        partners: what nodes keep for each other.
        traces: where spans go; None: nowhere.
        node: the one that this is on, if no other coordinator can be elected.

    Attributes:
        incidents: the latest, by job and id, oldest first.
        on_incident: called with every incident, and again whenever there is more to say of it.
        on_audit: called with what has become of an order of a person.
        on_deleted: called with a job, its store, and the names of checkpoints that retention has deleted.
        dropped: effects that came too late.
    """

    def __init__(
        self,
        workers: Workers,
        save_timeout: float,
        policy: Policy,
        state: Path | None = None,
        *,
        term: int = 0,
        may_act: Callable[[], bool] = lambda: True,
        drains: bool = False,
        draining: Draining | None = None,
        metrics: Metrics | None = None,
        partners: PartnerPolicy | None = None,
        traces: Traces | None = None,
        node: str = "",
    ) -> None:
        self.core = Coordinator(
            save_timeout=save_timeout, policy=policy, mark=secrets.token_hex(2), draining=draining or Draining(),
            partners=partners or PartnerPolicy(), node=node,
        )  # fmt: skip
        self.incidents: OrderedDict[tuple[str, str], pb.Incident] = OrderedDict()
        self.on_incident: Callable[[pb.Incident], None] = lambda incident: None
        self.on_audit: Callable[[Audit], None] = lambda effect: None
        self.on_deleted: Callable[[str, str, list[str]], None] = lambda job, store, names: None
        self.term, self.dropped = term, 0
        self._state = state
        self._listing, self._ringing = asyncio.Lock(), asyncio.Semaphore(RINGS)
        self._introducing, self._next_ring = asyncio.Semaphore(INTRODUCTIONS), 0.0
        self._workers, self._may_act = workers, may_act
        self._drains, self._metrics = drains, metrics
        self._tracing = Tracing(traces or Traces())
        self._books = Books(metrics) if metrics is not None else None
        self._peers: dict[str, Deliver] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[tuple[str, int, int], str] = {}
        self._ticked, self._stopped = asyncio.Event(), False
        self._noted: list[str] = []

    def attend(self, node: str, deliver: Deliver) -> None:
        """An agent has connected; it will report all it holds."""
        if node in self._peers:  # its earlier connection is broken, and this is the first sign of it
            self._execute(self.core.agent_lost(node, time.monotonic()))
        self._peers[node] = deliver

    def depart(self, node: str, deliver: Deliver) -> None:
        """An agent's connection has ended (unless it has connected again meanwhile)."""
        if self._peers.get(node) is deliver:
            del self._peers[node]
            self._execute(self.core.agent_lost(node, time.monotonic()))

    def report(self, node: str, report: pb.Report) -> None:
        """Something happened on a node."""
        if report.HasField("node_joined"):
            _warn_of_clock(report.node_joined, time.time())
        decision = self.core.handle(node, report, time.monotonic())
        # only what is said aloud needs the job's name, and a coordinator hears many reports
        job = getattr(getattr(report, report.WhichOneof("event") or "", None), "job", "") if decision.reasons else ""
        self._execute(decision, job)

    async def list_complete(self, job: str) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of a job in memory, newest first, once what is lost has been rebuilt.

        Raises:
            AgentUnavailable: this is no coordinator any more; another one will know.
        """
        while True:
            if self._stopped:
                raise AgentUnavailable(f"job {job} is not coordinated here any more")
            self._execute(self.core.recover(job, time.monotonic()))  # again, if what it was made of is lost meanwhile
            if not self.core.redundancy.is_rebuilding(job):
                break
            await self._ticked.wait()
        notes = self.core.lost(job)
        for note in notes:
            if note not in self._noted:  # every rank asks
                log.warning("job %s: %s", job, note)
        self._noted = notes
        epoch, step = self.core.committed(job)
        return agent_pb2.ListSnapshotsResponse(
            snapshots=self.core.snapshots(job), notes=notes, committed_epoch=epoch, committed_step=step
        )

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK)
            self._execute(self.core.tick(time.monotonic()))
            if self._books is not None:
                self._books.publish(self.core.ledger)
            ticked, self._ticked = self._ticked, asyncio.Event()
            ticked.set()

    async def stop(self) -> None:
        """Cancel what is running; whoever waits for a rebuild hears that it is over here."""
        self._stopped = True
        if self._books is not None:
            self._books.close()
        self._ticked.set()
        for deliver in self._peers.values():
            deliver(None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _execute(self, decision: Decision, job: str = "") -> None:
        for reason in decision.reasons:
            about = job if job in self.core.jobs or job in self.core.launched else ""
            log.info(reason, extra={"event": "decision", "job": about or None})
        for effect in decision.effects:
            if not self._may_act():
                self._drop(effect)
            elif isinstance(effect, Send):
                effect.order.term = self.term
                if self._tracing.is_on and effect.order.HasField("save_ended"):
                    self._tracing.ended(effect.order.job, effect.order.save_ended.outcome, time.monotonic())
                deliver = self._peers.get(effect.node)
                if deliver:  # an agent that is away reports everything when it is back, and hears it then
                    deliver(effect.order)
            elif isinstance(effect, Record):
                self._record(effect.incident)
            elif isinstance(effect, Audit):
                self.on_audit(effect)
            elif isinstance(effect, Restarted):
                if self._metrics is not None:
                    self._metrics.restarts.labels(effect.cause).inc()
            elif isinstance(effect, Resumed):
                self._resumed(effect)
            else:
                task = asyncio.ensure_future(self._do(effect))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _record(self, incident: pb.Incident) -> None:
        key = (incident.job, incident.id)
        known = self.incidents.get(key)
        incident.opened = known.opened if known else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if known is None and self._metrics is not None:
            self._metrics.incidents.labels(IncidentKind(incident.kind)).inc()
        self.incidents[key] = incident
        while len(self.incidents) > KEPT_INCIDENTS:
            self.incidents.popitem(last=False)
        self.on_incident(incident)

    def _resumed(self, effect: Resumed) -> None:
        if self._books is not None:
            self._books.resumed(effect)
        self._tracing.resumed(effect)
        telemetry.log(log, logging.INFO, Event.JOB_RESUMED, "steps again, %.1f s after the fault",
            effect.times[-1] - effect.times[0], job=effect.job, attempt=effect.attempt, reason=effect.why)  # fmt: skip

    async def _do(self, effect: AllotEpoch | Commit | Lookup | Probe | ReadNodes | KeepNodes | Drain) -> None:
        if not self._may_act():
            self._drop(effect)
        elif isinstance(effect, AllotEpoch):
            done = await self._allot(effect)
            self._execute(self.core.epoch_done(done, time.monotonic()), effect.job)
        elif isinstance(effect, Commit):
            began, told = time.monotonic(), dict[str, Any]()
            ended = await self._commit(effect, told)
            self._tracing.committed(effect, ended, began, told, time.monotonic())
            self._execute(self.core.commit_done(ended, time.monotonic()), effect.job)
            self._count(effect, ended)
            if not ended.code and self._may_act():
                await self._expire(effect)
        elif isinstance(effect, Probe):
            answer = await self._ring(effect)
            if answer is not None:
                self._execute(self.core.probed(Probed(effect.job, effect.node, answer), time.monotonic()))
        elif isinstance(effect, ReadNodes):
            self._execute(self.core.nodes_read(await self._read_nodes(), time.monotonic()))
        elif isinstance(effect, KeepNodes):
            at = time.time()
            entries = {n: {"score": s, "at": at - age, "why": why} for n, (s, age, why) in effect.strikes.items()}
            words = {
                n: {"excluded": bad, "at": at - age, "until": at + left if left < math.inf else 0.0, "why": why}
                for n, (bad, age, left, why) in effect.words.items()
            }
            _, problem = await self._list_nodes("keep_nodes", nodes=entries, words=words)
            self._execute(self.core.nodes_kept(NodesKept(effect.said, problem), time.monotonic()))
        elif isinstance(effect, Drain):
            await drain(effect.node, effect.reason, enabled=self._drains)
        else:
            found = await self._lookup(effect)
            if found:
                self._execute(self.core.lookup_done(found, time.monotonic()), effect.job)

    async def _ring(self, effect: Probe) -> Answer | None:
        """Look after a launcher, in its turn where many are to be; None if nobody wants to know any more."""
        node = self._node(effect)
        if node is None:
            return None
        async with self._ringing if node.away_since is not None else self._introducing:
            node = self._node(effect)
            if node is None or (node.away_since is None and node.rung):
                return None  # it has come back
            if node.away_since is not None:
                now = time.monotonic()
                self._next_ring = max(self._next_ring, now - RINGS / RING_RATE) + 1 / RING_RATE
                await asyncio.sleep(max(self._next_ring - now, 0.0))
            while True:
                try:
                    return await ring(effect.address, effect.port)
                except OSError:  # no descriptors
                    await asyncio.sleep(NO_DESCRIPTORS)

    def _node(self, effect: Probe) -> Node | None:
        attempts = self.core.launched.get(effect.job)
        return attempts.nodes.get(effect.node) if attempts else None

    def _drop(self, effect: Effect) -> None:
        self.dropped += 1
        log.warning("term %d: not done, the lease may have ended: %s", self.term, type(effect).__name__)

    async def _read_nodes(self) -> NodesRead:
        at, (found, _) = time.time(), await self._list_nodes("read_nodes")
        strikes = {n: (e["score"], max(at - e["at"], 0.0), e["why"]) for n, e in found.get("nodes", {}).items()}
        words = {
            n: (w["excluded"], max(at - w["at"], 0.0), w["until"] - at if w["until"] else math.inf, w["why"])
            for n, w in found.get("words", {}).items()
        }
        return NodesRead(strikes, words)

    async def _list_nodes(self, op: str, **args: Any) -> tuple[dict[str, Any], str]:
        """Read or write the list of nodes that have failed, in a process of its own; {} and why where that fails."""
        if self._state is None:
            return {}, "there is no place for it (launch.state)"
        async with self._listing:
            worker = WorkerProxy("nodes")
            try:
                call = worker.call(op, {"directory": str(self._state), **args})
                return await asyncio.wait_for(call, LIST_TIMEOUT), ""
            except (CkptsvcError, TimeoutError) as error:
                why = f"no answer in {LIST_TIMEOUT:g} s" if isinstance(error, TimeoutError) else error
                log.warning("the list of nodes that have failed: %s", why)
                return {}, str(why)
            finally:
                await worker.close()

    async def _allot(self, effect: AllotEpoch) -> EpochDone:
        args = {"store": effect.store, "job": effect.job, "attempt": effect.attempt}
        try:
            answer = await self._workers.of(effect.job).call("epoch", args)
        except CkptsvcError as error:
            return EpochDone(effect.job, effect.attempt, effect.rewinds, 0, error.code, str(error))
        return EpochDone(effect.job, effect.attempt, effect.rewinds, answer["epoch"])

    async def _commit(self, effect: Commit, told: dict[str, Any]) -> CommitDone:
        key = (effect.job, effect.epoch, effect.step)
        if len({s.extent for s in effect.shards}) > 1:
            why = "the ranks use different values of save.extent"
            return CommitDone(effect.job, effect.epoch, effect.step, "config", why)
        info = {
            "step": effect.step,
            "epoch": effect.epoch,
            "attempt": effect.attempt,
            "job": effect.job,
            "world_size": effect.world_size,
            "extent": effect.shards[0].extent,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "aliases": effect.aliases,
        }
        shards = [
            {name: getattr(s, name) for name in ("name", "rank", "nbytes", "digests", "columns", "segments")}
            for s in effect.shards
        ]
        # The same writer for every try of this commit, so that a record whose answer was lost is known as ours.
        writer = self._writers.setdefault(key, secrets.token_hex(8))
        args = {"store": effect.store, "info": info, "shards": shards, "writer": writer}
        args["metrics"] = dict(effect.metrics)
        try:
            told |= await self._workers.of(effect.job).call("commit", args)
        except CkptsvcError as error:
            return CommitDone(effect.job, effect.epoch, effect.step, error.code, str(error))
        except Exception as error:  # an unforeseen one must not keep the save waiting for its timeout
            log.exception("step %d: the commit failed", effect.step)
            return CommitDone(effect.job, effect.epoch, effect.step, "internal", f"{type(error).__name__}: {error}")
        finally:
            self._writers.pop(key, None)
        return CommitDone(effect.job, effect.epoch, effect.step)

    def _count(self, effect: Commit, ended: CommitDone) -> None:
        """Of a commit, how long its save took, or what the store said."""
        job = self.core.jobs.get(effect.job)
        if self._metrics is None or job is None:
            return
        outcome = job.saves.ended.get((effect.epoch, effect.step))
        if not ended.code and outcome is not None:
            self._metrics.commit_latency.observe(outcome.seconds)
        elif issubclass(BY_CODE.get(ended.code, CkptsvcError), StoreError):
            self._metrics.store_errors.labels(canonical(effect.store).partition("://")[0], ended.code).inc()

    async def _lookup(self, effect: Lookup) -> LookupDone | None:
        args = {"store": effect.store, "epoch": effect.epoch, "step": effect.step}
        try:
            answer = await self._workers.of(effect.job).call("lookup", args)
        except CkptsvcError as error:
            log.warning("cannot look up step %d: %s", effect.step, error)
            return None
        return LookupDone(effect.job, effect.epoch, effect.step, answer["committed"])

    async def _expire(self, effect: Commit) -> None:
        """Have old checkpoints deleted, beside the saves: nobody waits for it."""
        policy = {f.name: getattr(effect.retention, f.name) for f in effect.retention.DESCRIPTOR.fields}
        args = {"store": effect.store, "policy": policy | {"last": effect.keep}, "epoch": effect.epoch}
        try:
            done = await self._workers.of(effect.job).call("expire", args | {"step": effect.step})
        except CkptsvcError as error:
            log.warning("old checkpoints could not be removed: %s", error)
            return
        self.core.deleted(effect.job, done["gone"])
        if done["gone"]:
            telemetry.log(log, logging.INFO, Event.CHECKPOINT_DELETED, "removed %s: %d objects",
                ", ".join(done["gone"]), done["objects"], job=effect.job)  # fmt: skip
            self.on_deleted(effect.job, effect.store, done["gone"])
            if self._metrics is not None:
                self._metrics.deleted_checkpoints.inc(len(done["gone"]))


def _warn_of_clock(event: pb.NodeJoined, here: float) -> None:
    skew = event.clock - here
    if event.clock and abs(skew) > MAX_SKEW:
        how = "ahead of" if skew > 0 else "behind"
        # Not refused: of two clocks, nobody knows which one is wrong.
        log.warning("the clock of node %s is %.0f s %s the coordinator's", event.node, abs(skew), how)
