"""What people order, as the coordinator decides it."""

import pytest
from told import (
    STORE,
    durable,
    epoch_done,
    joined,
    kinds,
    left,
    node_joined,
    node_ready,
    orders,
    progressed,
    rewound,
    skipped,
    staged,
)

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import Audit, CommitDone, Decision, KeepNodes, NodesKept, NodesRead, Restarted
from ckptsvc.control.exclusion import Exclusion, Strikes, Word
from ckptsvc.control.restart import Phase
from ckptsvc.control.tiering import Draining
from ckptsvc.control.verbs import verb_of
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause

FIELDS = {type_.message_type._concrete_class: type_.name for type_ in pb.Report.DESCRIPTOR.fields if type_.message_type}


class Driver:
    """Feeds reports, keeps the time, and hears what is answered."""

    def __init__(self):
        self.core = Coordinator(save_timeout=100.0, node="n0")
        self.now, self.count = 0.0, 0
        self.seen = Decision()
        self.writes, self.problem = True, ""

    def do(self, decision):
        self.seen.add(decision)
        for effect in decision.effects:
            if isinstance(effect, KeepNodes) and self.writes:
                self.do(self.core.nodes_kept(NodesKept(effect.said, self.problem), self.now))
        return decision

    def tell(self, event, node=None):
        report = pb.Report(**{FIELDS[type(event)]: event})
        return self.do(self.core.handle(node or getattr(event, "node", "n0"), report, self.now))

    def tick(self, seconds=0.5):
        self.now += seconds
        return self.do(self.core.tick(self.now))

    def ask(self, verb, job="job", **fields):
        self.count += 1
        by = pb.Caller(uid=7, name="ada", node="n0")
        asked = pb.Asked(id=str(self.count), job=job, node="n0", verb=verb, by=by, at=100.0 + self.now, **fields)
        self.tell(asked)
        return asked

    def answers(self, asked):
        return [a for _, a in orders(self.seen, "answered") if a.id == asked.id]

    def result(self, asked):
        """How it has ended, once."""
        found = [a for a in self.answers(asked) if not a.begun]
        assert len(found) == 1, found
        assert [e for e in self.seen.effects if isinstance(e, Audit) and e.asked.id == asked.id]
        return found[0]

    def train(self, steps, start=0):
        """All ranks go on, ten steps a second."""
        for step in range(start + 10, start + steps + 10, 10):
            self.tick(1.0)
            for node in ("n0", "n1"):
                self.tell(progressed(node, step))


@pytest.fixture
def driver():
    found = Driver()
    for node in ("n0", "n1", "n2"):
        found.tell(pb.AgentHello(node=node))
    return found


@pytest.fixture
def running(driver):
    """Two ranks that have trained thirty steps."""
    for rank in (0, 1):
        driver.tell(joined(rank))
    driver.do(driver.core.epoch_done(epoch_done(1), driver.now))
    driver.train(30)
    driver.seen = Decision()
    return driver


def save(driver, step):
    for rank in (0, 1):
        driver.tell(staged(rank, step=step))
    for rank in (0, 1):
        driver.tell(durable(rank, step=step))
    driver.do(driver.core.commit_done(CommitDone("job", 1, step), driver.now))


