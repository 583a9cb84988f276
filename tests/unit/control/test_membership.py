import pytest
from told import announced, epoch_done, joined, kinds, left, orders, progressed, rewound, staged

from ckptsvc.control.effects import AllotEpoch
from ckptsvc.control.membership import (
    AGENT_PATIENCE,
    EPOCH_RETRY,
    LEAD_SECONDS,
    PATIENCE_WITH_PREDECESSOR,
    Job,
)
from ckptsvc.control.runs import ranks_of
from ckptsvc.control.save import Saves


@pytest.fixture
def job():
    return Job("job", "file:///run", Saves("job", 100.0))


@pytest.fixture
def full(job):
    """Both ranks are there, and the epoch is 4."""
    for rank in (0, 1):
        job.join(joined(rank), 0.0)
    job.epoch_done(epoch_done(4))
    return job


class TestJoining:
    def test_the_first_rank_begins_the_attempt(self, job):
        decision = job.join(joined(0, attempt=3, every_seconds=5.0), 7.0)
        assert decision.reasons == ["job job: attempt 3 with 2 ranks"]
        assert (job.attempt, job.world_size, job.joined_at, job.every_seconds) == (3, 2, 7.0, 5.0)
        assert (job.saves.keep, job.saves.nodes, job.nodes) == (3, {"n0"}, ["n0"])

    def test_the_second_rank_joins_it(self, job):
        job.join(joined(0), 0.0)
        assert job.join(joined(1), 1.0).reasons == []
        assert (job.joined_at, job.nodes) == (0.0, ["n0", "n1"])

    def test_a_rank_that_comes_after_the_epoch_hears_it(self, job):
        job.join(joined(0), 0.0)
        job.epoch_done(epoch_done(4))
        ((node, allotted),) = orders(job.join(joined(1), 1.0), "epoch_allotted")
        assert (node, allotted.attempt, allotted.epoch) == ("n1", 1, 4)

    def test_an_epoch_that_an_earlier_coordinator_gave_is_kept(self, job):
        decision = job.join(joined(0, epoch=9), 0.0)
        assert job.epoch == 9
        assert kinds(decision) == ["n0: epoch_allotted"]
        assert kinds(job.want_epoch(False, 0.0)) == []

    def test_the_highest_epoch_counts(self, full):
        full.join(joined(0, epoch=3), 0.0)
        assert full.epoch == 4
        full.join(joined(1, epoch=5), 0.0)
        assert full.epoch == 5

    def test_a_rank_of_an_attempt_that_is_over_is_refused(self, full):
        full.join(joined(0, attempt=2), 1.0)
        decision = full.join(joined(1, attempt=1), 2.0)
        ((node, refused),) = orders(decision, "job_refused")
        assert (node, refused.attempt, refused.code) == ("n1", 1, "fenced")
        assert decision.reasons == [refused.why] == ["attempt 1 of job job is over; attempt 2 runs"]
        assert list(full.ranks) == [0]

    def test_a_new_attempt_starts_from_nothing(self, full):
        full.announce(announced(0))
        full.progressed(progressed("n0", 50), 1.0)
        full.stop_wanted = "asked"
        full.join(joined(0, attempt=2), 9.0)
        assert (full.epoch, full.announced, full.progress, full.highest, full.stop_wanted) == (0, {}, {}, 0, "")
        assert (full.saves.attempt, full.saves.attempt_began) == (2, 9.0)

    def test_a_known_rank_without_an_epoch_is_another_process(self, full):
        """As with a launcher that does not count its restarts."""
        full.join(joined(1), 1.0)
        assert (list(full.ranks), full.epoch, full.joined_at) == ([1], 0, 1.0)

    def test_unless_its_agent_was_lost_before_it_could_hear_of_the_epoch(self, full):
        full.agent_lost("n1", 0.5)
        assert kinds(full.join(joined(1), 1.0)) == ["n1: epoch_allotted"]
        assert (list(full.ranks), full.epoch) == ([0, 1], 4)

    def test_another_world_size_is_another_attempt(self, full):
        full.join(joined(0, world_size=3), 1.0)
        assert (full.world_size, list(full.ranks), full.epoch) == (3, [0], 0)


