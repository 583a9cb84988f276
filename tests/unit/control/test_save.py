import pytest
from told import commits, dropped, durable, kinds, orders, shard_failed, skipped, staged

from ckptsvc.control.effects import CommitDone, Lookup, LookupDone
from ckptsvc.control.save import LATE_NEWS, LOOKUP_PATIENCE, QUIET_BEFORE_LOOKUP, REMEMBERED, Saves
from ckptsvc.rpc.v1 import agent_pb2

KEY = (1, 10)


@pytest.fixture
def saves():
    saves = Saves("job", timeout=100.0, keep=3)
    saves.begin(1, 0.0)
    return saves


def stage_all(saves, now=0.0, **changes):
    for rank in (0, 1):
        saves.staged(staged(rank, **changes), now)


def commit(saves):
    stage_all(saves)
    saves.durable(durable(0), 1.0)
    return saves.durable(durable(1), 2.0)


def outcome_of(decision):
    """How a save ended; every node was told the same."""
    told = [order.outcome for _, order in orders(decision, "save_ended")]
    assert told
    assert all(outcome == told[0] for outcome in told)
    return told[0]


class TestStaging:
    def test_the_first_rank_opens_the_save(self, saves):
        assert kinds(saves.staged(staged(0), 5.0)) == []
        assert saves.open[KEY].opened == 5.0
        assert saves.open[KEY].missing == [1]

    def test_the_last_rank_makes_the_snapshot_complete_and_every_node_hears_it(self, saves):
        saves.staged(staged(0, aliases={"a": "w"}), 0.0)
        decision = saves.staged(staged(1, aliases={"b": "w"}), 0.0)
        assert kinds(decision) == ["n0: snapshot_complete", "n1: snapshot_complete"]
        _, complete = orders(decision, "snapshot_complete")[0]
        assert (complete.epoch, complete.step, complete.world_size) == (1, 10, 2)
        assert dict(complete.aliases) == {"a": "w", "b": "w"}
        assert "all 2 ranks have staged" in decision.reasons[0]
        assert saves.snapshots() == [KEY]

    def test_a_node_that_reports_again_hears_again_that_the_snapshot_is_complete(self, saves):
        stage_all(saves)
        assert kinds(saves.staged(staged(1), 1.0)) == ["n1: snapshot_complete"]

    def test_what_is_staged_again_after_the_end_hears_the_outcome_at_once(self, saves):
        stage_all(saves)
        saves.shard_failed(shard_failed(0), 1.0)
        decision = saves.staged(staged(1), 2.0)
        assert "n1: save_ended" in kinds(decision)
        assert not saves.open

    def test_a_skip_by_a_rank_that_has_staged_opens_no_save_without_ranks(self, saves):
        """It would have been committed with the next word of it, without a shard."""
        saves.staged(staged(rank=0, ended=True), 0)
        saves.skipped(skipped(rank=0), 0)
        assert not saves.open
        assert not commits(saves.staged(staged(rank=0), 0))

    def test_a_snapshot_whose_save_has_ended_counts_as_memory_only(self, saves):
        stage_all(saves, ended=True)
        assert saves.snapshots() == [KEY]
        assert not saves.open


class TestOvertaking:
    """A rank had no agent when it should have staged; the others' snapshots must not wait for it for ever."""

    def test_a_rank_that_stages_a_later_step_ends_the_saves_that_wait_for_it(self, saves):
        saves.staged(staged(0, step=10), 0.0)
        decision = saves.staged(staged(1, step=20), 1.0)
        outcome = outcome_of(decision)
        assert (outcome.step, outcome.outcome) == (10, agent_pb2.OUTCOME_FAILED)
        assert outcome.reason == "rank 1 went on to step 20 before it staged"
        assert list(saves.open) == [(1, 20)]

    def test_one_that_an_earlier_coordinator_may_have_committed_is_looked_up_first(self, saves):
        saves.staged(staged(0, step=10, again=True), 0.0)
        decision = saves.staged(staged(1, step=20), 1.0)
        assert decision.effects == [Lookup("job", 1, 10, "file:///run")]
        assert outcome_of(saves.lookup_done(LookupDone("job", 1, 10, False), 2.0)).outcome == agent_pb2.OUTCOME_FAILED

    def test_what_is_said_again_comes_in_any_order(self, saves):
        saves.staged(staged(0, step=10), 0.0)
        assert kinds(saves.staged(staged(1, step=20, again=True), 1.0)) == []
        assert kinds(saves.staged(staged(1, step=10, again=True), 1.0)) == [
            "n0: snapshot_complete",
            "n1: snapshot_complete",
        ]

    def test_a_save_that_has_its_snapshot_goes_on(self, saves):
        stage_all(saves, step=10)
        assert kinds(saves.staged(staged(0, step=20), 1.0)) == []
        assert kinds(saves.staged(staged(1, step=20), 1.0)) == ["n0: snapshot_complete", "n1: snapshot_complete"]
        assert list(saves.open) == [(1, 10), (1, 20)]