class TestCheckpoint:
    def test_it_is_ordered_at_a_step_nobody_has_reached_and_answered_when_it_is_committed(self, running):
        asked = running.ask(pb.VERB_CHECKPOINT)
        assert [a.begun for a in running.answers(asked)] == [True]
        ordered = orders(running.tick(), "save_at")
        assert [node for node, _ in ordered] == ["n0", "n1"]
        step = ordered[0][1].step
        assert step > 30
        save(running, step)
        running.tick()
        done = running.result(asked)
        assert (done.code, done.step, done.bytes) == ("", step, 200)

    def test_one_that_was_taken_before_the_order_does_not_count(self, running):
        for rank in (0, 1):
            running.tell(staged(rank, step=30))
        asked = running.ask(pb.VERB_CHECKPOINT)
        for rank in (0, 1):
            running.tell(durable(rank, step=30))
        running.do(running.core.commit_done(CommitDone("job", 1, 30), running.now))
        running.tick()
        assert all(answer.begun for answer in running.answers(asked))

    def test_one_that_is_skipped_is_ordered_again(self, running):
        asked = running.ask(pb.VERB_CHECKPOINT)
        (step, *_) = [order.step for _, order in orders(running.tick(), "save_at")]
        running.tell(skipped(0, step=step))
        running.tick()
        assert orders(running.seen, "save_at")[-1][1].step > step or running.core.jobs["job"].save_wanted
        assert all(answer.begun for answer in running.answers(asked))

    def test_one_that_fails_is_said_to(self, running):
        asked = running.ask(pb.VERB_CHECKPOINT)
        (step, *_) = [order.step for _, order in orders(running.tick(), "save_at")]
        for rank in (0, 1):
            running.tell(staged(rank, step=step))
        for rank in (0, 1):
            running.tell(durable(rank, step=step))
        running.do(running.core.commit_done(CommitDone("job", 1, step, "store-full", "no space"), running.now))
        running.tick()
        assert (running.result(asked).code, "no space" in running.result(asked).what) == ("store-full", True)

    def test_of_a_job_that_does_not_run_there_is_none(self, running):
        assert running.result(running.ask(pb.VERB_CHECKPOINT, "other")).code == "not-found"
        asked = running.ask(pb.VERB_CHECKPOINT)
        for rank in (0, 1):
            running.tell(left(rank))
        running.tick()
        assert running.result(asked).code == "save-failed"

    def test_who_asks_twice_is_answered_and_orders_nothing_twice(self, running):
        asked = running.ask(pb.VERB_CHECKPOINT)
        running.tell(asked)
        assert len(running.core.verbs.working) == 1
        (step, *_) = [order.step for _, order in orders(running.tick(), "save_at")]
        save(running, step)
        running.tick()
        running.tell(asked)
        finals = [answer for answer in running.answers(asked) if not answer.begun]
        assert len(finals) == 2
        assert finals[0] == finals[1]


