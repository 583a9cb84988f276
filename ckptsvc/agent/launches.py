"""The launchers (`ckptsvc run`) on this node: their reports go to the job's coordinator, its orders come back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from ckptsvc.agent.coordination.uplink import Uplink
from ckptsvc.agent.launcher.output import log_file
from ckptsvc.agent.local import Local, way_to
from ckptsvc.agent.logtail import one_line
from ckptsvc.agent.sessions import Session
from ckptsvc.control.restart import JOIN_PATIENCE, launched_as
from ckptsvc.errors import EXIT_STATUS, CkptsvcError, InvalidInput, LimitReached
from ckptsvc.rpc.bounds import check
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

logger = logging.getLogger("ckptsvc.agent")

COORDINATOR_KEY = "ckptsvc-coordinator"
"""Metadata of the Launch call: the address of the job's coordinator; absent or "" for this agent."""


LONELY = 10.0
"""Seconds without a coordinator after which the user is told."""

LOOK_EVERY = 1.0
"""Seconds between looks whether there is one."""

MAX_DETAIL = 300
"""Characters of what a launcher says about the end of a rank."""


@dataclass(slots=True)
class Launcher:
    """One `ckptsvc run`."""

    hello: agent_pb2.LauncherHello
    way: str  # to its coordinator
    bandwidth: float = 0.0  # to the coordinator's node, when this one came; 0: not known
    orders: asyncio.Queue[agent_pb2.LaunchResponse] = field(default_factory=asyncio.Queue)
    ready: agent_pb2.LauncherReady | None = None
    leaving: str = "its launcher is gone"
    since: float = field(default_factory=time.monotonic)
    exits: dict[int, pb.Report] = field(default_factory=dict)  # by rank of the attempt that runs here
    heard_at: float = field(default_factory=time.monotonic)  # when there last was a coordinator
    warned: bool = False  # that there is none
    told: bool = False  # a coordinator may have heard of it
    stop: pb.Report | None = None  # asked for in the attempt that runs here; maybe while there was no coordinator


