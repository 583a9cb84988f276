"""A node of the simulation: its agent, `ckptsvc run` with its ranks, and the shared memory that outlives both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckptsvc.agent import reports
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.launches import Launcher, Launches
from ckptsvc.agent.local import Local
from ckptsvc.agent.node import Node
from ckptsvc.agent.orders.orders import ASK_AGAIN
from ckptsvc.agent.orders.standing import StandingOrders
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.watching.watch import Watch
from ckptsvc.control.effects import Answer
from ckptsvc.control.runs import ranks_of
from ckptsvc.control.stalls import Limits
from ckptsvc.errors import ArenaExhausted
from ckptsvc.pipeline.arena import Arena, ArenaPool, Kept, Label, Parity, State
from ckptsvc.rpc.identity import PHASE_BYTES
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Metrics, Skip

if TYPE_CHECKING:
    from simulation import Line, Session, World

JOB, THIEF, STORE = "job", "thief", "file:///run"
SLOTS = 2
METRICS = Metrics("simulation")
LIMITS = Limits(startup=20.0)
LOOK_EVERY = 0.5
GROW = 30.0


class Memory(ArenaPool):
    """The arenas, without files: what a killed agent leaves is what has a label."""

    def stage(self, arena: Arena, label: Label) -> None:
        arena.label, arena.state, arena.holder = label, State.STAGED, ""

    def _set_filled(self, arena: Arena, nbytes: int) -> None:
        """There is no file."""

    def keep(self, arena: Arena) -> None:
        arena.state = State.KEPT

    def keep_guest(self, arena: Arena, label: Label) -> None:
        arena.label, arena.state, arena.step = label, State.KEPT, label.step

    def release(self, arena: Arena) -> None:
        arena.label, arena.state, arena.step, arena.holder = None, State.FREE, -1, ""

    def provide(self, job: str, rank: int) -> None:
        for slot in range(SLOTS - len(self.of(job, rank))):
            name = f"{job}-{rank}-{slot}"
            while name in self.arenas:
                name += "'"
            self.arenas[name] = Arena(name, Path(name), 1, job, rank)


@dataclass(eq=False)
class Rank:
    """One training process."""

    job: str
    number: int
    attempt: int
    world_size: int
    started: float
    status: int | None = None
    token: str = ""
    epoch: int = 0  # of the attempt, as far as this process knows: a new agent learns it from here
    attached: bool = False
    last_order: int = -1
    stepped_at: float = 0.0
    hangs: str = ""  # what is seen of it: "T": it is stopped; "elsewhere": it sleeps where it should not
    hung: str = ""  # what was seen of it when it last did, and
    went_on_at: float = -1e9  # when it went on

    @property
    def alive(self) -> bool:
        return self.status is None


@dataclass(eq=False)
class Attempt:
    """The ranks of one attempt, in lockstep."""

    number: int
    world_size: int
    ranks: dict[int, tuple[Machine, Rank]] = field(default_factory=dict)
    step: int = -1
    began: int = -1


class Machine:
    """One node."""

    line: Line

    def __init__(self, world: World, name: str) -> None:
        self._world, self.name = world, name
        self.pool = Memory(Path("unused"), 1 << 40)
        self.local = Local(name, self.pool, METRICS, None, "")  # type: ignore[arg-type]
        self.ranks: dict[int, Rank] = {}  # of the launched job
        self.agent_alive = False
        self._incarnation = 0
        self._attempt = self._first_rank = self._world_size = 0
        self._launched = self._connected = self._greeted = False
        self._since = 0.0
        self._status: int | None = None
        self._lost = False
        self.agent_stopped_until = self._said_until = 0.0
        self.standing = StandingOrders()  # in place of the file that outlives an agent
        self.answers: dict[str, pb.Answered] = {}

    def everything(self) -> Iterator[pb.Report]:
        """What the agent tells a coordinator that it has connected to."""
        launcher = self.launches._by_job.get(JOB)
        if launcher is not None:
            launcher.hello.uptime = self._world.now - self._since  # the agent adds the time on the wall since the hello
        yield from self.local.resync("")

    def answer(self, now: float) -> Answer:
        """What the doorbell of `ckptsvc run` says to the coordinator."""
        if now < self.line.cut_until:
            return Answer.SILENT
        return Answer.GONE if self._lost or self._status is not None or not self._launched else Answer.UP

    @property
    def launcher_waits(self) -> bool:
        return self._status is None and not self._lost

    # ---- the agent (mirrors agent.server and the parts of agent.saves and agent.arenas that take time) ---------------

    def start_agent(self) -> None:
        if self.agent_alive or self._lost:
            return
        self.agent_alive = True
        self.agent_stopped_until = 0.0  # another process
        self._incarnation += 1
        for arena in list(self.pool.arenas.values()):
            if arena.label is None:
                del self.pool.arenas[arena.name]
        self.local = Local(self.name, self.pool, METRICS, None, "")  # type: ignore[arg-type]
        self.local._uplinks[""] = self.line
        self.local.standing = self.standing
        self.node = Node(self.local, None, slots=SLOTS, linger=1e9, save_timeout=1e9)  # type: ignore[arg-type]
        self.launches = Launches(self.local)
        self.node.launch_order = self.launches.order
        self.watch = Watch(self.local, LIMITS, enabled=True)
        self.node.watch_order = self._watch_order
        self.node.partner_order = self._partner_order
        self.node.people_order = self._people_order
        self._world.later(LOOK_EVERY, self._look, self._incarnation)
        for rank in self.ranks.values():
            self._world.later(self._world.rng.uniform(0, 3), self._register_again, self._incarnation, rank)
        for arena in self.pool.arenas.values():
            assert arena.label is not None
            self.local.job(arena.label.job, "", STORE)
            if arena.state is State.STAGED:
                self._begin_save(arena, arena.label, again=True)
        self.line.connect()
        if self._launched:
            self._world.later(self._world.rng.uniform(0, 1), self._connect_launcher, self._incarnation)

    def kill_agent(self) -> None:
        if self.agent_alive:
            self.agent_alive = self._connected = False
            self.line.break_(self._world.rng.uniform(0, 10))
            for token in list(self.local.sessions):
                self.node._forget(token)

    def obey(self, order: pb.Order) -> None:
        """An order of the coordinator has arrived."""
        if self._world.now < self.agent_stopped_until:
            wait = self.agent_stopped_until - self._world.now
            self._world.later(wait, self._obey_late, self._incarnation, self.line.session, order)
            return
        if order.WhichOneof("effect") == "save_ended" and order.job in self.local.jobs:
            self._world.checks.told(order.job, order.save_ended.outcome)
        self.node.on_order(order)
        launcher = self.launches._by_job.get(JOB)
        while launcher is not None and not launcher.orders.empty():
            response = launcher.orders.get_nowait()
            # A stream: what was said first arrives first.
            self._said_until = max(self._world.now + self._world.rng.uniform(0, 0.1), self._said_until)
            delay = self._said_until - self._world.now
            self._world.later(delay, self._launcher_obeys, self._incarnation, response)

    def _obey_late(self, incarnation: int, session: Session, order: pb.Order) -> None:
        if self._is(incarnation) and not session.broken:  # else the coordinator may have gone on without this node
            self.obey(order)

    # ---- what people order (mirrors agent.orders) --------------------------------------------------------------------

    def ask(self, asked: pb.Asked) -> None:
        """Somebody gives an order to this node's agent."""
        if self.agent_alive:
            self._ask(self._incarnation, asked)

    def _ask(self, incarnation: int, asked: pb.Asked) -> None:
        answer = self.answers.get(asked.id)
        if self._is(incarnation) and (answer is None or answer.begun):
            self.line.report(pb.Report(asked=asked))
            self._world.later(ASK_AGAIN, self._ask, incarnation, asked)

    def _people_order(self, order: pb.Order) -> None:
        if order.HasField("vacate"):
            self.standing.vacate(order.vacate.reason if order.vacate.on else "")
        else:
            self.answers[order.answered.id] = order.answered

    # ---- what nodes keep for each other (mirrors agent.partners) -----------------------------------------------------

    def _partner_order(self, job: LocalJob, order: pb.Order) -> None:
        effect = order.protect if order.HasField("protect") else order.rebuild
        done = self._protected if order.HasField("protect") else self._rebuilt
        self._world.later(self._world.rng.expovariate(1), done, self._incarnation, job, effect)

    def has(self, job: str, key: tuple[int, int], ranks: list[int], group: dict[str, list[int]] | None = None) -> bool:
        """Whether all that is in memory here, for others to read, and this node's part of the parity of that group."""
        held = {a.label.rank: a.label for a in self.pool.arenas.values() if a.label and (a.job, a.key) == (job, key)}
        parity = held[-1].parity if -1 in held else None
        members = {node: [kept.rank for kept in shards] for node, shards in parity.members} if parity else None
        return self.agent_alive and held.keys() >= set(ranks) and (group is None or members == group)

    def _protected(self, incarnation: int, job: LocalJob, order: pb.Protect) -> None:
        key, machines = (order.epoch, order.step), self._world.machines
        held = {holder.node: ranks_of(holder.ranks) for holder in order.members}
        if not self._is(incarnation) or not all(machines[n].has(job.name, key, ranks) for n, ranks in held.items()):
            return
        if not order.losses:
            for rank in (rank for ranks in held.values() for rank in ranks):
                self._keep_guest(job, order, rank)
            return
        members = [(node, [Kept(rank, 1, b"") for rank in ranks]) for node, ranks in held.items()]
        self._keep_guest(job, order, -1, Parity(losses=order.losses, digests=b"", members=members))

    def _rebuilt(self, incarnation: int, job: LocalJob, order: pb.Rebuild) -> None:
        if not self._is(incarnation):
            return
        left = [holder for holder in order.members if holder.address]
        key, machines, why = (order.epoch, order.step), self._world.machines, ""
        group = {holder.node: ranks_of(holder.ranks) for holder in order.members}
        able = [machines[h.node].has(job.name, key, group[h.node], group) for h in left]
        if not all(able) or len(order.members) - len(left) > order.losses:
            why = "not enough is left"
        else:
            for rank in ranks_of(order.ranks):
                self._keep_guest(job, order, rank)
        event = pb.Rebuilt(job=job.name, node=self.name, epoch=order.epoch, step=order.step, why=why)
        self.line.report(pb.Report(rebuilt=event))

    def _keep_guest(
        self, job: LocalJob, order: pb.Protect | pb.Rebuild, rank: int, parity: Parity | None = None
    ) -> None:
        key = order.epoch, order.step
        own = [a for a in self.pool.arenas.values() if a.guest and (a.job, a.rank) == (job.name, rank)]
        anew = [a for a in own if a.key == key and parity and a.label and a.label.attempt < order.attempt]
        if any(a.key >= key for a in own if a not in anew):
            return
        if anew:
            (arena,) = anew
            self.local.dropped(job, arena.label)
        elif len(own) < SLOTS:
            name = f"guest-{job.name}-{rank}-{order.step}-{order.epoch}"
            arena = self.pool.arenas[name] = Arena(name, Path(name), 1, job.name, rank, guest=True)
        else:
            arena = min(own, key=lambda a: a.step)
            self.local.dropped(job, arena.label)
        label = Label(
            job=job.name, store=STORE, coordinator="", attempt=order.attempt, epoch=order.epoch, step=order.step,
            rank=rank, world_size=order.world_size, nbytes=1, extent=1 << 20, aliases={}, kept=True, guest=True,
            parity=parity,
        )  # fmt: skip
        self.pool.keep_guest(arena, label)
        self.line.report(reports.staged(self.name, label, ended=True))

    # ---- the watch (mirrors agent.watch where it takes time) ---------------------------------------------------------

    def _look(self, incarnation: int) -> None:
        if self._is(incarnation):
            if self._world.now >= self.agent_stopped_until:
                self.watch.look(self._world.now)
            self._world.later(LOOK_EVERY, self._look, incarnation)

    def _watch_order(self, job: LocalJob, order: pb.Order) -> None:
        if order.HasField("examine"):
            self._world.later(self._world.rng.uniform(0.2, 1.5), self._examined, self._incarnation, job, order.examine)
            return
        self.watch.look(self._world.now)
        rank = self.ranks.get(order.kill.rank)
        still = rank is not None and order.kill.state in ("", rank.hangs)
        if rank is not None and still and self.watch.hangs(job.name, order.kill.attempt, rank.number):
            self._world.checks.killing(rank)
            self._exit(rank, -9)

    def _examined(self, incarnation: int, job: LocalJob, order: pb.Examine) -> None:
        if not self._is(incarnation) or self._world.now < self.agent_stopped_until:
            return
        examined = pb.Examined(
            job=job.name, attempt=order.attempt, incident=order.incident, round=order.round, node=self.name
        )
        stalls = self.watch._stalls.get((job.name, order.attempt))
        for session in self.local.sessions.values():
            rank = self.ranks.get(session.reg.rank)
            if rank is None or stalls is None or (session.reg.job, session.reg.attempt) != (job.name, order.attempt):
                continue
            evidence = examined.ranks.add(rank=rank.number, state="S", stack="all_reduce", step=1)
            evidence.stalled, evidence.threshold = stalls.quiet(rank.number), stalls.allowed(rank.number)
            if rank.hangs:
                evidence.state, evidence.stack = ("T", "") if rank.hangs == "T" else ("S", "elsewhere")
            late = bool(rank.hangs)
            evidence.groups.add(group="g", enqueued=2 - late, completed=1, collective="" if late else "all_reduce")
        self.line.report(pb.Report(examined=examined))

    def _register_again(self, incarnation: int, rank: Rank) -> None:
        """As client.session._keep_connected."""
        lives = rank.alive and rank.attached and rank.hangs != "T"
        if lives and self._is(incarnation) and rank.token not in self.local.sessions:
            self._register(rank)

    def _register(self, rank: Rank) -> bool:
        if not self.agent_alive:
            return False
        registration = Registration(
            op="register",
            job=rank.job,
            store=STORE,
            attempt=rank.attempt,
            rank=rank.number,
            world_size=rank.world_size,
            epoch=rank.epoch,
            every_seconds=self._world.schedule.every_seconds,
        )
        rank.token, _, fd = self.node.register(registration, 0)
        os.close(fd)
        self._beat(rank)
        self.pool.provide(rank.job, rank.number)
        self.local.sessions[rank.token].announced = (0, "digest")
        self.line.report(reports.announced(self.local.sessions[rank.token]))
        return True

    def _beat(self, rank: Rank) -> None:
        page = self.local.sessions[rank.token].page
        if not page.get("phases"):
            page.enter(b"step".ljust(PHASE_BYTES, b"\0"), 1)
        page.put("at", int(self._world.now * 1e9) + 1)

    def _snapshot(self, rank: Rank, step: int) -> None:
        """As client.session and agent.arenas: an arena, a copy, and it is the agent's."""
        if rank.token not in self.local.sessions:
            if self._register(rank):
                self._world.note(f"rank {rank.number} on {self.name} has found its agent again, too late for {step}")
            return
        session = self.local.sessions[rank.token]
        job, attempt = self.local.jobs[rank.job], self.local.jobs[rank.job].attempt(rank.attempt)
        try:
            if attempt.refused or not attempt.epoch:
                raise ArenaExhausted(str(attempt.refused or "no epoch"))
            arena, evicted = self.pool.acquire(rank.job, rank.number, 1, step, rank.token)
        except ArenaExhausted as error:
            self.node.arenas._skip(job, session, attempt.epoch, step, str(error), Skip.NO_ARENA)
            return
        self.local.dropped(job, evicted)
        rank.epoch = attempt.epoch
        label = Label(
            job=rank.job,
            store=STORE,
            coordinator="",
            attempt=rank.attempt,
            epoch=attempt.epoch,
            step=step,
            rank=rank.number,
            world_size=rank.world_size,
            nbytes=1,
            extent=1 << 20,
            aliases={},
        )
        self._world.later(self._world.rng.uniform(0, 0.4), self._submit, self._incarnation, rank, arena, label)

    def _submit(self, incarnation: int, rank: Rank, arena: Arena, label: Label) -> None:
        if rank.alive and self._is(incarnation) and arena.state is State.FILLING:
            self.pool.stage(arena, label)
            self._begin_save(arena, label)

    def _begin_save(self, arena: Arena, label: Label, *, again: bool = False) -> None:
        self.line.report(reports.staged(self.name, label, again=again))
        self._world.later(self._world.rng.expovariate(1), self._written, self._incarnation, arena, label, 0)

    def _written(self, incarnation: int, arena: Arena, label: Label, tries: int) -> None:
        if not self._is(incarnation):
            return
        if self._world.store.down and tries < 3:  # the store is wrapped in Retrying
            self._world.later(self._world.rng.uniform(1, 8), self._written, incarnation, arena, label, tries + 1)
            return
        if self._world.store.down:
            result = reports.shard_failed(label, "store-unavailable", "the store is down")
        else:
            self._world.store.shards.add((label.epoch, label.step, label.rank))
            event = pb.Durable(job=label.job, epoch=label.epoch, step=label.step, rank=label.rank, name="shard")
            result = pb.Report(durable=event)
        self.node.saves._tell(self.local.jobs[label.job], label, result)

    def _is(self, incarnation: int) -> bool:
        return self.agent_alive and incarnation == self._incarnation

    # ---- `ckptsvc run` (mirrors agent.launcher and Launches.serve) ---------------------------------------------------

    def start_launcher(self) -> None:
        self._launched, self._since = True, self._world.now
        self._connect_launcher(self._incarnation)

    def _connect_launcher(self, incarnation: int) -> None:
        if not self._is(incarnation) or self._connected or self._status is not None or self._lost:
            return
        self._connected = True
        schedule = self._world.schedule
        hello = agent_pb2.LauncherHello(
            job=JOB,
            node=self.name,
            node_rank=-1,
            min_nodes=schedule.least,
            max_nodes=schedule.most,
            nproc=schedule.nproc,
            max_restarts=30,
            address=self.name,
            attempt=self._attempt if self.ranks else 0,
            first_rank=self._first_rank,
            world_size=self._world_size,
            doorbell=1,
            grow=GROW,
            uptime=self._world.now - self._since,
            again=self._greeted,
        )
        self._greeted = True
        launcher = self.launches._by_job[JOB] = Launcher(hello, "", told=hello.again)
        self.launches._introduce(launcher, self.line)
        if not self.ranks:
            self._say_ready()
        for rank in self.ranks.values():
            if not rank.alive:
                self._say_exited(rank)

    def _say_ready(self) -> None:
        launcher = self.launches._by_job.get(JOB)
        if self.agent_alive and launcher is not None:
            launcher.ready = agent_pb2.LauncherReady(attempt=self._attempt, port=1)
            launcher.hello.attempt = 0
            launcher.exits.clear()
            self.line.report(self.launches._ready(launcher))

    def _say_exited(self, rank: Rank) -> None:
        launcher = self.launches._by_job.get(JOB)
        if self.agent_alive and launcher is not None and self.ranks.get(rank.number) is rank:
            event = pb.RankExited(
                job=JOB, node=self.name, attempt=rank.attempt, rank=rank.number, status=rank.status or 0
            )
            report = launcher.exits[rank.number] = pb.Report(rank_exited=event)
            self.line.report(report)

    def _launcher_obeys(self, incarnation: int, response: agent_pb2.LaunchResponse) -> None:
        if not self._is(incarnation) or self._status is not None:
            return
        kind = response.WhichOneof("order")
        if kind == "start":
            self._stop_ranks()
            self._start_ranks(response.start)
        elif kind == "stop" and response.stop.attempt == self._attempt:
            self._stop_ranks()
            self._world.later(self._world.rng.uniform(0, 2), self._stopped, self._attempt)
        elif kind == "end":
            self._end(response.end.status)

    def _end(self, status: int) -> None:
        self._stop_ranks()
        self.ranks.clear()
        self._status = status
        self._connected = False
        del self.launches._by_job[JOB]
        self.line.report(pb.Report(node_left=pb.NodeLeft(job=JOB, node=self.name, detail="its launcher is gone")))

    def _start_ranks(self, order: agent_pb2.StartRanks) -> None:
        world = self._world
        self._attempt, self._first_rank, self._world_size = order.attempt, order.first_rank, order.world_size
        self.ranks.clear()
        attempt = world.attempts.get(order.attempt)
        # A coordinator that knows of nothing may count to this number again after a node that was away for long.
        if attempt is None or not any(rank.alive for _, rank in attempt.ranks.values()):
            attempt = world.attempts[order.attempt] = Attempt(order.attempt, order.world_size)
            world.later(1.0, self._train, attempt)
        for number in range(order.first_rank, order.first_rank + world.schedule.nproc):
            rank = self.ranks[number] = Rank(JOB, number, order.attempt, order.world_size, world.now)
            attempt.ranks[number] = (self, rank)
            world.later(world.rng.uniform(0.2, 1), self._attach, rank)

    def _stop_ranks(self) -> None:
        for rank in self.ranks.values():
            self._exit(rank, -15)

    def _stopped(self, attempt: int) -> None:
        if attempt == self._attempt and not any(rank.alive for rank in self.ranks.values()):
            self.ranks.clear()
            self._say_ready()

    # ---- training processes (mirror client.session) ------------------------------------------------------------------

    def _attach(self, rank: Rank) -> None:
        """Register, and wait until the attempt has an epoch and everybody has announced."""
        if not rank.alive:
            return
        if rank.token not in self.local.sessions:
            self._register(rank)
        if self.agent_alive:
            state = self.local.jobs[rank.job].attempt(rank.attempt)
            if state.refused:
                self._world.note(f"rank {rank.number} of {rank.job} on {self.name} is refused: {state.refused}")
                self._exit(rank, 11)
                return
            if 0 in state.groups and (state.epoch or state.epoch_error):
                rank.attached, rank.epoch = True, state.epoch
                self._world.brain.asked(rank.job)
                return
        if self._world.now - rank.started > 120:
            self._exit(rank, 20)
            return
        self._world.later(0.5, self._attach, rank)

    def _train(self, attempt: Attempt) -> None:
        """One step of all ranks, again and again; it stands still when one of them is missing."""
        world = self._world
        if attempt.ranks and not any(rank.alive for _, rank in attempt.ranks.values()):
            return
        there = len(attempt.ranks) == attempt.world_size
        if there and all(r.alive and r.attached and not r.hangs for _, r in attempt.ranks.values()):
            if attempt.step < 0:
                attempt.began = attempt.step = self._restored()
            attempt.step += 1
            for machine, rank in attempt.ranks.values():
                machine._step(rank, attempt.step, attempt.began)
            if attempt.step >= world.schedule.steps:
                for machine, rank in attempt.ranks.values():
                    world.later(world.rng.uniform(0.5, 1.5), machine._exit, rank, 0)
                return
        world.later(world.rng.uniform(0.5, 1.5), self._train, attempt)

    def _restored(self) -> int:
        """The newest step in memory or in the store."""
        snapshots = self._world.brain.core.snapshots(JOB) if self._world.brain.alive else []
        newest = max(((s.epoch, s.step) for s in snapshots), default=(0, 0))
        return max(newest, max(self._world.store.commits, default=(0, 0)))[1]

    def _step(self, rank: Rank, step: int, began: int) -> None:
        rank.stepped_at = self._world.now
        due = step % self._world.schedule.every_steps == 0
        session = self.local.sessions.get(rank.token) if self.agent_alive else None
        if session is not None:
            session.page.put("step", step)
            self._beat(rank)
            progressed = pb.Progressed(
                job=JOB, attempt=rank.attempt, node=self.name, lowest=step, highest=step, began=began
            )
            self.line.report(pb.Report(progressed=progressed))
            if due:
                due = not session.page.is_paused(step)
                self._world.checks.automatic(self, rank, step, taken=due)
            order = session.page.get("save_at")
            if order != rank.last_order and order <= step:
                rank.last_order = order
                if order == step:
                    due = True
                elif order >= 0:
                    self.node.arenas.abandon(rank.token, "", order, "already past the step at which to save")
        if due and self.agent_alive:
            self._snapshot(rank, step)

    def _exit(self, rank: Rank, status: int) -> None:
        """The process ends; agent and launcher see it, if they are there."""
        if not rank.alive:
            return
        rank.status = status
        if self.agent_alive and rank.token in self.local.sessions:
            if status == 0:
                self.node.leave(rank.token)
            else:
                self._world.later(0.05, self.node._gone, rank.token, False, "process ended")
        if rank.job == JOB:
            self._world.later(self._world.rng.uniform(0, 0.2), self._say_exited, rank)

    # ---- faults ------------------------------------------------------------------------------------------------------

    def kill_a_rank(self, which: int) -> None:
        ranks = [rank for rank in self.ranks.values() if rank.alive]
        if ranks:
            self._exit(ranks[which % len(ranks)], -9)

    def hang_a_rank(self, which: int, how: str, seconds: float) -> None:
        """It stops, for so many seconds; 0: for ever."""
        ranks = [rank for rank in self.ranks.values() if rank.alive and not rank.hangs]
        if ranks:
            rank = ranks[which % len(ranks)]
            others = [r for m in self._world.machines.values() for r in m.ranks.values() if r.hangs == "T"]
            if 2 * (len(others) + 1) > rank.world_size:
                seconds = seconds or 20.0  # a job of which most ranks are stopped counts as suspended, and is let alone
            rank.hangs = how
            if seconds:
                self._world.later(seconds, self._go_on, rank)

    def _go_on(self, rank: Rank) -> None:
        rank.hung, rank.hangs, rank.went_on_at = rank.hangs, "", self._world.now
        if rank.alive and self.agent_alive:
            self._register_again(self._incarnation, rank)

    def start_thief(self) -> None:
        """Another job wants to write to the run. A coordinator that has just begun does not know the first job yet."""
        world = self._world
        if self.agent_alive and world.brain.alive and world.now - world.brain.born > 15:
            thief = Rank(THIEF, 0, 1, 1, world.now)
            self._attach(thief)
            world.later(world.rng.uniform(2, 20), self._exit, thief, 0)

    def lose(self) -> None:
        """The whole node is gone for ever."""
        for rank in self.ranks.values():
            self._exit(rank, -9)
        self.kill_agent()
        self.pool.arenas.clear()
        self._lost = True