class TestPause:
    def test_it_holds_from_a_step_nobody_has_reached_and_saves_by_time_end(self, running):
        running.core.jobs["job"].every_seconds = 1.0
        asked = running.ask(pb.VERB_PAUSE, reason="quiet")
        told = orders(running.seen, "pausing")
        assert [(node, order.paused, order.attempt) for node, order in told] == [("n0", True, 1), ("n1", True, 1)]
        assert told[0][1].step > 30
        assert running.result(asked).step == told[0][1].step
        running.seen = Decision()
        running.train(50, 30)
        assert orders(running.seen, "save_at") == []
        running.ask(pb.VERB_CHECKPOINT)
        assert len(orders(running.tick(), "save_at")) == 2

    def test_resuming_is_decided_after_the_pause_has_begun(self, running):
        running.ask(pb.VERB_PAUSE)
        paused_at = orders(running.seen, "pausing")[0][1].step
        asked = running.ask(pb.VERB_RESUME)
        assert all(answer.begun for answer in running.answers(asked))
        running.train(60, 30)
        resumed = orders(running.seen, "pausing")[-1][1]
        assert not resumed.paused
        assert resumed.step > paused_at
        assert running.result(asked).step == resumed.step

    def test_pausing_what_is_paused_changes_for_how_long_and_not_since_when(self, running):
        first = running.result(running.ask(pb.VERB_PAUSE, seconds=5.0))
        running.train(20, 30)
        running.now += 1
        second = running.result(running.ask(pb.VERB_PAUSE))
        assert second.step == first.step
        assert [order.left for _, order in orders(running.seen, "pausing")] == [5.0, 5.0, 0.0, 0.0]
        running.train(80, 50)
        assert running.core.jobs["job"].paused

    def test_a_new_attempt_is_told_before_it_hears_of_its_epoch(self, running):
        running.ask(pb.VERB_PAUSE)
        running.seen = Decision()
        for rank in (0, 1):
            running.tell(joined(rank, attempt=2))
        running.do(running.core.epoch_done(epoch_done(2, attempt=2), running.now))
        assert kinds(running.seen) == [
            "n0: pausing", "AllotEpoch", "n1: pausing", "n0: epoch_allotted", "n1: epoch_allotted",
        ]  # fmt: skip
        assert {(order.attempt, order.step) for _, order in orders(running.seen, "pausing")} == {(2, 1)}

    def test_going_back_to_a_checkpoint_does_not_end_it(self, running):
        running.ask(pb.VERB_PAUSE)
        running.seen = Decision()
        running.tell(rewound(1))
        assert {order.step for _, order in orders(running.seen, "pausing")} == {1}

    def test_after_it_was_resumed_going_back_to_a_checkpoint_leaves_nothing_out(self, running):
        running.ask(pb.VERB_PAUSE)
        running.train(60, 30)
        running.now += 1
        running.ask(pb.VERB_RESUME)
        running.seen = Decision()
        running.tell(rewound(1))
        told = orders(running.seen, "pausing")
        assert [(node, order.paused, order.step) for node, order in told] == [("n0", False, 1), ("n1", False, 1)]

    @pytest.mark.parametrize("verbs", [[pb.VERB_PAUSE], [pb.VERB_PAUSE, pb.VERB_RESUME]])
    def test_new_processes_under_the_same_attempt_number_are_told_from_their_first_step_on(self, running, verbs):
        for verb in verbs:
            running.ask(verb)
            running.train(60, 30)
            running.now += 1
        held = orders(running.seen, "pausing")[-1][1]
        assert held.step > 1
        for core in (running, Driver()):  # or a coordinator that hears of it now
            core.seen = Decision()
            for rank in (0, 1):
                core.tell(held)
                core.tell(joined(rank))
            told = orders(core.seen, "pausing")
            assert {node for node, _ in told} == {"n0", "n1"}
            assert {(order.paused, order.step) for _, order in told} == {(held.paused, 1)}

    def test_it_ends_when_its_time_is_over(self, running):
        running.ask(pb.VERB_PAUSE, seconds=5.0)
        assert orders(running.seen, "pausing")[0][1].left == 5.0
        running.train(80, 30)
        assert not orders(running.seen, "pausing")[-1][1].paused
        assert not running.core.jobs["job"].paused

    def test_a_new_coordinator_hears_of_it_from_the_agents(self, running):
        running.ask(pb.VERB_PAUSE)
        held = orders(running.seen, "pausing")[0][1]
        later = Driver()
        later.tell(held)
        for rank in (0, 1):
            later.tell(joined(rank, epoch=1))
        told = orders(later.seen, "pausing")
        assert [(node, order.step, order.version) for node, order in told] == [
            ("n0", held.step, held.version), ("n1", held.step, held.version)
        ]  # fmt: skip
        assert later.core.jobs["job"].paused

    def test_of_two_words_the_later_one_counts_whoever_tells_it_first(self, running):
        running.ask(pb.VERB_PAUSE)
        before = orders(running.seen, "pausing")[0][1]
        running.train(60, 30)
        running.now += 1
        running.ask(pb.VERB_RESUME)
        after = orders(running.seen, "pausing")[-1][1]
        for first, second in ((before, after), (after, before)):
            later = Driver()
            later.tell(joined(0, epoch=1))
            later.tell(first)
            later.tell(second)
            assert not later.core.pauses.known["job"].paused

    def test_an_agent_that_was_away_is_told_again(self, running):
        running.ask(pb.VERB_PAUSE)
        running.do(running.core.agent_lost("n1", running.now))
        running.seen = Decision()
        running.tell(joined(1, epoch=1))
        assert [node for node, _ in orders(running.seen, "pausing")] == ["n1"]

    def test_a_job_that_is_called_the_same_as_one_that_has_ended_is_another_one(self, running):
        running.ask(pb.VERB_PAUSE)
        for rank in (0, 1):
            running.tell(left(rank, died=False))
        assert not running.core.jobs["job"].paused
        running.seen = Decision()
        for rank in (0, 1):
            running.tell(joined(rank, attempt=2, every_seconds=1.0))
        assert orders(running.seen, "pausing") == []
        running.do(running.core.epoch_done(epoch_done(2, attempt=2), running.now))
        for step in (10, 20, 30):
            running.tick(2.0)
            for node in ("n0", "n1"):
                running.tell(progressed(node, step, attempt=2))
        assert orders(running.seen, "save_at") != []
        assert "was not paused" in running.result(running.ask(pb.VERB_RESUME)).what

    def test_a_job_of_which_nothing_is_known_is_not_paused_whatever_one_before_it_was(self, running):
        running.core.jobs["job"].paused = True
        for rank in (0, 1):
            running.tell(joined(rank, attempt=2))
        assert not running.core.jobs["job"].paused

    def test_one_whose_ranks_have_died_and_come_again_is_the_same(self, running):
        running.ask(pb.VERB_PAUSE)
        for rank in (0, 1):
            running.tell(left(rank, died=True))
        running.seen = Decision()
        running.tell(joined(0, attempt=2))
        assert [order.step for _, order in orders(running.seen, "pausing")] == [1]

    def test_who_resumes_what_is_not_paused_is_told_so(self, running):
        assert "was not paused" in running.result(running.ask(pb.VERB_RESUME)).what
        assert running.result(running.ask(pb.VERB_PAUSE, "nobody")).code == "not-found"


