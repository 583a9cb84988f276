"""Whom the coordinator has keep what, and rebuild what."""

import pytest
from told import STORE, dropped, durable, joined, left, orders, progressed, staged

from ckptsvc.control.coordinator import FORGET_AFTER, Coordinator
from ckptsvc.control.effects import Commit
from ckptsvc.control.redundancy import PartnerPolicy
from ckptsvc.control.runs import ranks_of, runs_of
from ckptsvc.control.save import QUIET_BEFORE_LOOKUP
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

NODES = 4
KEY = (1, 10)


class World:
    """A coordinator, and `nodes` nodes with two ranks each."""

    def __init__(self, partner, nodes=NODES, **policy):
        self.core = Coordinator(partners=PartnerPolicy(partner, **policy))
        self.nodes, self.world = nodes, 2 * nodes
        for node in range(nodes):
            self.hello(node)
        for rank in range(self.world):
            self.tell(rank // 2, rank_joined=joined(rank, node=f"n{rank // 2}", world_size=self.world))

    def tell(self, node, now=0.0, **report):
        return self.core.handle(f"n{node}", pb.Report(**report), now)

    def hello(self, node, domain="", address=None):
        address = f"127.0.0.1:{node + 1}" if address is None else address
        self.tell(node, agent_hello=pb.AgentHello(node=f"n{node}", address=address, domain=domain))

    def stage(self, step=10, **changes):
        """All ranks stage; what is decided then."""
        decisions = [
            self.tell(rank // 2, staged=staged(rank, node=f"n{rank // 2}", step=step, world_size=self.world, **changes))
            for rank in range(self.world)
        ]
        return decisions[-1]

    def guard(self, decision, but=()):
        """The nodes do as they are told."""
        for name, order in orders(decision, "protect"):
            if name not in but:
                members = [pb.Holder(node=m.node, ranks=m.ranks) for m in order.members]
                event = pb.Guarded(job="job", node=name, epoch=1, step=order.step, losses=order.losses, members=members,
                    world_size=order.world_size, aliases=order.aliases, store=STORE)  # fmt: skip
                self.tell(int(name[1:]), guarded=event)

    def copied(self, rank, node, step=10):
        event = staged(rank, node=f"n{node}", step=step, world_size=self.world, copy=True, ended=True)
        return self.tell(node, staged=event)

    def listed(self):
        return [snapshot.step for snapshot in self.core.snapshots("job")]


def test_without_a_policy_or_another_node_nothing_is_ordered():
    assert orders(World("off").stage(), "protect") == []
    assert orders(World("copy", nodes=1).stage(), "protect") == []


def test_each_node_copies_from_one_other_when_the_snapshot_is_complete():
    told = orders(World("copy").stage(), "protect")
    assert len(told) == NODES
    for name, order in told:
        (holder,) = order.members
        assert holder.node != name
        assert ranks_of(holder.ranks) == [2 * int(holder.node[1:]), 2 * int(holder.node[1:]) + 1]
        assert holder.address == f"127.0.0.1:{int(holder.node[1:]) + 1}"
        assert (order.epoch, order.step, order.attempt, order.world_size, order.losses) == (1, 10, 1, 8, 0)
    assert sorted(order.members[0].node for _, order in told) == ["n0", "n1", "n2", "n3"]


def test_a_copy_is_on_a_node_of_another_domain():
    world = World("copy")
    for node in range(NODES):
        world.hello(node, domain="rack" if node < 2 else "")
    told = dict(orders(world.stage(), "protect"))
    assert told["n0"].members[0].node in ("n2", "n3")
    assert told["n1"].members[0].node in ("n2", "n3")


def test_what_the_agents_do_not_know_of_domains_the_ranks_do():
    """An agent that no job has started is told nothing by the scheduler."""
    world = World("copy")
    for node in range(NODES):
        world.hello(node, domain="of the agent" if node == 3 else "")
    for rank in range(world.world):  # the even nodes share a switch; so would the odd ones, if n3's agent said nothing
        said = joined(rank, node=f"n{rank // 2}", world_size=world.world, domain=f"s{rank // 2 % 2}")
        world.tell(rank // 2, rank_joined=said)
    assert world.core.redundancy.peers["n3"].domain == "of the agent"
    partner = {name: order.members[0].node for name, order in orders(world.stage(), "protect")}
    assert partner["n0"] in ("n1", "n3")
    assert partner["n2"] in ("n1", "n3")


def test_only_so_many_snapshots_are_kept_elsewhere_and_none_twice():
    world = World("copy", every=2)
    assert [bool(orders(world.stage(step), "protect")) for step in (10, 20, 30, 40)] == [True, False, True, False]
    assert orders(world.stage(30), "protect") == []


@pytest.mark.parametrize("changes", [{"again": True}, {"attempt": 0}])
def test_what_is_reported_again_or_of_an_attempt_that_is_over_is_let_be(changes):
    assert orders(World("copy").stage(**changes), "protect") == []


def test_a_node_that_cannot_be_reached_is_left_out_and_named():
    world = World("copy")
    world.hello(3, address="")
    decision = world.stage()
    assert {name for name, _ in orders(decision, "protect")} == {"n0", "n1", "n2"}
    assert "no other node can be had to protect what these hold: n3" in " ".join(decision.reasons)


def test_a_snapshot_stays_while_each_shard_is_on_some_node():
    world = World("copy")
    world.stage()
    world.copied(2, 0)
    world.copied(3, 0)
    world.core.agent_lost("n1", 1.0)
    assert world.listed() == [10]
    world.tell(0, dropped=dropped(2, node="n0"))
    assert world.listed() == []
    (lost,) = world.core.lost("job")
    assert lost.startswith(
        "step 10 was complete in memory and is lost, with the nodes that had the snapshots of rank 2 "
    )


def test_a_copy_that_goes_does_not_take_the_snapshot_along():
    world = World("copy")
    world.stage()
    world.copied(2, 0)
    world.tell(0, dropped=dropped(2, node="n0"))
    assert world.listed() == [10]


def test_a_new_coordinator_knows_a_snapshot_of_which_only_copies_are_left():
    world = World("copy", nodes=2)
    world.tell(0, staged=staged(0, node="n0", world_size=4, again=True, ended=True))
    world.tell(0, staged=staged(1, node="n0", world_size=4, again=True, ended=True))
    world.copied(2, 0)
    assert world.listed() == []
    world.copied(3, 0)
    assert world.listed() == [10]


@pytest.mark.parametrize(("partner", "losses"), [("xor", 1), ("rs", 2)])
def test_what_a_group_has_lost_is_rebuilt_by_those_that_are_left(partner, losses):
    world = World(partner)
    decision = world.stage()
    told = orders(decision, "protect")
    assert len(told) == NODES
    assert all(order.losses == losses and len(order.members) == NODES for _, order in told)
    world.guard(decision)
    for node in range(1, 1 + losses):
        world.core.agent_lost(f"n{node}", 1.0)
    assert world.listed() == []
    found = orders(world.core.recover("job", 2.0), "rebuild")
    assert {name for name, _ in found} <= {"n0", "n3", *(["n2"] if losses == 1 else [])}
    assert sorted(rank for _, order in found for rank in ranks_of(order.ranks)) == list(range(2, 2 + 2 * losses))
    for _, order in found:
        assert [bool(m.address) for m in order.members].count(False) == losses
    assert world.core.redundancy.is_rebuilding("job")
    for name, order in found:
        for rank in ranks_of(order.ranks):
            world.copied(rank, int(name[1:]))
        world.tell(int(name[1:]), rebuilt=pb.Rebuilt(job="job", node=name, epoch=1, step=10))
    assert not world.core.redundancy.is_rebuilding("job")
    assert world.listed() == [10]


def rebuilding(partner="rs"):
    world = World(partner)
    world.guard(world.stage())
    world.core.agent_lost("n1", 1.0)
    return world, orders(world.core.recover("job", 2.0), "rebuild")


def test_a_node_that_has_come_in_place_of_a_lost_one_rebuilds():
    world = World("xor")
    world.guard(world.stage())
    world.core.agent_lost("n1", 1.0)
    world.hello(7)
    for rank in (2, 3):
        world.tell(7, rank_joined=joined(rank, node="n7", world_size=world.world))
    ((name, order),) = orders(world.core.recover("job", 2.0), "rebuild")
    assert (name, ranks_of(order.ranks)) == ("n7", [2, 3])


def test_nothing_is_ordered_while_it_is_being_rebuilt_or_once_those_left_could_not():
    world, found = rebuilding()
    assert orders(world.core.recover("job", 3.0), "rebuild") == []
    failed = world.tell(0, rebuilt=pb.Rebuilt(job="job", node=found[0][0], epoch=1, step=10, why="it is damaged"))
    assert "cannot be rebuilt from parity on n0: it is damaged" in failed.reasons[0]
    assert orders(world.core.recover("job", 4.0), "rebuild") == []
    world.core.agent_lost("n2", 5.0)  # that may have been why
    assert orders(world.core.recover("job", 6.0), "rebuild")


def test_a_rebuild_that_takes_too_long_is_given_up_and_said():
    world, _ = rebuilding()
    assert world.core.redundancy.is_rebuilding("job")
    decision = world.core.tick(2.0 + world.core.partners.patience + 0.1)
    assert any("was not rebuilt from parity in 60 s; an older one has to do" in reason for reason in decision.reasons)
    assert not world.core.redundancy.is_rebuilding("job")


def test_a_node_that_was_away_for_a_moment_is_no_reason_to_give_a_rebuild_up():
    world = World("xor")
    world.guard(world.stage())
    world.core.agent_lost("n1", 1.0)
    for _ in range(3):
        world.hello(7)
        for rank in (2, 3):
            world.tell(7, rank_joined=joined(rank, node="n7", world_size=world.world))
        assert [name for name, _ in orders(world.core.recover("job", 2.0), "rebuild")] == ["n7"]
        world.core.agent_lost("n7", 3.0)
        assert not world.core.redundancy.is_rebuilding("job")


def test_a_new_coordinator_has_rebuilt_what_was_lost_with_the_one_before():
    before = World("xor")
    decision = before.stage(aliases={"head": "embedding"})
    after = Coordinator(partners=PartnerPolicy("xor"))
    before.core = after  # what it hears is what n0, n2 and n3 have
    for node in (0, 2, 3):
        before.hello(node)
    before.guard(decision, but=["n1"])
    assert before.core.recover("job", 0.0).effects == []  # nobody has told yet what is left
    for rank in (0, 1, 4, 5, 6, 7):
        event = staged(rank, node=f"n{rank // 2}", world_size=8, again=True, ended=True)
        before.tell(rank // 2, staged=event)
    assert before.listed() == []
    found = orders(before.core.recover("job", 2.0), "rebuild")
    assert sorted(rank for _, order in found for rank in ranks_of(order.ranks)) == [2, 3]
    assert all((order.world_size, order.aliases) == (8, {"head": "embedding"}) for _, order in found)
    for name, order in found:
        for rank in ranks_of(order.ranks):
            before.copied(rank, int(name[1:]))
    assert before.listed() == [10]


def test_a_copy_is_no_sign_that_a_save_has_ended():
    """A new coordinator hears of a copy before the node it is a copy of has come back."""
    world = World("copy", nodes=2)
    world.core = Coordinator(partners=PartnerPolicy("copy"))
    for rank in (0, 1):
        world.tell(0, staged=staged(rank, node="n0", world_size=4, again=True))
        world.copied(rank + 2, 0)
    world.core.tick(QUIET_BEFORE_LOOKUP + 1.0)
    for rank in (2, 3):
        world.tell(1, now=9.0, staged=staged(rank, node="n1", world_size=4, again=True))
    decisions = [world.core.handle("n0", pb.Report(durable=durable(rank)), 10.0 + rank).effects for rank in range(4)]
    assert [type(effect) for effect in decisions[-1]] == [Commit]


def replaced(world):
    """All ranks have come anew, those of n1 on n7; the agent of n1 is still there."""
    for rank in range(world.world):
        node = rank // 2 if rank // 2 != 1 else 7
        world.hello(node)
        world.tell(node, rank_joined=joined(rank, node=f"n{node}", world_size=world.world, attempt=2))


def test_what_only_a_node_without_ranks_holds_counts_as_lost_once_all_ranks_have_come():
    world = World("copy")
    world.stage()
    assert world.listed() == [10]
    replaced(world)
    assert world.listed() == []
    world.copied(2, 7)
    world.copied(3, 0)
    assert world.listed() == [10]
    world.stage(20, attempt=2)  # n1 takes part again, though none of its ranks joined there
    assert world.listed() == [10]
    world.tell(1, rank_left=left(0, node="n0", attempt=2))
    assert world.listed() == [20, 10]


def test_what_a_node_without_ranks_holds_is_rebuilt_where_they_are():
    world = World("xor")
    world.guard(world.stage())
    replaced(world)
    ((name, order),) = orders(world.core.recover("job", 2.0), "rebuild")
    assert (name, ranks_of(order.ranks)) == ("n7", [2, 3])
    assert [m.node for m in order.members if not m.address] == ["n1"]
    for rank in (2, 3):
        world.copied(rank, 7)
    world.tell(7, rebuilt=pb.Rebuilt(job="job", node="n7", epoch=1, step=10))
    assert world.listed() == [10]
    world.core.agent_lost("n0", 3.0)  # and now n1 may be read from
    found = orders(world.core.recover("job", 4.0), "rebuild")
    assert {m.node for m in found[0][1].members if m.address} == {"n1", "n2", "n3"}
    assert "n1" not in {name for name, _ in found}


def test_one_node_that_rebuilds_for_two_groups_owes_two_answers():
    world = World("xor", group=2)
    decision = world.stage()
    world.guard(decision)
    groups = {order.members[0].node: order.members for _, order in orders(decision, "protect")}
    assert len(groups) == 2
    world.hello(7)
    for name, (holder, _) in groups.items():
        world.core.agent_lost(name, 1.0)
        for rank in ranks_of(holder.ranks):
            world.tell(7, rank_joined=joined(rank, node="n7", world_size=world.world))
    found = orders(world.core.recover("job", 2.0), "rebuild")
    assert [name for name, _ in found] == ["n7", "n7"]
    for _, order in found:
        assert world.core.redundancy.is_rebuilding("job")
        for rank in ranks_of(order.ranks):
            world.copied(rank, 7)
        world.tell(7, rebuilt=pb.Rebuilt(job="job", node="n7", epoch=1, step=10))
    assert not world.core.redundancy.is_rebuilding("job")


@pytest.mark.parametrize("lost", ["n0", "n2"])
def test_where_another_node_is_lost_meanwhile_what_is_left_then_begins_anew(lost):
    world, found = rebuilding()
    assert {name for name, _ in found} == {"n0", "n2"}
    assert "n3" in {m.node for m in found[0][1].members if m.address}
    decision = world.core.agent_lost(lost, 3.0)
    assert f"step 10 cannot be rebuilt so: {lost} is lost too" in decision.reasons
    assert not world.core.redundancy.is_rebuilding("job")
    again = orders(world.core.recover("job", 4.0), "rebuild")
    assert {rank for _, order in again for rank in ranks_of(order.ranks)} > {2, 3}
    assert lost not in {m.node for _, order in again for m in order.members if m.address}


@pytest.mark.parametrize("but", [["n0"], ["n0", "n2"]])
def test_a_part_of_the_parity_that_was_never_made_counts_as_lost(but):
    world = World("rs")
    world.guard(world.stage(), but)
    world.core.agent_lost("n1", 1.0)
    assert bool(orders(world.core.recover("job", 2.0), "rebuild")) == (len(but) == 1)


def test_parity_that_was_dropped_is_of_no_use():
    world = World("xor")
    world.guard(world.stage())
    world.tell(0, dropped=pb.Dropped(job="job", node="n0", epoch=1, step=10, rank=-1))
    world.core.agent_lost("n1", 1.0)
    assert orders(world.core.recover("job", 2.0), "rebuild") == []


def test_an_older_snapshot_that_is_whole_is_no_reason_not_to_rebuild_a_newer_one():
    world = World("copy")
    world.stage(5)
    for rank in (2, 3):
        world.copied(rank, 0, step=5)
    world.core.redundancy.policy = PartnerPolicy("xor")
    world.guard(world.stage(10))
    world.core.agent_lost("n1", 1.0)
    assert world.listed() == [5]
    assert orders(world.core.recover("job", 2.0), "rebuild")
    world.core.redundancy.jobs["job"].rebuilding.clear()
    for rank in (2, 3):
        world.copied(rank, 0)
    assert orders(world.core.recover("job", 3.0), "rebuild") == []  # and what is whole needs nothing


def test_two_nodes_and_reed_solomon_make_do_with_one_loss():
    told = orders(World("rs", nodes=2).stage(), "protect")
    assert [order.losses for _, order in told] == [1, 1]


def test_a_job_of_which_there_is_nothing_but_parity_is_forgotten_in_the_end():
    world = World("xor")
    event = pb.Guarded(job="other", node="n0", epoch=1, step=10, world_size=2, store=STORE)
    world.tell(0, guarded=event)
    assert "other" in world.core.redundancy.jobs
    world.core.tick(FORGET_AFTER + 1.0)
    assert "other" not in world.core.redundancy.jobs


def test_nonsense_from_the_wire_is_let_be():
    world = World("xor")
    world.tell(0, rebuilt=pb.Rebuilt(job="nobody", node="n0", epoch=1, step=10))
    world.tell(0, rebuilt=pb.Rebuilt(job="job", node="nobody", epoch=9, step=9, why="x"))
    world.tell(0, dropped=pb.Dropped(job="nobody", node="x", rank=-1))
    world.tell(0, dropped=pb.Dropped(job="job", node="x", epoch=9, step=9, rank=0))
    world.tell(0, guarded=pb.Guarded(job="job", node="x", members=[pb.Holder(node="y", ranks=runs_of([0, 9]))]))
    assert orders(world.core.recover("job", 1.0), "rebuild") == []
    assert world.core.recover("nobody", 1.0).effects == []


def restarted(world, began, but=()):
    """The ranks of n1, which is lost, have come on n7, and all but those of some nodes have begun; what is ordered."""
    world.core.agent_lost("n1", 1.0)
    world.hello(7)
    nodes = [node if node != 1 else 7 for node in range(world.nodes)]
    for rank in range(world.world):
        said = joined(rank, node=f"n{nodes[rank // 2]}", world_size=world.world, attempt=2)
        world.tell(nodes[rank // 2], rank_joined=said)
    return began_with(world, began, but)


def began_with(world, step, but=()):
    for node in [node if node != 1 else 7 for node in range(world.nodes)]:
        if node not in but:
            event = progressed(f"n{node}", step, attempt=2, began=step)
            assert not orders(world.tell(node, progressed=event), "protect")
    return dict(orders(world.core.tick(2.0), "protect"))


def copied_by_all(world):
    for name, order in orders(world.stage(), "protect"):
        for rank in ranks_of(order.members[0].ranks):
            world.copied(rank, int(name[1:]))


def test_what_was_restored_is_copied_again_where_one_node_alone_has_it():
    world = World("copy")
    copied_by_all(world)
    (keeper,) = [node for node in world.core.jobs["job"].saves.held[KEY][2] if node != "n1"]
    others = {"n0", "n2", "n3"} - {keeper}
    told = restarted(world, 10)
    kept = {rank for order in told.values() for rank in ranks_of(order.members[0].ranks)}
    own = {2 * int(keeper[1:]), 2 * int(keeper[1:]) + 1}
    assert kept == {2, 3} | own, "of its own, the copy was on the node that is lost"
    assert all(order.members[0].node == keeper and order.attempt == 2 for order in told.values())
    assert not others & told.keys(), "the other pair has lost nothing"
    for name, order in told.items():
        for rank in ranks_of(order.members[0].ranks):
            world.copied(rank, int(name[1:]))
    world.core.agent_lost(keeper, 3.0)
    assert world.listed() == [10]
    assert began_with(world, 10) == {}, "once for each attempt"


@pytest.mark.parametrize(
    ("partner", "began", "but"), [("copy", 10, [2]), ("copy", 5, []), ("copy", 0, []), ("off", 10, []), ("rs", 10, [])]
)
def test_nothing_is_kept_again_before_all_have_begun_with_it_nor_where_another_loss_does_no_harm(partner, began, but):
    world = World(partner)
    world.guard(world.stage())
    if partner == "copy":
        for rank in range(world.world):
            world.copied(rank, 0 if rank > 1 else 2)
    else:
        for rank in (2, 3):
            world.copied(rank, 0)
    assert restarted(world, began, but) == {}


def test_parity_that_makes_up_for_no_more_losses_is_made_anew_by_those_that_have_what_was_restored():
    world = World("xor")
    world.guard(world.stage())
    world.core.agent_lost("n1", 1.0)
    for rank in (2, 3):
        world.copied(rank, 3)
    told = restarted(world, 10)
    members = {"n0": [0, 1], "n2": [4, 5], "n3": [2, 3, 6, 7]}
    assert told.keys() == members.keys()
    for order in told.values():
        assert {m.node: ranks_of(m.ranks) for m in order.members} == members
        assert (order.losses, order.attempt, order.step) == (1, 2, 10)
    for name, order in told.items():
        world.tell(int(name[1:]), dropped=dropped(-1, node=name))
        event = pb.Guarded(job="job", node=name, epoch=1, step=10, losses=1, members=order.members, world_size=8)
        world.tell(int(name[1:]), guarded=event)
    world.core.agent_lost("n3", 5.0)
    found = orders(world.core.recover("job", 6.0), "rebuild")
    assert sorted(rank for _, order in found for rank in ranks_of(order.ranks)) == [2, 3, 6, 7]


def test_where_there_is_but_one_node_nothing_is_said_of_what_was_restored():
    world = World("copy", nodes=1)
    world.stage()
    for rank in (0, 1):
        world.tell(0, rank_joined=joined(rank, node="n0", world_size=2, attempt=2))
    world.tell(0, progressed=progressed("n0", 10, attempt=2, began=10))
    decision = world.core.tick(2.0)
    assert not orders(decision, "protect")
    assert not any("kept elsewhere" in reason for reason in decision.reasons)
