"""Which snapshots go on from the local disks, in which order, whatever happens to nodes, agents and the store."""

import random

import pytest

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import Commit, CommitDone, Decision, Send
from ckptsvc.control.tiering import COMMIT_AGAIN, LOST_PATIENCE, SETTLE_PATIENCE, Draining, Waiting, choose
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

LOCAL, COMMITTED, FAILED = agent_pb2.OUTCOME_LOCAL, agent_pb2.OUTCOME_COMMITTED, agent_pb2.OUTCOME_FAILED
STORE = "file:///run"


def steps(*numbers: int) -> list[Waiting]:
    """Waiting snapshots; a negative number is one that must go on."""
    return [Waiting((1, abs(n)), n < 0) for n in numbers]


@pytest.mark.parametrize(
    ("waiting", "committed", "backlog", "chosen", "passed"),
    [
        ((), 0, 2, None, []),
        ((10,), 0, 2, 10, []),
        ((20, 10), 0, 2, 10, []),
        ((10, 20, 30), 0, 2, 30, [10, 20]),
        ((10, -20, 30), 0, 2, 20, [10]),
        ((10, 20), 30, 2, None, [10, 20]),
        ((-10, 40), 30, 2, 10, []),
        ((10, 20), 0, 1, 20, [10]),
    ],
)
def test_the_oldest_is_next_unless_there_are_too_many(waiting, committed, backlog, chosen, passed) -> None:
    key, left_out = choose(steps(*waiting), (1, committed), backlog)
    assert (key and key[1], sorted(k[1] for k in left_out)) == (chosen, passed)