class TestCommit:
    def test_is_ordered_when_every_shard_is_durable_and_not_before(self, saves):
        stage_all(saves)
        assert commits(saves.durable(durable(1), 1.0)) == []
        (effect,) = commits(saves.durable(durable(0), 2.0))
        assert [shard.rank for shard in effect.shards] == [0, 1]
        assert (effect.epoch, effect.step, effect.attempt, effect.world_size, effect.keep) == (1, 10, 1, 2, 3)
        assert effect.store == "file:///run"

    def test_is_ordered_once(self, saves):
        assert len(commits(commit(saves))) == 1
        assert commits(saves.durable(durable(1), 3.0)) == []

    def test_waits_for_the_staging_report_of_every_rank(self, saves):
        saves.staged(staged(0), 0.0)
        saves.durable(durable(0), 0.0)
        assert commits(saves.durable(durable(1), 0.0)) == []
        assert len(commits(saves.staged(staged(1), 0.0))) == 1

    @pytest.mark.parametrize("rank", [-1, 2, 99])
    def test_a_rank_that_cannot_be_is_ignored(self, saves, rank):
        stage_all(saves)
        saves.durable(durable(0), 0.0)
        assert commits(saves.durable(durable(rank), 0.0)) == []

    def test_a_shard_of_a_save_nobody_knows_is_ignored(self, saves):
        assert kinds(saves.durable(durable(0), 0.0)) == []

    def test_done_ends_the_save_and_every_node_hears_it(self, saves):
        commit(saves)
        decision = saves.commit_done(CommitDone("job", *KEY), 7.0)
        assert kinds(decision) == ["n0: save_ended", "n1: save_ended"]
        outcome = outcome_of(decision)
        assert outcome.outcome == agent_pb2.OUTCOME_COMMITTED
        assert (outcome.code, outcome.bytes, outcome.seconds) == ("", 200, 7.0)
        assert decision.reasons == ["step 10: committed"]
        assert not saves.open

    @pytest.mark.parametrize(
        ("code", "expected"), [("fenced", agent_pb2.OUTCOME_FENCED), ("store-full", agent_pb2.OUTCOME_FAILED)]
    )
    def test_refused_ends_the_save_with_the_reason(self, saves, code, expected):
        commit(saves)
        outcome = outcome_of(saves.commit_done(CommitDone("job", *KEY, code, "why"), 7.0))
        assert (outcome.outcome, outcome.code, outcome.reason) == (expected, code, "why")

    def test_an_answer_for_a_save_that_has_ended_changes_nothing(self, saves):
        commit(saves)
        saves.commit_done(CommitDone("job", *KEY), 7.0)
        assert kinds(saves.commit_done(CommitDone("job", *KEY, "store-full", "why"), 8.0)) == []
        assert saves.ended[KEY].outcome == agent_pb2.OUTCOME_COMMITTED