class TestLeaving:
    @pytest.mark.parametrize(("died", "word"), [(True, "died"), (False, "left")])
    def test_is_told(self, full, died, word):
        decision = full.leave(left(1, died=died, detail="process ended"), 1.0)
        assert decision.reasons == [f"job job: rank 1 on n1 {word} (process ended)"]
        assert list(full.ranks) == [0]

    def test_ends_the_saves_that_wait_for_it(self, full):
        full.saves.staged(staged(0), 0.0)
        assert "n0: save_ended" in kinds(full.leave(left(1), 1.0))

    @pytest.mark.parametrize("event", [left(1, attempt=0), left(1, attempt=2), left(7)])
    def test_of_somebody_else_means_nothing(self, full, event):
        assert full.leave(event, 1.0).reasons == []
        assert list(full.ranks) == [0, 1]

    def test_a_rank_that_comes_back_can_stage_again(self, full):
        full.leave(left(1), 1.0)
        full.join(joined(1), 2.0)
        assert kinds(full.saves.staged(staged(0), 3.0)) == []


class TestAgentsThatGo:
    def test_ranks_of_a_lost_agent_stay_for_a_while(self, full):
        full.agent_lost("n1", 10.0)
        assert full.tick(10.0 + AGENT_PATIENCE).reasons == []
        assert list(full.ranks) == [0, 1]

    def test_and_are_gone_then(self, full):
        full.saves.staged(staged(0), 0.0)
        full.agent_lost("n1", 10.0)
        decision = full.tick(10.1 + AGENT_PATIENCE)
        assert decision.reasons[0] == "job job: rank 1 on n1 died (its agent was lost 60 s ago)"
        assert "n0: save_ended" in kinds(decision)
        assert list(full.ranks) == [0]
        assert full.tick(1000.0).reasons == []

    def test_a_rank_that_registers_again_stays(self, full):
        full.agent_lost("n1", 10.0)
        full.join(joined(1, epoch=4), 20.0)
        assert full.tick(1000.0).reasons == []
        assert list(full.ranks) == [0, 1]

    def test_one_rank_of_a_node_may_come_back_without_the_other(self, full):
        full.join(joined(0, node="n1"), 0.0)
        full.agent_lost("n1", 10.0)
        full.join(joined(1), 20.0)
        full.tick(1000.0)
        assert list(full.ranks) == [1]


class TestEpoch:
    def test_is_wanted_when_the_job_is_there(self, job):
        assert kinds(job.want_epoch(False, 0.0)) == []
        job.join(joined(0), 0.0)
        assert job.want_epoch(False, 0.0).effects == [AllotEpoch("job", 1, 0, "file:///run")]

    def test_is_asked_for_again_only_after_a_while(self, job):
        job.join(joined(0), 0.0)
        job.want_epoch(False, 0.0)
        assert kinds(job.want_epoch(False, EPOCH_RETRY - 0.1)) == []
        assert kinds(job.want_epoch(False, EPOCH_RETRY)) == ["AllotEpoch"]

    def test_waits_for_the_saves_of_a_predecessor_but_not_for_ever(self, job):
        job.join(joined(0), 0.0)
        assert kinds(job.want_epoch(True, PATIENCE_WITH_PREDECESSOR - 0.1)) == []
        assert kinds(job.want_epoch(True, PATIENCE_WITH_PREDECESSOR)) == ["AllotEpoch"]

    def test_is_told_to_every_node(self, job):
        for rank in (0, 1):
            job.join(joined(rank), 0.0)
        decision = job.epoch_done(epoch_done(4))
        assert kinds(decision) == ["n0: epoch_allotted", "n1: epoch_allotted"]
        assert decision.reasons == ["job job: epoch 4"]

    def test_a_refusal_is_told_and_tried_again(self, job):
        job.join(joined(0), 0.0)
        job.want_epoch(False, 0.0)
        decision = job.epoch_done(epoch_done(0, code="store-denied", why="read-only"))
        ((_, allotted),) = orders(decision, "epoch_allotted")
        assert (allotted.epoch, allotted.code, allotted.why) == (0, "store-denied", "read-only")
        assert decision.reasons == ["job job: no epoch: read-only"]
        assert kinds(job.want_epoch(False, EPOCH_RETRY)) == ["AllotEpoch"]

    def test_an_answer_for_another_attempt_or_a_second_one_is_ignored(self, full):
        assert kinds(full.epoch_done(epoch_done(8, attempt=2))) == []
        assert kinds(full.epoch_done(epoch_done(8))) == []
        assert full.epoch == 4


