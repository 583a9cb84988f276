"""A launched job on a few nodes, its agents, one coordinator and one store, under a virtual clock, with faults.

    Schedule.draw(seed).run()           # raises Violation, with what happened

Real are the coordinator's core (`ckptsvc.control`) and what an agent knows and does at once (`agent.node`,
`agent.local`, `agent.launches`, `agent.saves`). In place of what takes time, each with delays of its own: the network
(a stream keeps its order; what is under way when it breaks is lost; the coordinator may notice later than the agent),
the store, the I/O workers, `ckptsvc run` with its ranks, and the training, in which no rank is a step ahead of another.

Everything is drawn from the seed; a failing schedule is the same every time. `check.py` says what must always hold.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from check import Checks, Violation
from machine import JOB, Attempt, Machine

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import (
    AllotEpoch,
    Audit,
    Commit,
    CommitDone,
    Decision,
    Drain,
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
from ckptsvc.control.redundancy import PartnerPolicy
from ckptsvc.control.restart import AWAY_PATIENCE
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

TICK = 0.5
SAVE_TIMEOUT = 60.0
POLICY = Policy(confirm=60.0, give_up=200.0)
HEALED = 5.0
"""Virtual seconds after which a node that was out of reach certainly has heard what it missed."""

PATIENCE = 900.0
"""Virtual seconds after the last fault in which everything must have come to an end."""


@dataclass(frozen=True)
class Fault:
    """Something bad: `kind` happens to `where` at `at` and, where that means something, lasts `seconds`."""

    at: float
    kind: str
    where: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.at:7.2f} {self.kind} {self.where}{lasting}"


KINDS = {
    "kill rank": 5,
    "kill agent": 4,
    "kill coordinator": 3,
    "break line": 4,
    "cut off": 3,
    "store outage": 2,
    "kill rank and agent": 2,
    "another job": 2,
    "stop rank": 3,
    "rank elsewhere": 3,
    "stop agent": 2,
    "lose node": 0.3,
}


VERBS = ["checkpoint", "pause", "pause", "resume", "resume", "restart", "drain", "undrain", "exclude", "include"]


@dataclass(frozen=True)
class Schedule:
    """What is run, and what goes wrong."""

    seed: int
    nodes: int
    least: int
    most: int
    nproc: int
    steps: int
    every_steps: int
    every_seconds: float
    faults: tuple[Fault, ...]
    late: float = 0.0  # seconds after the others at which the last node comes
    partner: str = "off"  # what the nodes keep for each other
    orders: tuple[Fault, ...] = ()  # of people: the verb is the kind, `where` says which node is asked, and which meant

    @staticmethod
    def draw(seed: int) -> Schedule:
        rng = random.Random(f"schedule {seed}")
        faults = []
        for _ in range(rng.randint(0, 6)):
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            seconds = rng.choice([rng.uniform(0.5, 5), rng.uniform(5, 30), rng.uniform(60, 90)])
            if kind in ("kill rank", "break line", "lose node"):
                seconds = 0.0
            elif kind in ("stop rank", "rank elsewhere") and rng.random() < 0.5:
                seconds = 0.0  # for ever
            faults.append(Fault(rng.uniform(0, 60), kind, rng.randrange(100), seconds))
        nodes = rng.randint(1, 3)
        most = rng.choice([nodes, rng.randint(1, nodes)])  # others are spares
        return Schedule(
            seed=seed,
            nodes=nodes,
            least=rng.choice([most, rng.randint(1, most)]),
            most=most,
            nproc=rng.randint(1, 2),
            steps=rng.randint(20, 40),
            every_steps=rng.randint(2, 7),
            every_seconds=rng.choice([0.0, 0.0, 10.0]),
            faults=tuple(sorted(faults, key=lambda f: f.at)),
            late=rng.choice([0.0, 0.0, rng.uniform(5, 50)]),
            partner=random.Random(f"partner {seed}").choice(["off", "copy", "xor", "rs"]),
        )

    @staticmethod
    def losses(seed: int) -> Schedule:
        """Nodes that keep copies or parity for each other, and of which some are lost."""
        rng = random.Random(f"losses {seed}")
        kinds = ["lose node"] * 5 + ["kill agent", "break line", "cut off", "kill coordinator", "kill rank"]
        faults = []
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.uniform(8, 40), rng.choice(kinds)
            seconds = 0.0 if kind in ("lose node", "break line", "kill rank") else rng.uniform(0.5, 5)
            faults.append(Fault(at, kind, rng.randrange(100), seconds))
        nodes = rng.randint(3, 6)
        return Schedule(
            seed=seed, nodes=nodes, least=1, most=rng.choice([nodes, nodes - 1]), nproc=rng.randint(1, 2), steps=40,
            every_steps=rng.randint(2, 7), every_seconds=0.0, faults=tuple(sorted(faults, key=lambda f: f.at)),
            partner=rng.choice(["copy", "xor", "rs"]),
        )  # fmt: skip

    @staticmethod
    def ordered(seed: int) -> Schedule:
        """A job that people give orders to, while the one thing or the other goes wrong."""
        rng = random.Random(f"orders {seed}")
        drawn = Schedule.draw(seed)
        orders = [
            Fault(rng.uniform(2, 50), rng.choice(VERBS), rng.randrange(100), rng.choice([0.0, 0.0, rng.uniform(5, 20)]))
            for _ in range(rng.randint(1, 6))
        ]
        few = drawn.faults if rng.random() < 0.7 else ()
        return replace(drawn, faults=few, steps=rng.randint(30, 60), orders=tuple(sorted(orders, key=lambda o: o.at)))

    def run(self) -> World:
        """Run it to its end, or raise Violation."""
        world = World(self)
        world.run()
        return world

    def shrink(self) -> Schedule:
        """A schedule of as few faults and orders as possible that still fails."""
        for each in (*self.faults, *self.orders):
            fewer = replace(
                self,
                faults=tuple(f for f in self.faults if f is not each),
                orders=tuple(o for o in self.orders if o is not each),
            )
            try:
                fewer.run()
            except Violation:
                return fewer.shrink()
        return self


class Store:
    """What is durable, and the answers of a store that is out of order at times."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.shards: set[tuple[int, int, int]] = set()
        self.commits: dict[tuple[int, int], str] = {}
        self.epochs: list[str] = []
        self.down_until = 0.0

    @property
    def down(self) -> bool:
        return self._world.now < self.down_until

    def take_epoch(self, effect: AllotEpoch) -> EpochDone:
        if self.down:
            return EpochDone(effect.job, effect.attempt, effect.rewinds, 0, "store-unavailable", "the store is down")
        self.epochs.append(effect.job)
        return EpochDone(effect.job, effect.attempt, effect.rewinds, len(self.epochs))

    def commit(self, effect: Commit) -> CommitDone:
        """As `pipeline.commit`: idempotent, fenced by epochs of other jobs; in an outage the answer may be lost."""
        key = (effect.epoch, effect.step)
        lost = self.down and self._world.rng.random() < 0.3
        if self.down and not lost:
            return CommitDone(effect.job, *key, "store-unavailable", "the store is down")
        if key not in self.commits:
            if self.epochs[-1] != effect.job:
                return CommitDone(effect.job, *key, "fenced", "another job took the run over")
            self._world.checks.committing(effect, self)
            self.commits[key] = effect.job
            self._world.note(f"store: step {effect.step} of epoch {effect.epoch} is committed")
        return CommitDone(effect.job, *key, "store-unavailable" if lost else "", "no answer" if lost else "")

    def look_up(self, effect: Lookup) -> LookupDone | None:
        key = (effect.epoch, effect.step)
        return None if self.down else LookupDone(effect.job, *key, key in self.commits)


