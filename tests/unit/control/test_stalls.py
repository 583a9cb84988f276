import random

import pytest

from ckptsvc.control.stalls import ENOUGH, PAUSE, RECENT, WARM_UP, Gaps, Limits, Sight, Stalls

LIMITS = Limits(floor=4.0, factor=3.0, startup=600.0)
TICK = 0.25


class Node:
    """A node under a virtual clock: ranks that step, and an agent that looks."""

    def __init__(self, ranks=1, limits=LIMITS, clock_of_ranks=1000.0, patience=0.0):
        self.stalls = Stalls("job", "n0", 1, limits, TICK, patience)
        self.now, self.offset = 0.0, clock_of_ranks
        self.sights = {rank: Sight(0, self.time, 1, self.time, "step") for rank in range(ranks)}
        self.reports = []

    @property
    def time(self):
        """As the ranks' clock has it."""
        return self.now + self.offset

    def beat(self, rank=0, steps=1):
        sight = self.sights[rank]
        self.sights[rank] = sight._replace(step=sight.step + steps, at=self.time)

    def enter(self, phase, rank=0, changes=1):
        sight = self.sights[rank]
        self.sights[rank] = sight._replace(phases=sight.phases + changes, since=self.time, at=self.time, phase=phase)

    def wait(self, seconds, stopped=()):
        """Let time pass, with a look at every tick; returns what was reported."""
        found = []
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            found += self.stalls.look(self.sights, self.now, stopped)
        self.reports += found
        return found

    def sleep(self, seconds):
        """Time passes, and nobody looks: the agent is stopped."""
        self.now += seconds

    def train(self, steps, seconds=0.5, ranks=None):
        for _ in range(steps):
            self.wait(seconds)
            for rank in self.sights if ranks is None else ranks:
                self.beat(rank)
        self.wait(TICK)
        return self

    def until_reported(self, most=1000.0, **how):
        """Seconds until something is reported."""
        began = self.now
        while not (found := self.wait(TICK, **how)):
            assert self.now - began < most, "nothing was reported"
        return self.now - began, found


def stalled(report):
    return report.stalled if report.HasField("stalled") else None


class TestGaps:
    def test_nothing_is_known_of_an_empty_history(self):
        assert Gaps().quantile(0.99) == 0.0

    @pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.001, 0.3, 17.0, 1e5])
    def test_a_quantile_is_five_percent_too_long_at_most(self, seconds):
        gaps = Gaps()
        gaps.add(seconds, 30)
        assert max(seconds, 0.001) * 0.999 <= gaps.quantile(0.99) <= max(seconds, 0.001) * 1.051

    def test_it_is_the_quantile_and_not_the_longest(self):
        gaps = Gaps()
        rng = random.Random(7)
        seen = [rng.lognormvariate(0, 1) for _ in range(1000)]
        for seconds in seen:
            gaps.add(seconds)
        exact = sorted(seen)[989]
        assert exact <= gaps.quantile(0.99) <= 1.06 * exact < max(seen)

    def test_of_a_few_it_is_the_longest(self):
        gaps = Gaps()
        for seconds in [0.1] * 19 + [8.0]:
            gaps.add(seconds)
        assert gaps.quantile(0.99) == pytest.approx(8.0, rel=0.06)

    def test_memory_does_not_grow_and_the_old_fades(self):
        gaps = Gaps()
        for seconds in (30.0, 0.2):
            for _ in range(10 * int(RECENT)):
                gaps.add(seconds)
        assert gaps.total <= RECENT + 1
        assert len(gaps._counts) < 30
        assert gaps.quantile(0.99) < 0.3

    def test_what_cannot_be_is_the_longest_or_shortest_there_is(self):
        gaps = Gaps()
        gaps.add(1e300)
        assert 1e5 < gaps.quantile(0.99) < 1e6


