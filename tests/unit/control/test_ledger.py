"""The books of jobs as a coordinator keeps them: from what it hears to where the time went."""

import pytest
from told import joined, left, node_joined, node_ready, progressed

from ckptsvc.control.coordinator import FORGET_AFTER, Coordinator
from ckptsvc.control.effects import Answer, NodesRead, Probed, Resumed
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

FIELDS = {type(getattr(pb.Report(), f.name)): f.name for f in pb.Report.DESCRIPTOR.fields}


class World:
    """A coordinator, what it has said of restarts, and the time."""

    def __init__(self):
        self.core, self.now, self.resumed = Coordinator(), 0.0, []

    def tell(self, event, node="n0"):
        report = pb.Report(**{FIELDS[type(event)]: event})
        self._take(self.core.handle(node, report, self.now))

    def wait(self, seconds):
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now = min(self.now + 0.2, until)
            self._take(self.core.tick(self.now))

    def _take(self, decision):
        self.resumed += [effect for effect in decision.effects if isinstance(effect, Resumed)]

    def launch(self, nodes=("n0",), nproc=2):
        for place, node in enumerate(nodes):
            self.tell(node_joined(node, node_rank=place, min_nodes=1, max_nodes=len(nodes), nproc=nproc, doorbell=9))
            self.tell(node_ready(node))
        self._take(self.core.nodes_read(NodesRead({}), self.now))
        self.wait(6.0)

    def attach(self, attempt=1, began=0, nodes=("n0", "n0")):
        for rank, node in enumerate(nodes):
            self.tell(joined(rank, node=node, attempt=attempt, world_size=len(nodes), epoch=attempt))
        self.wait(1.0)
        self.progress(began, attempt, began)

    def progress(self, step, attempt=1, began=0, blocked=0.0, node="n0"):
        self.tell(progressed(node, step, attempt=attempt, began=began, blocked=blocked))

    def steps(self, first, last, attempt=1, began=0):
        """One a second."""
        for step in range(first, last + 1):
            self.wait(1.0)
            self.progress(step, attempt, began)

    @property
    def books(self):
        return self.core.ledger.accounts["job"].books

    @property
    def booked(self):
        return {share.value: round(seconds, 3) for share, seconds in self.books.seconds.items() if seconds}


@pytest.fixture
def world():
    """A launched job of two ranks that has done ten steps."""
    found = World()
    found.launch()
    found.attach()
    found.steps(1, 10)
    assert found.booked == {"other": 2.0, "useful": 9.0}  # a second to attach, one for the first step
    return found


def test_a_rank_that_dies_and_the_restart_part_by_part(world):
    world.wait(0.6)
    world.tell(left(1, node="n0"))
    world.wait(0.2)
    world.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=1, status=-9))
    world.wait(0.4)
    world.tell(node_ready("n0", attempt=1))  # all have ended: the next attempt starts
    world.wait(2.0)
    world.attach(attempt=2, began=6)
    world.steps(7, 12, attempt=2, began=6)
    (resumed,) = world.resumed
    fault = 17.6
    assert (resumed.job, resumed.attempt) == ("job", 2)
    assert "rank 1" in resumed.why
    parts = [round(end - begin, 3) for begin, end in zip(resumed.times, resumed.times[1:], strict=False)]
    assert parts == [0.0, 0.2, 0.4, 2.2, 0.8, 1.0]  # that all have registered is seen at the next tick
    assert resumed.times[0] == pytest.approx(fault)
    assert world.booked == {
        "other": 2.0,
        "useful": 9.0 + 2.0,  # steps 11 and 12
        "redone": 0.6 + 3.0,  # half a step; 8 to 10 (7 was the first, and is part of the restart)
        "detection": 0.2,
        "restart": 4.4,
    }


