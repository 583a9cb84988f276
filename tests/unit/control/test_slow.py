"""Jobs that have become slower: the rank that hardly ever waits is named, and left alone."""

import random

import pytest
from scenes import COMPUTING, Stage, in_collective
from told import joined, kinds, orders

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import Decision, Record
from ckptsvc.control.health import ANSWER_PATIENCE
from ckptsvc.control.slow import LOOKS, LOOKS_MOST, REST
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


class Job:
    """A coordinator, and nodes that answer its orders with what they see at that moment."""

    def __init__(self, seed, waits=0.1):
        self.rng = random.Random(seed)
        self.stage = Stage(self.rng, quiet=0.2)
        self.core, self.now, self.waits = Coordinator(mark="m"), 100.0, waits
        self.examined, self.records, self.reasons = 0, [], []
        for rank, node in self.stage.nodes.items():
            self.tell(joined(rank, node=node, world_size=self.stage.world, epoch=1), "rank_joined")

    def tell(self, event, field="slowed"):
        return self.obey(self.core.handle("n0", pb.Report(**{field: event}), self.now))

    def slowed(self, **changes):
        event = {"job": "job", "node": "n0", "attempt": 1, "step": 50, "usual": 0.1, "seconds": 1.0, **changes}
        return self.tell(pb.Slowed(**event))

    def obey(self, decision):
        self.reasons += decision.reasons
        self.records += [e.incident for e in decision.effects if isinstance(e, Record)]
        for node, order in orders(decision, "examine"):
            self.examined += node == "n0"
            self.answer(node, order)
        return decision

    def answer(self, node, order):
        if node == "n0":
            self.look()
        ranks = [e for r, e in self.stage.ranks.items() if self.stage.nodes[r] == node]
        self.tell(pb.Examined(job="job", attempt=1, incident=order.incident, round=order.round, node=node, ranks=ranks),
            "examined")  # fmt: skip

    def look(self):
        """The others wait for the culprit, but for the moments in which that one has come as far."""
        stage = self.stage
        waits = self.rng.random() < self.waits
        for evidence in stage.ranks.values():
            computes = (evidence.rank == stage.culprit) != waits
            stage_of_rank(evidence, stage.number, computes)

    def wait(self, seconds):
        decision = Decision()
        for _ in range(round(seconds / 0.2)):
            self.now += 0.2
            decision.add(self.obey(self.core.tick(self.now)))
        return decision


def stage_of_rank(evidence, number, computes):
    if computes:
        in_collective(evidence, number - 1, "")
        evidence.state, evidence.cpu, evidence.stack = "R", 1.0, COMPUTING
    else:
        waiting = Stage(random.Random(1)).ranks[0]
        in_collective(evidence, number, waiting.collective)
        evidence.state, evidence.cpu, evidence.stack = "S", 0.0, waiting.stack


@pytest.mark.parametrize("seed", range(20))
def test_the_rank_that_the_others_wait_for_is_named_and_left_alone(seed):
    job = Job(seed)
    job.slowed()
    job.wait(20)
    (incident,) = job.records
    stage = job.stage
    assert (incident.kind, incident.rank, incident.node) == ("slow", stage.culprit, stage.node)
    assert incident.sentence.startswith(f"rank {stage.culprit} on {stage.node} holds the job up: a step takes 1 s, 10")
    assert LOOKS <= job.examined <= LOOKS_MOST
    assert not job.core.slow.searches


@pytest.mark.parametrize("seed", range(10))
def test_where_now_this_one_is_waited_for_and_now_that_one_nobody_is_named(seed):
    job = Job(seed, waits=0.0)
    look, ranks = job.look, list(job.stage.ranks)

    def another():
        job.stage.culprit = ranks[job.examined % len(ranks)]
        look()

    job.look = another
    job.slowed()
    job.wait(60)
    assert job.records == []
    assert job.examined == LOOKS_MOST


def test_all_that_compute_longer_are_no_incident():
    job = Job(1)
    job.look = lambda: [stage_of_rank(e, job.stage.number, computes=True) for e in job.stage.ranks.values()]
    job.slowed()
    job.wait(60)
    assert job.records == []
    assert job.reasons[-1] == "job job: it has become slower, and no rank stands out"


def test_a_node_that_does_not_answer_is_not_waited_for():
    job = Job(7)
    silent = next(n for n in reversed(job.stage.nodes.values()) if n not in ("n0", job.stage.node))
    assert len(set(job.stage.nodes.values())) > 2
    answer = job.answer
    job.answer = lambda node, order: answer(node, order) if node != silent else None
    job.slowed()
    job.wait(LOOKS_MOST * (ANSWER_PATIENCE + 2))
    assert [i.rank for i in job.records] == [job.stage.culprit]


def test_what_is_known_last_is_said_and_said_once():
    job = Job(5)
    job.slowed(seconds=0.4)
    job.slowed(node="n1", seconds=0.9)
    job.wait(20)
    job.slowed(seconds=1.5)
    job.wait(20)
    (incident,) = job.records
    assert "a step takes 0.9 s, 9 times as long as before" in incident.sentence
    job.wait(REST)
    job.slowed(seconds=5.0)
    job.wait(20)
    assert len(job.records) == 2


@pytest.mark.parametrize("changes", [{"job": "other"}, {"attempt": 2}, {"attempt": 0}, {"usual": 0.0}])
def test_what_cannot_be_is_ignored(changes):
    assert kinds(Job(1).slowed(**changes)) == []


def test_a_hang_is_looked_into_instead():
    job = Job(3)
    job.answer = lambda node, order: None
    job.tell(pb.Stalled(job="job", node="n0", attempt=1, rank=0, phase="step", seconds=5, threshold=4), "stalled")
    assert kinds(job.slowed()) == []
    del job.core.health.cases["job"]
    job.slowed()
    job.tell(pb.Stalled(job="job", node="n0", attempt=1, rank=0, phase="step", seconds=5, threshold=4), "stalled")
    job.wait(1)
    assert not job.core.slow.searches