class TestThresholds:
    def test_without_history_a_rank_has_its_startup_time(self):
        node = Node()
        seconds, (report,) = node.until_reported()
        assert 600 < seconds <= 601
        assert (report.stalled.threshold, report.stalled.rank, report.stalled.step) == (600.0, 0, 0)

    def test_short_steps_are_judged_by_the_floor(self):
        seconds, (report,) = Node().train(ENOUGH + WARM_UP).until_reported()
        assert 4 < seconds <= 4.5
        assert stalled(report).threshold == 4.0
        assert (stalled(report).phase, stalled(report).step) == ("step", ENOUGH + WARM_UP)

    def test_long_steps_by_three_times_their_99th_percentile(self):
        seconds, _ = Node().train(ENOUGH + WARM_UP, seconds=10).until_reported()
        assert 30 < seconds < 33

    def test_all_ranks_of_the_node_make_the_history(self):
        node = Node(ranks=8).train(WARM_UP + 3)
        assert node.stalls.allowed(0) == 4.0

    def test_the_first_steps_do_not_count(self):
        node = Node()
        node.train(WARM_UP, seconds=50).train(ENOUGH)
        assert node.stalls.allowed(0) == 4.0

    def test_one_long_step_among_hundreds_changes_nothing(self):
        node = Node().train(300).train(1, seconds=3.5).train(20)
        assert node.stalls.allowed(0) == 4.0

    def test_pauses_that_come_again_and_again_are_learned(self):
        node = Node().train(200)
        for _ in range(4):
            node.train(1, seconds=6).train(30)
        kinds = [report.WhichOneof("event") for report in node.reports]
        assert kinds[:2] == ["stalled", "moved"]
        assert node.stalls.allowed(0) > 12
        node.reports.clear()
        node.train(1, seconds=6)
        assert node.reports == []

    def test_a_pause_among_steps_shorter_than_a_look_is_not_averaged_away(self):
        node = Node()
        for _ in range(40):
            for _ in range(8):
                node.wait(TICK)
                node.beat(steps=25)
            node.wait(3.0)
            node.beat(steps=25)
        node.wait(TICK)
        assert node.stalls.allowed(0) == 4.0  # two in a thousand
        gaps = node.stalls._gaps["step"]
        assert gaps.quantile(0.9995) == pytest.approx(3.0, rel=0.1)

    def test_a_stopped_process_has_the_floor_only(self):
        seconds, (report,) = Node().until_reported(stopped=(0,))
        assert 4 < seconds <= 4.6
        assert stalled(report).threshold == 4.0


class TestPhases:
    def test_the_innermost_phase_counts(self):
        node = Node().train(50)
        node.enter("evaluation")
        seconds, (report,) = node.until_reported()
        assert seconds > 600
        assert stalled(report).phase == "evaluation"

    def test_each_phase_has_its_own_history(self):
        node = Node().train(50)
        for _ in range(ENOUGH):
            node.enter("evaluation")
            node.wait(20)
            node.enter("step")
            node.train(10)
        assert node.reports == []
        assert node.stalls.allowed(0) == 4.0
        node.enter("evaluation")
        seconds, (report,) = node.until_reported()
        assert 60 < seconds < 65
        assert stalled(report).phase == "evaluation"

    def test_proof_of_progress_makes_gaps_of_its_own(self):
        node = Node().train(50)
        node.enter("restore")
        for _ in range(100):
            node.wait(1.0)
            node.sights[0] = node.sights[0]._replace(at=node.time)
        seconds, _ = node.until_reported()
        assert seconds <= 4.5

    def test_a_short_phase_that_is_seldom_seen_whole_is_learned_too(self):
        """A data loader's turn of 50 ms in every step, declared as a phase."""
        node = Node(clock_of_ranks=0.0)
        for _ in range(200):
            node.wait(TICK)
            node.beat(steps=5)
            node.enter("data", changes=10)
        node.wait(TICK)
        assert node.sights[0].phase == "data"
        assert node.stalls.allowed(0) == 4.0

    def test_a_phase_that_ends_between_looks_does_not_count_for_the_step(self):
        node = Node().train(50)
        for _ in range(30):
            node.wait(2.0)
            node.enter("save")
            node.wait(30.0)
            node.enter("step")
            node.beat()
        node.wait(TICK)
        assert not any(map(stalled, node.reports))  # that steps have become four times as long is said
        assert node.stalls.allowed(0) < 10