def test_a_node_that_is_lost_is_a_fault_from_when_its_agent_was():
    world = World()
    world.launch(nodes=("n0", "n1"), nproc=1)
    for node in ("n0", "n1"):
        world._take(world.core.probed(Probed("job", node, Answer.UP), world.now))
    world.attach(nodes=("n0", "n1"))
    world.steps(1, 5)
    lost = world.now
    world._take(world.core.agent_lost("n1", world.now))
    world.wait(1.0)
    world._take(world.core.probed(Probed("job", "n1", Answer.SILENT), world.now))
    world.wait(0.2)
    world.tell(node_ready("n0", attempt=1))
    world.wait(1.0)
    world.attach(attempt=2, began=4, nodes=("n0",))
    world.steps(5, 6, attempt=2, began=4)
    (resumed,) = world.resumed
    assert resumed.times[:3] == pytest.approx((lost, lost, lost + 1.0))
    assert world.booked["detection"] == pytest.approx(1.0)


def test_a_hang_is_a_fault_from_the_last_sign_of_life_on(world):
    world.wait(5.0)
    stalled = pb.Stalled(job="job", node="n0", attempt=1, rank=1, phase="step", step=10, seconds=4.5, threshold=4.0)
    world.tell(stalled)
    world.wait(0.2)
    assert world.booked["detection"] == pytest.approx(5.2)
    world.wait(2.8)
    assert world.booked["detection"] == pytest.approx(8.0)
    world.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=1, status=-9))
    world.tell(node_ready("n0", attempt=1))
    world.attach(attempt=2, began=10)
    world.steps(11, 11, attempt=2, began=10)
    (resumed,) = world.resumed
    assert resumed.times[1] - resumed.times[0] == pytest.approx(4.5)
    assert resumed.times[2] - resumed.times[1] == pytest.approx(3.0)


def test_a_stall_that_ends_by_itself_is_no_restart(world):
    world.wait(5.0)
    world.tell(pb.Stalled(job="job", node="n0", attempt=1, rank=1, phase="step", step=10, seconds=4.5, threshold=4.0))
    world.wait(1.0)
    world.tell(pb.Moved(job="job", attempt=1, rank=1))
    world.wait(1.0)
    world.progress(11)
    assert world.booked == {"other": 2.0, "useful": 9.8, "detection": 6.2}  # that it moves is seen at the next tick
    assert world.resumed == []


def test_blocked_time_is_that_of_the_rank_that_was_held_up_longest(world):
    world.wait(1.0)
    world.progress(11, blocked=0.25)
    world.progress(11, blocked=0.125, node="n1")
    assert world.booked == {"other": 2.0, "useful": 9.75, "blocked": 0.25}


def test_a_job_that_ends_is_not_charged_for_what_follows(world):
    for rank in (0, 1):
        world.tell(left(rank, node="n0", died=False))
        world.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=rank, status=0))
    total = world.books.total
    world.wait(60.0)
    assert world.books.total == total
    world.now += FORGET_AFTER
    world.wait(FORGET_AFTER + 1)
    assert world.core.ledger.accounts == {}


@pytest.mark.parametrize("died", [True, False])
def test_a_job_without_a_launcher_was_restarted_if_its_ranks_had_died(died):
    world = World()
    world.attach()
    world.steps(1, 5)
    for rank in (0, 1):
        world.tell(left(rank, node="n0", died=died))
    world.wait(30.0)
    assert world.books.total == pytest.approx(6.0)
    world.attach(attempt=2, began=5)
    world.steps(6, 7, attempt=2, began=5)
    if died:
        assert world.booked == {"other": 2.0, "useful": 5.0, "restart": 32.0}
    else:
        assert world.booked == {"other": 4.0, "useful": 5.0}
    assert world.resumed == []


def test_a_coordinator_that_takes_over_begins_anew_and_sums_up_right():
    world = World()
    world.now = 1000.0
    world.tell(node_joined("n0", attempt=3, min_nodes=1, max_nodes=1, nproc=2, again=True, world_size=2))
    world.attach(attempt=3, began=500)
    world.steps(501, 505, attempt=3, began=500)
    assert world.booked == {"other": 2.0, "useful": 4.0}
    assert world.resumed == []
