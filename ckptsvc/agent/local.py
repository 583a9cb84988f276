"""The state that the parts of an agent share: sessions, jobs, arenas, and the ways to the coordinators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from ckptsvc.agent import reports
from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.coordination.uplink import LocalUplink, RemoteUplink, Uplink
from ckptsvc.agent.orders.standing import StandingOrders
from ckptsvc.agent.sessions import LocalJob, Session
from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import AgentUnavailable, ConfigError
from ckptsvc.pipeline.arena import ArenaPool, Label, State
from ckptsvc.rpc.etcd import parse_url
from ckptsvc.rpc.trust import Trust
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import ArenaState, Metrics, Tier
from ckptsvc.telemetry.traces import Traces

_ARENA_STATES = {
    State.FREE: ArenaState.FREE,
    State.FILLING: ArenaState.STAGING,
    State.STAGED: ArenaState.WRITING,
    State.KEPT: ArenaState.KEPT,
}


MOST_JOBS, MOST_RANKS = 1024, 16384
"""What one agent takes in at a time, where nobody sets less."""

UNUSED_FOR = 30.0
"""Seconds after which a way that nothing needs is closed: what was said last has arrived by then."""

ELECTED = "etcd://"
"""What stands for a coordinator's address where it is elected: the URL begins like this."""


