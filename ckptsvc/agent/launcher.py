"""`ckptsvc run`: starts this node's ranks for every attempt the coordinator orders, and says how they end.

hello, ready -> start -> (ranks run) -> exits reported -> stop -> ready -> start ... -> end
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import grpc
import grpc.aio

from ckptsvc.agent.launches import COORDINATOR_KEY
from ckptsvc.control.restart import describe_status
from ckptsvc.errors import EXIT_STATUS, AgentUnavailable
from ckptsvc.rpc.channel import OPTIONS, error_of
from ckptsvc.rpc.dial import ensure_agent, sockets
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

RECONNECT = 1.0
"""Seconds between attempts to reach the agent again."""

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
        stop_grace: seconds ranks get to save and stop when this launcher gets SIGTERM.
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
    stop_grace: float = 60.0


@dataclass(slots=True)
class _Rank:
    rank: int
    process: asyncio.subprocess.Process
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    ended_at: float = 0.0


class Launcher:
    """One `ckptsvc run`; `run` returns its exit status."""

    def __init__(self, launch: Launch, environ: Mapping[str, str]) -> None:
        self._launch, self._environ = launch, environ
        self._reports: asyncio.Queue[agent_pb2.LaunchRequest] = asyncio.Queue()
        self._ranks: dict[int, _Rank] = {}
        self._attempt = 0
        self._first_rank = 0
        self._status: int | None = None
        self._interrupted = asyncio.Event()
        self._stop_wanted = ""  # why the job was asked to stop
        self._terminated = False
        self._port: socket.socket | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Serve until the job ends; returns the exit status for this process."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupted.set)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            loop.add_signal_handler(number, self._ask_to_stop, number)
        serving = asyncio.ensure_future(self._serve())
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        await asyncio.wait((serving, interrupted), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await self._stop_ranks(5.0)
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            return EXIT_STATUS["interrupted"] if self._stop_wanted else 130
        interrupted.cancel()
        return serving.result()

    def _ask_to_stop(self, number: int) -> None:
        name = signal.Signals(number).name
        hurried = number == signal.SIGTERM and self._terminated
        self._stop_wanted = self._stop_wanted or f"{name} to ckptsvc run on {self._launch.node}"
        if number == signal.SIGTERM:
            self._terminated = True
            asyncio.get_running_loop().call_later(self._launch.stop_grace, self._out_of_time)
        if hurried or not self._ranks:
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
        without_agent = 0.0
        while self._status is None:
            began = time.monotonic()
            try:
                await asyncio.get_running_loop().run_in_executor(
                    None, ensure_agent, self._launch.directory, self._launch.agent_arguments
                )
                await self._talk()
                without_agent = 0.0
            except (grpc.RpcError, AgentUnavailable) as failure:
                error = error_of(failure) if isinstance(failure, grpc.RpcError) else failure
                if not isinstance(error, AgentUnavailable):
                    raise error from None
                self._say(f"lost the agent ({error.what}); the ranks go on")
            if self._status is None:
                await asyncio.sleep(RECONNECT)
                without_agent = 0.0 if self._ranks else without_agent + time.monotonic() - began
                if without_agent > AGENT_PATIENCE:
                    raise AgentUnavailable(f"no agent for {AGENT_PATIENCE:g} s")
        await self._stop_ranks(2.0)
        return self._status

    async def _talk(self) -> None:
        """One connection to the agent, until the job ends or the agent is lost."""
        path, _ = sockets(self._launch.directory)
        self._reports = asyncio.Queue()
        if not self._ranks:
            self._ready()
        for one in self._ranks.values():
            if one.process.returncode is not None:
                self._exited(one, self._attempt)  # maybe while there was no agent to tell
        if self._stop_wanted:
            self._report_stop_wanted()  # the agent we have lost may not have passed it on
        metadata = ((COORDINATOR_KEY, self._launch.coordinator),)
        async with grpc.aio.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
            call = agent_pb2_grpc.AgentServiceStub(channel).Launch(self._requests(self._reports), metadata=metadata)
            async for response in call:
                kind = response.WhichOneof("order")
                if kind == "start":
                    await self._start(response.start)
                elif kind == "stop" and response.stop.attempt == self._attempt:
                    self._say(f"stopping attempt {self._attempt}: {response.stop.reason}")
                    await self._stop_ranks(response.stop.grace)
                    self._ready()
                elif kind == "end":
                    self._say(f"the job ends: {response.end.reason}")
                    self._status = response.end.status
                    return

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
            attempt=self._attempt if self._ranks else 0,
            first_rank=self._first_rank,
        )
        yield agent_pb2.LaunchRequest(hello=hello)
        while True:
            yield await reports.get()

    def _ready(self) -> None:
        """Reserve a port for the next attempt's rendezvous store, and say that this node could start it."""
        if self._port is not None:
            self._port.close()
        # Held until the ranks start, so that nobody else gets it; SO_REUSEADDR lets rank 0 take it over at once.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind((self._launch.address, 0))
        ready = agent_pb2.LauncherReady(attempt=self._attempt, port=self._port.getsockname()[1])
        self._reports.put_nowait(agent_pb2.LaunchRequest(ready=ready))

    async def _start(self, order: agent_pb2.StartRanks) -> None:
        await self._stop_ranks(0.0)
        if self._port is not None:
            self._port.close()
            self._port = None
        self._attempt, self._first_rank = order.attempt, order.first_rank
        last = order.first_rank + self._launch.nproc - 1
        self._say(f"attempt {order.attempt}: ranks {order.first_rank} to {last} of {order.world_size}")
        for local in range(self._launch.nproc):
            rank = order.first_rank + local
            process = await asyncio.create_subprocess_exec(
                *self._launch.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._rank_environ(order, local),
            )
            one = self._ranks[rank] = _Rank(rank, process)
            one.tasks = [
                asyncio.ensure_future(self._copy_output(one, order.attempt)),
                asyncio.ensure_future(self._watch(one, order.attempt)),
            ]

    def _rank_environ(self, order: agent_pb2.StartRanks, local: int) -> dict[str, str]:
        launch, rank = self._launch, order.first_rank + local
        environ = {
            **self._environ,
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
            "CKPTSVC_JOB": launch.job,
            "CKPTSVC_ATTEMPT": str(order.attempt),
            "CKPTSVC_NODE": launch.node,
            "CKPTSVC_SOCKET": str(launch.directory),
            "CKPTSVC_COORDINATOR": launch.coordinator,
        }
        if launch.nproc > 1:
            environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
        return environ

    async def _copy_output(self, one: _Rank, attempt: int) -> None:
        """Keep a rank's output in its file, and show it with the rank in front."""
        assert one.process.stdout is not None
        prefix = f"[{one.rank}] ".encode()
        with contextlib.ExitStack() as stack:
            log: BinaryIO | None = None
            if self._launch.log_dir is not None:
                folder = self._launch.log_dir / f"attempt_{attempt}"
                folder.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(
                    open(folder / f"rank_{one.rank}.log", "ab", buffering=0)  # noqa: ASYNC230  once, and local
                )
            while True:
                try:
                    line = await one.process.stdout.readline()
                except ValueError:  # a line longer than the reader's buffer
                    line = await one.process.stdout.read(1 << 16)
                if not line:
                    return
                if log is not None:
                    log.write(line)
                sys.stdout.buffer.write(prefix + line)
                sys.stdout.buffer.flush()

    async def _watch(self, one: _Rank, attempt: int) -> None:
        status = await one.process.wait()
        one.ended_at = time.monotonic()
        if status != 0:
            self._say(f"rank {one.rank} {describe_status(status)}")
        self._exited(one, attempt)

    def _exited(self, one: _Rank, attempt: int) -> None:
        exited = agent_pb2.RankExit(
            attempt=attempt, rank=one.rank, status=one.process.returncode, monotonic=one.ended_at
        )
        self._reports.put_nowait(agent_pb2.LaunchRequest(exit=exited))

    async def _stop_ranks(self, grace: float) -> None:
        ranks = list(self._ranks.values())
        alive = [one for one in ranks if one.process.returncode is None]
        for one in alive:
            with contextlib.suppress(ProcessLookupError):
                # A stopped process does not see SIGTERM until it is continued.
                one.process.send_signal(signal.SIGTERM)
                one.process.send_signal(signal.SIGCONT)
        if alive and grace > 0:
            await asyncio.wait([asyncio.ensure_future(one.process.wait()) for one in alive], timeout=grace)
        for one in alive:
            if one.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    one.process.kill()
        for one in ranks:
            await one.process.wait()
            # Grandchildren may hold the pipe open: do not wait for their output.
            await asyncio.wait(one.tasks, timeout=1.0)
            for task in one.tasks:
                task.cancel()
        self._ranks.clear()

    def _say(self, message: str) -> None:
        print(f"ckptsvc run [{self._launch.node}]: {message}", file=sys.stderr, flush=True)  # noqa: T201