class World:
    """A job of two nodes with a rank each, and what the coordinator has ordered."""

    def __init__(self, every: int = 1, backlog: int = 2) -> None:
        self.policy = Draining(every, backlog)
        self.now = 1000.0
        self.outcomes: dict[int, list[int]] = {}  # step -> outcomes, in order
        self.drains: list[tuple[str, int]] = []  # node, step
        self.commits: list[int] = []
        self.metrics: dict[int, dict[str, str]] = {}  # step -> what it was committed with
        self.restart()
        for rank in range(2):
            joined = pb.RankJoined(job="j", node=f"n{rank}", store=STORE, attempt=1, rank=rank, world_size=2, epoch=1)
            self.say(f"n{rank}", rank_joined=joined)

    def restart(self) -> None:
        """Another coordinator, which knows nothing."""
        self.core = Coordinator(save_timeout=600.0, draining=self.policy)

    def obey(self, decision: Decision) -> None:
        for effect in decision.effects:
            if isinstance(effect, Commit):
                self.commits.append(effect.step)
                self.metrics[effect.step] = dict(effect.metrics)
            elif isinstance(effect, Send) and effect.order.HasField("drain_shards"):
                self.drains.append((effect.node, effect.order.drain_shards.step))
            elif isinstance(effect, Send) and effect.order.HasField("save_ended") and effect.node == "n0":
                outcome = effect.order.save_ended.outcome
                self.outcomes.setdefault(outcome.step, []).append(outcome.outcome)

    def say(self, node: str, **event: object) -> None:
        self.obey(self.core.handle(node, pb.Report(**event), self.now))

    def tick(self, seconds: float = 0.5) -> None:
        self.now += seconds
        self.obey(self.core.tick(self.now))

    def staged(self, step: int, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            fields = {"job": "j", "node": f"n{rank}", "epoch": 1, "step": step, "attempt": 1, "rank": rank}
            self.say(f"n{rank}", staged=pb.Staged(**fields, world_size=2, nbytes=1, store=STORE))

    def kept(self, step: int, *ranks: int, again: bool = False, ended: agent_pb2.Outcome | None = None) -> None:
        for rank in ranks or (0, 1):
            if not again:
                self.staged(step, rank)
            self.say(
                f"n{rank}",
                local_kept=pb.LocalKept(
                    job="j", node=f"n{rank}", epoch=1, step=step, attempt=1, rank=rank, world_size=2, nbytes=1,
                    store=STORE, again=again, ended=ended is not None, outcome=ended,
                    metrics={} if rank else {"loss": f"{step}"},
                ),
            )  # fmt: skip

    def wanted(self, step: int, *, left_local: bool = False) -> None:
        event = pb.DurableWanted(job="j", node="n0", epoch=1, step=step, left_local=left_local)
        self.say("n0", durable_wanted=event)

    def durable(self, step: int, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            self.say(f"n{rank}", durable=pb.Durable(job="j", epoch=1, step=step, rank=rank, name=f"r{rank}", nbytes=1))

    def commit(self, step: int, code: str = "") -> None:
        self.obey(self.core.commit_done(CommitDone("j", 1, step, code, "why"), self.now))

    def through(self, step: int) -> None:
        """The agents drain a step, and it is committed."""
        self.durable(step)
        self.commit(step)


def test_a_step_is_drained_when_it_is_whole_on_the_disks_and_committed_when_it_is_durable() -> None:
    world = World()
    world.kept(10, 0)
    assert world.drains == []
    world.kept(10, 1)
    assert world.drains == [("n0", 10), ("n1", 10)]
    world.durable(10, 0)
    assert world.commits == []
    world.durable(10, 1)
    assert world.commits == [10]
    world.commit(10)
    assert world.outcomes == {10: [COMMITTED]}


def test_one_step_at_a_time_and_a_long_queue_is_cut() -> None:
    world = World()
    for step in (10, 20, 30, 40):
        world.kept(step)
    assert {step for _, step in world.drains} == {10}
    world.through(10)
    assert world.outcomes == {20: [LOCAL], 30: [LOCAL], 10: [COMMITTED]}
    world.through(40)
    assert [step for _, step in world.drains] == [10, 10, 40, 40]


def test_a_newer_one_that_is_faster_waits_for_its_turn_but_not_for_ever() -> None:
    world = World(every=2)
    world.staged(10)
    world.kept(10, 0)
    world.kept(20)
    world.tick()
    assert world.drains == []
    world.kept(10, 1)
    assert {step for _, step in world.drains} == {10}
    assert world.outcomes == {20: [LOCAL]}
    world.through(10)
    world.staged(30)
    world.kept(30, 0)
    world.kept(40)
    world.tick(SETTLE_PATIENCE + 1)
    assert world.drains[-1] == ("n1", 40)


def test_every_third_goes_on_unless_somebody_waits() -> None:
    world = World(every=3)
    for step in (10, 20, 30, 40):
        world.kept(step)
        if (1, step) in world.core.jobs["j"].saves.open:
            world.through(step)
    assert world.commits == [10, 40]
    world.say("n0", durable_wanted=pb.DurableWanted(job="j", node="n0", epoch=1, step=30))
    world.through(30)
    assert world.commits == [10, 40, 30]
    assert world.outcomes[30] == [LOCAL, COMMITTED]


def test_the_last_one_goes_on_when_the_ranks_are_gone() -> None:
    world = World(every=100)
    for step in (10, 20, 30):
        world.kept(step)
        world.through(step)
    world.tick()
    assert world.commits == [10]
    for rank in range(2):
        world.say(f"n{rank}", rank_left=pb.RankLeft(job="j", node=f"n{rank}", attempt=1, rank=rank))
    world.tick()
    world.through(30)
    assert world.commits == [10, 30]


def test_who_waits_for_what_is_gone_hears_it() -> None:
    world = World(every=100)
    world.kept(10)
    world.through(10)
    world.kept(20)
    for rank in range(2):
        world.say(f"n{rank}", local_dropped=pb.LocalDropped(job="j", epoch=1, step=20, rank=rank))
    world.wanted(20)
    assert world.outcomes[20] == [LOCAL], "maybe the disks come back"
    world.tick(LOST_PATIENCE)
    world.wanted(20)
    assert world.outcomes[20] == [LOCAL, FAILED]
    world.kept(20, again=True, ended=LOCAL)  # the disks come back: it is what it was
    assert [s.step for s in world.core.snapshots("j") if s.on_disk] == [20, 10]
    world.say("n0", durable_wanted=pb.DurableWanted(job="j", node="n0", epoch=1, step=20))
    world.through(20)
    assert world.outcomes[20][-1] == COMMITTED


def test_a_save_with_a_shard_on_no_disk_is_always_drained() -> None:
    """One node's disk is full: its shard is durable at once, the others' must follow."""
    world = World(every=100)
    world.kept(10)
    world.through(10)
    fields = {"job": "j", "node": "n0", "epoch": 1, "step": 20, "attempt": 1, "rank": 0, "world_size": 2}
    world.say("n0", staged=pb.Staged(**fields, nbytes=1, store=STORE))
    world.kept(20, 1)
    world.durable(20, 0)
    world.tick()
    assert world.drains[-1] == ("n1", 20)
    world.durable(20, 1)
    assert world.commits == [10, 20]


def test_a_store_that_does_not_take_the_commit_is_asked_again() -> None:
    world = World()
    world.kept(10)
    world.durable(10)
    world.commit(10, "store-unavailable")
    assert world.outcomes == {}
    world.tick(1)
    assert world.commits == [10]
    world.tick(COMMIT_AGAIN)
    assert world.commits == [10, 10]
    world.commit(10)
    assert world.outcomes == {10: [COMMITTED]}


@pytest.mark.parametrize("code", ["store", "store-full", "internal", "a later version's"])
def test_no_trouble_of_a_store_ends_a_save_that_is_on_disks(code: str) -> None:
    world = World()
    world.kept(10)
    world.durable(10)
    world.commit(10, code)
    assert world.outcomes == {}


def test_a_commit_that_hangs_leaves_the_snapshot_on_the_disks() -> None:
    world = World()
    world.kept(10)
    world.durable(10)
    world.tick(601)
    assert world.outcomes == {10: [LOCAL]}
    assert [s.step for s in world.core.snapshots("j") if s.on_disk] == [10]


def test_a_fenced_commit_is_the_end() -> None:
    world = World()
    world.kept(10)
    world.durable(10)
    world.commit(10, "fenced")
    assert world.outcomes == {10: [agent_pb2.OUTCOME_FENCED]}
    assert world.core.snapshots("j") == [agent_pb2.Snapshot(epoch=1, step=10, world_size=2)]  # in memory, as ever


def test_a_drain_that_takes_hours_is_not_given_up() -> None:
    world = World()
    world.kept(10)
    world.tick(4 * 3600)
    world.tick()
    assert world.outcomes == {}
    world.through(10)
    assert world.outcomes == {10: [COMMITTED]}


def test_a_lost_disk_holds_up_nothing_for_ever_and_the_rest_stays_where_it_is() -> None:
    world = World()
    world.kept(10)
    world.durable(10, 0)
    world.obey(world.core.agent_lost("n1", world.now))
    world.tick()
    world.tick(LOST_PATIENCE / 2)
    assert world.outcomes == {}
    world.tick(LOST_PATIENCE)
    assert world.outcomes == {10: [LOCAL]}
    assert not [s for s in world.core.snapshots("j") if s.on_disk]
    world.kept(10, 1, again=True)  # the node comes back with its disk: it can be restored
    assert [s.step for s in world.core.snapshots("j") if s.on_disk] == [10]


def test_a_node_that_comes_back_is_told_again() -> None:
    world = World()
    world.kept(10)
    world.obey(world.core.agent_lost("n1", world.now))
    world.kept(10, 1, again=True)
    assert world.drains == [("n0", 10), ("n1", 10), ("n1", 10)]


def test_another_coordinator_goes_on_from_what_the_agents_hold() -> None:
    world = World()
    for step in (10, 20):
        world.kept(step)
    world.durable(10, 0)
    world.restart()
    world.drains.clear()
    for rank in range(2):
        for step in (10, 20):
            world.kept(step, rank, again=True)
    world.durable(10, 0)
    world.tick()
    assert {step for _, step in world.drains} == {10}
    world.durable(10, 1)
    world.commit(10)
    world.through(20)
    assert world.commits == [10, 20]


def test_what_an_earlier_coordinator_left_local_is_drained_for_who_waits_for_it() -> None:
    world = World(every=100)
    world.kept(10)
    world.through(10)
    world.kept(20)
    world.restart()
    world.kept(20, 0, again=True, ended=LOCAL)
    world.wanted(20, left_local=True)  # before the other node has found the new coordinator
    world.kept(20, 1, again=True, ended=LOCAL)
    assert world.outcomes[20] == [LOCAL], "they know that"
    world.wanted(20, left_local=True)
    assert world.drains[-2:] == [("n0", 20), ("n1", 20)]
    world.through(20)
    assert world.outcomes[20] == [LOCAL, COMMITTED]


def test_metrics_come_along_however_a_snapshot_comes_to_be_drained() -> None:
    world = World(every=100)
    world.kept(10)  # its save is open
    world.through(10)
    world.kept(20)
    world.wanted(20)  # taken up again
    world.through(20)
    world.kept(30)
    world.restart()
    world.kept(30, again=True)  # by another coordinator
    world.through(30)
    assert world.metrics == {step: {"loss": f"{step}"} for step in (10, 20, 30)}


def test_the_last_one_goes_on_though_an_earlier_coordinator_left_it_local() -> None:
    world = World()
    world.restart()
    world.kept(20, again=True, ended=LOCAL)
    world.tick()
    assert world.drains == [("n0", 20), ("n1", 20)]


def test_who_waits_for_what_nobody_knows_any_more_hears_it() -> None:
    world = World()
    world.wanted(20)
    world.wanted(30, left_local=True)
    world.tick(LOST_PATIENCE)
    world.wanted(20)
    world.wanted(30, left_local=True)
    assert world.outcomes == {30: [FAILED]}, "step 20 may be staged yet"


@pytest.mark.parametrize("known", [LOCAL, None])
def test_a_node_that_has_not_heard_of_a_commit_hears_it_from_another_coordinator(
    known: agent_pb2.Outcome | None,
) -> None:
    world = World()
    world.restart()
    world.kept(20, 0, again=True, ended=known)
    world.kept(20, 1, again=True, ended=COMMITTED)
    assert world.outcomes == {20: [COMMITTED]}


def test_a_node_that_is_to_drain_what_it_knows_to_be_committed_says_so() -> None:
    world = World()
    world.restart()
    world.kept(20, 1, again=True, ended=COMMITTED)
    world.kept(20, 0, again=True, ended=LOCAL)
    world.wanted(20, left_local=True)
    assert world.drains == [("n0", 20), ("n1", 20)]
    world.kept(20, 1, again=True, ended=COMMITTED)  # in answer
    assert world.outcomes == {20: [COMMITTED]}
    assert world.drains == [("n0", 20), ("n1", 20)]


def test_what_has_ended_is_there_for_a_restore_only() -> None:
    world = World()
    world.kept(10, again=True, ended=LOCAL)
    world.tick()
    assert world.drains == []
    (snapshot,) = world.core.snapshots("j")
    assert (snapshot.step, snapshot.on_disk, snapshot.not_in_memory) == (10, True, True)


def test_a_disk_of_a_node_without_ranks_is_read_by_nobody() -> None:
    world = World()
    world.staged(10, 0, 1)
    world.kept(10, 0, 1)
    assert [snapshot.step for snapshot in world.core.snapshots("j")] == [10]
    for rank, node in ((0, "n0"), (1, "n7")):
        joined = pb.RankJoined(job="j", node=node, store=STORE, attempt=2, rank=rank, world_size=2, epoch=2)
        world.say(node, rank_joined=joined)
    assert world.core.snapshots("j") == []


def test_a_snapshot_half_in_memory_and_half_on_disks_is_whole() -> None:
    world = World()
    world.kept(10, 0, again=True, ended=LOCAL)
    assert world.core.snapshots("j") == []
    fields = {"job": "j", "node": "n1", "epoch": 1, "step": 10, "attempt": 1, "rank": 1, "world_size": 2}
    world.say("n1", staged=pb.Staged(**fields, nbytes=1, store=STORE, ended=True, again=True))
    (snapshot,) = world.core.snapshots("j")
    assert (snapshot.on_disk, snapshot.not_in_memory) == (True, True)


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_one_at_a_time_and_the_newest_in_the_end(seed: int) -> None:
    """Random orders of copies, drains, failing commits, lost nodes and new coordinators; then everything heals."""
    rng = random.Random(seed)
    world = World(rng.choice([1, 2, 5]), rng.choice([1, 2, 4]))
    disk: dict[int, dict[int, bool]] = {0: {}, 1: {}}  # rank -> step -> durable
    away: set[int] = set()
    last = 0

    def resync(rank: int) -> None:
        for step, durable in sorted(disk[rank].items()):
            last_word = world.outcomes.get(step, [None])[-1]
            knows = last_word == COMMITTED or (last_word == LOCAL and rng.random() < 0.5)  # else: a new agent
            world.kept(step, rank, again=True, ended=last_word if knows else None)
            if durable and not knows:
                world.durable(step, rank)

    def work(orders: list[tuple[str, int]]) -> None:
        for node, step in orders:
            rank = int(node[1])
            if rank not in away and step in disk[rank]:
                disk[rank][step] = True
                world.durable(step, rank)

    for _ in range(rng.randint(5, 40)):
        match rng.choice(["save", "save", "drain", "drain", "commit", "fail", "lose", "back", "coordinator", "time"]):
            case "save" if not away:
                last += 10
                for rank in rng.sample([0, 1], 2):
                    disk[rank][last] = False
                    world.kept(last, rank)
            case "drain":
                orders, world.drains = world.drains, []
                work(orders)
            case "commit" if world.commits:
                world.commit(world.commits.pop())
            case "fail" if world.commits:
                world.commit(world.commits.pop(), "store-unavailable")
            case "lose":
                rank = rng.randrange(2)
                away.add(rank)
                world.obey(world.core.agent_lost(f"n{rank}", world.now))
            case "back" if away:
                rank = away.pop()
                resync(rank)
            case "coordinator":
                world.restart()
                world.commits.clear()
                world.drains.clear()
                for rank in {0, 1} - away:
                    resync(rank)
            case "time":
                world.tick(rng.choice([0.5, 10.0, 100.0]))
        saves = world.core.jobs["j"].saves.open if "j" in world.core.jobs else {}
        assert sum(save.draining for save in saves.values()) <= 1
    for rank in list(away):
        away.discard(rank)
        resync(rank)
    for _ in range(200):
        orders, world.drains = world.drains, []
        work(orders)
        while world.commits:
            world.commit(world.commits.pop())
        world.tick(1.0)
    saves = world.core.jobs["j"].saves if "j" in world.core.jobs else None
    assert saves is None or not saves.open
    if last and world.policy.every == 1:
        assert COMMITTED in world.outcomes.get(last, []) or LOCAL in world.outcomes[last]
        committed = [step for step, outcomes in world.outcomes.items() if COMMITTED in outcomes]
        assert committed, "something was committed"