class Launches:
    """All launchers connected to this agent."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._by_job: dict[str, Launcher] = {}
        self.stopping = False  # this agent ends, and another may follow
        local.launchers, local.stops = self.resync, self.stops
        local.launched = self._by_job.__contains__

    @property
    def idle(self) -> bool:
        """No launcher is connected."""
        return not self._by_job

    def ways(self) -> dict[str, str]:
        """The jobs that are launched here, and the way to the coordinator of each."""
        return {job: launcher.way for job, launcher in self._by_job.items()}

    def log_of(self, session: Session) -> Path | None:
        """The file with a rank's output, if its launcher keeps it."""
        launcher = self._by_job.get(launched_as(session.reg.job))
        if launcher is None or not launcher.hello.log_dir:
            return None
        return log_file(Path(launcher.hello.log_dir), session.reg.attempt, session.reg.rank)

    async def serve(
        self, requests: AsyncIterator[agent_pb2.LaunchRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[agent_pb2.LaunchResponse]:
        """One Launch call, from hello to the end of the job."""
        hello = (await anext(aiter(requests))).hello
        check(hello)
        if hello.log_dir and not hello.log_dir.startswith("/"):
            raise InvalidInput("the directory for the ranks' output must be an absolute path")
        if hello.job in self._by_job:
            raise InvalidInput(f"job {hello.job} is already launched on this node")
        if len(self._by_job) >= self._local.most_jobs:
            raise LimitReached(f"{len(self._by_job)} jobs are launched on this node already")
        if not hello.attempt and not hello.again:
            self._local.standing.check_open()
        metadata = dict(context.invocation_metadata() or ())
        launcher = Launcher(hello, way_to(str(metadata.get(COORDINATOR_KEY, "")), hello.job), told=hello.again)
        uplink = self._local.uplink(launcher.way)
        if hello.check_network and not hello.attempt:
            launcher.bandwidth = await uplink.measure()
            uplink = self._local.uplink(launcher.way)  # made anew if nothing has needed it meanwhile
            if hello.job in self._by_job:
                raise InvalidInput(f"job {hello.job} is already launched on this node")
        self._by_job[hello.job] = launcher
        self._introduce(launcher, uplink)
        reading = asyncio.ensure_future(self._read(requests, launcher))
        getting = asyncio.ensure_future(launcher.orders.get())
        try:
            while True:
                await asyncio.wait((reading, getting), timeout=LOOK_EVERY, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    response = getting.result()
                    getting = asyncio.ensure_future(launcher.orders.get())
                elif reading.done():
                    if isinstance(error := reading.exception(), CkptsvcError):
                        raise error
                    return  # the launcher has nothing more to say: it leaves
                elif (missing := self._missing(launcher, uplink.is_connected)) is not None:
                    response = missing
                else:
                    continue
                yield response
                if response.WhichOneof("order") == "end":
                    return
        finally:
            reading.cancel()
            getting.cancel()
            if self._by_job.get(hello.job) is launcher:
                del self._by_job[hello.job]
            if not self.stopping:  # else the launcher goes on, and finds the next agent
                left = pb.NodeLeft(job=hello.job, node=self._local.name, detail=launcher.leaving)
                uplink.report(pb.Report(node_left=left))

    def _introduce(self, launcher: Launcher, uplink: Uplink) -> None:
        for report in self._reports_of(launcher):
            uplink.report(report)
        launcher.told = launcher.told or uplink.is_connected

    def _missing(self, launcher: Launcher, connected: bool) -> agent_pb2.LaunchResponse | None:
        """What a launcher is told because there is no coordinator; one that runs nothing does not wait for ever."""
        if connected:
            launcher.heard_at, launcher.warned = time.monotonic(), False
            return None
        alone = time.monotonic() - launcher.heard_at
        where = f"no coordinator answers at {launcher.way.partition('#')[0]}"
        if alone > JOIN_PATIENCE and not launcher.hello.attempt:
            end = agent_pb2.JobEnd(status=EXIT_STATUS["agent-unavailable"], reason=f"{where} for {alone:.0f} s")
            return agent_pb2.LaunchResponse(end=end)
        if alone <= LONELY or launcher.warned:
            return None
        launcher.warned = True
        waits = "the ranks go on" if launcher.hello.attempt else f"waiting {JOIN_PATIENCE:.0f} s for it"
        return agent_pb2.LaunchResponse(notice=agent_pb2.Notice(text=f"{where}; {waits}"))

    async def _read(self, requests: AsyncIterator[agent_pb2.LaunchRequest], launcher: Launcher) -> None:
        job, node = launcher.hello.job, self._local.name
        uplink = self._local.uplink(launcher.way)
        async for request in requests:
            check(request)
            kind = request.WhichOneof("report")
            if kind == "ready":
                launcher.ready = request.ready
                launcher.hello.attempt = 0  # no rank runs here now
                launcher.exits.clear()
                uplink.report(self._ready(launcher))
            elif kind == "exit":
                event = request.exit
                if not 0 <= event.rank - launcher.hello.first_rank < launcher.hello.nproc:
                    continue  # none of its own
                exited = pb.RankExited(
                    job=job, node=node, attempt=event.attempt, rank=event.rank, status=event.status,
                    detail=one_line(event.detail)[:MAX_DETAIL],
                )  # fmt: skip
                report = launcher.exits[event.rank] = pb.Report(rank_exited=exited)
                uplink.report(report)
            elif kind == "leaving":
                launcher.leaving = one_line(request.leaving.reason)[:MAX_DETAIL]
            elif kind == "stop_wanted":
                wanted = pb.StopRequested(job=job, reason=one_line(request.stop_wanted.reason)[:MAX_DETAIL])
                launcher.stop = pb.Report(stop_requested=wanted)
                uplink.report(launcher.stop)

    def order(self, order: pb.Order) -> None:
        """An order of the coordinator for a launcher."""
        launcher = self._by_job.get(order.job)
        if launcher is None:
            return
        kind = order.WhichOneof("effect")
        if kind == "start":
            if order.start.attempt == launcher.hello.attempt:
                return  # repeated by a coordinator that was not sure
            known = max(launcher.hello.attempt, launcher.ready.attempt if launcher.ready else 0)
            if order.start.attempt <= known:
                logger.warning("job %s: refused to start attempt %d; attempt %d has been here",
                    order.job, order.start.attempt, known)  # fmt: skip
                self._local.metrics.orders_refused.inc()
                return
            launcher.ready = launcher.stop = None
            launcher.exits.clear()
            launcher.hello.attempt = order.start.attempt
            launcher.hello.first_rank = order.start.first_rank
            launcher.hello.world_size = order.start.world_size
            launcher.orders.put_nowait(agent_pb2.LaunchResponse(start=order.start))
        elif kind == "stop":
            launcher.orders.put_nowait(agent_pb2.LaunchResponse(stop=order.stop))
        elif kind == "end":
            self._local.standing.forget(order.job)
            launcher.orders.put_nowait(agent_pb2.LaunchResponse(end=order.end))

    def resync(self, way: str) -> Iterator[pb.Report]:
        """What a coordinator that connects anew must hear of the launchers."""
        for launcher in self._by_job.values():
            if launcher.way == way:
                yield from self._reports_of(launcher)
                launcher.told = True

    def stops(self, way: str) -> Iterator[pb.Report]:
        """The requests to stop that such a coordinator must hear of, once it knows the ranks."""
        for launcher in self._by_job.values():
            if launcher.way == way and launcher.stop is not None:
                yield launcher.stop

    def _reports_of(self, launcher: Launcher) -> Iterator[pb.Report]:
        hello = launcher.hello
        joined = pb.NodeJoined(
            job=hello.job,
            node=self._local.name,
            node_rank=hello.node_rank,
            min_nodes=hello.min_nodes,
            max_nodes=hello.max_nodes,
            nproc=hello.nproc,
            max_restarts=hello.max_restarts,
            address=hello.address,
            attempt=hello.attempt,
            first_rank=hello.first_rank,
            doorbell=hello.doorbell,
            world_size=hello.world_size,
            unfit=hello.unfit,
            clock=time.time(),
            crash_loop=hello.crash_loop,
            grow=hello.grow,
            bandwidth=launcher.bandwidth,
            uptime=hello.uptime + time.monotonic() - launcher.since,
            again=launcher.told,
        )
        yield pb.Report(node_joined=joined)
        if launcher.ready is not None:
            yield self._ready(launcher)
        yield from launcher.exits.values()

    def _ready(self, launcher: Launcher) -> pb.Report:
        assert launcher.ready is not None
        ready = pb.NodeReady(
            job=launcher.hello.job,
            node=self._local.name,
            attempt=launcher.ready.attempt,
            port=launcher.ready.port,
        )
        return pb.Report(node_ready=ready)
