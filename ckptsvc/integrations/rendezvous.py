"""A torchrun as a node of a launched job: it says when it is ready, and waits for the order to start.

To the coordinator, a torchrun is a launcher of one rank: which ranks there really are is torchrun's business, and so is
how often it restarts them. Its rank ends well when all of torchrun's have.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is, but torch does not say so
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from ckptsvc.agent.coordination.elections import reachable
from ckptsvc.agent.launches import COORDINATOR_KEY
from ckptsvc.config import agents_directory, load, private_directory
from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError
from ckptsvc.quantities import parse_address
from ckptsvc.rpc.channel import OPTIONS, error_of
from ckptsvc.rpc.dial import agent_arguments, agents_home, ensure_agent, sockets
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc
from ckptsvc.settings import Settings

JOIN_TIMEOUT = 600.0
"""Seconds to wait for the other nodes, as torchrun's own rendezvous."""

STORE_TIMEOUT = 60.0
"""Seconds to reach the store of an attempt."""

END_TIMEOUT = 60.0
"""Seconds to wait for the other nodes when all ranks of this one have ended well."""

RECONNECT = 0.5
"""Seconds between attempts to reach the agent again."""

MANY = 1 << 20
"""Restarts: torchrun counts them itself."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this torchrun stands.

    Attributes:
        job, node: their names.
        address: where other nodes reach this one.
        coordinator: address of the coordinator's agent, or the etcd where it is elected; "" if it is this node's agent.
        directory: of this node's agent.
        agent_arguments: for the agent, if it has to be started.
        join_timeout: seconds to wait for the other nodes.
        grow: as in `agent.launcher.launcher.Launch`.
    """

    job: str
    node: str
    address: str
    coordinator: str
    directory: Path
    agent_arguments: list[str]
    join_timeout: float
    grow: float | None


def place_of(parameters: RendezvousParameters) -> Place:
    """Find out where this torchrun stands.

    Raises:
        ConfigError: the endpoint or the job's name is missing or wrong.
        CoordinationUnavailable: nobody answers where the coordinator is to be elected.
    """
    alone = parameters.max_nodes == 1
    named = parameters.run_id not in ("", "none")
    settings = load(os.environ)
    elected = "" if alone else _elected(parameters, settings)
    if not alone and not (named and (parameters.endpoint or elected)):
        raise ConfigError("a job of several nodes needs --rdzv-endpoint HOST:PORT and --rdzv-id NAME",
            hint="instead of the endpoint, --rdzv-conf coordination=etcd://HOST:PORT")  # fmt: skip
    name = parameters.get("node")
    base = agents_home(agents_directory(settings, os.environ), settings)
    directory = private_directory(base / f"node-{name}" if name else base)
    leads, listen = not elected, ""
    if parameters.endpoint and not alone:
        endpoint = parse_address(parameters.endpoint)
        given = parameters.get_as_bool("is_host")
        leads = _is_here(endpoint.host) if given is None else given
        listen = str(endpoint) if leads else ""
    node = name or settings.agent.name or socket.gethostname()
    local = "127.0.0.1" if alone or parameters.endpoint.startswith(("127.", "localhost")) else socket.gethostname()
    return Place(
        job=parameters.run_id if named else f"torchrun-{os.getpid()}-{secrets.token_hex(3)}",
        node=node,
        address=parameters.local_addr or local,
        coordinator=elected or ("" if leads else parameters.endpoint),
        directory=directory,
        agent_arguments=agent_arguments(node, listen, elected),
        join_timeout=float(parameters.get("join_timeout", JOIN_TIMEOUT)),
        grow=settings.launch.grow,
    )


def _elected(parameters: RendezvousParameters, settings: Settings) -> str:
    """The etcd where the job's coordinator is elected; "" if an endpoint says where it is."""
    given = parameters.get("coordination", "").replace("+", ",")
    if given and parameters.endpoint:
        raise ConfigError("--rdzv-endpoint and coordination in --rdzv-conf exclude each other")
    where = "" if parameters.endpoint else given or settings.agent.coordination
    return reachable(where, settings.etcd) if where else ""


def _is_here(host: str) -> bool:
    """Whether an address is one of this host's."""
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        return False
    return True