class TestFailure:
    def test_a_shard_that_cannot_be_written_ends_the_save(self, saves):
        stage_all(saves)
        outcome = outcome_of(saves.shard_failed(shard_failed(1), 1.0))
        assert (outcome.outcome, outcome.code) == (agent_pb2.OUTCOME_FAILED, "store-full")
        assert outcome.reason == "rank 1: no space left"

    def test_a_fenced_writer_says_so(self, saves):
        stage_all(saves)
        assert outcome_of(saves.shard_failed(shard_failed(1, "fenced"), 1.0)).outcome == agent_pb2.OUTCOME_FENCED

    def test_a_shard_that_was_durable_before_stays_so(self, saves):
        stage_all(saves)
        saves.durable(durable(1), 1.0)
        assert kinds(saves.shard_failed(shard_failed(1), 2.0)) == []
        assert len(commits(saves.durable(durable(0), 3.0))) == 1

    def test_nothing_but_its_answer_ends_a_commit_that_is_under_way(self, saves):
        commit(saves)
        for decision in (
            saves.shard_failed(shard_failed(0), 3.0),
            saves.skipped(skipped(0), 3.0),
            saves.rank_gone(0, "died", 3.0),
            saves.tick(102.0),
        ):
            assert kinds(decision) == []
        assert outcome_of(saves.commit_done(CommitDone("job", *KEY), 9.0)).outcome == agent_pb2.OUTCOME_COMMITTED

    def test_a_rank_that_skips_ends_the_save_for_all(self, saves):
        saves.staged(staged(1), 0.0)
        outcome = outcome_of(saves.skipped(skipped(0), 1.0))
        assert (outcome.outcome, outcome.code) == (agent_pb2.OUTCOME_SKIPPED, "arena-exhausted")
        assert outcome.reason == "rank 0: no arena"

    def test_a_rank_that_skips_first_is_remembered(self, saves):
        saves.nodes.add("n0")
        assert kinds(saves.skipped(skipped(0), 0.0)) == ["n0: save_ended"]
        assert kinds(saves.staged(staged(1), 1.0)) == ["n1: save_ended"]
        assert not saves.open

    def test_a_second_skip_says_nothing_new(self, saves):
        saves.nodes.add("n0")
        saves.skipped(skipped(0), 0.0)
        assert kinds(saves.skipped(skipped(1), 0.0)) == []

    def test_outcomes_are_forgotten_after_a_while(self, saves):
        for step in range(REMEMBERED + 1):
            saves.skipped(skipped(0, step=step), 0.0)
        assert len(saves.ended) == REMEMBERED
        assert (1, 0) not in saves.ended


class TestRanksThatGo:
    def test_a_rank_that_dies_before_it_stages_ends_the_save(self, saves):
        saves.staged(staged(0), 0.0)
        decision = saves.rank_gone(1, "died", 1.0)
        assert outcome_of(decision).reason == "rank 1 died before it staged"
        assert decision.reasons == ["step 10: failed: rank 1 died before it staged"]

    def test_a_rank_that_dies_before_anybody_stages_ends_the_save_too(self, saves):
        saves.rank_gone(1, "died", 1.0)
        assert outcome_of(saves.staged(staged(0), 2.0)).reason == "rank 1 was gone before it staged"

    def test_a_rank_that_has_staged_may_die(self, saves):
        stage_all(saves)
        assert kinds(saves.rank_gone(1, "died", 1.0)) == []
        saves.durable(durable(0), 1.0)
        assert len(commits(saves.durable(durable(1), 1.0))) == 1

    def test_saves_of_another_attempt_do_not_mind(self, saves):
        saves.staged(staged(0, attempt=2, epoch=2), 0.0)
        assert kinds(saves.rank_gone(1, "died", 1.0)) == []

    def test_a_rank_that_registers_again_is_not_gone(self, saves):
        saves.rank_gone(1, "died", 1.0)
        saves.rank_back(1)
        assert kinds(saves.staged(staged(0), 2.0)) == []

    def test_a_new_attempt_ends_what_the_old_one_left_open_once_late_news_are_in(self, saves):
        saves.staged(staged(0), 0.0)
        saves.begin(2, 10.0)
        assert kinds(saves.tick(10.0 + LATE_NEWS)) == []
        assert outcome_of(saves.tick(10.1 + LATE_NEWS)).reason == "rank 1 was gone before it staged"

    def test_late_news_complete_the_save_of_an_old_attempt(self, saves):
        saves.staged(staged(0), 0.0)
        saves.durable(durable(0), 0.0)
        saves.begin(2, 10.0)
        saves.staged(staged(1), 20.0)
        assert len(commits(saves.durable(durable(1), 20.0))) == 1

    def test_a_save_whose_ranks_have_all_staged_outlives_its_attempt(self, saves):
        stage_all(saves)
        saves.begin(2, 10.0)
        assert kinds(saves.tick(99.0)) == []