def launched(driver, *nodes, **fields):
    for node in nodes:
        if "ReadNodes" in kinds(driver.tell(node_joined(node, nproc=1, **fields))):
            driver.do(driver.core.nodes_read(NodesRead({}), driver.now))
    for node in nodes:
        driver.tell(node_ready(node))
    driver.tick(6.0)
    return driver.core.launched["job"]


class TestRestart:
    def test_it_stops_the_attempt_starts_another_and_takes_no_restart(self, driver):
        attempts = launched(driver, "n0", "n1", max_restarts=0)
        asked = driver.ask(pb.VERB_RESTART, reason="new data", attempt=1)
        assert len(orders(driver.seen, "stop")) == 2
        assert [e for e in driver.seen.effects if isinstance(e, Restarted)] == [Restarted("job", Cause.ASKED)]
        for node in ("n0", "n1"):
            driver.tell(node_ready(node, 1))
        driver.tick()
        assert "attempt 2 has begun" in driver.result(asked).what
        assert attempts.restarts == 0
        assert attempts.incidents == ["attempt 1: restarted by ada: new data"]
        assert driver.core.exclusion.strikes == {}

    def test_a_new_coordinator_that_is_asked_again_does_not_do_it_twice(self, driver):
        launched(driver, "n0", "n1")
        driver.core.launched["job"].attempt = 2
        assert "has begun already" in driver.result(driver.ask(pb.VERB_RESTART, attempt=1)).what
        assert orders(driver.seen, "stop") == []

    def test_what_cannot_be_restarted(self, driver):
        assert "has not started" in driver.result(driver.ask(pb.VERB_RESTART)).what
        attempts = launched(driver, "n0", "n1")
        attempts.stop_wanted = "SIGTERM"
        assert "about to stop" in driver.result(driver.ask(pb.VERB_RESTART)).what
        attempts.stop_wanted, attempts.phase = "", Phase.STOPPING
        assert "is stopping" in driver.result(driver.ask(pb.VERB_RESTART)).what


