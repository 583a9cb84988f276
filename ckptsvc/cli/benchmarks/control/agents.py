"""Ten thousand agents in one process, as their coordinator sees them: the reports of real ones, in their order and at
their times, and an answer to every order. What they stand for (ranks, launchers, shards) is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from ckptsvc.agent.coordination.uplink import RECONNECT, bundles
from ckptsvc.agent.watching.evidence import WATCH, shorten
from ckptsvc.cli.benchmarks.control.wire import Call, Connection
from ckptsvc.control.pace import progress_every, stalls_within
from ckptsvc.errors import AgentUnavailable, CkptsvcError
from ckptsvc.rpc import proof
from ckptsvc.rpc.channel import OPTIONS
from ckptsvc.rpc.secret import numeric
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

JOB = "bench"
RUN = f"{JOB}@run"
"""As `ckptsvc run` names the job, and as its ranks register."""

PATH = "/ckptsvc.rpc.v1.CoordinatorService/Attend"

WARM = (0.3, 0.5)
"""Seconds from the order to start until a rank has registered: a warm worker takes the first."""

ENDS = (0.02, 0.3)
"""Seconds that ranks take to end when they are told to."""

STEP = 0.5
"""Seconds that a step takes."""

NBYTES, EXTENT = 128 << 20, 1 << 20
"""Bytes of a shard, and of what each of its checksums covers."""

AT_ONCE = 16
"""Agents that do something before pings are answered again."""

DIALLING = 256
"""Connections that are being made at the same time."""

_STACK = "\n".join(f"forward_{n} (torch/nn/modules/module.py:{1700 + n})" for n in range(24))
_WAITS = f"{_STACK}\nall_reduce (torch/distributed/distributed_c10d.py:2810)"
_STUCK = f"{_STACK}\nbackward (train.py:118)"
_OTHERS = "\n".join(f"thread loader-{n}\nwait (threading.py:327)\nget (queue.py:171)" for n in range(8))
_LOG = "\n".join(f"step {n}: loss 2.{n:03d}, 0.51 s, 38.2 GiB" for n in range(60))


class Doorbell:
    """The door of a launcher (launcher.doorbell): it answers, is gone, or is silent as a host that is cut off."""

    def __init__(self, backlog: int = 0) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._full: list[socket.socket] = []
        asyncio.get_running_loop().add_reader(self._socket, self._answer)

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.accept()[0].close()

    def mute(self) -> None:
        """Answer no more: the kernel drops who calls while nobody takes in those who wait."""
        asyncio.get_running_loop().remove_reader(self._socket)
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", self.port))
            self._full.append(one)

    def close(self) -> None:
        """Be gone."""
        if self._socket.fileno() < 0:
            return
        asyncio.get_running_loop().remove_reader(self._socket)
        for one in (self._socket, *self._full):
            one.close()


@dataclass(slots=True)
class Agent:
    """One agent with its launcher and ranks.

    Attributes:
        ended: the attempt whose ranks have ended; it is ready for the next.
        ranks: those that live.
        lost: the node is gone.
        bell: its own doorbell; else it shares one.
    """

    number: int
    name: str
    connection: Connection | None = None
    call: Call | None = None
    attempt: int = 0
    ended: int = 0
    world: int = 0
    epoch: int = 0
    ranks: range = range(0)
    joined: bool = False
    lost: bool = False
    bell: Doorbell | None = None

    @property
    def runs(self) -> bool:
        """Whether it has ranks."""
        return bool(self.ranks) and not self.lost


@dataclass(slots=True)
class Fleet:
    """All agents.

    Attributes:
        address: of the coordinator.
        secret: that its user's agents share.
        nodes: agents of the job; further ones are spares.
        nproc: ranks of each.
        store: of the job.
        share: agents on one connection.
        seen: kind of order -> number of an agent -> when it got the last one (CLOCK_MONOTONIC).
        reports, orders: how many messages were sent and received.
        failed: why a save was not committed.
        pause: the most seconds for which this process has done something else than to answer.
    """

    address: tuple[str, int]
    secret: str
    nodes: int
    nproc: int
    store: str
    share: int = 1
    agents: list[Agent] = field(default_factory=list)
    seen: dict[str, dict[int, float]] = field(default_factory=dict)
    reports: int = 0
    orders: int = 0
    born: float = field(default_factory=time.monotonic)
    failed: str = ""
    pause: float = 0.0
    culprit: int = -1  # the rank that is stopped
    _due: deque[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=deque)
    _bell: Doorbell | None = None
    _connections: dict[int, Connection] = field(default_factory=dict)
    _closed: bool = False
    _made: list[Connection] = field(default_factory=list)
    _dialling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DIALLING))
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _asking: tuple[str, grpc.aio.Channel] | None = None

    # ---- connections -------------------------------------------------------------------------------------------------

    def join(self, spares: int, own_bells: Iterable[int]) -> None:
        """Let all agents come, with a launcher that is ready."""
        self._bell = Doorbell(4096)
        self.agents = [Agent(n, f"n{n:05d}") for n in range(self.nodes + spares)]
        for number in own_bells:
            self.agents[number].bell = Doorbell()
        for agent in self.agents:
            self._spawn(self._connect(agent))
        self._spawn(self._beat())
        self._spawn(self._work())

    async def _connect(self, agent: Agent) -> None:
        loop = asyncio.get_running_loop()
        async with self._dialling:
            # Proofs are bound to an address and not to a connection: all ask on one that is gRPC's own.
            try:
                admission = await self._ask()
            except CkptsvcError:
                self._spawn(self._connect_later(agent))
                return
            key = agent.number // self.share
            connection = self._connections.get(key)
            while connection is None or connection.ended:
                try:
                    made = await loop.create_connection(self._new_connection, *self.address)
                except OSError:
                    await asyncio.sleep(random.uniform(0.5, 1.0) * RECONNECT)
                    continue
                known = self._connections.get(key)
                if known is not None and not known.ended:  # an agent that shares it was faster
                    made[1].close()
                    connection = known
                else:
                    connection = self._connections[key] = made[1]
        agent.connection = connection
        agent.call = connection.call(
            admission.metadata, lambda message: self._hear(agent, message), lambda: self._lost(agent, connection)
        )
        self._send(agent, [pb.Report(agent_hello=pb.AgentHello(node=agent.name))])
        self._send(agent, self._resync(agent))

    async def _connect_later(self, agent: Agent) -> None:
        await asyncio.sleep(RECONNECT)
        await self._connect(agent)

    async def _ask(self) -> proof.Admission:
        address = numeric(f"{self.address[0]}:{self.address[1]}")
        if self._asking is None or self._asking[0] != address:
            if self._asking is not None:
                await self._asking[1].close()
            self._asking = address, grpc.aio.insecure_channel(address, options=OPTIONS)
        return await proof.ask(self._asking[1], address, self.secret, "Attend")

    def _new_connection(self) -> Connection:
        connection = Connection(PATH)
        self._made.append(connection)
        return connection

    def _lost(self, agent: Agent, connection: Connection) -> None:
        """The coordinator is gone: look for the next one."""
        if agent.connection is connection:
            agent.connection = agent.call = None
        if not agent.lost and not self._closed:
            self._spawn(self._connect(agent))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Hang up all."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._connections.values():
            connection.close()
        if self._asking is not None:
            await self._asking[1].close()
        for bell in {self._bell, *(agent.bell for agent in self.agents)}:
            if bell is not None:
                bell.close()

    @property
    def waiting(self) -> bool:
        """Whether anything has not been sent yet, because the coordinator does not read."""
        return any(connection.waiting for connection in self._connections.values())

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes to and from the coordinator so far."""
        return sum(c.sent for c in self._made), sum(c.received for c in self._made)

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _send(self, agent: Agent, reports: Iterable[pb.Report]) -> None:
        """What an agent has to say at one time; a real one's uplink bundles it like this."""
        if agent.connection is None or agent.call is None or agent.lost:
            return
        for message in bundles(reports):
            agent.connection.send(agent.call, message.SerializeToString())
            self.reports += 1

    def _resync(self, agent: Agent) -> Iterator[pb.Report]:
        bell = agent.bell or self._bell
        assert bell is not None
        yield pb.Report(
            node_joined=pb.NodeJoined(
                job=JOB, node=agent.name, node_rank=-1, min_nodes=self.nodes, max_nodes=self.nodes, nproc=self.nproc,
                max_restarts=1 << 20, address="127.0.0.1", doorbell=bell.port, clock=time.time(),
                attempt=agent.attempt if agent.ranks else 0, first_rank=agent.ranks.start, world_size=agent.world,
                uptime=time.monotonic() - self.born,
            )
        )  # fmt: skip
        if not agent.ranks:
            yield self._ready(agent)
        elif agent.joined:
            yield from self._attached(agent)

    def _ready(self, agent: Agent) -> pb.Report:
        return pb.Report(node_ready=pb.NodeReady(job=JOB, node=agent.name, attempt=agent.ended, port=29500))

    def _attached(self, agent: Agent) -> Iterator[pb.Report]:
        for rank in agent.ranks:
            yield pb.Report(
                rank_joined=pb.RankJoined(
                    job=RUN, node=agent.name, store=self.store, attempt=agent.attempt, rank=rank,
                    world_size=agent.world, epoch=agent.epoch,
                )
            )  # fmt: skip
            # Of twelve ranks on a node, each holds what its peers on the other nodes hold (tensor parallel).
            digest = f"{rank % self.nproc:032x}"
            yield pb.Report(announced=pb.Announced(job=RUN, attempt=agent.attempt, rank=rank, digest=digest))

    def _ended(self, agent: Agent, ranks: Iterable[int], status: int) -> Iterator[pb.Report]:
        for rank in ranks:
            yield pb.Report(
                rank_left=pb.RankLeft(job=RUN, node=agent.name, attempt=agent.attempt, rank=rank, died=True)
            )
            yield pb.Report(
                rank_exited=pb.RankExited(job=JOB, node=agent.name, attempt=agent.attempt, rank=rank, status=status)
            )

    async def _beat(self) -> None:
        """All agents tell how far their ranks are, each in its turn, as often as agents of so large a job do."""
        turn, now = 0, time.monotonic()
        while True:
            await asyncio.sleep(0.02)
            now, before = time.monotonic(), now
            self.pause = max(self.pause, now - before)
            step = int((now - self.born) / STEP)
            period = progress_every(self.nodes)
            due = int((now - self.born) * len(self.agents) / period)
            for number in range(max(turn, due - len(self.agents)), due):
                agent = self.agents[number % len(self.agents)]
                if agent.runs and agent.joined:
                    done = pb.Progressed(job=RUN, attempt=agent.attempt, node=agent.name, lowest=step, highest=step)
                    self._send(agent, [pb.Report(progressed=done)])
            turn = due

    # ---- orders ------------------------------------------------------------------------------------------------------

    def _hear(self, agent: Agent, message: bytes) -> None:
        now = time.monotonic()
        if agent.lost:
            return
        order = pb.Order.FromString(message)
        kind = order.WhichOneof("effect") or ""
        self.orders += 1
        self.seen.setdefault(kind, {})[agent.number] = now
        if kind == "start":
            start = order.start
            agent.attempt, agent.world, agent.epoch, agent.joined = start.attempt, start.world_size, 0, False
            agent.ranks = range(start.first_rank, start.first_rank + self.nproc)
            self._later(random.uniform(*WARM), self._attach, agent, start.attempt)
        elif kind == "epoch_allotted":
            agent.epoch = order.epoch_allotted.epoch
        elif kind == "stop" and order.stop.attempt == agent.attempt and agent.ranks:
            self._later(random.uniform(*ENDS), self._end, agent, agent.attempt)
        elif kind == "examine":
            self._later(WATCH, self._examine, agent, order.examine)
        elif kind == "save_ended" and order.save_ended.outcome.code:
            self.failed = order.save_ended.outcome.reason
        elif kind == "kill":
            self._send(agent, self._ended(agent, [order.kill.rank], -9))

    def _later(self, delay: float, do: Callable[..., None], *arguments: Any) -> None:
        """Do something then, or as soon after that as it has its turn."""
        asyncio.get_running_loop().call_later(delay, self._due.append, (do, arguments))

    async def _work(self) -> None:
        """Do what is due, a little at a time: pings of others want an answer meanwhile."""
        while True:
            for _ in range(min(len(self._due), AT_ONCE)):
                do, arguments = self._due.popleft()
                do(*arguments)
            await asyncio.sleep(0 if self._due else 0.005)

    def _attach(self, agent: Agent, attempt: int) -> None:
        if agent.attempt == attempt and agent.ranks:
            agent.joined = True
            self._send(agent, self._attached(agent))

    def _end(self, agent: Agent, attempt: int) -> None:
        if agent.attempt == attempt and agent.ranks:
            reports = [*self._ended(agent, agent.ranks, -15)]
            agent.ranks, agent.joined, agent.ended = range(0), False, attempt
            self._send(agent, [*reports, self._ready(agent)])

    def _examine(self, agent: Agent, order: pb.Examine) -> None:
        wanted = list(order.ranks or agent.ranks)
        found = [self._evidence(rank, brief=order.brief) for rank in wanted if rank == self.culprit]
        others = [rank for rank in wanted if rank != self.culprit]
        if others:  # alike but for their numbers: to make all of them takes seconds for ten thousand agents
            alike = self._evidence(others[0], brief=order.brief)
            for rank in others:
                found.append(pb.RankEvidence())
                found[-1].CopyFrom(alike)
                found[-1].rank, found[-1].pid = rank, 4000 + rank
        examined = pb.Examined(job=RUN, attempt=order.attempt, incident=order.incident, node=agent.name, ranks=found,
            round=order.round)  # fmt: skip
        self._send(agent, [pb.Report(examined=examined)])

    def _evidence(self, rank: int, *, brief: bool) -> pb.RankEvidence:
        stuck = rank == self.culprit
        number, where = (41, "") if stuck else (42, "all_reduce of [1024] float32")
        found = pb.RankEvidence(
            rank=rank, pid=4000 + rank, phase="step", step=41, stalled=5.0, threshold=4.0, state="T" if stuck else "S",
            cpu=0.0, waits_in="do_signal_stop" if stuck else "futex_wait", answers=not stuck, asked=True,
            enqueued=number, completed=41, collective=where, stack="" if stuck else _WAITS, threads=40,
            resident=8 << 30, io_bytes=1 << 30, native_stack=_STUCK if stuck else "",
            groups=[pb.GroupProgress(group=f"{name} nccl", enqueued=number, completed=41, collective=where)
                for name in ("default", f"tp{rank // self.nproc}")],
        )  # fmt: skip
        found.other_stacks, found.log_tail = _OTHERS, _LOG
        if brief:
            shorten(found)
        return found

    # ---- what happens to them ----------------------------------------------------------------------------------------

    def kill_rank(self, agent: Agent) -> None:
        """SIGKILL to a rank: its agent sees it at once, its launcher a moment later."""
        left, exited = self._ended(agent, [random.choice(agent.ranks)], -9)
        self._send(agent, [left])
        asyncio.get_running_loop().call_later(0.005, self._send, agent, [exited])

    def cut(self, agent: Agent) -> None:
        """The node ends: its connections are reset."""
        agent.lost = True
        if agent.bell is not None:
            agent.bell.close()
        if agent.connection is not None and agent.call is not None:
            agent.connection.end(agent.call)

    def silence(self, agent: Agent) -> None:
        """The node is cut off: its connections stay, and nothing answers."""
        agent.lost = True
        if agent.bell is not None:
            agent.bell.mute()
        if agent.connection is not None:
            agent.connection.freeze()

    def freeze_rank(self, agent: Agent, floor: float, looks_every: float) -> None:
        """SIGSTOP to a rank: a moment later all others wait for it, and all agents see it when `floor` has passed."""
        self.culprit = random.choice(agent.ranks)

        def spread() -> float:
            return random.uniform(0, STEP) + random.uniform(0, stalls_within(self.nodes))

        for one in self.agents:
            if one.runs:
                late = floor + random.uniform(0, looks_every) + (0.0 if one is agent else spread())
                self._later(late, self._stall, one, one.attempt)

    def _stall(self, agent: Agent, attempt: int) -> None:
        if agent.attempt == attempt and agent.ranks:
            rank = self.culprit if self.culprit in agent.ranks else agent.ranks.start
            stalled = pb.Stalled(job=RUN, node=agent.name, attempt=attempt, rank=rank, phase="step", step=41,
                seconds=4.1, threshold=4.0, stopped=rank == self.culprit)  # fmt: skip
            self._send(agent, [pb.Report(stalled=stalled)])

    def replace(self, agent: Agent) -> None:
        """A node that is gone comes back, as a new one."""
        if agent.connection is not None:
            agent.connection.close()
        if agent.bell is not None:
            agent.bell.close()
            agent.bell = Doorbell()
        agent.lost, agent.ranks, agent.attempt, agent.ended, agent.epoch = False, range(0), 0, 0, 0
        self._connections.pop(agent.number // self.share, None) if self.share == 1 else None
        self._spawn(self._connect(agent))

    async def save(
        self, step: int, named: Callable[[int], str], columns: Callable[[int], bytes], held_back: int
    ) -> None:  # fmt: skip
        """All ranks stage and write a shard, but for the last word of one rank."""
        for agent in self.agents:
            await asyncio.sleep(0)  # pings want an answer
            if agent.runs:
                self._send(agent, [
                    pb.Report(staged=pb.Staged(job=RUN, epoch=agent.epoch, step=step, node=agent.name, rank=rank,
                        attempt=agent.attempt, world_size=agent.world, nbytes=NBYTES, store=self.store))
                    for rank in agent.ranks])  # fmt: skip
                self._send(agent, [self._durable(agent, rank, step, named(rank), columns(rank)) for rank in agent.ranks
                    if rank != held_back])  # fmt: skip

    def finish_save(self, agent: Agent, step: int, name: str, columns: bytes) -> None:
        """The last shard is durable."""
        self._send(agent, [self._durable(agent, agent.ranks.start, step, name, columns)])

    def _durable(self, agent: Agent, rank: int, step: int, name: str, columns: bytes) -> pb.Report:
        digests = bytes(8 * NBYTES // EXTENT)
        return pb.Report(durable=pb.Durable(job=RUN, epoch=agent.epoch, step=step, rank=rank, name=name, nbytes=NBYTES,
            extent=EXTENT, digests=digests, columns=columns))  # fmt: skip

    async def wait(self, kind: str, done: Callable[[dict[int, float]], bool], patience: float) -> dict[int, float]:
        """Wait for orders of a kind: until `done` says so of who has got one, and when.

        Raises:
            AgentUnavailable: it has not in `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while not done(self.seen.get(kind, {})):
            if time.monotonic() > deadline:
                got = len(self.seen.get(kind, {}))
                raise AgentUnavailable(
                    f"{got} of {len(self.agents)} agents have got the order {kind!r} in {patience:g} s",
                    hint="both sides need a core of their own: try on a quiet machine, or with fewer --agents",
                )
            await asyncio.sleep(0.02)
        return self.seen[kind]