class TestTime:
    def test_ranks_that_never_stage_are_named(self, saves):
        saves.staged(staged(0, world_size=12), 0.0)
        assert kinds(saves.tick(100.0)) == []
        outcome = outcome_of(saves.tick(100.1))
        assert outcome.reason == "after 100 s these ranks have not staged: 1, 2, 3, 4, 5, 6, 7, 8 ..."
        assert outcome.code == "save-failed"
        assert outcome.timed_out

    def test_a_save_that_fails_earlier_has_not_taken_too_long(self, saves):
        stage_all(saves)
        assert not outcome_of(saves.shard_failed(shard_failed(0), 1.0)).timed_out

    def test_ranks_that_never_write_are_named(self, saves):
        stage_all(saves)
        saves.durable(durable(0), 0.0)
        outcome = outcome_of(saves.tick(100.1))
        assert outcome.reason == "after 100 s these ranks have not written their shards: 1"
        assert outcome.timed_out


class TestSavesOfBeforeOurTime:
    """A new coordinator hears of them from agents that report again what they hold."""

    @pytest.fixture
    def old(self, saves):
        saves.staged(staged(0, again=True), 0.0)
        return saves

    def test_a_quiet_one_is_looked_up_now_and_then(self, old):
        assert kinds(old.tick(QUIET_BEFORE_LOOKUP)) == []
        (effect,) = old.tick(QUIET_BEFORE_LOOKUP + 0.1).effects
        assert effect == Lookup("job", *KEY, "file:///run")
        assert kinds(old.tick(QUIET_BEFORE_LOOKUP + 0.2)) == []

    def test_one_whose_ranks_have_all_staged_will_be_committed_again(self, old):
        old.staged(staged(1, again=True), 0.0)
        assert kinds(old.tick(50.0)) == []

    def test_one_that_a_rank_has_staged_in_our_time_cannot_have_been_committed(self, old):
        old.staged(staged(1, world_size=3), 0.0)
        assert kinds(old.tick(50.0)) == []
        assert "n0: save_ended" in kinds(old.rank_gone(2, "died", 51.0))

    def test_a_record_ends_it(self, old):
        outcome = outcome_of(old.lookup_done(LookupDone("job", *KEY, True), 7.0))
        assert outcome.outcome == agent_pb2.OUTCOME_COMMITTED

    def test_no_record_leaves_it_open(self, old):
        assert kinds(old.lookup_done(LookupDone("job", *KEY, False), 7.0)) == []
        assert KEY in old.open

    @pytest.mark.parametrize("found", [True, False])
    def test_does_not_fail_before_the_store_was_asked(self, old, found):
        assert kinds(old.rank_gone(1, "died", 1.0)) == ["Lookup"]
        assert kinds(old.rank_gone(1, "died", 1.0)) == []
        outcome = outcome_of(old.lookup_done(LookupDone("job", *KEY, found), 2.0))
        if found:
            assert outcome.outcome == agent_pb2.OUTCOME_COMMITTED
        else:
            assert (outcome.outcome, outcome.reason) == (agent_pb2.OUTCOME_FAILED, "rank 1 died before it staged")

    @pytest.mark.parametrize("event", [shard_failed(0), skipped(1)])
    def test_whatever_it_fails_of(self, old, event):
        decide = old.shard_failed if event == shard_failed(0) else old.skipped
        assert ("Lookup" in kinds(decide(event, 1.0))) == (event == shard_failed(0))  # a rank that skipped: no commit

    def test_a_store_that_cannot_say_is_asked_again_and_then_that_is_the_outcome(self, old):
        old.rank_gone(1, "died", 1.0)
        assert kinds(old.tick(1.1 + QUIET_BEFORE_LOOKUP)) == ["Lookup"]
        assert kinds(old.tick(1.2 + QUIET_BEFORE_LOOKUP)) == []
        outcome = outcome_of(old.tick(1.1 + LOOKUP_PATIENCE))
        assert (outcome.outcome, outcome.code) == (agent_pb2.OUTCOME_FAILED, "store-unavailable")
        assert outcome.reason.startswith("rank 1 died before it staged; the store does not say")

    def test_is_not_committed_once_it_has_failed(self, old):
        old.rank_gone(1, "died", 1.0)
        old.staged(staged(1, again=True), 2.0)
        old.durable(durable(0), 2.0)
        assert commits(old.durable(durable(1), 2.0)) == []

    def test_a_rank_that_knows_of_the_end_is_not_waited_for(self, old):
        old.staged(staged(1, again=True, ended=True), 0.0)
        assert kinds(old.rank_gone(1, "died", 1.0)) == []  # it has staged
        assert kinds(old.tick(QUIET_BEFORE_LOOKUP + 0.1)) == ["Lookup"]
        outcome = outcome_of(old.lookup_done(LookupDone("job", *KEY, False), 6.0))
        assert outcome.reason == "it had ended without a commit before"

    def test_an_answer_for_a_save_that_has_ended_or_is_being_committed_is_ignored(self, saves):
        assert kinds(saves.lookup_done(LookupDone("job", *KEY, True), 1.0)) == []
        commit(saves)
        assert kinds(saves.lookup_done(LookupDone("job", *KEY, True), 1.0)) == []

    def test_a_commit_that_never_returns_is_given_up(self, saves):
        commit(saves)
        assert kinds(saves.tick(102.0)) == []
        outcome = outcome_of(saves.tick(102.1))
        assert (outcome.code, outcome.reason) == ("store-unavailable", "the commit has not returned for 100 s")
        assert kinds(saves.commit_done(CommitDone("job", *KEY), 200.0)) == []