class TestRewinding:
    def test_takes_another_epoch(self, full):
        decision = full.rewound(rewound(1))
        assert decision.reasons == ["job job: went back to an earlier checkpoint; a new epoch begins"]
        assert full.epoch == 0
        assert full.want_epoch(False, 0.1).effects == [AllotEpoch("job", 1, 1, "file:///run")]
        ((_, allotted), _) = orders(full.epoch_done(epoch_done(5, rewinds=1)), "epoch_allotted")
        assert (allotted.epoch, allotted.rewinds) == (5, 1)

    def test_counts_once_though_every_rank_says_it(self, full):
        full.rewound(rewound(1))
        full.epoch_done(epoch_done(5, rewinds=1))
        assert full.rewound(rewound(1)).reasons == []
        assert full.epoch == 5

    def test_an_epoch_that_was_asked_for_before_is_of_no_use(self, full):
        full.rewound(rewound(1))
        assert kinds(full.epoch_done(epoch_done(5, rewinds=0))) == []
        assert full.epoch == 0

    def test_of_another_attempt_is_ignored(self, full):
        full.rewound(rewound(1, attempt=2))
        assert full.epoch == 4


class TestAgreement:
    def test_when_all_have_announced_everybody_hears_who_holds_the_same(self, full):
        assert kinds(full.announce(announced(1, "b"))) == []
        decision = full.announce(announced(0, "a"))
        assert kinds(decision) == ["n0: holders", "n1: holders"]
        _, holders = orders(decision, "holders")[0]
        assert [ranks_of(group.runs) for group in holders.groups] == [[0], [1]]
        assert (holders.attempt, holders.generation) == (1, 0)

    def test_equal_digests_are_one_group_in_order(self, full):
        full.announce(announced(1))
        ((_, holders), _) = orders(full.announce(announced(0)), "holders")
        assert [ranks_of(group.runs) for group in holders.groups] == [[0, 1]]

    def test_what_is_said_again_after_its_agent_was_lost_is_answered_to_that_node_once(self, full):
        full.announce(announced(0))
        full.announce(announced(1))
        assert kinds(full.announce(announced(1))) == []
        full.agent_lost("n1", 5.0)
        assert kinds(full.announce(announced(1))) == ["n1: holders"]
        assert kinds(full.announce(announced(1))) == []

    def test_an_agent_that_was_away_when_all_agreed_hears_it_when_it_is_back(self, full):
        full.announce(announced(0))
        full.agent_lost("n1", 5.0)
        full.announce(announced(1))
        assert kinds(full.announce(announced(1))) == ["n1: holders"]

    def test_a_rank_that_changes_its_mind_tells_everybody(self, full):
        full.announce(announced(0))
        full.announce(announced(1))
        assert kinds(full.announce(announced(1, "other"))) == ["n0: holders", "n1: holders"]

    def test_generations_do_not_mix(self, full):
        full.announce(announced(0, generation=0))
        assert kinds(full.announce(announced(1, generation=50))) == []
        decision = full.announce(announced(0, generation=50))
        assert orders(decision, "holders")[0][1].generation == 50
        assert list(full.announced) == [50]

    def test_another_attempt_is_ignored(self, full):
        assert kinds(full.announce(announced(0, attempt=2))) == []
        assert full.announced == {}