class TestNodes:
    def test_an_excluded_node_is_not_chosen_at_the_next_start(self, driver):
        attempts = launched(driver, "n0", "n1", "n2", min_nodes=2, max_nodes=2)
        assert attempts.hosts == {"n0", "n1"}
        asked = driver.ask(pb.VERB_EXCLUDE, "", target="n1", reason="a fan")
        (kept,) = [e for e in driver.tick().effects if isinstance(e, KeepNodes)]
        assert kept.words["n1"][0]
        assert "goes on running job" in driver.result(asked).what
        driver.ask(pb.VERB_RESTART)
        for node in ("n0", "n1"):
            driver.tell(node_ready(node, 1))
        driver.tick()
        assert attempts.hosts == {"n0", "n2"}
        assert attempts.aside(driver.now) == {"n1": "is excluded: a fan (ada)"}
        driver.ask(pb.VERB_INCLUDE, "", target="n1")
        assert attempts.aside(driver.now) == {"n1": "a spare"}

    def test_a_word_is_answered_when_it_is_on_the_list(self, driver):
        driver.writes = False
        asked = driver.ask(pb.VERB_EXCLUDE, "", target="n1")
        (first,) = [e for e in driver.tick().effects if isinstance(e, KeepNodes)]
        later = driver.ask(pb.VERB_EXCLUDE, "", target="n2")
        driver.do(driver.core.nodes_kept(NodesKept(first.said), driver.now))
        assert driver.result(asked).what == "node n1 is excluded"
        assert [a.begun for a in driver.answers(later)] == [True]
        driver.writes, driver.problem = True, "nodes.json: No space left on device"
        driver.tick()
        assert driver.result(later).code == "store"
        assert "No space left" in driver.result(later).what
        assert driver.core.exclusion.excluded("n2", driver.now)

    def test_for_a_time(self):
        exclusion = Exclusion()
        exclusion.say("a", Word(True, 0.0, 60.0, "why"))
        assert exclusion.excluded("a", 59.0)
        assert not exclusion.excluded("a", 61.0)

    def test_the_later_word_counts_and_including_forgives(self):
        exclusion = Exclusion({"a": Strikes(5.0, 0.0, "died")})
        assert exclusion.excluded("a", 1.0)
        exclusion.say("a", Word(False, 2.0, 0.0, "mended"))
        assert not exclusion.excluded("a", 3.0)
        exclusion.say("a", Word(True, 1.0, 100.0, "an older word"))
        assert not exclusion.excluded("a", 3.0)
        exclusion.merge({}, 4.0, {"a": Word(True, 3.5, 100.0, "of another coordinator")})
        assert exclusion.why("a", 5.0) == "is excluded: of another coordinator"

    def test_the_list_of_other_coordinators_is_taken_in(self, driver):
        driver.tell(node_joined("a"))
        decision = driver.core.nodes_read(NodesRead({}, {"a": (True, 60.0, 600.0, "a fan (ada)")}), driver.now)
        assert decision.reasons[0] == "node a is excluded: a fan (ada)"