class TestMemory:
    def test_newest_first(self, saves):
        for epoch, step in ((1, 20), (2, 10), (1, 10)):
            stage_all(saves, epoch=epoch, step=step)
        assert saves.snapshots() == [(2, 10), (1, 20), (1, 10)]

    def test_a_shard_that_is_dropped_makes_the_snapshot_incomplete(self, saves):
        stage_all(saves)
        saves.dropped(dropped(0))
        assert saves.snapshots() == []
        saves.dropped(dropped(1))
        assert (saves.held, saves.complete, saves.aliases, saves.places) == ({}, {}, {}, {})

    def test_other_snapshots_stay(self, saves):
        stage_all(saves)
        stage_all(saves, step=20)
        saves.dropped(dropped(0))
        assert saves.snapshots() == [(1, 20)]
        saves.node_gone("n0")
        assert saves.snapshots() == []

    def test_a_shard_nobody_knows_may_be_dropped(self, saves):
        saves.dropped(dropped(0))

    def test_a_node_out_of_reach_takes_its_shards_along_until_it_reports_them_again(self, saves):
        stage_all(saves)
        saves.node_gone("n1")
        assert saves.snapshots() == []
        assert saves.nodes == {"n0"}
        saves.staged(staged(1), 5.0)
        assert saves.snapshots() == [KEY]

    def test_what_a_node_that_is_gone_wrote_still_counts(self, saves):
        stage_all(saves)
        saves.durable(durable(1), 0.0)
        saves.node_gone("n1")
        assert len(commits(saves.durable(durable(0), 0.0))) == 1

    def test_a_shard_that_is_on_another_node_now_stays_when_the_first_one_goes(self, saves):
        stage_all(saves)
        saves.staged(staged(1, node="n7"), 1.0)
        saves.node_gone("n1")
        assert saves.snapshots() == [KEY]
        saves.node_gone("n7")
        assert saves.snapshots() == []


def test_a_rank_that_comes_late_to_a_step_the_others_have_passed_does_not_hold_its_arena_for_it(saves):
    """Rank 0 had no agent at step 10; rank 1 waited for an arena and staged it when rank 0 was at step 20 already."""
    saves.staged(staged(0, step=20), 0.0)
    decision = saves.staged(staged(1, step=10), 1.0)
    assert "rank 0 had gone on to step 20" in outcome_of(decision).reason
    assert KEY not in saves.open