@dataclass(eq=False)
class Session:
    """One stream between an agent and the coordinator, first to last message."""

    began: float
    broken: bool = False
    last: dict[str, float] = field(default_factory=dict)  # direction -> when its last message arrives


class Line:
    """The way from one agent to the coordinator (mirrors agent.uplink.RemoteUplink and servicer.Attend)."""

    def __init__(self, world: World, machine: Machine) -> None:
        self._world, self._machine = world, machine
        self.session: Session | None = None
        self.cut_until = 0.0
        self._was_cut = False
        self._lost_at = 0.0
        self._excused_until = 0.0

    @property
    def excused(self) -> bool:
        """Whether nobody can expect the node to do what it is told: it is, or was just now, out of reach for long."""
        if self.session is None:
            return self._was_cut or self._world.now - self._lost_at >= AWAY_PATIENCE
        return self._world.now < self._excused_until

    @property
    def is_connected(self) -> bool:
        """Whether what is reported is sent."""
        return self.session is not None

    def cut(self, seconds: float, notice: float) -> None:
        """Neither agent nor launcher can be reached for so long."""
        self.cut_until, self._was_cut = self._world.now + seconds, True
        self.break_(notice)

    def report(self, report: pb.Report) -> None:
        """As RemoteUplink: dropped while there is no connection."""
        if self.session is not None:
            self._world.in_flight += 1
            self._send("up", self.session, self._arrive, self.session, report)

    def deliver(self, session: Session, order: pb.Order) -> None:
        self._send("down", session, self._obey, session, order)

    def connect(self) -> None:
        """Try until it succeeds; then tell all there is."""
        world = self._world
        if self.session is not None or not self._machine.agent_alive:
            return
        stopped = world.now < self._machine.agent_stopped_until
        self._was_cut = self._was_cut or stopped
        if stopped or world.now < self.cut_until or not world.brain.alive:
            world.later(0.3, self.connect)
            return
        if self.excused:
            self._excused_until = world.now + HEALED
        self.session, self._was_cut = Session(world.now), False
        name = self._machine.name
        self.report(pb.Report(agent_hello=pb.AgentHello(node=name, address=name, domain=f"d{int(name[1:]) // 2}")))
        for report in self._machine.everything():
            self.report(report)

    def break_(self, notice: float) -> None:
        """What is under way is lost; the coordinator notices after `notice` seconds, unless a new one comes first."""
        session, self.session = self.session, None
        if session is not None:
            session.broken, self._lost_at = True, self._world.now
            self._world.later(notice, self._world.brain.depart, self._machine.name, session)
            self._world.later(0.3, self.connect)

    def _send(self, way: str, session: Session, action: Callable[..., None], *args: Any) -> None:
        at = max(self._world.now + self._world.rng.expovariate(20), session.last.get(way, 0.0))
        session.last[way] = at
        self._world.later(at - self._world.now, action, *args)

    def _arrive(self, session: Session, report: pb.Report) -> None:
        self._world.in_flight -= 1
        if session.broken or not self._world.brain.alive:
            return
        if report.WhichOneof("event") == "agent_hello":
            self._world.brain.attend(self._machine.name, session)
            self._world.brain.report(self._machine.name, report)
        elif self._world.brain.peers.get(self._machine.name) is session:
            self._world.brain.report(self._machine.name, report)

    def _obey(self, session: Session, order: pb.Order) -> None:
        if not session.broken and self._machine.agent_alive:
            self._machine.obey(order)


