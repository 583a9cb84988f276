import pytest
from told import kinds, node_joined, node_ready, orders

from ckptsvc.control.crashloop import describe_status
from ckptsvc.control.effects import Answer, Probe, Probed
from ckptsvc.control.restart import (
    AWAY_PATIENCE,
    EXIT_PATIENCE,
    GRACE,
    INTERRUPTED,
    JOIN_PATIENCE,
    LAST_CALL,
    LIST_PATIENCE,
    NODE_PATIENCE,
    RING_EVERY,
    SHOWN,
    Accused,
    Attempts,
    Phase,
)


def make(min_nodes=2, max_nodes=2, max_restarts=2):
    return Attempts("job", min_nodes, max_nodes, max_restarts)


@pytest.fixture
def gathered():
    """Nodes a and b are ready: attempt 1 runs with ranks 0 and 1 on a, 2 and 3 on b."""
    attempts = make()
    start(attempts, 0, now=0.0)
    return attempts


def start(attempts, after, now, nodes=("a", "b")):
    decisions = []
    for node in nodes:
        if node not in attempts.nodes:
            attempts.joined(node_joined(node), now)
        decisions.append(attempts.ready(node_ready(node, after), now))
    return decisions[-1]


def exit_all(attempts, status=0, ranks=(0, 1, 2, 3), now=5.0):
    for rank in ranks:
        decision = attempts.rank_exited(attempts.attempt, rank, "ab"[rank // 2], status, now)
    return decision


class TestGathering:
    def test_starts_when_all_nodes_are_ready(self):
        attempts = make()
        assert attempts.joined(node_joined("a"), 0.0).reasons == ["job job: node a joined (1/2)"]
        assert kinds(attempts.ready(node_ready("a"), 0.0)) == []
        assert attempts.joined(node_joined("b"), 0.0).reasons == ["job job: node b joined (2/2)"]
        decision = attempts.ready(node_ready("b"), 0.0)
        assert kinds(decision) == ["a: start", "b: start"]
        assert decision.reasons == ["job job: attempt 1 starts: 4 ranks on 2 nodes"]
        (_, first), (_, second) = orders(decision, "start")
        assert (first.attempt, first.world_size, first.nodes) == (1, 4, 2)
        assert (first.first_rank, second.first_rank) == (0, 2)
        assert (first.node_rank, second.node_rank) == (0, 1)
        assert (first.master_addr, first.master_port) == ("address-of-a", 1000)
        assert (second.master_addr, second.master_port) == ("address-of-a", 1000)
        assert attempts.phase is Phase.RUNNING

    def test_node_ranks_that_were_given_decide_the_order(self):
        attempts = make()
        for node, rank in (("a", 1), ("b", 0)):
            attempts.joined(node_joined(node, node_rank=rank), 0.0)
            decision = attempts.ready(node_ready(node), 0.0)
        assert {n: o.first_rank for n, o in orders(decision, "start")} == {"b": 0, "a": 2}
        assert orders(decision, "start")[0][1].master_addr == "address-of-b"

    def test_nodes_may_run_different_numbers_of_ranks(self):
        attempts = make()
        for node, nproc in (("a", 3), ("b", 1)):
            attempts.joined(node_joined(node, nproc=nproc), 0.0)
            decision = attempts.ready(node_ready(node), 0.0)
        assert [(o.first_rank, o.world_size) for _, o in orders(decision, "start")] == [(0, 4), (3, 4)]
        assert attempts.running == {0: "a", 1: "a", 2: "a", 3: "b"}

    def test_waits_a_while_for_more_nodes_than_the_least(self):
        attempts = make(min_nodes=1)
        attempts.joined(node_joined("a"), 0.0)
        assert kinds(attempts.ready(node_ready("a"), 0.0)) == []
        assert kinds(attempts.tick(LAST_CALL - 0.1)) == []
        assert kinds(attempts.tick(LAST_CALL)) == ["a: start"]

    def test_does_not_wait_once_the_most_are_there(self):
        attempts = make(min_nodes=1)
        assert kinds(start(attempts, 0, 0.0)) == ["a: start", "b: start"]

    def test_a_node_that_is_not_fit_is_sent_home(self):
        attempts = make()
        ((node, end),) = orders(attempts.joined(node_joined("c", unfit="memory: none left"), 1.0), "end")
        assert (node, end.status, end.reason) == ("c", 87, "node c is not taken in: memory: none left")
        assert attempts.nodes == {}

    def test_nor_is_one_with_a_slow_network_taken_in(self):
        attempts = make(min_nodes=1, max_nodes=9)
        for node, rate in (("a", 0.0), ("b", 1e6), ("c", 90e6)):
            assert kinds(attempts.joined(node_joined(node, bandwidth=rate), 0.0)) == []
        ((node, end),) = orders(attempts.joined(node_joined("d", bandwidth=110e6), 0.0), "end")
        assert (node, end.status) == ("b", 87)
        assert end.reason.startswith("node b is not taken in: network: 1.0 MB/s between it and the coordinator's node")
        assert list(attempts.nodes) == ["a", "c", "d"]

    def test_but_one_that_runs_stays(self, gathered):
        gathered.nodes["b"].bandwidth = 1e6
        gathered.max_nodes = 9
        for node in "cde":
            assert kinds(gathered.joined(node_joined(node, bandwidth=99e6), 1.0)) == []
        assert "b" in gathered.nodes

    def test_a_node_that_runs_ranks_is_fit(self, gathered):
        assert kinds(gathered.joined(node_joined("a", unfit="clock: wrong", attempt=1), 1.0)) == []
        assert "a" in gathered.nodes

    def test_a_node_that_leaves_is_not_waited_for(self):
        attempts = make(min_nodes=1)
        attempts.joined(node_joined("a"), 0.0)
        attempts.joined(node_joined("b"), 0.0)
        attempts.ready(node_ready("a"), 0.0)
        decision = attempts.node_left("b", "its launcher is gone", 1.0)
        assert decision.reasons == ["job job: node b is gone (its launcher is gone)"]
        assert kinds(attempts.tick(1.0 + LAST_CALL)) == ["a: start"]

    def test_nodes_that_never_come_are_not_waited_for_for_ever(self):
        attempts = make()
        attempts.joined(node_joined("a"), 5.0)
        assert kinds(attempts.tick(5.0 + JOIN_PATIENCE)) == []
        ((_, end),) = orders(attempts.tick(5.1 + JOIN_PATIENCE), "end")
        assert (end.status, end.reason) == (1, "only 1 of 2 nodes have come")

    def test_readiness_of_a_node_nobody_knows_is_ignored(self):
        assert kinds(make().ready(node_ready("a"), 0.0)) == []


class TestFailure:
    @pytest.mark.parametrize(
        ("status", "words"),
        [(None, "died"), (3, "exited with status 3"), (-9, "was killed by signal 9"), (-11, "was killed by signal 11")],
    )
    def test_a_rank_that_fails_stops_all(self, gathered, status, words):
        decision = gathered.rank_exited(1, 3, "b", status, 7.0)
        assert kinds(decision) == ["a: stop", "b: stop"]
        assert decision.reasons == [f"job job: rank 3 on b {words}; restart 1 of 2"]
        _, stop = orders(decision, "stop")[0]
        assert (stop.attempt, stop.grace, stop.reason) == (1, GRACE, f"rank 3 on b {words}")
        assert gathered.incidents == [f"attempt 1: rank 3 on b {words}"]

    def test_what_is_known_of_why_is_said_in_short(self, gathered):
        gathered.rank_exited(1, 3, "b", 1, 7.0, "MemoryError " + 1000 * "x")
        assert gathered.last_failure == "rank 3 on b exited with status 1: MemoryError " + (SHOWN - 12) * "x"

    def test_further_ranks_of_the_attempt_fail_without_effect(self, gathered):
        gathered.rank_exited(1, 3, "b", -9, 7.0)
        assert kinds(gathered.rank_exited(1, 0, "a", -15, 7.1)) == []
        assert gathered.restarts == 1

    @pytest.mark.parametrize(("attempt", "rank"), [(0, 0), (2, 0), (1, 4), (1, -1)])
    def test_what_cannot_be_is_ignored(self, gathered, attempt, rank):
        assert kinds(gathered.rank_exited(attempt, rank, "a", 1, 7.0)) == []

    def test_the_next_attempt_starts_when_all_nodes_are_ready_again(self, gathered):
        gathered.rank_exited(1, 3, "b", -9, 7.0)
        assert kinds(gathered.ready(node_ready("a", 1), 8.0)) == []
        decision = gathered.ready(node_ready("b", 1), 9.0)
        assert [o.attempt for _, o in orders(decision, "start")] == [2, 2]
        assert orders(decision, "start")[1][1].master_port == 1001

    def test_a_node_that_never_heard_of_the_attempt_has_nothing_to_stop(self, gathered):
        gathered.rank_exited(1, 3, "b", -9, 7.0)
        gathered.ready(node_ready("a", 1), 8.0)
        gathered.joined(node_joined("b"), 9.0)
        assert [o.attempt for _, o in orders(gathered.ready(node_ready("b", 0), 9.0), "start")] == [2, 2]

    def test_a_node_that_comes_back_in_between_has_to_be_ready_too(self, gathered):
        gathered.rank_exited(1, 0, "a", 1, 10.0)
        gathered.node_left("b", "its launcher has ended", 10.1)
        gathered.joined(node_joined("b"), 10.2)
        assert kinds(gathered.ready(node_ready("a", 1), 10.3)) == []
        assert kinds(gathered.ready(node_ready("b", 0), 10.4)) == ["a: start", "b: start"]

    def test_no_restarts_left_ends_the_job(self, gathered):
        for attempt in (1, 2):
            gathered.rank_exited(attempt, 0, "a", 1, 1.0)
            start(gathered, attempt, 2.0)
        decision = gathered.rank_exited(3, 0, "a", 1, 3.0)
        assert kinds(decision) == ["a: end", "b: end"]
        _, end = orders(decision, "end")[0]
        assert (end.status, end.reason) == (1, "rank 0 on a exited with status 1; no restarts left of 2")
        assert gathered.phase is Phase.ENDED
        assert len(gathered.incidents) == 3

    def test_a_node_that_leaves_fails_the_attempt(self, gathered):
        decision = gathered.node_left("b", "its launcher is gone", 7.0)
        assert kinds(decision) == ["a: stop"]
        assert gathered.last_failure == "node b is gone (its launcher is gone)"

    def test_too_few_nodes_are_waited_for_and_then_the_job_ends(self, gathered):
        gathered.node_left("b", "gone", 7.0)
        gathered.ready(node_ready("a", 1), 8.0)
        assert kinds(gathered.tick(7.0 + NODE_PATIENCE)) == []
        ((_, end),) = orders(gathered.tick(7.1 + NODE_PATIENCE), "end")
        assert end.reason == "only 1 of 2 nodes are left: node b is gone (gone)"

    def test_another_node_may_take_the_place(self, gathered):
        gathered.node_left("b", "gone", 7.0)
        gathered.ready(node_ready("a", 1), 8.0)
        gathered.joined(node_joined("c"), 20.0)
        assert [o.attempt for _, o in orders(gathered.ready(node_ready("c"), 20.0), "start")] == [2, 2]

    def test_a_smaller_job_goes_on_at_once_when_that_is_allowed(self):
        attempts = make(min_nodes=1)
        start(attempts, 0, 0.0)
        attempts.node_left("b", "gone", 7.0)
        ((_, order),) = orders(attempts.ready(node_ready("a", 1), 7.5), "start")
        assert (order.attempt, order.world_size) == (2, 2)

    def test_a_node_that_joined_late_starts_with_the_next_attempt(self):
        attempts = make(min_nodes=1)
        start(attempts, 0, 0.0, nodes=("a",))
        attempts.tick(LAST_CALL)
        assert kinds(start(attempts, 0, 50.0, nodes=("b",))) == []
        assert kinds(attempts.rank_exited(1, 0, "a", 1, 60.0)) == ["a: stop", "b: stop"]
        decision = attempts.ready(node_ready("a", 1), 61.0)
        assert [(n, o.attempt) for n, o in orders(decision, "start")] == [("a", 2), ("b", 2)]

    def test_a_node_without_ranks_may_leave(self):
        attempts = make(min_nodes=1)
        start(attempts, 0, 0.0, nodes=("a",))
        attempts.tick(LAST_CALL)
        start(attempts, 0, 50.0, nodes=("b",))
        assert kinds(attempts.node_left("b", "gone", 55.0)) == []
        assert attempts.phase is Phase.RUNNING

    def test_a_node_that_leaves_twice_leaves_once(self, gathered):
        gathered.node_left("b", "gone", 7.0)
        assert gathered.node_left("b", "gone", 7.0).reasons == []


class TestSpares:
    """Nodes beyond the most that the job uses wait, and take the places of those that go."""

    @pytest.fixture
    def with_spare(self):
        attempts = make(max_restarts=9)
        start(attempts, 0, 0.0)
        assert attempts.joined(node_joined("c"), 1.0).reasons == ["job job: node c joined as a spare (3/2)"]
        assert kinds(attempts.ready(node_ready("c"), 1.0)) == []
        return attempts

    def test_a_spare_takes_the_place_of_a_lost_node_at_once(self, with_spare):
        assert kinds(with_spare.node_left("a", "gone", 7.0)) == ["b: stop", "c: stop"]
        decision = with_spare.ready(node_ready("b", 1), 7.5)
        # b keeps its ranks, and with them the snapshots in its memory
        assert [(n, o.first_rank, o.world_size) for n, o in orders(decision, "start")] == [("c", 0, 4), ("b", 2, 4)]
        assert orders(decision, "start")[0][1].master_addr == "address-of-c"

    def test_it_waits_while_nothing_is_lost(self, with_spare):
        with_spare.rank_exited(1, 0, "a", 1, 7.0)
        with_spare.ready(node_ready("a", 1), 7.5)
        decision = with_spare.ready(node_ready("b", 1), 7.5)
        assert [n for n, _ in orders(decision, "start")] == ["a", "b"]
        assert decision.reasons == ["job job: attempt 2 starts: 4 ranks on 2 nodes; without c"]

    def test_a_person_can_see_it(self, with_spare):
        assert with_spare.aside(1.0) == {"c": "a spare"}
        with_spare.exclusion.strike("c", 9.0, "it lost power", 1.0)
        with_spare.agent_lost("b", 1.0)
        assert with_spare.aside(1.0) == {"b": "its agent is away", "c": "has failed too often: it lost power"}

    def test_it_ends_with_the_job(self, with_spare):
        assert kinds(exit_all(with_spare)) == ["a: end", "b: end", "c: end"]

    def test_it_may_leave(self, with_spare):
        assert kinds(with_spare.node_left("c", "gone", 7.0)) == []
        assert with_spare.phase is Phase.RUNNING

    def test_a_node_that_comes_back_is_a_spare(self, with_spare):
        with_spare.node_left("a", "gone", 7.0)
        with_spare.ready(node_ready("b", 1), 7.5)
        decision = with_spare.joined(node_joined("a", attempt=1), 20.0)
        assert [(n, o.attempt) for n, o in orders(decision, "stop")] == [("a", 1)]
        assert kinds(with_spare.ready(node_ready("a", 1), 21.0)) == []
        with_spare.node_left("b", "gone", 30.0)
        decision = with_spare.ready(node_ready("c", 2), 30.5)
        assert [(n, o.first_rank) for n, o in orders(decision, "start")] == [("c", 0), ("a", 2)]


class TestNodesThatAreAway:
    """The rule in the docstring of control/restart.py: who rings, what the answers mean."""

    @pytest.fixture
    def job(self):
        attempts = make(min_nodes=1, max_restarts=9)
        for node in "ab":
            attempts.joined(node_joined(node, doorbell=7000), 0.0)
            attempts.probed(Probed("job", node, Answer.UP), 0.0)
            attempts.ready(node_ready(node), 0.0)
        assert attempts.phase is Phase.RUNNING
        return attempts

    def test_the_door_is_rung_at_once(self, job):
        assert job.agent_lost("b", 10.0).effects == [Probe("job", "b", "address-of-b", 7000)]

    @pytest.mark.parametrize(
        ("answer", "why"),
        [(Answer.GONE, "its launcher has ended"), (Answer.SILENT, "neither its agent nor its host answers")],
    )
    def test_without_an_answer_the_node_is_lost(self, job, answer, why):
        job.agent_lost("b", 10.0)
        assert kinds(job.probed(Probed("job", "b", answer), 10.1)) == ["a: stop"]
        assert job.last_failure == f"node b is gone ({why})"
        assert [n for n, _ in orders(job.ready(node_ready("a", 1), 10.2), "start")] == ["a"]

    def test_with_one_nothing_is_done_while_ranks_run(self, job):
        job.agent_lost("b", 10.0)
        now = 10.0
        for _ in range(1000):
            assert kinds(job.probed(Probed("job", "b", Answer.UP), now)) == []
            assert kinds(job.tick(now + RING_EVERY / 2)) == []
            now += RING_EVERY
            assert kinds(job.tick(now)) == ["Probe"]
            assert kinds(job.tick(now)) == []  # one at a time
        assert job.phase is Phase.RUNNING

    def test_when_all_others_have_ended_it_is_not_waited_for_for_ever(self, job):
        job.agent_lost("b", 10.0)
        job.probed(Probed("job", "b", Answer.UP), 10.0)
        exit_all(job, ranks=(0, 1), now=20.0)
        job.tick(11.0)
        assert "a: stop" not in kinds(job.tick(10.0 + NODE_PATIENCE))
        assert "a: stop" in kinds(job.tick(10.1 + NODE_PATIENCE))

    def test_a_restart_does_not_wait_long_for_it_when_there_are_enough_others(self, job):
        job.agent_lost("b", 10.0)
        job.probed(Probed("job", "b", Answer.UP), 10.0)
        job.rank_exited(1, 0, "a", 1, 12.0)
        assert kinds(job.ready(node_ready("a", 1), 12.5)) == []
        assert "a: start" not in kinds(job.tick(10.0 + AWAY_PATIENCE))
        assert "a: start" in kinds(job.tick(10.1 + AWAY_PATIENCE))

    def test_but_does_when_there_are_not(self, gathered):
        gathered.agent_lost("b", 10.0)
        gathered.rank_exited(1, 0, "a", 1, 12.0)
        gathered.ready(node_ready("a", 1), 12.5)
        assert kinds(gathered.tick(10.0 + NODE_PATIENCE)) == []
        gathered.joined(node_joined("b", attempt=1, first_rank=2), 69.0)
        assert [o.attempt for _, o in orders(gathered.ready(node_ready("b", 1), 70.0), "start")] == [2, 2]

    def test_a_node_that_is_back_is_not_lost_by_an_old_answer(self, job):
        job.agent_lost("b", 10.0)
        job.joined(node_joined("b", attempt=1, first_rank=2, doorbell=7000), 10.5)
        assert job.probed(Probed("job", "b", Answer.GONE), 10.6).reasons == []
        assert kinds(job.tick(1000.0)) == []

    def test_a_doorbell_that_cannot_be_heard_from_the_beginning_is_none(self):
        attempts = make(min_nodes=1)
        assert kinds(attempts.joined(node_joined("a", doorbell=7000), 0.0)) == ["Probe"]
        assert kinds(attempts.joined(node_joined("b", doorbell=7000), 0.0)) == ["Probe"]
        assert attempts.probed(Probed("job", "a", Answer.UP), 0.1).reasons == []
        (reason,) = attempts.probed(Probed("job", "b", Answer.GONE), 0.1).reasons
        assert "node b: if its agent is lost it is waited for, 60 s long" in reason
        assert kinds(attempts.agent_lost("a", 1.0)) == ["Probe"]
        assert kinds(attempts.agent_lost("b", 1.0)) == []
        assert kinds(attempts.joined(node_joined("b", doorbell=7001), 2.0)) == ["Probe"]  # another launcher

    def test_a_node_that_nobody_knows_is_not_rung_at(self, job):
        assert kinds(job.agent_lost("stranger", 10.0)) == []
        assert kinds(job.probed(Probed("job", "stranger", Answer.GONE), 10.0)) == []

    def test_nor_one_of_a_job_that_has_ended(self, job):
        exit_all(job)
        assert kinds(job.agent_lost("b", 10.0)) == []


class TestExclusion:
    @pytest.fixture
    def three(self):
        """Nodes a, b and c, of which two are used; b has failed twice already."""
        attempts = make(max_restarts=9)
        for _ in range(2):
            attempts.exclusion.strike("b", 1.0, "rank 7 died", 0.0)
        start(attempts, 0, 0.0, nodes=("a", "b", "c"))
        return attempts

    def test_a_node_that_fails_once_too_often_is_not_used_again(self, three):
        assert three.hosts == {"a", "b"}
        three.rank_exited(1, 3, "b", -9, 1.0)
        three.ready(node_ready("a", 1), 1.5)
        decision = three.ready(node_ready("b", 1), 1.5)
        assert [(n, o.first_rank) for n, o in orders(decision, "start")] == [("a", 0), ("c", 2)]

    def test_unless_there_are_not_enough_without_it(self, three):
        three.node_left("c", "gone", 0.5)
        three.rank_exited(1, 3, "b", -9, 1.0)
        three.ready(node_ready("a", 1), 1.5)
        decision = three.ready(node_ready("b", 1), 1.5)
        assert [n for n, _ in orders(decision, "start")] == ["a", "b"]

    def test_errors_of_a_program_weigh_less_than_signals(self, three):
        three.rank_exited(1, 3, "b", 1, 1.0)
        assert not three.exclusion.excluded("b", 1.0)

    def test_who_fails_after_another_node_has_gone_is_not_to_blame(self, three):
        three.agent_lost("a", 1.0)
        assert kinds(three.rank_exited(1, 3, "b", 1, 1.1)) == ["a: stop", "b: stop", "c: stop"]
        assert three.exclusion.score("b", 1.1) < 2.0
        assert three.loop.crashes == []
        three.node_left("a", "neither its agent nor its host answers", 3.0)
        assert three.exclusion.score("a", 3.0) == 1.0

    def test_a_rank_that_hung_is_to_blame_whoever_ends_first(self, three):
        three.accuse(Accused(1, 3, "b", "rank 3 on b hung in all_reduce"))
        assert kinds(three.rank_exited(1, 0, "a", 1, 1.0)) == ["a: stop", "b: stop", "c: stop"]
        assert three.last_failure == "rank 3 on b hung in all_reduce"
        assert three.exclusion.excluded("b", 1.0)
        assert (three.loop.crashes[0].rank, three.loop.crashes[0].how) == (3, "hung")
        assert three.exclusion.score("a", 1.0) == 0.0

    def test_a_job_of_one_node_strikes_nobody(self):
        attempts = make(1, 1)
        start(attempts, 0, 0.0, nodes=("a",))
        attempts.rank_exited(1, 0, "a", -9, 1.0)
        assert attempts.exclusion.strikes == {}

    def test_the_list_is_waited_for(self):
        attempts = make()
        attempts.exclusion.known = False
        assert kinds(start(attempts, 0, 0.0)) == []
        assert kinds(attempts.tick(LIST_PATIENCE)) == ["a: start", "b: start"]

    def test_and_so_is_a_better_node(self):
        attempts = make()
        attempts.exclusion.strike("a", 3.0, "it is bad", 0.0)
        assert kinds(start(attempts, 0, 0.0)) == []
        assert kinds(start(attempts, 0, 1.0, nodes=("c",))) == ["b: start", "c: start"]

    def test_but_not_for_ever(self):
        attempts = make()
        attempts.exclusion.strike("a", 3.0, "it is bad", 0.0)
        start(attempts, 0, 0.0)
        assert kinds(attempts.tick(LAST_CALL)) == ["b: start", "a: start"]


class TestCrashLoop:
    def test_the_job_ends_with_a_status_of_its_own(self):
        attempts = make(1, 1, max_restarts=99)
        attempts.loop.limit = 3
        start(attempts, 0, 0.0, nodes=("a",))
        for attempt in (1, 2):
            assert kinds(attempts.rank_exited(attempt, 1, "a", 7, attempt)) == ["a: stop"]
            attempts.ready(node_ready("a", attempt), attempt)
        ((_, end),) = orders(attempts.rank_exited(3, 1, "a", 7, 3.0), "end")
        assert end.status == 86
        assert end.reason == (
            "rank 1 on a exited with status 7; 3 attempts in a row have failed, and none has come to a first"
            " checkpoint; each time rank 1 on node a exited with status 7"
        )

    def test_progress_is_what_can_be_restored(self):
        attempts = make(1, 1, max_restarts=99)
        attempts.loop.limit = 2
        saved = 0
        attempts.reached = lambda: (saved, saved + 5)
        start(attempts, 0, 0.0, nodes=("a",))
        for attempt in range(1, 20):
            saved += 10
            assert kinds(attempts.rank_exited(attempt, 0, "a", -9, attempt)) == ["a: stop"]
            attempts.ready(node_ready("a", attempt), attempt)

    def test_nodes_that_are_lost_are_no_crashes(self):
        attempts = make(1, 2, max_restarts=99)
        attempts.loop.limit = 1
        start(attempts, 0, 0.0)
        assert kinds(attempts.node_left("b", "gone", 1.0)) == ["a: stop"]


class TestSuspects:
    """An agent sees a process end before the launcher says how."""

    def test_the_launcher_knows_better(self, gathered):
        gathered.suspect(1, 0, "a", 5.0)
        gathered.rank_exited(1, 0, "a", 0, 5.5)
        assert kinds(gathered.tick(100.0)) == []

    def test_but_not_for_long(self, gathered):
        gathered.suspect(1, 0, "a", 5.0)
        gathered.suspect(1, 0, "a", 5.9)
        assert kinds(gathered.tick(5.0 + EXIT_PATIENCE)) == []
        assert kinds(gathered.tick(5.1 + EXIT_PATIENCE)) == ["a: stop", "b: stop"]
        assert gathered.last_failure == "rank 0 on a died"

    @pytest.mark.parametrize(("attempt", "rank"), [(0, 0), (2, 0), (1, 4)])
    def test_somebody_else_is_not_one(self, gathered, attempt, rank):
        gathered.suspect(attempt, rank, "a", 5.0)
        assert kinds(gathered.tick(100.0)) == []


class TestEnd:
    def test_all_ranks_end_well(self, gathered):
        assert kinds(exit_all(gathered, ranks=(0, 1, 2))) == []
        ((_, end), _) = orders(gathered.rank_exited(1, 3, "b", 0, 9.0), "end")
        assert (end.status, end.reason) == (0, "all ranks have ended")

    def test_ranks_that_were_asked_to_stop(self, gathered):
        exit_all(gathered, ranks=(0, 1))
        ((_, end), _) = orders(exit_all(gathered, INTERRUPTED, ranks=(2, 3)), "end")
        assert (end.status, end.reason) == (INTERRUPTED, "stopped on request; nothing was saved")

    def test_what_was_asked_for_and_what_was_saved_is_told(self, gathered):
        gathered.stop_wanted, gathered.saved = "SIGTERM to a", "step 9 is committed in file:///run"
        ((_, end), _) = orders(exit_all(gathered, INTERRUPTED), "end")
        assert end.reason == "stopped on request (SIGTERM to a); step 9 is committed in file:///run"

    def test_a_rank_that_dies_after_a_stop_was_asked_for_ends_the_job_for_there_is_no_time(self, gathered):
        gathered.stop_wanted = "SIGTERM to a"
        ((_, end), _) = orders(gathered.rank_exited(1, 2, "b", -15, 5.0), "end")
        assert end.status == INTERRUPTED
        assert "nothing was saved; before the last save, rank 2 on b was killed by signal 15" in end.reason

    def test_a_rank_that_ends_well_twice_counts_once(self, gathered):
        assert kinds(exit_all(gathered, ranks=(0, 0, 1, 1, 2, 2))) == []

    def test_nothing_happens_after_the_end(self, gathered):
        exit_all(gathered)
        for decision in (
            gathered.ready(node_ready("a", 1), 6.0),
            gathered.node_left("a", "gone", 6.0),
            gathered.rank_exited(1, 0, "a", 1, 6.0),
            gathered.tick(1000.0),
        ):
            assert kinds(decision) == []


class TestLostMessages:
    """What an agent or a launcher that reconnects says decides, whatever was sent before."""

    def test_the_order_to_start_is_repeated(self, gathered):
        gathered.joined(node_joined("b"), 3.0)
        decision = gathered.ready(node_ready("b", 0), 3.0)
        ((node, order),) = orders(decision, "start")
        assert (node, order.attempt, order.first_rank) == ("b", 1, 2)

    def test_a_launcher_that_was_started_anew_has_no_ranks(self, gathered):
        gathered.rank_exited(1, 0, "a", 1, 3.0)
        start(gathered, 1, 4.0)
        gathered.joined(node_joined("b"), 5.0)
        decision = gathered.ready(node_ready("b", 0), 5.0)
        assert kinds(decision) == ["a: stop", "b: stop"]
        assert gathered.last_failure == "node b has no rank of attempt 2 any more"

    def test_the_order_to_stop_is_repeated(self, gathered):
        gathered.rank_exited(1, 0, "a", 1, 3.0)
        decision = gathered.joined(node_joined("b", attempt=1, first_rank=2), 4.0)
        ((node, stop),) = orders(decision, "stop")
        assert (node, stop.attempt, stop.reason) == ("b", 1, "rank 0 on a exited with status 1")
        assert gathered.phase is Phase.STOPPING

    def test_the_order_to_end_is_repeated(self, gathered):
        exit_all(gathered)
        ((node, end),) = orders(gathered.joined(node_joined("b", attempt=1, first_rank=2), 9.0), "end")
        assert (node, end.status, end.reason) == ("b", 0, "all ranks have ended")

    def test_ranks_of_an_older_attempt_are_stopped(self, gathered):
        gathered.rank_exited(1, 0, "a", 1, 3.0)
        start(gathered, 1, 4.0)
        decision = gathered.joined(node_joined("b", attempt=1, first_rank=2), 5.0)
        assert [(n, o.attempt) for n, o in orders(decision, "stop")] == [("b", 1)]
        assert gathered.phase is Phase.RUNNING

    def test_a_node_whose_agent_stays_away_is_given_up(self, gathered):
        gathered.agent_lost("b", 10.0)
        gathered.agent_lost("stranger", 10.0)
        assert kinds(gathered.tick(10.0 + NODE_PATIENCE)) == []
        decision = gathered.tick(10.1 + NODE_PATIENCE)
        assert kinds(decision) == ["a: stop"]
        assert gathered.last_failure == "node b is gone (its agent is away for 60 s)"

    def test_a_node_whose_agent_comes_back_is_not(self, gathered):
        gathered.agent_lost("b", 10.0)
        gathered.joined(node_joined("b", attempt=1, first_rank=2), 30.0)
        assert kinds(gathered.tick(1000.0)) == []


class TestNewCoordinator:
    def test_spares_that_were_started_beside_the_running_attempt_are_stopped_with_it(self):
        attempts = make()
        start(attempts, 0, now=0.0, nodes=("s1", "s2"))
        assert (attempts.phase, attempts.attempt) == (Phase.RUNNING, 1)
        decision = attempts.joined(node_joined("a", attempt=1, first_rank=0), 1.0)
        assert kinds(decision) == ["a: stop", "s1: stop", "s2: stop"]
        assert attempts.phase is Phase.STOPPING
        assert kinds(attempts.joined(node_joined("b", attempt=1, first_rank=2), 1.1)) == ["b: stop"]
        for node in ("s1", "s2", "a"):
            assert kinds(attempts.ready(node_ready(node, 1), 2.0)) == []
        started = kinds(attempts.ready(node_ready("b", 1), 2.0))
        assert (len(started), attempts.attempt) == (2, 2), "one attempt, and a later one"

    @pytest.mark.parametrize(("max_nodes", "attempt", "waits"), [(2, 1, False), (3, 1, True), (2, 0, True)])
    def test_goes_on_with_a_restart_at_once_when_all_who_can_have_run_have_stopped(self, max_nodes, attempt, waits):
        attempts = make(max_nodes=max_nodes)
        attempts.exclusion.known = True
        for node in ("a", "b"):
            attempts.joined(node_joined(node, max_nodes=max_nodes, again=True), 0.0)
        assert kinds(attempts.ready(node_ready("a", attempt), 0.1)) == []
        started = kinds(attempts.ready(node_ready("b", attempt), 0.1))
        assert (started == []) == waits
        assert waits or attempts.attempt == attempt + 1

    def test_starts_no_spare_while_a_node_whose_agent_is_away_may_run_the_attempt(self):
        attempts = make(1, 1)
        attempts.joined(node_joined("spare", again=True), 0.0)
        assert kinds(attempts.ready(node_ready("spare"), 0.0)) == []
        attempts.joined(node_joined("another", again=True), 4.0)
        assert kinds(attempts.ready(node_ready("another"), 4.0)) == []
        assert kinds(attempts.tick(AWAY_PATIENCE - 0.1)) == []
        assert kinds(attempts.tick(AWAY_PATIENCE)) == ["spare: start"]

    def test_nor_goes_on_with_a_restart_without_the_nodes_it_has_not_heard_of(self):
        attempts = make(min_nodes=2, max_nodes=3)
        attempts.joined(node_joined("a", attempt=2, world_size=6), 0.0)
        attempts.joined(node_joined("b"), 0.1)
        assert kinds(attempts.ready(node_ready("b", 2), 0.1)) == ["a: stop", "b: stop"]
        assert kinds(attempts.ready(node_ready("a", 2), 1.0)) == []
        assert kinds(attempts.tick(AWAY_PATIENCE - 0.1)) == []
        late = node_joined("c", attempt=2, first_rank=4, world_size=6)
        assert kinds(attempts.joined(late, AWAY_PATIENCE - 0.1)) == ["c: stop"]
        assert kinds(attempts.tick(2 * AWAY_PATIENCE)) == []
        assert sorted(kinds(attempts.ready(node_ready("c", 2), 21.0))) == ["a: start", "b: start", "c: start"]

    def test_nor_takes_the_only_node_that_has_stopped_for_a_spare_may_run_in_its_place(self):
        attempts = make(1, 1)
        attempts.joined(node_joined("a", again=True), 0.0)
        assert kinds(attempts.ready(node_ready("a", 1), 0.0)) == []
        assert kinds(attempts.joined(node_joined("spare", attempt=2, world_size=2), 0.1)) == []
        assert (attempts.phase, attempts.attempt) == (Phase.RUNNING, 2)

    def test_does_not_wait_once_it_has_heard_of_all_ranks(self):
        attempts = make(1, 1)
        attempts.joined(node_joined("a", attempt=1, world_size=2, again=True), 0.0)
        assert kinds(attempts.rank_exited(1, 0, "a", 1, 0.5)) == ["a: stop"]
        assert kinds(attempts.ready(node_ready("a", 1), 1.0)) == ["a: start"]

    def test_nodes_that_no_coordinator_has_heard_of_are_started_at_once(self):
        attempts = make(1, 1)
        attempts.joined(node_joined("a", uptime=100.0), 0.0)
        assert kinds(attempts.ready(node_ready("a"), 0.0)) == ["a: start"]

    @pytest.fixture
    def new(self):
        return make()

    def test_takes_over_a_running_attempt(self, new):
        for node, first in (("a", 0), ("b", 2)):
            assert kinds(new.joined(node_joined(node, attempt=3, first_rank=first), 0.0)) == []
        assert (new.phase, new.attempt, new.restarts) == (Phase.RUNNING, 3, 2)
        assert new.running == {0: "a", 1: "a", 2: "b", 3: "b"}
        assert kinds(exit_all(new)) == ["a: end", "b: end"]

    def test_counts_the_restarts_there_were(self, new):
        new.joined(node_joined("a", attempt=3), 0.0)
        ((_, end),) = orders(new.rank_exited(3, 0, "a", 1, 1.0), "end")
        assert end.reason == "rank 0 on a exited with status 1; no restarts left of 2"

    def test_does_not_end_the_job_before_it_has_heard_of_all_nodes(self, new):
        new.joined(node_joined("a", attempt=1), 0.0)
        assert kinds(exit_all(new, ranks=(0, 1))) == []
        new.joined(node_joined("b", attempt=1, first_rank=2), 1.0)
        assert kinds(exit_all(new, ranks=(2, 3))) == ["a: end", "b: end"]

    def test_knows_from_any_node_how_many_ranks_there_are(self):
        new = make(min_nodes=1)
        new.joined(node_joined("a", attempt=1, world_size=4), 0.0)
        assert kinds(exit_all(new, ranks=(0, 1))) == []
        new.joined(node_joined("b", attempt=1, first_rank=2, world_size=4), 1.0)
        assert kinds(exit_all(new, ranks=(2, 3))) == ["a: end", "b: end"]

    def test_waits_for_all_nodes_before_it_starts_an_attempt(self):
        new = make(min_nodes=1)
        new.joined(node_joined("a"), 0.0)
        assert kinds(new.ready(node_ready("a", 3), 0.0)) == []
        new.joined(node_joined("b"), 1.0)
        assert [o.attempt for _, o in orders(new.ready(node_ready("b", 3), 1.0), "start")] == [4, 4]

    def test_ends_it_with_what_it_knows_when_the_others_do_not_come(self, new):
        new.joined(node_joined("a", attempt=1), 0.0)
        exit_all(new, ranks=(0, 1))
        assert kinds(new.tick(NODE_PATIENCE)) == []
        ((_, end),) = orders(new.tick(NODE_PATIENCE + 0.1), "end")
        assert end.status == 0

    def test_stops_an_attempt_whose_other_nodes_do_not_come(self, new):
        new.joined(node_joined("a", attempt=1), 0.0)
        assert kinds(new.tick(NODE_PATIENCE + 0.1)) == ["a: stop"]
        assert new.last_failure == "not all nodes have come back"

    def test_goes_on_after_an_attempt_that_was_stopped(self, new):
        for node in "ab":
            new.joined(node_joined(node), 0.0)
            decision = new.ready(node_ready(node, 2), 0.0)
        assert [o.attempt for _, o in orders(decision, "start")] == [3, 3]
        assert new.restarts == 2

    def test_an_attempt_that_one_node_has_stopped_is_stopped_on_the_others(self, new):
        new.joined(node_joined("a"), 0.0)
        new.ready(node_ready("a", 1), 0.0)
        decision = new.joined(node_joined("b", attempt=1, first_rank=2), 1.0)
        assert kinds(decision) == ["b: stop"]
        assert [o.attempt for _, o in orders(new.ready(node_ready("b", 1), 2.0), "start")] == [2, 2]

    def test_and_so_when_the_stopped_node_comes_last(self, new):
        new.joined(node_joined("b", attempt=1, first_rank=2), 0.0)
        new.joined(node_joined("a"), 1.0)
        assert kinds(new.ready(node_ready("a", 1), 1.0)) == ["a: stop", "b: stop"]
        assert [o.attempt for _, o in orders(new.ready(node_ready("b", 1), 70.0), "start")] == [2, 2]

    def test_the_latest_attempt_counts(self, new):
        new.joined(node_joined("a", attempt=1), 0.0)
        decision = new.joined(node_joined("b", attempt=2, first_rank=2), 1.0)
        assert [(n, o.attempt) for n, o in orders(decision, "stop")] == [("a", 1)]
        assert (new.attempt, new.running) == (2, {2: "b", 3: "b"})

    def test_nodes_of_a_job_that_ended_before_this_one_are_sent_home(self, new):
        new.predecessor = (1, "no restarts left of 2")
        new.joined(node_joined("b"), 0.0)
        ((node, end),) = orders(new.ready(node_ready("b", 2), 0.0), "end")
        assert (node, end.status, end.reason) == ("b", 1, "no restarts left of 2")
        assert new.nodes == {}


@pytest.mark.parametrize(
    ("status", "words"), [(0, "exited with status 0"), (3, "exited with status 3"), (-9, "was killed by signal 9")]
)
def test_statuses_are_put_into_words(status, words):
    assert describe_status(status) == words