class TestDrain:
    @pytest.fixture
    def training(self, driver):
        """A launched job with a rank on each of two nodes, and a spare."""
        launched(driver, "n0", "n1", "n2", min_nodes=2, max_nodes=2)
        for rank in (0, 1):
            driver.tell(joined(rank))
        driver.do(driver.core.epoch_done(epoch_done(1), driver.now))
        driver.train(30)
        driver.seen = Decision()
        return driver

    def test_a_checkpoint_then_a_start_without_the_node(self, training):
        asked = training.ask(pb.VERB_DRAIN, "", target="n1", reason="a fan")
        assert [node for node, _ in orders(training.seen, "vacate")] == ["n1"]
        (step, *_) = [order.step for _, order in orders(training.tick(), "save_at")]
        assert orders(training.seen, "stop") == []
        save(training, step)
        training.tick()
        assert {node for node, _ in orders(training.seen, "stop")} == {"n0", "n1", "n2"}
        for rank in (0, 1):
            training.tell(left(rank, died=False))
        for node in ("n0", "n1"):
            training.tell(node_ready(node, 1))
        training.tick()
        assert training.core.launched["job"].hosts == {"n0", "n2"}
        assert training.result(asked).what == "job job needs n1 no more"
        assert not training.result(asked).code

    def test_a_job_that_has_no_other_node_is_left_alone(self, training):
        training.tell(pb.NodeLeft(job="job", node="n2", detail="gone"))
        asked = training.ask(pb.VERB_DRAIN, "", target="n1")
        (step, *_) = [order.step for _, order in orders(training.tick(), "save_at")]
        save(training, step)
        training.tick()
        assert "cannot do without n1" in training.result(asked).what
        assert orders(training.seen, "stop") == []

    def test_nothing_is_stopped_after_a_checkpoint_that_failed(self, training):
        asked = training.ask(pb.VERB_DRAIN, "", target="n1")
        (step, *_) = [order.step for _, order in orders(training.tick(), "save_at")]
        for rank in (0, 1):
            training.tell(staged(rank, step=step))
        for rank in (0, 1):
            training.tell(durable(rank, step=step))
        training.do(training.core.commit_done(CommitDone("job", 1, step, "store-full", "no space"), training.now))
        training.tick()
        assert "no space" in training.result(asked).what
        assert orders(training.seen, "stop") == []

    def test_ranks_of_somebody_else_have_to_be_stopped_by_him(self, running):
        asked = running.ask(pb.VERB_DRAIN, "", target="n1")
        (step, *_) = [order.step for _, order in orders(running.tick(), "save_at")]
        save(running, step)
        running.tick()
        assert "stop them" in running.result(asked).what

    def test_the_node_of_the_only_coordinator_is_said_to_be_one(self, training):
        asked = training.ask(pb.VERB_DRAIN, "", target="n0")
        (step, *_) = [order.step for _, order in orders(training.tick(), "save_at")]
        save(training, step)
        training.tick()
        for rank in (0, 1):
            training.tell(left(rank, died=False))
        for node in ("n0", "n1"):
            training.tell(node_ready(node, 1))
        training.tick()
        assert "is coordinated by the agent of n0" in training.result(asked).what

    def test_a_save_in_progress_is_waited_for_and_a_snapshot_that_is_nowhere_else_is_said(self, running):
        for rank in (0, 1):
            running.tell(staged(rank, step=20))
        for rank in (0, 1):
            running.tell(left(rank, died=True))
        asked = running.ask(pb.VERB_DRAIN, "", target="n1")
        assert all(answer.begun for answer in running.answers(asked))
        running.tell(pb.ShardFailed(job="job", epoch=1, step=20, rank=0, code="store-full", what="no space"))
        running.tick()
        assert "in its memory, and nowhere else" in running.result(asked).what

    def test_copies_are_made_elsewhere_from_the_next_snapshot_on(self):
        core = Coordinator(node="n0")
        core.redundancy.attends(pb.AgentHello(node="n1", address="a:1"))
        core.redundancy.attends(pb.AgentHello(node="n2", address="a:2", vacating=True))
        assert core.redundancy.leaving == {"n2"}
        core.redundancy.leave("n1", leaves=True)
        assert core.redundancy.leaving == {"n1", "n2"}
        core.redundancy.leave("n2", leaves=False)
        assert core.redundancy.leaving == {"n1"}

    def test_no_job_no_work(self, driver):
        asked = driver.ask(pb.VERB_DRAIN, "", target="n2")
        assert not driver.result(asked).code
        driver.ask(pb.VERB_UNDRAIN, "", target="n2")
        assert [order.on for _, order in orders(driver.seen, "vacate")] == [True, False]

    @pytest.mark.parametrize("job", ["", "job"])
    def test_a_node_that_nobody_knows_is_not_said_to_be_empty(self, training, job):
        assert training.result(training.ask(pb.VERB_DRAIN, job, target="n9")).code == "not-found"
        training.do(training.core.agent_lost("n1", training.now))
        assert training.result(training.ask(pb.VERB_DRAIN, job, target="n1")).code == "not-found"
        assert orders(training.seen, "vacate") == []
        assert not training.core.exclusion.excluded("n1", training.now)

    def test_a_job_that_has_not_begun_is_waited_for_until_it_has_without_the_node(self, driver):
        for node in ("n0", "n1", "n2"):
            driver.tell(node_joined(node, nproc=1, max_nodes=3))
        driver.do(driver.core.nodes_read(NodesRead({}), driver.now))
        asked = driver.ask(pb.VERB_DRAIN, "", target="n1")
        assert [answer.what for answer in driver.answers(asked)] == ["job job: it has not begun"]
        for node in ("n0", "n1", "n2"):
            driver.tell(node_ready(node))
        driver.tick(6.0)
        assert driver.core.launched["job"].hosts == {"n0", "n2"}
        assert not driver.result(asked).code

    def test_a_job_that_has_not_begun_and_needs_the_node_is_said_to(self, driver):
        for node in ("n0", "n1"):
            driver.tell(node_joined(node, nproc=1))
        asked = driver.ask(pb.VERB_DRAIN, "", target="n1")
        assert "cannot do without n1" in driver.result(asked).what
        assert driver.result(asked).code

    def test_a_spare_that_would_be_taken_next_is_said_to_be_needed(self, training):
        training.ask(pb.VERB_EXCLUDE, "", target="n1")
        asked = training.ask(pb.VERB_DRAIN, "", target="n2")
        assert "cannot do without n2" in training.result(asked).what

    @pytest.mark.parametrize("code", ["", "save-failed"])
    def test_what_was_left_on_its_local_disk_goes_to_the_store_first(self, running, code):
        running.core.draining = Draining(every=100)
        self.keep(running, 20, 30)  # the first one is drained
        running.do(running.core.commit_done(CommitDone("job", 1, 20), running.now))
        for rank, node in enumerate(("n0", "n2")):  # n1 trains no more
            running.tell(joined(rank, node=node, attempt=2))
        assert running.core.jobs["job"].saves.ended[1, 30].outcome == agent_pb2.OUTCOME_LOCAL
        running.seen = Decision()
        asked = running.ask(pb.VERB_DRAIN, "", target="n1")
        running.tick()
        assert all(answer.begun for answer in running.answers(asked))
        assert {(node, order.step) for node, order in orders(running.seen, "drain_shards")} == {("n0", 30), ("n1", 30)}
        for rank in (0, 1):
            running.tell(durable(rank, step=30))
        running.do(running.core.commit_done(CommitDone("job", 1, 30, code, "no space"), running.now))
        running.tick()
        assert bool(running.result(asked).code) == bool(code)
        assert ("step 30 is on its local disk" in running.result(asked).what) == bool(code)

    @staticmethod
    def keep(running, *steps):
        for step in steps:
            for rank in (0, 1):
                running.tell(staged(rank, step=step))
                running.tell(pb.LocalKept(job="job", node=f"n{rank}", epoch=1, step=step, attempt=1, rank=rank,
                    world_size=2, nbytes=1, store=STORE))  # fmt: skip
            if step == steps[0]:
                for rank in (0, 1):
                    running.tell(durable(rank, step=step))


def test_an_order_of_a_later_version_is_refused(driver):
    asked = pb.Asked(id="1", job="job", node="n0")
    asked.verb = 99
    driver.tell(asked)
    assert driver.result(asked).code == "invalid-input"
    assert verb_of(99) == "order 99"


def test_too_many_orders_are_refused(running, monkeypatch):
    monkeypatch.setattr("ckptsvc.control.verbs.MOST", 2)
    asked = [running.ask(pb.VERB_CHECKPOINT) for _ in range(3)]
    assert "too many" in running.result(asked[2]).what


def test_an_order_that_never_ends_is_given_up(running, monkeypatch):
    monkeypatch.setattr("ckptsvc.control.verbs.LONGEST", 5.0)
    asked = running.ask(pb.VERB_CHECKPOINT)
    running.tick(10.0)
    assert running.result(asked).what.startswith("given up after 5 s")
