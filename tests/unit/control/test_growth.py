"""When a job that runs on fewer nodes than it could is started anew with those that have come."""

import pytest
from told import node_joined, node_ready, orders

from ckptsvc.control.growth import SETTLE, Growth, Reach
from ckptsvc.control.restart import LAST_CALL, Accused, Attempts, Phase

PATIENCE = 100.0


class TestWhen:
    @pytest.fixture
    def growth(self):
        """A node has come at 0 s, and the newest checkpoint is that of step 50."""
        growth = Growth(PATIENCE)
        growth.look(["c"], Reach(60, 50), 0.0, told=True)
        return growth

    def test_at_the_next_checkpoint(self, growth):
        assert growth.look(["c"], Reach(70, 50), SETTLE, told=True) == ""
        assert growth.look(["c"], Reach(80, 75), 20.0, told=True) == "at the checkpoint of step 75"

    def test_others_may_come_first(self, growth):
        assert growth.look(["c"], Reach(80, 75), SETTLE - 0.1, told=True) == ""
        assert growth.look(["c", "d"], Reach(80, 75), SETTLE, told=True) != ""

    def test_at_once_where_nothing_is_lost(self, growth):
        assert growth.look(["c"], Reach(50, 50), SETTLE, told=True) == "and loses no step"
        assert growth.look(["c"], Reach(0, -1), SETTLE, told=True) == "and loses no step"

    def test_at_once_where_nobody_tells_what_would_be_lost_as_torchrun(self, growth):
        assert growth.look(["c"], Reach(), SETTLE, told=True).startswith("at once")

    def test_but_not_where_a_new_coordinator_has_not_heard_yet(self, growth):
        assert growth.look(["c"], Reach(), SETTLE, told=False) == ""

    def test_a_checkpoint_is_not_waited_for_for_ever(self, growth):
        assert growth.look(["c"], Reach(999, 50), PATIENCE - 0.1, told=True) == ""
        assert (
            growth.look(["c"], Reach(999, 50), PATIENCE, told=True)
            == "after 100 s in which no checkpoint was committed"
        )

    def test_never_where_that_is_off(self):
        growth = Growth(None)
        for now in (0.0, 1e6):
            assert growth.look(["c"], Reach(0, 0), now, told=True) == ""

    def test_a_node_that_goes_again_is_forgotten(self, growth):
        growth.look([], Reach(70, 50), 50.0, told=True)
        assert growth.look(["c"], Reach(999, 60), PATIENCE, told=True) == ""

    def test_one_checkpoint_is_asked_for(self, growth):
        assert [growth.wants_checkpoint(now) for now in (0.0, SETTLE, SETTLE, 50.0)] == [False, True, False, False]
        growth.look([], Reach(), 60.0, told=True)
        assert not growth.wants_checkpoint(70.0)
        growth.look(["d"], Reach(99, 50), 80.0, told=True)
        assert growth.wants_checkpoint(80.0 + SETTLE)


class TestWho:
    @pytest.fixture
    def attempts(self):
        """One to three nodes; attempt 1 runs on a, and b has come since."""
        attempts = Attempts("job", 1, 3, 2)
        attempts.joined(node_joined("a"), 0.0)
        attempts.ready(node_ready("a"), 0.0)
        attempts.tick(LAST_CALL)
        assert attempts.hosts == {"a"}
        attempts.joined(node_joined("b"), 10.0)
        attempts.ready(node_ready("b"), 10.0)
        return attempts

    def test_nodes_for_which_there_is_room(self, attempts):
        assert attempts.waiting(11.0) == ["b"]
        for node in "cd":
            attempts.joined(node_joined(node), 11.0)
            attempts.ready(node_ready(node), 11.0)
        assert attempts.waiting(11.0) == ["b", "c"]
        attempts.max_nodes = 1
        assert attempts.waiting(11.0) == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda a: setattr(a.nodes["b"], "ready", -1),
            lambda a: a.agent_lost("b", 11.0),
            lambda a: a.agent_lost("a", 11.0),
            lambda a: a.exclusion.strike("b", 9.0, "it is bad", 11.0),
            lambda a: a.rank_exited(1, 0, "a", 0, 11.0),
            lambda a: a.rank_exited(1, 0, "a", 1, 11.0),
            lambda a: a.suspect(1, 0, "a", 11.0),
            lambda a: a.accuse(Accused(1, 0, "a", "it hangs")),
            lambda a: setattr(a, "stop_wanted", "SIGTERM"),
            lambda a: setattr(a, "world", 99),
        ],
    )
    def test_not_while_anything_else_is_the_matter(self, attempts, change):
        change(attempts)
        assert attempts.waiting(11.0) == []

    def test_it_is_no_failure(self, attempts):
        decision = attempts.grow(["b"], "and loses no step", 20.0)
        assert [stop.attempt for _, stop in orders(decision, "stop")] == [1, 1]
        assert decision.reasons == ["job job: node b can be used: the job grows from 1 to 2 nodes, and loses no step"]
        assert (attempts.phase, attempts.restarts, attempts.incidents) == (Phase.STOPPING, 0, [])
        decision = attempts.ready(node_ready("a", 1), 21.0)
        assert [(n, o.attempt, o.world_size, o.first_rank) for n, o in orders(decision, "start")] == [
            ("a", 2, 4, 0),
            ("b", 2, 4, 2),
        ]

    def test_a_node_that_is_lost_while_it_grows_ends_nothing(self, attempts):
        attempts.grow(["b"], "and loses no step", 20.0)
        attempts.node_left("b", "gone", 20.1)
        assert [n for n, _ in orders(attempts.ready(node_ready("a", 1), 21.0), "start")] == ["a"]
