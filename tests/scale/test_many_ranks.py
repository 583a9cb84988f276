"""One save of 12,000 ranks through the coordinator's core: what an event costs must not grow with their number."""

import gc
import time
import tracemalloc

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import Commit, CommitDone, Decision, EpochDone
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

RANKS_PER_NODE = 12
COLUMNS = bytes(4000)
"""About what a rank with a hundred regions reports."""


class Job:
    """All agents of a job, and the core that hears them."""

    def __init__(self, nodes):
        self.core = Coordinator()
        self.nodes, self.world = nodes, nodes * RANKS_PER_NODE
        self.cost = {}

    def tell(self, what, events):
        """Handle (node, report) pairs; note CPU seconds per event."""
        pairs = list(events)
        decision = Decision()
        began = time.thread_time()
        for node, report in pairs:
            decision.add(self.core.handle(node, report, 1.0))
        self.cost[what] = (time.thread_time() - began) / len(pairs)
        return decision

    def ranks(self):
        for rank in range(self.world):
            yield f"n{rank // RANKS_PER_NODE}", rank

    def each_rank(self, make):
        return [(node, make(node, rank)) for node, rank in self.ranks()]

    def each_node(self, make):
        return [(f"n{n}", make(f"n{n}")) for n in range(self.nodes)]

    def attach(self):
        def joined(node, rank):
            event = pb.RankJoined(job="j", node=node, store="s", attempt=1, rank=rank, world_size=self.world)
            return pb.Report(rank_joined=event)

        self.tell("join", self.each_rank(joined))
        self.core.epoch_done(EpochDone("j", 1, 0, 1), 1.0)
        self.announce("announce")

    def announce(self, what):
        def announced(node, rank):
            return pb.Report(announced=pb.Announced(job="j", attempt=1, rank=rank, digest="d"))

        return self.tell(what, self.each_rank(announced))

    def progress(self, step, what="progress"):
        def progressed(node):
            return pb.Report(progressed=pb.Progressed(job="j", attempt=1, node=node, lowest=step, highest=step))

        self.tell(what, self.each_node(progressed))

    def stage(self, what, **changes):
        def staged(node, rank):
            fields = {"epoch": 1, "step": 10, "attempt": 1, "world_size": self.world, "store": "s"} | changes
            return pb.Report(staged=pb.Staged(job="j", node=node, rank=rank, **fields))

        return self.tell(what, self.each_rank(staged))

    def write(self):
        def durable(node, rank):
            event = pb.Durable(job="j", epoch=1, step=10, rank=rank, name="shard", nbytes=1, columns=COLUMNS)
            return pb.Report(durable=event)

        return self.tell("durable", self.each_rank(durable))

    def leave(self):
        def left(node, rank):
            return pb.Report(rank_left=pb.RankLeft(job="j", node=node, attempt=1, rank=rank))

        self.tell("leave", self.each_rank(left))

    def lose_all_agents(self):
        began = time.thread_time()
        for node in range(self.nodes):
            self.core.agent_lost(f"n{node}", 2.0)
        self.cost["agent lost"] = (time.thread_time() - began) / self.nodes

    def tick(self):
        began = time.thread_time()
        self.core.tick(3.0)
        self.cost["tick"] = time.thread_time() - began

    def life(self):
        """Attach, save, lose every connection and find it again, leave."""
        self.attach()
        for step in (1, 2):
            self.progress(step)
        self.stage("staged")
        (effect,) = (e for e in self.write().effects if isinstance(e, Commit))
        assert len(effect.shards) == self.world
        self.tick()
        done = self.core.commit_done(CommitDone("j", 1, 10), 2.0)
        assert len(done.effects) == self.nodes
        self.lose_all_agents()
        assert len(self.announce("announced again").effects) == self.nodes
        self.stage("staged again", ended=True, again=True)
        assert [s.step for s in self.core.snapshots("j")] == [10]
        self.leave()
        return self.cost


def test_an_event_costs_the_same_in_a_large_job(capsys):
    gc.disable()  # its pauses would count for whoever is being measured
    try:
        small = Job(100).life()
        large = Job(1000).life()
    finally:
        gc.enable()
    with capsys.disabled():
        print("\nmicroseconds an event, in a job of 1,200 and of 12,000 ranks:")
        for what in large:
            print(f"  {what:16} {small[what] * 1e6:8.1f} {large[what] * 1e6:8.1f}")
    for what in set(large) - {"tick"}:
        # Linear growth would be tenfold; larger tables miss the caches.
        assert large[what] < 4 * small[what] + 20e-6, what
    assert large["tick"] < 0.02


def test_memory_a_rank(capsys):
    tracemalloc.start()
    try:
        job = Job(300)
        job.attach()
        job.stage("staged")
        job.write()
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] / job.world
    finally:
        tracemalloc.stop()
    with capsys.disabled():
        print(f"\n{used:.0f} bytes of Python objects a rank in the middle of a save, besides its columns")
    assert used < 3000