class Local:
    """One agent's state. Owned by its event loop: nothing here is thread-safe, nothing blocks.

    Attributes:
        on_order: what to do with a coordinator's order.
        launchers: reports about the launchers of a coordinator's jobs.
        stops: requests to stop such jobs.
        stalled: reports about the stalled ranks of a coordinator's jobs.
        on_disk: reports about the copies on the local disk of a coordinator's jobs.
        launched: whether a launcher of that job is connected.
        elect: makes the way to an elected coordinator.
        leading: the elected coordinators in this process.
        last_active: when there was last something to do (CLOCK_MONOTONIC).
        address: where other agents reach this one.
        domain: this node's failure domain.
        most_jobs, most_ranks: that this agent takes in at a time.
        traces: where spans go.
        standing: orders of people that outlive this agent.
    """

    def __init__(self, name: str, pool: ArenaPool, metrics: Metrics, shell: CoordinatorShell, trust: Trust) -> None:
        self.name, self.pool, self.metrics = name, pool, metrics
        self.sessions: dict[str, Session] = {}
        self.jobs: dict[str, LocalJob] = {}
        self.on_order: Callable[[pb.Order], None] = lambda order: None
        self.launchers: Callable[[str], Iterator[pb.Report]] = lambda coordinator: iter(())
        self.stops: Callable[[str], Iterator[pb.Report]] = lambda coordinator: iter(())
        self.stalled: Callable[[str], Iterator[pb.Report]] = lambda coordinator: iter(())
        self.on_disk: Callable[[str], Iterator[pb.Report]] = lambda coordinator: iter(())
        self.launched: Callable[[str], bool] = lambda job: False
        self.elect: Callable[[str], Uplink] = _elects_none
        self.leading: Callable[[], Sequence[CoordinatorShell]] = list
        self.last_active = time.monotonic()
        self.address = self.domain = ""
        self.most_jobs, self.most_ranks = MOST_JOBS, MOST_RANKS
        self.traces = Traces()
        self.standing = StandingOrders()
        self._shell, self._trust = shell, trust
        self._uplinks: dict[str, Uplink] = {}
        self._unused: dict[str, float] = {}  # way -> since when (CLOCK_MONOTONIC)
        self._tasks: set[asyncio.Task[object]] = set()

    def session(self, token: str) -> Session:
        """The session of a token; AgentUnavailable where there is none: register again."""
        session = self.sessions.get(token)
        if session is None:
            raise AgentUnavailable("this agent does not know the session", hint="it was restarted: register again")
        return session

    def job(self, name: str, coordinator: str, store: str) -> LocalJob:
        """The job of that name, known from now on.

        What an earlier agent has left of a job names its coordinator of then: the ranks that come know better.
        """
        way = way_to(coordinator, name)
        uplink = self.uplink(way)
        job = self.jobs.get(name)
        if job is None:
            job = self.jobs[name] = LocalJob(name, way, store)
        elif job.coordinator != way and not any(s.reg.job == name for s in self.sessions.values()):
            job.coordinator = way
            for report in self.resync(way):
                uplink.report(report)
        job.store = store
        return job

    def uplink(self, way: str) -> Uplink:
        """The way to a coordinator (see `way_to`); "" is the one in this process."""
        if way not in self._uplinks:
            if way.startswith(ELECTED):
                self._uplinks[way] = self.elect(way)
            elif way:
                self._uplinks[way] = self.dial(self.hello(), way, self._obey, way)
            else:
                self._uplinks[way] = LocalUplink(self.hello(), self._shell, self._obey)
        return self._uplinks[way]

    def hello(self, job: str = "", term: int = 0) -> pb.AgentHello:
        """What this agent says of itself to a coordinator; job and term are of an elected one."""
        vacating = bool(self.standing.vacated)
        return pb.AgentHello(
            node=self.name, job=job, term=term, address=self.address, domain=self.domain, vacating=vacating
        )

    def dial(self, hello: pb.AgentHello, address: str, on_order: Callable[[pb.Order], None], way: str) -> RemoteUplink:
        """Connect to the coordinator at an address, for the jobs of that way."""
        uplink = RemoteUplink(hello, address, on_order, lambda: self.resync(way), self._trust)
        uplink.on_refused = self.metrics.orders_refused.inc
        return uplink

    def hang_up(self, way: str) -> None:
        """Close a way that nothing needs any more; it is made again when something does."""
        uplink = self._uplinks.pop(way, None)
        if uplink is not None:
            self.spawn(uplink.close())

    def hang_up_unused(self, now: float) -> None:
        """Close ways that nothing has needed for a while; one to an elected coordinator sees to that itself."""
        needed = {"", *(job.coordinator for job in self.jobs.values())}
        dialled = [way for way in self._uplinks if way not in needed and not way.startswith(ELECTED)]
        self._unused = {way: self._unused.get(way, now) for way in dialled if not self.concerns(way)}
        if self.standing.vacated:
            return  # that it takes jobs again comes that way
        for way in [way for way, since in self._unused.items() if now - since > UNUSED_FOR]:
            del self._unused[way]
            self.hang_up(way)

    def concerns(self, way: str) -> bool:
        """Whether there is anything on this node that needs that way."""
        return any(job.coordinator == way for job in self.jobs.values()) or any(True for _ in self.launchers(way))

    def cores(self) -> list[Coordinator]:
        """The coordinators in this process."""
        return [shell.core for shell in (self._shell, *self.leading())]

    def own_cores(self) -> list[Coordinator]:
        """That of them that was not elected."""
        return [self._shell.core]

    def saving(self, job: str) -> bool:
        """Whether a coordinator in this process has saves of the job in progress: it needs the job's worker."""
        return any(job in core.jobs and core.jobs[job].saves.open for core in self.cores())

    def coordinates(self, job: str) -> bool:
        """Whether a coordinator in this process knows the job."""
        return any(job in core.jobs for core in self.cores())

    def report(self, job: LocalJob, report: pb.Report) -> None:
        """Tell the job's coordinator."""
        self.uplink(job.coordinator).report(report)

    def dropped(self, job: LocalJob, label: Label | None) -> None:
        """Tell that a snapshot has left memory."""
        if label is not None:
            self.report(job, reports.dropped(self.name, label))

    def resync(self, coordinator: str) -> Iterator[pb.Report]:
        """Everything a coordinator that knows nothing must hear of this node."""
        yield from self.launchers(coordinator)
        for job in self.jobs.values():
            if job.coordinator == coordinator:
                yield from self.standing.report(job.name)
        for session in self.sessions.values():
            reg = session.reg
            job, attempt = self.jobs[reg.job], self.jobs[reg.job].attempt(reg.attempt)
            # A rank that was refused must not come in before those it was refused for.
            if job.coordinator == coordinator and not attempt.refused:
                yield reports.joined(self.name, reg, attempt.epoch)
                if attempt.rewinds and not attempt.epoch:
                    yield reports.rewound(reg, attempt.rewinds)
                if session.announced:
                    yield reports.announced(session)
        for arena in self.pool.arenas.values():
            holder = self.jobs.get(arena.job)
            if arena.label is not None and holder is not None and holder.coordinator == coordinator:
                yield reports.staged(self.name, arena.label, ended=arena.state is State.KEPT, again=True)
        yield from self.on_disk(coordinator)
        for job in self.jobs.values():
            if job.coordinator == coordinator:
                yield from job.results.values()
                yield from job.skips.values()
        yield from self.stalled(coordinator)
        yield from self.stops(coordinator)

    def arena_changed(self, job: str, rank: int) -> None:
        """Wake the rank that waits for an arena, and count again."""
        for session in self.sessions.values():
            if (session.reg.job, session.reg.rank) == (job, rank):
                session.arena_changed.set()
                session.arena_changed = asyncio.Event()
        held = dict.fromkeys(State, 0)
        for arena in self.pool.arenas.values():
            held[arena.state] += arena.capacity
        for state, nbytes in held.items():
            self.metrics.arena_bytes.labels(_ARENA_STATES[state]).set(nbytes)
        tiers = dict.fromkeys((Tier.MEMORY, Tier.COPY, Tier.PARITY), 0)
        newest: dict[tuple[str, Tier], tuple[int, int]] = {}
        for label in (arena.label for arena in self.pool.arenas.values() if arena.label is not None):
            tier = Tier.PARITY if label.parity else Tier.COPY if label.guest else Tier.MEMORY
            tiers[tier] += label.nbytes
            key = label.job, tier
            newest[key] = max(newest.get(key, (0, -1)), (label.epoch, label.step))
        for tier, nbytes in tiers.items():
            self.metrics.tier_bytes.labels(tier).set(nbytes)
        self.metrics.hold({key: step for key, (_, step) in newest.items()}, tuple(tiers))

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run something beside; it ends with the agent."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop what runs beside, and hang up."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for uplink in list(self._uplinks.values()):
            await uplink.close()

    def _obey(self, order: pb.Order) -> None:
        self.on_order(order)


def way_to(coordinator: str, job: str) -> str:
    """The way to a job's coordinator: its address, or where and for which job it is elected.

    Raises:
        ConfigError: not a URL of etcd.
    """
    return f"{parse_url(coordinator)}#{launched_as(job)}" if coordinator.startswith(ELECTED) else coordinator


def _elects_none(way: str) -> Uplink:
    where = way.partition("#")[0]
    raise ConfigError(f"the job elects its coordinator at {where}, this agent knows no etcd",
        hint="start it with --coordination, or set agent.coordination")  # fmt: skip


async def wait_for(event: asyncio.Event, timeout: float) -> None:
    """Wait for an event, but not longer than so many seconds."""
    try:
        await asyncio.wait_for(event.wait(), max(timeout, 0.001))
    except TimeoutError:
        return