class Rendezvous(RendezvousHandler):
    """See torch.distributed.elastic.rendezvous.api for what each method must do."""

    def __init__(self, parameters: RendezvousParameters, place: Place) -> None:
        self._parameters, self._place = parameters, place
        self._since = time.monotonic()
        self._greeted = False  # some agent
        self._reports: queue.Queue[agent_pb2.LaunchRequest | None] = queue.Queue()
        self._last: agent_pb2.LaunchRequest | None = None  # what an agent that is reached anew must hear
        self._changed = threading.Condition()
        self._running: agent_pb2.StartRanks | None = None
        self._wanted: agent_pb2.StartRanks | None = None  # the order to start the next attempt
        self._attempt = 0
        self._stopped = False  # the attempt that runs is to be stopped
        self._end: agent_pb2.JobEnd | None = None
        self._failure: CkptsvcError | None = None
        self._closed = False
        self._port: socket.socket | None = None
        self._store: TCPStore | None = None
        self._door: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def get_backend(self) -> str:
        """The name that it is registered under."""
        return "ckptsvc"

    def get_run_id(self) -> str:
        """The name of the job."""
        return str(self._parameters.run_id)

    @property
    def use_agent_store(self) -> bool:
        """Ranks use the store of the attempt: it stays when rank 0 dies, and is never used for two attempts."""
        return True

    def is_closed(self) -> bool:
        """Whether the job has ended, or this torchrun has left it."""
        return self._end is not None or self._closed

    def set_closed(self) -> None:
        """The coordinator decides when the job ends."""

    def num_nodes_waiting(self) -> int:
        """1 when torchrun is to restart its ranks: another node's have failed, or the job has ended."""
        with self._changed:
            return int(self._stopped or self._end is not None)

    def next_rendezvous(self) -> RendezvousInfo:
        """Say that no rank runs here, and wait for the order to start.

        Raises:
            RendezvousClosedError: the job has ended.
            RendezvousGracefulExitError: it has ended well, and this node was not needed any more.
            RendezvousTimeoutError: the other nodes have not come.
            RendezvousConnectionError: the agent refuses this node, or there is none.
        """
        self._open()
        with self._changed:
            self._running, self._stopped = None, False
            self._ready()
            self._changed.wait_for(lambda: self._wanted or self._end or self._failure, self._place.join_timeout)
            if self._failure is not None:
                raise RendezvousConnectionError(str(self._failure))
            if self._end is not None:
                kind = RendezvousClosedError if self._end.status else RendezvousGracefulExitError
                raise kind(f"job {self._place.job} has ended: {self._end.reason}")
            if self._wanted is None:
                raise RendezvousTimeoutError(f"the nodes of job {self._place.job} have not come together")
            order, self._wanted = self._wanted, None
            self._running, self._attempt = order, order.attempt
        os.environ.update(self._variables(order))  # torchrun hands its environment on to the ranks
        self._store = self._store_of(order)
        address = RendezvousStoreInfo(order.master_addr, order.master_port)
        return RendezvousInfo(self._store, order.node_rank, order.nodes, address)

    def shutdown(self) -> bool:
        """Leave: in good order if torchrun has (it calls this with its exception on the way otherwise)."""
        if self._thread is None:
            return True
        with self._changed:
            if sys.exc_info()[0] is None and self._running is not None:
                exited = agent_pb2.RankExit(attempt=self._attempt, rank=self._running.node_rank, status=0)
                self._say(agent_pb2.LaunchRequest(exit=exited))
                self._changed.wait_for(lambda: self._end or self._failure, END_TIMEOUT)
            else:
                self._say(agent_pb2.LaunchRequest(leaving=agent_pb2.Leaving(reason="torchrun has given up")))
            self._closed = True
            self._reports.put(None)  # the agent ends the call then
        self._thread.join(END_TIMEOUT)
        for sock in (self._port, self._door):
            if sock is not None:
                sock.close()
        return not self._thread.is_alive()

    # ---- attempts ----------------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        if self._port is not None:
            self._port.close()
        # Held, not listening: the store of the next attempt can have the port, and nobody else (see `launcher`).
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind((self._place.address, 0))
        ready = agent_pb2.LauncherReady(attempt=self._attempt, port=self._port.getsockname()[1])
        self._say(agent_pb2.LaunchRequest(ready=ready))

    def _say(self, report: agent_pb2.LaunchRequest) -> None:
        self._last = report
        self._reports.put(report)

    def _store_of(self, order: agent_pb2.StartRanks) -> TCPStore:
        leads = order.node_rank == 0
        host = self._place.address if leads else order.master_addr
        return TCPStore(
            host, order.master_port, is_master=leads, timeout=timedelta(seconds=STORE_TIMEOUT), wait_for_workers=False
        )

    def _variables(self, order: agent_pb2.StartRanks) -> dict[str, str]:
        place = self._place
        return {
            "CKPTSVC_JOB": place.job,
            "CKPTSVC_ATTEMPT": str(order.attempt),
            "CKPTSVC_NODE": place.node,
            "CKPTSVC_SOCKET": str(place.directory),
            "CKPTSVC_COORDINATOR": place.coordinator,
        }

    # ---- the agent (as the launcher, in a thread) ------------------------------------------------------------------

    def _open(self) -> None:
        if self._thread is None:
            self._door = socket.create_server((self._place.address, 0), backlog=64)
            threading.Thread(target=_answer, args=(self._door,), name="ckptsvc-doorbell", daemon=True).start()
            self._thread = threading.Thread(target=self._serve, name="ckptsvc-rendezvous", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while not self.is_closed():
            try:
                ensure_agent(self._place.directory, self._place.agent_arguments)
                self._talk()
            except (grpc.RpcError, CkptsvcError) as failure:
                error = error_of(failure) if isinstance(failure, grpc.RpcError) else failure
                if not isinstance(error, AgentUnavailable):
                    self._note(failure=error)
                    return
            if not self.is_closed():
                time.sleep(RECONNECT)

    def _talk(self) -> None:
        path, _ = sockets(self._place.directory)
        requests = self._requests()
        with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            for response in stub.Launch(requests, metadata=((COORDINATOR_KEY, self._place.coordinator),)):
                kind = response.WhichOneof("order")
                if kind == "start":
                    self._note(start=response.start)
                elif kind == "stop" and response.stop.attempt == self._attempt:
                    self._note(stop=True)
                elif kind == "end":
                    self._note(end=response.end)
                    return

    def _note(
        self,
        *,
        start: agent_pb2.StartRanks | None = None,
        stop: bool = False,
        end: agent_pb2.JobEnd | None = None,
        failure: CkptsvcError | None = None,
    ) -> None:
        with self._changed:
            if start is not None and start.attempt > self._attempt:
                self._wanted, self._last = start, None
            self._stopped = self._stopped or (stop and self._running is not None)
            self._end, self._failure = end or self._end, failure or self._failure
            self._changed.notify_all()

    def _requests(self) -> Iterator[agent_pb2.LaunchRequest]:
        place, parameters = self._place, self._parameters
        with self._changed:
            running, reports = self._running, queue.Queue[agent_pb2.LaunchRequest | None]()
            if self._last is not None:
                reports.put(self._last)
            self._reports.put(None)  # ends the requests of the call before
            self._reports = reports
        hello = agent_pb2.LauncherHello(
            job=place.job,
            node=place.node,
            node_rank=-1,
            min_nodes=parameters.min_nodes,
            max_nodes=parameters.max_nodes,
            nproc=1,
            max_restarts=MANY,
            address=place.address,
            attempt=running.attempt if running else 0,
            first_rank=running.first_rank if running else 0,
            world_size=running.world_size if running else 0,
            doorbell=self._door.getsockname()[1] if self._door else 0,
            grow=-1.0 if place.grow is None else place.grow,
            uptime=time.monotonic() - self._since,
            again=self._greeted,
        )
        yield agent_pb2.LaunchRequest(hello=hello)
        self._greeted = True
        while (report := reports.get()) is not None:
            yield report


def _answer(door: socket.socket) -> None:
    """A doorbell (see agent.launcher.doorbell)."""
    with contextlib.suppress(OSError):
        while True:
            door.accept()[0].close()
