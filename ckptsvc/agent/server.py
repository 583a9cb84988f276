"""The agent process: assembles the parts, serves until told to stop, and stops in order.

python -m ckptsvc.agent.server --dir DIR ...      (what `ckptsvc agent` and private agents run)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import hashlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import ckptsvc
from ckptsvc.agent import nodelist
from ckptsvc.agent.coordination.elections import Elections
from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.http.access import http_token
from ckptsvc.agent.http.page import Site
from ckptsvc.agent.identity import IdentityServer
from ckptsvc.agent.launches import Launches
from ckptsvc.agent.local import Local
from ckptsvc.agent.node import OVERDUE, Node
from ckptsvc.agent.orders.audit import audit_log
from ckptsvc.agent.orders.callers import Callers, RoleGate
from ckptsvc.agent.orders.orders import Orders
from ckptsvc.agent.orders.standing import StandingOrders
from ckptsvc.agent.process import handover, own_log, predecessor
from ckptsvc.agent.process.clock import watch_clock
from ckptsvc.agent.process.conditions import ground_of
from ckptsvc.agent.process.lasting import dispensable, until_told
from ckptsvc.agent.process.limits import lacking, raise_open_files
from ckptsvc.agent.process.notify import Notifier
from ckptsvc.agent.process.reload import reload
from ckptsvc.agent.process.repeated import keep_quiet
from ckptsvc.agent.process.tenancy import Tenancy
from ckptsvc.agent.process.trial import obstacle
from ckptsvc.agent.servicer import AgentServicer, CoordinatorServicer, add_agent_service, add_coordinator_service
from ckptsvc.agent.status.document import status_of, summary_of
from ckptsvc.agent.status.recent import Recent
from ckptsvc.agent.tiers.local_tier import LocalTier
from ckptsvc.agent.tiers.lowering import Lowering
from ckptsvc.agent.tiers.partners import Partners
from ckptsvc.agent.watching.nic_watch import NicWatch
from ckptsvc.agent.watching.watch import Watch, limits_of
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.config import agents_directory, load, private_directory
from ckptsvc.control.health import Policy
from ckptsvc.control.redundancy import PartnerPolicy
from ckptsvc.control.tiering import Draining
from ckptsvc.errors import EXIT_STATUS, AgentUnavailable, CkptsvcError
from ckptsvc.launch.domain import domain_of
from ckptsvc.pipeline.arena import ArenaPool
from ckptsvc.quantities import Address, parse_duration
from ckptsvc.rpc.channel import BETWEEN, LOCAL, MAX_CALLS, OPTIONS, SERVER_KEEPALIVE
from ckptsvc.rpc.dial import LOCK, sockets
from ckptsvc.rpc.secret import shared_secret
from ckptsvc.rpc.trust import BySecret, Trust
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2
from ckptsvc.settings import Settings, TierSettings
from ckptsvc.telemetry import Event, Fields, Metrics, log, start_logging
from ckptsvc.telemetry.logs import FORMAT, line
from ckptsvc.telemetry.traces import start_traces

logger = logging.getLogger("ckptsvc.agent")

GRACE = 2.0
"""Seconds that calls in flight get when the agent stops."""

SHORT_GRACE = 0.1
"""The same when a successor waits to take over: calls that wait for something are made again, the others are over."""

LAST_SAVE = 60.0
"""Seconds that the ranks get for a last save when a private agent is told to stop; told again, it stops at once."""


@dataclass(slots=True)
class Options:
    """How to run.

    Attributes:
        directory: holds the sockets, the lock and (by default) the log; belongs to this agent.
        settings: the merged configuration.
        linger: seconds without ranks, launchers and saves after which the agent ends; None: never, it is a service.
        read_again: reads the settings anew.
        service: directory of the system service that has started this agent; None: there is none.
        overrides: the settings that were given on the command line.
    """

    directory: Path
    settings: Settings
    linger: float | None = None
    read_again: Callable[[], Settings] = field(default=partial(load, os.environ))
    service: Path | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)

    @property
    def node(self) -> str:
        """The name of the node."""
        return self.settings.agent.name or socket.gethostname()


class Agent:
    """One agent; `run` is its whole life."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stopping = asyncio.Event()
        self._patient = False  # told to stop, and waiting for the last save
        self._grace = GRACE
        self._makes_way = self._yields = False
        # What a job starts inherits the address of a service manager that knows nothing of it.
        self._notifier = Notifier() if options.linger is not None else Notifier.of(os.environ, os.getpid())
        self._reading = asyncio.Lock()
        settings = options.settings
        self._where = settings.agent
        self.node_name = options.node
        self.metrics = Metrics(ckptsvc.__version__)
        self._ground = ground_of(settings, os.environ, self.metrics.certificate_expiry.set)
        self.traces = start_traces(settings.traces, self.node_name, ckptsvc.__version__)
        self.workers = Workers(settings, self.metrics.retried)
        self._on_incident: Callable[[coordinator_pb2.Incident], None] = lambda incident: None
        self.shell = self._new_shell(0, lambda: True)
        self.elections: Elections | None = None
        arenas = Path(settings.arena.dir)
        # Agents with different directories may share a machine (two "nodes" of a test): their arenas must not meet.
        self._tag = tag = hashlib.sha256(str(options.directory).encode()).hexdigest()[:8]
        self.pool = ArenaPool(arenas / f"ckptsvc-{os.geteuid()}-{tag}", self._ground.arena_bytes)
        self.tier: LocalTier | None = None
        self.lowering: Lowering | None = None
        self.tenancy: Tenancy | None = None
        self.address = ""
        self.metrics_address = self.page_address = ""
        self.recent = Recent()
        self.started = time.time()

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or (with `linger`) nothing is left to do.

        Raises:
            RunBusy: another agent serves this directory.
        """
        raise_open_files()
        keep_quiet()
        directory = self._options.directory
        private_directory(directory)
        self.trust = self._trust()
        lock = await self._lock(directory)
        left = self.pool.open()
        self._build()
        copies = await self.tier.open() if self.tier else []
        self._heed_signals()
        async with contextlib.AsyncExitStack() as stack:
            await self._listen(stack)
            if self._ground.etcd:
                self.elections = Elections(
                    *self._ground.etcd,
                    self._options.settings.etcd.ttl,
                    self.local,
                    self.trust,
                    self.address,
                    self._new_shell,
                )
            if self.tier:
                self.tier.recover(copies)
            self.node.saves.recover(left)
            tasks = [asyncio.ensure_future(c) for c in self._lasting()]
            (directory / "ready.new").write_text(self._ready_text())
            (directory / "ready.new").rename(directory / "ready")
            log(logger, logging.INFO, Event.AGENT_STARTED, "agent of %s serves in %s, listens on %s",
                self.node_name, directory, self.address, node=self.node_name)  # fmt: skip
            self._notifier.ready(summary_of(self))
            failure = await until_told(self._stopping, tasks)
            if not self._makes_way:
                self._notifier.stopping("ends; snapshots in memory wait for the next agent")
            launched = not self.launches.idle
            self.launches.stopping = True
            (directory / "ready").unlink(missing_ok=True)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._close(awaited=launched or self._makes_way or self._yields or failure is not None)
        if failure is not None:
            raise failure
        what = "makes way for its successor" if self._makes_way else "stopped"
        log(logger, logging.INFO, Event.AGENT_STOPPED, "agent of %s %s", self.node_name, what, node=self.node_name)
        if self._makes_way:
            handover.succeed(handover.Handed(lock, self.address, self.metrics_address))
        predecessor.end(lock)
        os.close(lock)

    def _heed_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stopping.set)
        loop.add_signal_handler(signal.SIGTERM, self._terminated)
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)  # some schedulers send it to all of a job's processes
        loop.add_signal_handler(handover.SIGNAL, lambda: self.local.spawn(self._make_way()))
        if not sys.stderr.isatty():  # a terminal that goes takes what runs in its foreground along
            loop.add_signal_handler(signal.SIGHUP, lambda: self.local.spawn(self._read_again()))

    async def _close(self, *, awaited: bool) -> None:
        """Close all parts; `awaited`: somebody counts on the next agent to find what is in memory."""
        idle = self.node.idle and not awaited
        await self.node.stop()
        await self.partners.close()
        await self.shell.stop()
        if self.elections:
            await self.elections.close()
        await self.workers.close()
        self.pool.close(remove=idle, keep_free=awaited or self._options.linger is None)
        if self.tier:
            self.tier.close()

    async def _lock(self, directory: Path) -> int:
        """The lock of the directory: taken, or received from a predecessor."""
        handed = handover.received(os.environ, directory / LOCK)
        if handed is not None:
            self._where = handed.listening(self._where)
        lock = handed.lock if handed else os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        await handover.own(lock, directory, is_service=self._options.linger is None)
        (directory / "ready").unlink(missing_ok=True)  # of an agent that was killed
        if (how := predecessor.begin(lock)) and not handed:
            logger.warning("%s; this one goes on with what is in memory", how)
        return lock

    def _lasting(self) -> Iterator[Coroutine[Any, Any, None]]:
        """What runs from the agent's beginning to its end."""
        yield self.trust.run()
        yield self.shell.run()
        yield self.node.watch()
        yield self.watch.run()
        yield dispensable("network cards are not watched any more", self.nics.run())
        yield self._until_idle()
        yield dispensable("agent.log is not bounded any more", own_log.bound(self._options.directory / own_log.NAME))
        yield dispensable("nobody looks after the clock any more", watch_clock(self.node_name))
        yield self._notifier.beat(partial(summary_of, self))
        if self.tenancy:
            yield self.tenancy.run()

    def _trust(self) -> Trust:
        """What this user's agents know each other by; without certificates, they are all on this host."""
        if self._ground.certificates is not None:
            return self._ground.certificates
        return BySecret(shared_secret(agents_directory(self._options.settings, os.environ)))

    def _new_shell(self, term: int, may_act: Callable[[], bool]) -> CoordinatorShell:
        settings = self._options.settings
        health = settings.health
        policy = Policy(health.automatic, health.confirm, health.give_up)
        listed = nodelist.directory_of(os.environ, settings.launch)
        tiers = settings.tiers
        shell = CoordinatorShell(self.workers, settings.save.timeout, policy, listed, term=term, may_act=may_act,
            drains=settings.scheduler.drain, draining=Draining(tiers.durable_every, tiers.durable_backlog),
            metrics=self.metrics, partners=_partners(tiers), traces=self.traces,
            node="" if term else self.node_name)  # fmt: skip
        shell.on_incident = lambda incident: self._on_incident(incident)
        shell.on_audit = lambda effect: self.orders.decided(effect)
        shell.on_deleted = lambda job, store, names: self.orders.deleted(job, store, names)
        shell.on_own = lambda verb, job, node, why, done: self.orders.own(verb, job, node, why, done=done)
        return shell

    def _shell_of(self, job: str, term: int) -> CoordinatorShell:
        """The coordinator that another agent wants: the one of all jobs, or (with a term) an elected one."""
        if not term:
            return self.shell
        if self.elections is None:
            raise AgentUnavailable("this agent takes no part in elections")
        return self.elections.shell_of(job, term)

    def _build(self) -> None:
        """The parts of the agent, in the order in which they know each other."""
        settings = self._options.settings
        self.local = Local(self.node_name, self.pool, self.metrics, self.shell, self.trust)
        self.local.traces = self.traces
        self.local.standing = StandingOrders(self._options.directory / "orders.json")
        linger = 600.0 if self._options.linger is None else self._options.linger
        if settings.tiers.local:
            self.tier = LocalTier(self.local, self.workers, settings.tiers, self._tag, OVERDUE * settings.save.timeout)
            self.lowering = Lowering(self.local, self.workers, self.tier)
        self.node = Node(
            self.local,
            self.workers,
            slots=settings.arena.slots,
            job_limit=settings.arena.job_limit,
            linger=linger,
            save_timeout=settings.save.timeout,
            margin=settings.scheduler.margin,
            early=(os.cpu_count() or 1) >= settings.save.early_cores,
            tier=self.tier,
        )
        if self._options.service:
            self.tenancy = Tenancy(self._options.service, self.local, self.workers, self._is_idle, self.tier)
        elif self._options.linger is not None:
            self.node.on_yield = self._give_way
        self.local.domain = domain_of(settings.tiers.domain, os.environ, self.node_name)
        twins = self.node.twins if settings.tiers.replicas else None
        self.partners = Partners(self.local, self.trust, settings.tiers.partner_rate, twins=twins)
        self.node.partner_order, self.node.on_filling = self.partners.order, self.partners.filling
        self.launches = Launches(self.local)
        self.nics = NicWatch(self.local, settings.nics)
        self.node.launch_order = self.launches.order
        enabled = settings.health.enabled
        self.watch = Watch(self.local, limits_of(settings.health), enabled=enabled, nics=self.nics.sentences)
        self.watch.log_of = self.launches.log_of
        self.node.watch_order = self.watch.order
        self.callers = Callers(settings.system.operators)
        self.orders = Orders(self.local, self.launches, audit_log(settings, os.environ))
        self.node.people_order = self.orders.on_order
        self.watch.on_kill = lambda job, rank, why: self.orders.own("kill", job, f"rank {rank}", why)
        self.callers.on_stranger = self.orders.stranger
        self.recent.open(settings, os.environ)
        self._on_incident = partial(self.recent.take, self.local.spawn)
        self.local.spawn(self.recent.load())

    def _terminated(self) -> None:
        """Stop; but an agent that a job has started, when its ranks are there, lets them save first.

        The scheduler that ends a job may send SIGTERM to all of its processes at once.
        """
        self._makes_way = False
        if self._options.linger is None or self._patient or not self.local.sessions:
            self._stopping.set()
        self._patient = True
        asyncio.get_running_loop().call_later(LAST_SAVE, self._stopping.set)

    async def _make_way(self) -> None:
        """Have the program, as it is installed now, take over in this process."""
        if self._makes_way:
            return
        self._makes_way = True
        if why := await obstacle(overrides=self._options.overrides):
            logger.error("the agent goes on as before, it cannot be replaced: %s", why)
            self._makes_way = False
            return
        await handover.copies_end(self.pool)
        if not self._makes_way:
            return  # told to end meanwhile
        self._notifier.reloading("makes way for its successor")
        self._grace = SHORT_GRACE
        self._stopping.set()

    async def _read_again(self) -> None:
        async with self._reading:
            self._notifier.reloading("reads the settings again")
            self._options.settings = await reload(self, self._options.read_again, self._options.settings)
            self._notifier.ready(summary_of(self))

    def _give_way(self) -> None:
        """End, for a service that waits to take over."""
        self._yields = True
        self._grace = SHORT_GRACE
        self._stopping.set()

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        settings = self._where
        stack.push_async_callback(asyncio.to_thread, self.traces.close)
        grpc_path, identity_path = sockets(self._options.directory)
        gate_of_roles = RoleGate(self.callers, self.orders.refused)
        local = grpc.aio.server(interceptors=[gate_of_roles], options=LOCAL, maximum_concurrent_rpcs=MAX_CALLS)
        servicer = AgentServicer(self.node, self.launches, lambda: status_of(self), self.callers, self.orders)
        add_agent_service(servicer, local)
        name = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, local)
        for each in (name, ""):
            await checks.set(each, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), local)
        # The other port is open to every user of the host, or of the network: no stranger is told anything there.
        gate = self.trust.gate(self.metrics.calls_refused.inc)
        roles = RoleGate(None, lambda caller, method: self.metrics.calls_refused.inc())
        between = grpc.aio.server(interceptors=[roles, gate], options=[*OPTIONS, *SERVER_KEEPALIVE, *BETWEEN])
        agents = CoordinatorServicer(
            self._shell_of, self.node_name, self.partners.offer, self.metrics.calls_refused.inc
        )
        add_coordinator_service(agents, between)
        port, host = self.trust.open_port(between, settings.listen)
        self.address = self.local.address = str(Address(host, port))
        gate.address = self.trust.spelled(self.address)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(grpc_path)
        local.add_insecure_port(f"unix:{grpc_path}")
        identity = IdentityServer(identity_path, self.node, self.callers)
        if settings.metrics_listen is not None:
            token = http_token(self._options.settings, os.environ)
            site = Site(lambda: status_of(self), self.metrics.registry, self.recent, token, self.trust.certificates)
            self.metrics_address, self.page_address = site.open(settings.metrics_listen)
            stack.push_async_callback(site.close)
            if self.tenancy:
                self.tenancy.page, self.tenancy.on_scrape = self.page_address, site.let_scrape
        await local.start()
        os.chmod(grpc_path, 0o600)
        await between.start()
        await identity.start()
        stack.push_async_callback(lambda: between.stop(self._grace))
        stack.push_async_callback(lambda: local.stop(self._grace))
        stack.push_async_callback(identity.stop)

    async def _until_idle(self) -> None:
        linger = self._options.linger
        while True:
            await asyncio.sleep(0.2)
            if not self._is_idle():
                self.local.last_active = time.monotonic()
            elif self._patient or (linger is not None and time.monotonic() - self.local.last_active > linger):
                self._stopping.set()

    def _is_idle(self) -> bool:
        return self.node.idle and self.launches.idle

    def _ready_text(self) -> str:
        return f"{os.getpid()}\n{self.address}\n{self.metrics_address}\n{self.page_address}\n"


