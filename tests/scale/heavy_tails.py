"""A healthy job whose steps have heavy tails, watched by the real detector and the real coordinator's core.

    job = Job(seed=1)
    job.run(1_000_000)
    assert not job.killed

Steps are lognormal; now and then one rank, one node, the agent or everybody pauses, for a Pareto-distributed time. All
ranks wait for the slowest, so that an examination finds what it would find of a hang: one rank elsewhere, the others in
the next collective. What tells a pause from a hang is only that it ends, or that the rank does something meanwhile.
"""

import random
from collections import Counter

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import Decision, Send
from ckptsvc.control.health import Policy
from ckptsvc.control.stalls import Limits, Sight, Stalls
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

LOOK = 0.25
NODES, PER_NODE = 2, 2
WORLD = NODES * PER_NODE
ANSWER = 0.8
"""Seconds an examination takes."""

COLLECTIVE = "all_reduce of [9] float32 in group default (gloo)"
WAITS = {"state": "S", "cpu": 0.01, "answers": True, "stack": "main\ntrain\nall_reduce"}

STANDS_STILL = 100.0
"""Most seconds that a healthy rank spends in one function without reading or writing: below Policy.confirm."""

HOUR = 3600.0

PAUSES = {
    # kind: (how often, most seconds, what is seen of the rank)
    "garbage collection": (5, STANDS_STILL, {"state": "R", "cpu": 1.0, "answers": False, "stack": "main\ncollect"}),
    "swapping": (3, STANDS_STILL, {"state": "D", "cpu": 0.0, "answers": False, "stack": "main\nf"}),
    "data loader": (5, STANDS_STILL, {"state": "S", "cpu": 0.0, "answers": True, "stack": "main\nnext\npoll"}),
    "writes a file": (3, HOUR, {"state": "D", "cpu": 0.1, "answers": True, "stack": "main\nsave\nwrite"}),
    "undeclared evaluation": (2, HOUR, {"state": "R", "cpu": 1.0, "answers": True}),
    "evaluation": (5, 500.0, {"state": "R", "cpu": 1.0, "answers": True, "stack": "main\nevaluate"}),
    "everybody": (3, HOUR, WAITS),
    "node": (2, 300.0, {}),
    "agent": (3, 120.0, {}),
}
"""What makes a step long without anything being wrong."""


class Job:
    """The job, its agents and its coordinator.

    Attributes:
        killed: sentences of the orders to kill a rank.
        stalls: reports that a rank is stalled.
        pauses: how many of each kind there were.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"heavy tails {seed}")
        self.core = Coordinator(policy=Policy(automatic="always"))
        self.now = self.looked = 0.0
        self.step = 0
        self.killed: list[str] = []
        self.stalls = 0
        self.pauses: Counter[str] = Counter()
        self.pausing: dict[int, dict[str, object]] = {}  # rank -> what is seen of it
        self.stopped: dict[str, float] = {}  # node -> until when its agent does nothing
        self._due: list[tuple[float, str, pb.Examine]] = []
        self.watches = {f"n{i}": Stalls("job", f"n{i}", 1, Limits(), LOOK) for i in range(NODES)}
        self.sights = {node: {} for node in self.watches}
        for rank in range(WORLD):
            self._beat(rank)
            joined = pb.RankJoined(job="job", node=node_of(rank), store="s", attempt=1, rank=rank, world_size=WORLD)
            self._tell(node_of(rank), pb.Report(rank_joined=joined))

    def run(self, steps: int) -> None:
        """So many steps."""
        rng = self.rng
        kinds, often = list(PAUSES), [often for often, _, _ in PAUSES.values()]
        for _ in range(steps):
            if rng.random() < 0.002:
                self._pause(rng.choices(kinds, often)[0])
            self.wait(rng.lognormvariate(-1.6, 1.0))
            self.step += 1
            for rank in range(WORLD):
                self._beat(rank)

    def wait(self, seconds: float) -> None:
        """Time passes."""
        until = self.now + seconds
        while self.looked + LOOK <= until:
            self.looked += LOOK
            self.now = self.looked
            self._look()
        self.now = until

    def _pause(self, kind: str) -> None:
        rng, rank = self.rng, self.rng.randrange(WORLD)
        _, most, seen = PAUSES[kind]
        seconds = min(0.5 * rng.paretovariate(0.7), most)
        self.pauses[kind] += 1
        if kind in ("node", "agent"):
            self.stopped[node_of(rank)] = self.now + seconds
        if kind == "agent":
            return
        if kind != "everybody":
            self.pausing[rank] = seen
        if kind == "evaluation":
            self._beat(rank, "evaluation")
        self.wait(seconds)
        if kind == "evaluation":
            self._beat(rank, "step")
        self.pausing.clear()

    def _beat(self, rank: int, phase: str = "step") -> None:
        sights = self.sights[node_of(rank)]
        before = sights.get(rank, Sight(0, 0.0, 0, 0.0, ""))
        if phase == before.phase:
            sights[rank] = Sight(self.step, self.now, before.phases, before.since, phase)
        else:
            sights[rank] = Sight(self.step, self.now, before.phases + 1, self.now, phase)

    def _look(self) -> None:
        for node, watch in self.watches.items():
            if self.stopped.get(node, 0.0) <= self.now:
                for report in watch.look(self.sights[node], self.now):
                    self.stalls += report.HasField("stalled")
                    self._tell(node, report)
        if self._due and self._due[0][0] <= self.now:
            _, node, order = self._due.pop(0)
            self._examine(node, order)
        if self.core.health.cases:
            self._obey(self.core.tick(self.now))

    def _examine(self, node: str, order: pb.Examine) -> None:
        if self.stopped.get(node, 0.0) > self.now:
            return
        answer = pb.Examined(job="job", attempt=1, incident=order.incident, round=order.round, node=node)
        for rank, sight in self.sights[node].items():
            watch = self.watches[node]
            seen = self.pausing.get(rank)
            fields = {"asked": True, **(WAITS if seen is None else seen)}
            if seen is not None and "state" in seen and "stack" not in seen:
                fields["stack"] = f"main\nevaluate\nlayer{self.rng.randrange(50)}"
            if fields.get("stack") == "main\nsave\nwrite":
                fields["io_bytes"] = int(self.now * (5 << 20))
            evidence = answer.ranks.add(
                rank=rank,
                phase=sight.phase,
                step=sight.step,
                stalled=watch.quiet(rank),
                threshold=watch.allowed(rank),
                **fields,
            )
            if evidence.answers:
                waits = seen is None or seen is WAITS
                number, name = self.step + waits, COLLECTIVE if waits else ""
                evidence.groups.add(group="default", enqueued=number, completed=self.step, collective=name)
        self._tell(node, pb.Report(examined=answer))

    def _tell(self, node: str, report: pb.Report) -> None:
        self._obey(self.core.handle(node, report, self.now))

    def _obey(self, decision: Decision) -> None:
        for effect in decision.effects:
            if isinstance(effect, Send) and effect.order.HasField("examine"):
                self._due.append((self.now + ANSWER, effect.node, effect.order.examine))
            elif isinstance(effect, Send) and effect.order.HasField("kill"):
                self.killed.append(effect.order.kill.reason)


def node_of(rank: int) -> str:
    """The node of a rank."""
    return f"n{rank // PER_NODE}"