class TestPace:
    def test_saves_are_ordered_by_time_at_a_step_nobody_has_reached(self, full):
        full.every_seconds = 10.0
        full.progressed(progressed("n0", 1000), 4.0)
        full.progressed(progressed("n0", 1100), 9.0)
        full.progressed(progressed("n1", 1103), 9.1)
        assert kinds(full.order_saves(9.9)) == []
        decision = full.order_saves(10.0)
        assert kinds(decision) == ["n0: save_at", "n1: save_at"]
        speed = 100 / 5.0
        _, order = orders(decision, "save_at")[0]
        assert (order.attempt, order.step) == (1, 1103 + 2 + speed * LEAD_SECONDS)
        assert decision.reasons == ["job job: save at step 1125"]
        assert kinds(full.order_saves(19.9)) == []
        assert kinds(full.order_saves(20.0)) == ["n0: save_at", "n1: save_at"]

    @pytest.mark.parametrize("lack", ["every_seconds", "epoch", "progress", "ranks"])
    def test_nothing_is_ordered_without(self, full, lack):
        full.every_seconds = 10.0
        full.progressed(progressed("n0", 100), 4.0)
        full.progressed(progressed("n0", 100), 5.0)
        full.order_saves(0.0)
        if lack == "ranks":
            full.leave(left(1), 6.0)
        else:
            setattr(full, lack, type(getattr(full, lack))())
        assert kinds(full.order_saves(100.0)) == []

    def test_a_stop_is_ordered_once(self, full):
        full.stop_wanted = "SIGTERM"
        assert kinds(full.order_saves(0.0)) == []
        full.progressed(progressed("n0", 7), 0.5)
        assert kinds(full.order_saves(1.0)) == [], "the pace is not known yet"
        full.progressed(progressed("n0", 7), 0.5 + LEAD_SECONDS)
        decision = full.order_saves(2.0)
        assert kinds(decision) == ["n0: stop_at", "n1: stop_at"]
        _, order = orders(decision, "stop_at")[0]
        assert (order.step, order.reason) == (9, "SIGTERM")
        assert decision.reasons == ["job job: stop at step 9: SIGTERM"]
        assert kinds(full.order_saves(3.0)) == []

    def test_who_asks_for_a_stop_first_is_named_and_a_stop_that_is_ordered_stays(self, full):
        full.want_stop("SIGTERM")
        full.want_stop("the time is over")
        for at in (0.5, 0.5 + LEAD_SECONDS):
            full.progressed(progressed("n0", 7), at)
        ((_, order), _) = orders(full.order_saves(2.0), "stop_at")
        assert order.reason == "SIGTERM"
        full.want_stop("SIGTERM again")
        assert kinds(full.order_saves(3.0)) == []

    def test_a_stop_that_came_too_late_is_ordered_again(self, full):
        full.stop_wanted = "SIGTERM"
        full.progressed(progressed("n0", 7), 0.5)
        full.progressed(progressed("n0", 7), 0.5 + LEAD_SECONDS)
        full.order_saves(2.0)
        full.missed(8)
        assert kinds(full.order_saves(3.0)) == []
        full.progressed(progressed("n0", 20), 3.0)
        full.missed(9)
        full.missed(9)
        ((_, order), _) = orders(full.order_saves(3.0), "stop_at")
        assert (order.step, order.reason) == (31, "SIGTERM")
        assert kinds(full.order_saves(4.0)) == []

    def test_speed_is_sampled_and_never_negative(self, full):
        full.progressed(progressed("n0", 1000), 0.0)  # where a restore has brought it is no speed
        full.progressed(progressed("n0", 1010), LEAD_SECONDS / 2)
        assert full.steps_per_second is None
        full.progressed(progressed("n0", 1030), LEAD_SECONDS)
        assert full.steps_per_second == 30.0
        full.progressed(progressed("n0", 5), 2 * LEAD_SECONDS)
        assert full.steps_per_second == 0.0

    def test_the_highest_step_follows_a_job_that_goes_back_to_a_checkpoint(self, full):
        full.progressed(progressed("n0", 500), 0.1)
        full.progressed(progressed("n1", 499), 0.2)
        full.progressed(progressed("n0", 100), 0.3)
        assert full.highest == 499
        full.progressed(progressed("n1", 101), 0.4)
        assert full.highest == 101

    def test_progress_of_another_attempt_is_ignored(self, full):
        full.progressed(progressed("n0", 100, attempt=2), 5.0)
        assert full.progress == {}