class TestReports:
    def test_a_rank_that_moves_again_is_reported_once(self):
        node = Node().train(50)
        node.wait(10)
        node.beat()
        node.wait(1)
        assert [r.WhichOneof("event") for r in node.reports] == ["stalled", "moved"]

    def test_in_a_large_job_it_is_reported_later_unless_its_process_is_stopped(self):
        at_once, _ = Node().train(50).until_reported()
        assert Node(patience=3.0).train(50).until_reported()[0] == pytest.approx(at_once + 3.0, abs=2 * TICK)
        assert Node(patience=3.0).train(50).until_reported(stopped=[0])[0] == pytest.approx(at_once, abs=2 * TICK)

    def test_only_the_longest_stalled_of_a_node_is_reported(self):
        node = Node(ranks=4).train(50)
        node.beat(1)
        node.wait(0.5)
        for rank in (0, 2, 3):
            node.beat(rank)
        node.wait(20)
        assert [stalled(r).rank for r in node.reports] == [1]

    def test_another_takes_the_place_of_one_that_moves(self):
        node = Node(ranks=2).train(200)
        node.wait(10)
        first = stalled(node.reports[0]).rank
        node.beat(first)
        found = node.wait(1)
        assert stalled(found[0]).rank == 1 - first
        assert found[1].moved.rank == first

    def test_it_is_said_again_to_a_coordinator_that_knows_nothing(self):
        node = Node().train(50)
        assert node.stalls.standing() == []
        node.wait(10)
        (report,) = node.stalls.standing()
        assert stalled(report).seconds == pytest.approx(10, abs=0.6)

    def test_a_rank_that_has_left_is_forgotten(self):
        node = Node(ranks=2).train(50)
        node.beat(1)
        node.wait(10)
        told = stalled(node.reports[0]).rank
        del node.sights[told]
        found = node.wait(0.5)
        assert [stalled(r).rank for r in found] == [1 - told]
        assert node.stalls.quiet(told) == node.stalls.allowed(told) == 0.0


class TestSlowness:
    def test_steps_that_become_slower_are_reported_and_again_when_they_become_slower_still(self):
        node = Node(ranks=2).train(60)
        assert node.reports == []
        node.train(20, seconds=3.5)
        told = [report.slowed for report in node.reports]
        assert {(t.job, t.node, t.attempt, t.usual < 0.6) for t in told} == {("job", "n0", 1, True)}
        assert 1 <= len(told) <= 3
        assert told[-1].seconds == pytest.approx(3.5, rel=0.3)
        assert told[-1].step > 60

    def test_what_is_no_step_is_none(self):
        node = Node().train(60)
        node.enter("evaluation")
        node.wait(100)
        assert not [report for report in node.reports if report.HasField("slowed")]


class TestPauses:
    def test_an_agent_that_was_stopped_begins_to_measure_anew(self):
        node = Node().train(50)
        node.wait(3.5)
        node.sleep(60)
        assert node.wait(3.5) == []
        assert node.wait(1.5) != []

    def test_what_a_stopped_agent_has_missed_is_no_history(self):
        node = Node().train(50)
        for _ in range(30):
            node.sleep(30)
            node.beat()
            node.wait(TICK)
        assert node.stalls.allowed(0) == 4.0

    def test_time_that_a_starved_agent_did_not_see_counts_little(self):
        """It gets to run every 1.5 s only; the rank, on the same machine, gets less too."""
        node = Node().train(50)
        seldom, began = PAUSE - 0.5, node.now
        while not node.wait(TICK):
            node.sleep(seldom - TICK)
            assert node.now - began < 60
        assert node.now - began > 2 * 4

    def test_the_ranks_clock_need_not_be_ours_and_may_go_back(self):
        node = Node(clock_of_ranks=-5000.0).train(50)
        assert node.stalls.allowed(0) == 4.0
        node.offset -= 3000
        node.train(1)
        assert node.reports == []
        assert node.stalls.allowed(0) == 4.0


@pytest.mark.parametrize("seed", range(20))
def test_a_page_full_of_nonsense_is_survived(seed):
    rng = random.Random(seed)
    node = Node(ranks=2)
    for _ in range(300):
        numbers = [rng.choice([0, -1, 5, 1 << 62, -(1 << 62), rng.randrange(1000)]) for _ in range(4)]
        node.sights[rng.randrange(3)] = Sight(numbers[0], numbers[1] / 1e9, numbers[2], numbers[3] / 1e9, "?")
        node.wait(TICK)
    assert all(gaps.total <= 2 * RECENT for gaps in node.stalls._gaps.values())