class Brain:
    """The coordinator (mirrors agent.runner.CoordinatorShell)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.alive = False
        self.life = 0
        self.born = 0.0
        self.peers: dict[str, Session] = {}
        self.core = Coordinator(policy=POLICY)

    def start(self) -> None:
        self.alive, self.born, self.peers = True, self._world.now, {}
        partners = PartnerPolicy(self._world.schedule.partner, group=4, patience=20.0)
        self.core = Coordinator(save_timeout=SAVE_TIMEOUT, policy=POLICY, partners=partners)
        self.life += 1
        self._world.checks.new_coordinator()
        self._tick(self.life)

    def die(self) -> None:
        self.alive = False
        self.peers = {}

    def attend(self, node: str, session: Session) -> None:
        if node in self.peers:
            self._execute(self.core.agent_lost(node, self._world.now))
        self.peers[node] = session

    def depart(self, node: str, session: Session) -> None:
        if self.peers.get(node) is session:
            del self.peers[node]
            self._execute(self.core.agent_lost(node, self._world.now))

    def report(self, node: str, report: pb.Report) -> None:
        self._world.checks.reported(report)
        self._execute(self.core.handle(node, report, self._world.now))

    def asked(self, job: str) -> None:
        """Ranks want to know what is in memory."""
        if self.alive:
            self._execute(self.core.recover(job, self._world.now))

    def _tick(self, life: int) -> None:
        if self.alive and life == self.life:
            self._execute(self.core.tick(self._world.now))
            self._world.later(TICK, self._tick, life)

    def _execute(self, decision: Decision) -> None:
        for reason in decision.reasons:
            self._world.note(f"coordinator: {reason}")
        for effect in decision.effects:
            self._world.checks.decided(effect)
            if isinstance(effect, Record | Drain | Restarted | Resumed | Audit):
                continue
            if not isinstance(effect, Send):
                self._world.later(self._world.rng.uniform(0.01, 0.5), self._do, self.life, effect)
            elif effect.node in self.peers:
                self._world.machines[effect.node].line.deliver(self.peers[effect.node], effect.order)

    def _do(self, life: int, effect: AllotEpoch | Commit | Lookup | Probe | ReadNodes | KeepNodes) -> None:
        """The worker does it; if the coordinator died meanwhile, it may have been done all the same."""
        if isinstance(effect, Probe | ReadNodes | KeepNodes):
            if life == self.life and self.alive:
                self._look(effect)
            return
        store, orphaned = self._world.store, life != self.life or not self.alive
        if orphaned and self._world.rng.random() < 0.5:
            return
        if isinstance(effect, AllotEpoch):
            answer: EpochDone | CommitDone | LookupDone | None = store.take_epoch(effect)
        elif isinstance(effect, Commit):
            answer = store.commit(effect)
        else:
            answer = store.look_up(effect)
        if orphaned or answer is None:
            return
        if isinstance(answer, EpochDone):
            self._execute(self.core.epoch_done(answer, self._world.now))
        elif isinstance(answer, CommitDone):
            self._execute(self.core.commit_done(answer, self._world.now))
        else:
            self._execute(self.core.lookup_done(answer, self._world.now))

    def _look(self, effect: Probe | ReadNodes | KeepNodes) -> None:
        if isinstance(effect, Probe):
            machine = self._world.machines[effect.node]
            answer = machine.answer(self._world.now)
            self._world.note(f"{effect.node}: {answer.value}")
            self._execute(self.core.probed(Probed(effect.job, effect.node, answer), self._world.now))
        elif isinstance(effect, ReadNodes):
            self._execute(self.core.nodes_read(NodesRead({}), self._world.now))
        else:
            self._execute(self.core.nodes_kept(NodesKept(effect.said), self._world.now))


class World:
    """Everything there is, and the time."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.now = 0.0
        self.events = 0
        self.in_flight = 0
        self.rng = random.Random(f"delays {schedule.seed}")
        self.trace: deque[str] = deque(maxlen=400)
        self.checks = Checks(self)
        self.store = Store(self)
        self.brain = Brain(self)
        self.attempts: dict[int, Attempt] = {}
        self.healed_at = max((f.at + f.seconds for f in (*schedule.faults, *schedule.orders)), default=0.0)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.machines = {f"n{i}": Machine(self, f"n{i}") for i in range(schedule.nodes)}
        for machine in self.machines.values():
            machine.line = Line(self, machine)

    def later(self, delay: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), action, args))

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:7.2f} {text}")

    def run(self) -> None:
        self.brain.start()
        for machine in self.machines.values():
            machine.start_agent()
            late = self.schedule.late if machine.name == f"n{self.schedule.nodes - 1}" else 0.0
            self.later(late + self.rng.uniform(0, 3), machine.start_launcher)
        for fault in self.schedule.faults:
            self.later(fault.at, self._strike, fault)
        for number, order in enumerate(self.schedule.orders):
            self.later(order.at, self._order_given, number, order)
        try:
            while self._queue:
                self.now, _, action, args = heapq.heappop(self._queue)
                self.events += 1
                action(*args)
                self.checks.always()
                if self.now > self.healed_at and self.checks.finished():
                    return
                if self.now > self.healed_at + PATIENCE:
                    self.checks.give_up()
        except Violation as violation:
            violation.explain(self)
            raise
        finally:
            for machine in self.machines.values():
                machine.kill_agent()

    def _order_given(self, number: int, order: Fault) -> None:
        machines = list(self.machines.values())
        asked, meant = machines[order.where % len(machines)], machines[order.where // 10 % len(machines)]
        of_node = order.kind in ("drain", "undrain", "exclude", "include")
        self.note(f"ORDER {order.kind} {meant.name if of_node else ''} (asked: {asked.name})")
        verb = pb.Verb.Value(f"VERB_{order.kind.upper()}")
        event = pb.Asked(
            id=str(number), job=JOB, node=asked.name, verb=verb, target=meant.name if of_node else "",
            seconds=order.seconds, at=1000.0 + self.now, by=pb.Caller(name="somebody", node=asked.name),
        )  # fmt: skip
        asked.ask(event)

    def _strike(self, fault: Fault) -> None:
        machine = list(self.machines.values())[fault.where % len(self.machines)]
        lasting = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        self.note(f"FAULT {fault.kind} ({machine.name}){lasting}")
        if fault.kind in ("kill rank", "kill rank and agent"):
            machine.kill_a_rank(fault.where)
        if fault.kind in ("kill agent", "kill rank and agent"):
            machine.kill_agent()
            self.later(fault.seconds, machine.start_agent)
        elif fault.kind == "kill coordinator":
            self.brain.die()
            for each in self.machines.values():
                each.line.break_(0.0)
            self.later(fault.seconds, self._revive, self.brain.life)
        elif fault.kind == "break line":
            machine.line.break_(self.rng.uniform(0, 10))
        elif fault.kind == "cut off":
            machine.line.cut(fault.seconds, self.rng.uniform(0, 10))
        elif fault.kind == "store outage":
            self.store.down_until = self.now + fault.seconds
        elif fault.kind == "stop rank":
            machine.hang_a_rank(fault.where, "T", fault.seconds)
        elif fault.kind == "rank elsewhere":
            machine.hang_a_rank(fault.where, "elsewhere", fault.seconds)
        elif fault.kind == "stop agent":
            machine.agent_stopped_until = self.now + fault.seconds
        elif fault.kind == "another job":
            machine.start_thief()
        elif fault.kind == "lose node" and self.attempts:  # a job that has never begun waits for its nodes for ever
            machine.lose()

    def _revive(self, life: int) -> None:
        if life == self.brain.life and not self.brain.alive:
            self.brain.start()