def _partners(settings: TierSettings) -> PartnerPolicy:
    return PartnerPolicy(settings.partner, settings.group, settings.partner_every, settings.rebuild)


async def serve(options: Options) -> None:
    """Run one agent to its end."""
    faulthandler.enable()  # a watchdog that ends it (SIGABRT) leaves on record where it stood
    try:
        logs = options.settings.log
        start_logging(logs.format, logs.level, node=options.node)
        await Agent(options).run()
    except (OSError, MemoryError) as error:
        why = lacking(error)
        if not why:
            raise
        raise CkptsvcError(f"the agent in {options.directory} cannot go on: {why}",
            hint="snapshots in memory wait for the next agent") from error  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the agent as a program; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ckptsvc.agent.server", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--listen")
    parser.add_argument("--name")
    parser.add_argument("--metrics-listen")
    parser.add_argument("--coordination")
    parser.add_argument("--max-write-rate")
    parser.add_argument("--linger")
    parser.add_argument("--json-log", action="store_true")
    parser.add_argument("--service", type=Path)
    args = parser.parse_args(arguments)
    try:
        overrides = {
            "agent.listen": args.listen,
            "agent.name": args.name,
            "agent.metrics_listen": args.metrics_listen,
            "agent.coordination": args.coordination,
            "store.max_write_rate": args.max_write_rate,
            "log.format": "json" if args.json_log else None,
        }
        read = partial(load, os.environ, overrides)
        settings = read()
        linger = parse_duration(args.linger) if args.linger else None
        # A coordinator of ten thousand agents has millions of objects and hardly a cycle: looking for those among them
        # all takes a second, in which it answers nobody.
        gc.set_threshold(50_000, 20, 100)
        asyncio.run(serve(Options(args.dir, settings, linger, read, args.service, overrides)))
    except CkptsvcError as error:
        if os.environ.get(FORMAT) == "json" or args.json_log:
            print(line(str(error), logging.CRITICAL, logger="ckptsvc.agent", about=Fields()), file=sys.stderr)  # noqa: T201
        else:
            print(f"ckptsvc agent: {error}", file=sys.stderr)  # noqa: T201  a program's last words
        return EXIT_STATUS[error.code]
    return 0


if __name__ == "__main__":
    sys.exit(main())
