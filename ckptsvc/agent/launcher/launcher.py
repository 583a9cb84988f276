"""`ckptsvc run`: starts this node's ranks for every attempt the coordinator orders, and says how they end.

hello, ready -> start -> (ranks run) -> exits reported -> stop -> ready -> start ... -> end
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ckptsvc.agent.launcher.doorbell import hang_up
from ckptsvc.agent.launcher.preflight import reason_against
from ckptsvc.agent.launcher.ranks import Rank, Ranks
from ckptsvc.agent.launches import COORDINATOR_KEY
from ckptsvc.agent.process.limits import raise_open_files
from ckptsvc.control.crashloop import describe_status
from ckptsvc.errors import EXIT_STATUS, AgentUnavailable, ConfigError, NodeUnfit
from ckptsvc.rpc.channel import OPTIONS, error_of
from ckptsvc.rpc.dial import ensure_agent, sockets
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc
from ckptsvc.telemetry import Fields
from ckptsvc.telemetry.logs import line

HEARD_AFTER = 1.0
"""Seconds of a connection to an agent after which it has heard what this launcher is."""

RECONNECT = 1.0
"""Seconds between attempts to reach the agent again."""

START_PATIENCE = 30.0
"""Seconds for the first agent to start. What is in its way may go: the port of a job that is just ending."""

AGENT_PATIENCE = 120.0
"""Seconds without an agent after which a launcher whose ranks have all ended gives up."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run, and as what.

    Attributes:
        command: program and arguments of every rank.
        job: name of the job, the same on all nodes.
        node: name of this node, unique in the job.
        node_rank: position of this node; -1 leaves it to the coordinator.
        min_nodes, max_nodes: how many nodes the job starts with.
        nproc: ranks on this node.
        max_restarts: attempts after the first one.
        address: where other nodes reach this one.
        coordinator: address of the coordinator's agent; "" if it is this node's.
        directory: of this node's agent.
        agent_arguments: for the agent, if it has to be started.
        log_dir: where the ranks' output is kept; None: only on the terminal.
        warm: what a warm interpreter that ranks are forked from is told (see `standby`); None: there is none.
        crash_loop: failed attempts in a row without progress that end the job; 0: they never do.
        preflight: where arenas are made, and other directories that are written to, to be checked before this node
            takes part in the job; None: nothing is checked.
        stop_grace: seconds ranks get to save and stop when this launcher gets SIGTERM.
        grow: seconds that a job on fewer nodes than it could use waits for a checkpoint before it starts anew with
            those that have come; None: they wait for the next restart.
        virtual_local_rank: each rank sees one GPU, and has the local rank 0.
        json_log: what it says is one JSON object a line.
    """

    command: Sequence[str]
    job: str
    node: str
    node_rank: int
    min_nodes: int
    max_nodes: int
    nproc: int
    max_restarts: int
    address: str
    coordinator: str
    directory: Path
    agent_arguments: Sequence[str]
    log_dir: Path | None
    warm: dict[str, Any] | None = None
    crash_loop: int = 0
    preflight: tuple[str, list[str]] | None = None
    stop_grace: float = 60.0
    grow: float | None = None
    virtual_local_rank: bool = False
    json_log: bool = False


class Launcher:
    """One `ckptsvc run`; `run` returns its exit status."""

    def __init__(self, launch: Launch, environ: Mapping[str, str]) -> None:
        self._launch = launch
        self._since = time.monotonic()
        self._greeted = False  # some agent
        self._reports: asyncio.Queue[agent_pb2.LaunchRequest] = asyncio.Queue()
        given = dict(environ)
        if launch.nproc > 1:
            given.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
        given.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun does
        self._devices = _devices(launch.nproc, given) if launch.virtual_local_rank else None
        files = raise_open_files()
        self._ranks = Ranks(launch.command, given, launch.warm, launch.log_dir, self._ended, self._say, files)
        self._attempt = 0
        self._first_rank = self._world = 0
        self._doorbell = 0
        self._unfit = ""
        self._leaving = False
        self._failure: NodeUnfit | None = None
        self._status: int | None = None
        self._interrupted = asyncio.Event()
        self._stop_wanted = ""  # why the job was asked to stop
        self._terminated = False
        self._port: socket.socket | None = None

    async def run(self) -> int:
        """Serve until the job ends; returns the exit status for this process."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupted.set)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            loop.add_signal_handler(number, self._ask_to_stop, number)
        await self._ranks.open()
        door, self._doorbell = await hang_up(self._launch.address)
        serving = asyncio.ensure_future(self._serve())
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        try:
            await asyncio.wait((serving, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                return serving.result()
            self._leave("ckptsvc run was told to end")
            await self._ranks.stop(5.0)
            return EXIT_STATUS["interrupted"] if self._stop_wanted else 130
        finally:
            for task in (serving, interrupted):
                task.cancel()
            await asyncio.gather(serving, interrupted, return_exceptions=True)
            await self._ranks.close()
            door.close()

    def _ask_to_stop(self, number: int) -> None:
        name = signal.Signals(number).name
        hurried = number == signal.SIGTERM and self._terminated
        self._stop_wanted = self._stop_wanted or f"{name} to ckptsvc run on {self._launch.node}"
        if number == signal.SIGTERM:
            self._terminated = True
            asyncio.get_running_loop().call_later(self._launch.stop_grace, self._out_of_time)
        if hurried or not self._ranks.live:
            self._say(f"signal {name}: ending now; the job resumes from its newest checkpoint")
            self._interrupted.set()
            return
        self._say(f"signal {name}: asking the job to save and stop")
        self._report_stop_wanted()

    def _out_of_time(self) -> None:
        if self._status is None:
            grace = f"{self._launch.stop_grace:g} s"
            self._say(f"no last save within {grace}; ending: the job resumes from its newest checkpoint")
            self._interrupted.set()

    def _report_stop_wanted(self) -> None:
        wanted = agent_pb2.StopWanted(reason=self._stop_wanted)
        self._reports.put_nowait(agent_pb2.LaunchRequest(stop_wanted=wanted))

    async def _serve(self) -> int:
        found, without_agent, said = False, 0.0, ""
        if self._launch.preflight is not None:
            self._unfit = await reason_against(*self._launch.preflight, self._launch.address)
        while not self._is_over():
            began = time.monotonic()
            try:
                await asyncio.get_running_loop().run_in_executor(
                    None, ensure_agent, self._launch.directory, self._launch.agent_arguments
                )
                found, said = True, ""
                await self._talk()
                without_agent = 0.0
            except (grpc.RpcError, AgentUnavailable) as failure:
                error = error_of(failure) if isinstance(failure, grpc.RpcError) else failure
                if not isinstance(error, AgentUnavailable):
                    raise error from None
                if self._unfit:
                    raise NodeUnfit(self._unfit) from None
                if not found and time.monotonic() - self._since > START_PATIENCE:
                    raise error from None
                missed = f"lost the agent ({error.what}); the ranks go on" if found else f"no agent: {error}"
                if missed != said:
                    self._say(missed)
                said = missed
            if self._failure is not None:
                raise self._failure
            if not self._is_over():
                await asyncio.sleep(RECONNECT)
                without_agent = 0.0 if self._ranks.live else without_agent + time.monotonic() - began
                if without_agent > AGENT_PATIENCE:
                    raise AgentUnavailable(f"no agent for {AGENT_PATIENCE:g} s")
        await self._ranks.stop(2.0)
        return 130 if self._status is None else self._status

    def _is_over(self) -> bool:
        return self._status is not None or self._leaving

    async def _talk(self) -> None:
        """One connection to the agent, until the job ends or the agent is lost."""
        path, _ = sockets(self._launch.directory)
        self._reports = asyncio.Queue()
        if not self._ranks.live:
            self._ready()
        for rank in self._ranks.live.values():
            if rank.status is not None:
                self._report_end(rank, rank.status)  # maybe while there was no agent to tell
        if self._stop_wanted:
            self._report_stop_wanted()  # the agent we have lost may not have passed it on
        metadata, began = ((COORDINATOR_KEY, self._launch.coordinator),), time.monotonic()
        async with grpc.aio.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
            call = agent_pb2_grpc.AgentServiceStub(channel).Launch(self._requests(self._reports), metadata=metadata)
            try:
                async for response in call:
                    self._greeted = True
                    await self._obey(response)
                    if self._status is not None:
                        return
            finally:  # a refusal may be lost on its way: who was hung up on at once has not been heard
                self._greeted |= time.monotonic() - began > HEARD_AFTER

    async def _obey(self, order: agent_pb2.LaunchResponse) -> None:
        kind = "" if self._leaving else order.WhichOneof("order")
        if kind == "start":
            await self._start(order.start)
        elif kind == "stop" and order.stop.attempt == self._attempt:
            self._say(f"stopping attempt {self._attempt}: {order.stop.reason}")
            await self._stop(order.stop.grace)
        elif kind == "notice":
            self._say(order.notice.text)
        elif kind == "end":
            self._say(f"the job ends: {order.end.reason}")
            self._status = order.end.status

    async def _requests(
        self, reports: asyncio.Queue[agent_pb2.LaunchRequest]
    ) -> AsyncIterator[agent_pb2.LaunchRequest]:
        launch = self._launch
        hello = agent_pb2.LauncherHello(
            job=launch.job,
            node=launch.node,
            node_rank=launch.node_rank,
            min_nodes=launch.min_nodes,
            max_nodes=launch.max_nodes,
            nproc=launch.nproc,
            max_restarts=launch.max_restarts,
            address=launch.address,
            attempt=self._attempt if self._ranks.live else 0,
            first_rank=self._first_rank,
            log_dir=str(launch.log_dir.absolute()) if launch.log_dir else "",
            world_size=self._world,
            doorbell=self._doorbell,
            unfit=self._unfit,
            crash_loop=launch.crash_loop,
            grow=-1.0 if launch.grow is None else launch.grow,
            check_network=launch.preflight is not None and not self._unfit,
            uptime=time.monotonic() - self._since,
            again=self._greeted,
        )
        yield agent_pb2.LaunchRequest(hello=hello)
        while True:
            report = await reports.get()
            yield report
            if report.WhichOneof("report") == "leaving":
                return  # the agent ends the call then

    def _ready(self) -> None:
        """Reserve a port for the next attempt's rendezvous store, and say that this node could start it."""
        if self._port is not None:
            self._port.close()
        # Held while the ranks run, so that nobody else gets it: as long as it does not listen, SO_REUSEADDR on both
        # sides lets rank 0 bind and listen to the same (tcp(7), and torch's TCPStore sets it).
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind((self._launch.address, 0))
        ready = agent_pb2.LauncherReady(attempt=self._attempt, port=self._port.getsockname()[1])
        self._reports.put_nowait(agent_pb2.LaunchRequest(ready=ready))

    async def _start(self, order: agent_pb2.StartRanks) -> None:
        await self._ranks.stop(0.0)
        self._attempt, self._first_rank, self._world = order.attempt, order.first_rank, order.world_size
        last = order.first_rank + self._launch.nproc - 1
        self._say(f"attempt {order.attempt}: ranks {order.first_rank} to {last} of {order.world_size}")
        variables = {order.first_rank + local: self._variables(order, local) for local in range(self._launch.nproc)}
        await self._ranks.start(order.attempt, variables)

    async def _stop(self, grace: float) -> None:
        left = await self._ranks.stop(grace)
        if left:
            why = f"processes {', '.join(map(str, left))} do not end of SIGKILL: a device or a file system hangs"
            self._failure = NodeUnfit(why)
            self._leave(why)
            return
        self._ready()

    def _leave(self, why: str) -> None:
        """Say that this launcher ends, and why; how its ranks end is nobody's concern any more."""
        self._leaving = True
        self._reports.put_nowait(agent_pb2.LaunchRequest(leaving=agent_pb2.Leaving(reason=why)))

    def _variables(self, order: agent_pb2.StartRanks, local: int) -> dict[str, str]:
        launch, rank = self._launch, order.first_rank + local
        own = {} if self._devices is None else {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": self._devices[local]}
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(order.world_size),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(launch.nproc),
            "GROUP_RANK": str(order.node_rank),
            "GROUP_WORLD_SIZE": str(order.nodes),
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(order.world_size),
            "MASTER_ADDR": order.master_addr,
            "MASTER_PORT": str(order.master_port),
            "TORCHELASTIC_RUN_ID": launch.job,
            "TORCHELASTIC_RESTART_COUNT": str(order.attempt - 1),
            "TORCHELASTIC_MAX_RESTARTS": str(launch.max_restarts),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "CKPTSVC_JOB": launch.job,
            "CKPTSVC_ATTEMPT": str(order.attempt),
            "CKPTSVC_NODE": launch.node,
            "CKPTSVC_SOCKET": str(launch.directory),
            "CKPTSVC_COORDINATOR": launch.coordinator,
            **own,
        }

    def _ended(self, rank: Rank) -> None:
        assert rank.status is not None
        if rank.status != 0:
            why = f": {rank.detail}" if rank.detail else ""
            self._say(f"rank {rank.number} {describe_status(rank.status)}{why}")
        if not self._leaving:
            self._report_end(rank, rank.status)

    def _report_end(self, rank: Rank, status: int) -> None:
        exited = agent_pb2.RankExit(
            attempt=self._attempt, rank=rank.number, status=status, monotonic=rank.ended_at, detail=rank.detail
        )
        self._reports.put_nowait(agent_pb2.LaunchRequest(exit=exited))

    def _say(self, message: str) -> None:
        text = f"ckptsvc run [{self._launch.node}]: {message}"
        if self._launch.json_log:
            about = Fields(job=self._launch.job, node=self._launch.node, attempt=self._attempt)
            text = line(message, logger="ckptsvc.run", about=about)
        self._ranks.output.say(text)


def _devices(nproc: int, environ: Mapping[str, str]) -> list[str]:
    """The one GPU that each rank of a node is to see.

    Raises:
        ConfigError: there are fewer than ranks.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(n) for n in range(nproc)] if visible is None else [name.strip() for name in visible.split(",")]
    if len(found) < nproc:
        raise ConfigError(f"--virtual-local-rank: {nproc} ranks, and CUDA_VISIBLE_DEVICES={visible}")
    return found
