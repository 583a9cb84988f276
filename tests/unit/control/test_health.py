import itertools
import random

import pytest
from scenes import COMPUTING, FAULTS, Stage, stage_of
from told import incidents, joined, kinds, left, node_joined, node_ready, orders

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import Answer, Decision, NodesRead, Probed, ReadNodes
from ckptsvc.control.health import ANSWER_PATIENCE, KILL_PATIENCE, SAMPLE, SAMPLES_FROM, UNSEEN, Policy
from ckptsvc.control.membership import AGENT_PATIENCE
from ckptsvc.control.restart import Phase
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

LARGE = SAMPLE * SAMPLES_FROM

FIELDS = {type(getattr(pb.Report(), f.name)): f.name for f in pb.Report.DESCRIPTOR.fields}
CONFIRM = 60.0


class Driver:
    """A coordinator, and nodes that answer its orders with what a stage has."""

    def __init__(self, stage, *, policy=None, launched=True):
        self.core = Coordinator(policy=policy or Policy(confirm=CONFIRM), mark="m")
        self.stage, self.now = stage, 100.0
        self.answers = True
        self.began = {rank: evidence.stalled - self.now for rank, evidence in stage.ranks.items()}
        self.reasons, self.records, self.sent = [], [], []
        names = sorted(set(stage.nodes.values()), key=lambda n: int(n[1:]))
        if launched:
            for node in names:
                many = {"min_nodes": len(names), "max_nodes": len(names), "nproc": stage.per_node}
                self.tell(node_joined(node, node_rank=int(node[1:]), **many))
                self.tell(node_ready(node))
        for rank, node in stage.nodes.items():
            self.tell(joined(rank, node=node, world_size=stage.world, epoch=1))

    @property
    def attempts(self):
        return self.core.launched["job"]

    @property
    def incident(self):
        return self.records[-1]

    def tell(self, event):
        report = pb.Report(**{FIELDS[type(event)]: event})
        return self._obey(self.core.handle(getattr(event, "node", "n0"), report, self.now))

    def stalled(self, rank=0):
        evidence = self.stage.ranks[rank]
        event = pb.Stalled(job="job", node=self.stage.nodes[rank], attempt=1, rank=rank, phase="step")
        event.step, event.seconds, event.threshold = evidence.step, evidence.stalled, evidence.threshold
        event.stopped = evidence.state == "T"
        return self.tell(event)

    def moved(self, rank=0):
        return self.tell(pb.Moved(job="job", attempt=1, rank=rank))

    def wait(self, seconds, tick=0.25):
        """Let time pass."""
        decision = Decision()
        for _ in range(round(seconds / tick)):
            self.now += tick
            decision.add(self._obey(self.core.tick(self.now)))
        return decision

    def answer(self, node, order):
        """What the agent of a node finds out."""
        ranks = [e for r, e in self.stage.ranks.items() if self.stage.nodes[r] == node]
        for evidence in ranks:
            evidence.stalled = self.now + self.began[evidence.rank]
        return pb.Examined(
            job="job",
            attempt=order.attempt,
            incident=order.incident,
            round=order.round,
            node=node,
            ranks=ranks,
            nics=self.stage.nics.get(node, ()),
        )

    def _obey(self, decision):
        self.reasons += decision.reasons
        self.records += incidents(decision)
        self.sent += kinds(decision)
        if any(isinstance(effect, ReadNodes) for effect in decision.effects):
            decision.add(self._obey(self.core.nodes_read(NodesRead({}), self.now)))
        if self.answers:
            for node, order in orders(decision, "examine"):
                if node not in self.stage.silent:
                    decision.add(self.tell(self.answer(node, order)))
        return decision


def make(fault, seed=1, **how):
    return Driver(stage_of(fault, random.Random(seed)), **how)


class TestKilling:
    def test_a_stopped_rank_at_once(self):
        driver = make("stopped")
        culprit, node = driver.stage.culprit, driver.stage.node
        decision = driver.stalled()
        ((where, kill),) = orders(decision, "kill")
        assert (where, kill.rank, kill.attempt, kill.state) == (node, culprit, 1, "T")
        assert kill.reason == driver.incident.sentence
        incident = driver.incident
        assert (incident.id, incident.kind, incident.job, incident.attempt) == ("1-1-m", "hung", "job", 1)
        assert (incident.rank, incident.node, incident.confidence) == (culprit, node, 0.95)
        assert list(incident.actions) == [f"SIGKILL to rank {culprit} on {node}"]
        assert incident.detected == pytest.approx(driver.stage.ranks[0].stalled)
        assert incident.step == driver.stage.step

    def test_the_attempt_fails_for_that_reason_whoever_ends_first(self):
        driver = make("stopped")
        driver.stalled()
        other = (driver.stage.culprit + 1) % driver.stage.world
        node = driver.stage.nodes[other]
        driver.tell(pb.RankExited(job="job", node=node, attempt=1, rank=other, status=1))
        assert driver.attempts.phase is Phase.STOPPING
        assert driver.attempts.last_failure.startswith(f"rank {driver.stage.culprit} on {driver.stage.node} hung: ")
        assert driver.incident.actions[-1] == "restart 1 of 2"
        assert {record.id for record in driver.records} == {"1-1-m"}

    @pytest.mark.parametrize("fault", ["loop with the interpreter lock", "stuck data loader", "missed collective"])
    def test_one_that_stands_still_elsewhere_after_a_while(self, fault):
        driver = make(fault)
        driver.stalled()
        assert driver.incident.rank == driver.stage.culprit
        assert not driver.incident.actions
        assert orders(driver.wait(CONFIRM - 10), "kill") == []
        ((_, kill),) = orders(driver.wait(20), "kill")
        assert kill.rank == driver.stage.culprit

    def test_later_where_its_stack_cannot_be_seen(self):
        driver = make("stuck data loader")
        driver.stage.unseen("stack")
        driver.stage.change(step=driver.stage.step - 1)
        driver.stalled()
        assert orders(driver.wait(UNSEEN * CONFIRM - 10), "kill") == []
        assert orders(driver.wait(20), "kill") != []

    def test_not_with_one_signal_only(self):
        driver = make("stuck data loader")
        driver.stage.unseen("stack", "answers")
        driver.stalled()
        assert driver.incident.rank == driver.stage.culprit
        assert orders(driver.wait(20 * CONFIRM), "kill") == []

    def test_not_when_only_its_node_is_under_suspicion(self):
        for fault in ("frozen node", "silent network card"):
            driver = make(fault, seed=4)
            driver.stalled(next(iter(driver.stage.ranks)))
            assert orders(driver.wait(20 * CONFIRM), "kill") == []
            assert driver.incident.node == driver.stage.node

    def test_not_while_it_is_within_the_time_of_its_phase(self):
        driver = make("hang in an evaluation")
        driver.stage.change(threshold=1e6)
        driver.stalled(next(r for r in driver.stage.ranks if r != driver.stage.culprit))
        assert orders(driver.wait(20 * CONFIRM), "kill") == []
        assert "still within its time" in driver.incident.sentence

    def test_not_a_suspended_job(self):
        driver = make("stopped")
        for evidence in driver.stage.ranks.values():
            evidence.state = "T"
        driver.stalled()
        assert orders(driver.wait(20 * CONFIRM), "kill") == []

    def test_the_whole_attempt_is_stopped_when_the_rank_does_not_die(self):
        driver = make("stopped")
        driver.stalled()
        assert orders(driver.wait(KILL_PATIENCE - 1), "stop") == []
        stops = orders(driver.wait(2), "stop")
        assert {node for node, _ in stops} == set(driver.stage.nodes.values())
        assert driver.attempts.last_failure == driver.incident.sentence
        assert driver.incident.actions[-1] == "restart 1 of 2"

    def test_nobody_else_is_blamed_when_it_does_not_die_and_is_no_longer_what_it_was(self):
        """It was continued in time: its agent has let it live, and there is more to find out."""
        driver = make("stopped")
        driver.stalled()
        driver.stage.change(state="S")
        assert orders(driver.wait(KILL_PATIENCE + 1), "stop") == []
        driver.moved()
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=3))
        assert driver.attempts.last_failure == "rank 0 on n0 exited with status 3"

    def test_the_node_of_a_rank_that_hung_gets_a_strike_and_the_program_a_crash(self):
        driver = make("stopped")
        driver.stalled()
        other = (driver.stage.culprit + driver.stage.per_node) % driver.stage.world
        driver.tell(pb.RankExited(job="job", node=driver.stage.nodes[other], attempt=1, rank=other, status=1))
        assert list(driver.core.exclusion.strikes) == [driver.stage.node]
        (crash,) = driver.attempts.loop.crashes
        assert (crash.rank, crash.node, crash.how) == (driver.stage.culprit, driver.stage.node, "hung")

    def test_one_that_was_on_its_way_again_lives(self):
        driver = make("stopped")
        driver.stalled()
        driver.moved()
        driver.wait(KILL_PATIENCE + 1)
        assert driver.attempts.phase is Phase.RUNNING
        assert driver.incident.actions[-1] == "it had gone on by itself, and lives"
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=3))
        assert driver.attempts.last_failure == "rank 0 on n0 exited with status 3"
        assert (driver.incident.id, driver.incident.kind) == ("1-2-m", "died")

    @pytest.mark.parametrize(
        ("automatic", "launched", "killed"),
        [("launched", True, True), ("launched", False, False), ("always", False, True), ("never", True, False)],
    )
    def test_only_where_the_policy_allows_it(self, automatic, launched, killed):
        driver = make("stopped", policy=Policy(automatic, CONFIRM), launched=launched)
        decision = driver.stalled().add(driver.wait(100))
        assert bool(orders(decision, "kill")) is killed
        assert driver.incident.rank == driver.stage.culprit


class TestLargeJobs:
    """Of very many nodes, some are examined first: enough to see that one rank is stopped, and the others are not."""

    @pytest.fixture
    def make_large(self):
        def make_large(fault):
            for seed in itertools.count():
                stage = Stage(random.Random(seed), nodes=LARGE)
                nodes = sorted(set(stage.nodes.values()))
                if len(nodes) == LARGE and stage.nodes[stage.culprit] not in nodes[::SAMPLES_FROM]:
                    break  # the sample does not happen to have its node
            FAULTS[fault](stage)
            return Driver(stage)

        return make_large

    def test_a_stopped_rank_is_killed_when_its_node_and_a_sample_have_answered(self, make_large):
        driver = make_large("stopped")
        decision = driver.stalled(driver.stage.culprit)
        assert driver.stage.node in [node for node, _ in orders(decision, "examine")]
        assert len(orders(decision, "examine")) == SAMPLE + 1
        ((_, kill),) = orders(decision, "kill")
        assert kill.rank == driver.stage.culprit

    @pytest.fixture
    def asked_for_another(self, make_large):
        """A sample has been asked because of another rank; returns how to go on."""
        driver = make_large("stopped")
        others = [rank for rank, node in driver.stage.nodes.items() if node != driver.stage.node and rank % 7 == 1]
        driver.answers = False
        return driver, orders(driver.stalled(others[0]), "examine")

    def test_its_node_is_asked_at_once_when_it_is_reported_a_moment_after_others(self, asked_for_another):
        driver, asked = asked_for_another
        (there,) = orders(driver.stalled(driver.stage.culprit), "examine")
        assert there[0] == driver.stage.node
        decision = Decision()
        for node, order in [*asked, there]:
            decision.add(driver.tell(driver.answer(node, order)))
        ((_, kill),) = orders(decision, "kill")
        assert kill.rank == driver.stage.culprit

    def test_the_slowest_of_a_sample_are_not_waited_for(self, asked_for_another):
        driver, asked = asked_for_another
        (there,) = orders(driver.stalled(driver.stage.culprit), "examine")
        decision = driver.tell(driver.answer(*there))
        answers = iter(asked)
        while not orders(decision, "kill"):
            decision.add(driver.tell(driver.answer(*next(answers))))
        ((_, kill),) = orders(decision, "kill")
        assert kill.rank == driver.stage.culprit
        left = len(list(answers))
        assert SAMPLE // 3 < left <= SAMPLE // 2  # with fewer answers, somebody may have stopped them all

    def test_between_two_samples_a_stopped_rank_starts_the_next(self, asked_for_another):
        driver, asked = asked_for_another
        for node, order in asked:
            driver.tell(driver.answer(node, order))
        driver.answers = True
        driver.stalled(driver.stage.culprit)
        decision = driver.wait(0.25)
        assert len(orders(decision, "examine")) == SAMPLE + 2
        ((_, kill),) = orders(decision, "kill")
        assert kill.rank == driver.stage.culprit

    def test_a_sample_accuses_nobody_whose_process_is_well(self, make_large):
        driver = make_large("stuck data loader")
        decision = driver.stalled(driver.stage.culprit)
        assert len(orders(decision, "examine")) == SAMPLE + 1
        assert not driver.records
        decision = driver.wait(1)
        assert len(orders(decision, "examine")) > LARGE
        assert driver.incident.rank == driver.stage.culprit

    def test_a_suspended_job_is_let_alone(self, make_large):
        driver = make_large("stopped")
        for evidence in driver.stage.ranks.values():
            evidence.state = "T"
        driver.stalled(driver.stage.culprit)
        assert orders(driver.wait(60), "kill") == []


class TestRanksThatDoNotComeBack:
    """A rank was stopped, and its agent killed: the new agent knows nothing of it, and cannot examine it."""

    def make(self):
        driver = make("stopped", seed=2)
        missing, node = driver.stage.culprit, driver.stage.node
        driver.wait(1)
        driver._obey(driver.core.agent_lost(node, driver.now))
        driver.wait(1)
        driver.tell(node_joined(node, attempt=1, first_rank=0, nproc=driver.stage.per_node, node_rank=int(node[1:])))
        for rank, where in driver.stage.nodes.items():
            if where == node and rank != missing:
                driver.tell(joined(rank, node=node, world_size=driver.stage.world, epoch=1))
        del driver.stage.ranks[missing]
        return driver, missing, node

    def test_the_attempt_is_ended_when_the_others_stand_still(self):
        driver, missing, node = self.make()
        driver.wait(AGENT_PATIENCE + 2)
        decision = driver.stalled(next(iter(driver.stage.ranks)))
        assert orders(decision, "kill") == []
        assert orders(decision, "stop") != []
        assert driver.incident.actions == ["restart 1 of 2"]
        assert f"rank {missing} on {node} hung: it has not come back to its agent" in driver.attempts.last_failure

    def test_not_as_long_as_they_step(self):
        driver, *_ = self.make()
        assert kinds(driver.wait(AGENT_PATIENCE + 600)) == []

    def test_nor_if_it_has_ended_in_good_order(self):
        driver, missing, node = self.make()
        driver.tell(pb.RankExited(job="job", node=node, attempt=1, rank=missing, status=0))
        driver.wait(AGENT_PATIENCE + 2)
        decision = driver.stalled(next(iter(driver.stage.ranks))).add(driver.wait(600))
        assert orders(decision, "kill") == []


class TestWorkUnseen:
    """A rank that does something long that nobody has declared: it must not be killed."""

    def unharmed(self, driver, change):
        driver.stalled()
        for second in range(600):
            change(second)
            assert orders(driver.wait(1), "kill") == []
        assert driver.incident.rank == driver.stage.culprit

    def test_it_writes_a_file(self):
        driver = make("dead file system")
        self.unharmed(driver, lambda second: driver.stage.change(io_bytes=second << 20))

    def test_it_goes_through_other_functions(self):
        driver = make("loop without the interpreter lock")
        self.unharmed(driver, lambda second: driver.stage.change(stack=f"{COMPUTING}\nf{second // 15} (x.py:1)"))

    def test_its_data_loaders_compute(self):
        driver = make("stuck data loader")
        self.unharmed(driver, lambda second: driver.stage.change(children_cpu=0.5 * second))

    def test_but_a_logger_beside_it_proves_nothing(self):
        driver = make("stuck data loader")
        driver.stalled()
        killed = []
        for second in range(100):
            driver.stage.change(children_cpu=0.01 * second, io_bytes=second << 10)
            killed += orders(driver.wait(1), "kill")
        assert len(killed) == 1

    def test_pauses_like_this_that_ended_by_themselves_are_remembered(self):
        driver = make("stuck data loader")
        driver.stalled()
        driver.wait(50)
        driver.moved()
        driver.began = dict.fromkeys(driver.began, 5.0 - driver.now)
        driver.stalled()
        assert orders(driver.wait(90), "kill") == []
        assert orders(driver.wait(40), "kill") != []


class TestClosing:
    def test_it_went_on_by_itself(self):
        driver = make("stuck data loader")
        driver.stalled()
        driver.wait(7)
        driver.moved()
        assert driver.incident.kind == "slow"
        assert driver.incident.actions[-1].startswith("went on by itself after 12.")
        assert driver.core.health.cases == {}
        assert orders(driver.wait(100), "examine") == []

    def test_only_when_all_that_were_reported_move(self):
        driver = make("stuck data loader")
        driver.stalled(0)
        driver.stalled(1)
        driver.moved(0)
        assert driver.core.health.cases
        driver.moved(1)
        assert not driver.core.health.cases

    def test_before_anybody_has_looked_it_was_nothing(self):
        driver = make("stuck data loader")
        driver.answers = False
        driver.stalled()
        driver.wait(1)
        driver.moved()
        assert driver.records == []
        assert "went on by itself" in driver.reasons[-1]

    def test_with_the_attempt(self):
        driver = make("stuck data loader")
        driver.stalled()
        for rank, node in driver.stage.nodes.items():
            driver.tell(left(rank, node=node))
        driver.wait(1)
        assert driver.incident.actions[-1] == "the attempt has ended"
        assert not driver.core.health.cases

    def test_with_the_agent_that_has_reported_it(self):
        driver = make("stuck data loader")
        driver.stalled(0)
        driver._obey(driver.core.agent_lost("n0", driver.now))
        assert not driver.core.health.cases
        driver.stalled(0)
        assert driver.core.health.cases

    def test_nobody_hears_at_once_of_a_stall_for_which_nobody_can_be_named(self):
        driver = make("silent network card")
        driver.stage.nics.clear()
        driver.stalled()
        driver.wait(2)
        assert driver.records == []
        driver.moved()
        assert driver.records == []
        driver.stalled()
        driver.wait(10)
        assert "perhaps the network" in driver.incident.sentence
        driver.moved()
        assert driver.incident.actions[-1].startswith("went on by itself")

    def test_numbers_go_on_and_begin_again_with_the_attempt(self):
        driver = make("stuck data loader")
        for _ in range(2):
            driver.stalled()
            driver.moved()
        assert list(dict.fromkeys(record.id for record in driver.records)) == ["1-1-m", "1-2-m"]


class TestExamining:
    def test_every_node_is_asked_and_a_silent_one_not_waited_for_long(self):
        driver = make("frozen node")
        decision = driver.stalled(next(iter(driver.stage.ranks)))
        assert sorted(n for n, _ in orders(decision, "examine")) == sorted(set(driver.stage.nodes.values()))
        assert driver.records == []
        driver.wait(ANSWER_PATIENCE + 0.5)
        assert f"node {driver.stage.node} does not answer" in driver.incident.signals

    def test_a_node_whose_agent_is_away_is_not_asked(self):
        driver = make("stuck data loader", seed=2)
        other = next(node for node in driver.stage.nodes.values() if node != "n0")
        driver.wait(1)
        driver._obey(driver.core.agent_lost(other, driver.now))
        driver.stage.silent.add(other)
        driver.stalled(0)
        assert f"{other}: examine" not in driver.sent
        assert driver.records, "the verdict waited for a node that is known to be away"

    def test_answers_that_are_late_or_of_others_are_of_no_use(self):
        driver = make("stopped")
        driver.answers = False
        orders_sent = orders(driver.stalled(), "examine")
        late = [driver.answer(node, order) for node, order in orders_sent]
        driver.wait(ANSWER_PATIENCE + 0.5)
        assert driver.records == []
        for answer in late:
            driver.tell(answer)
        for answer in late:
            answer.round, answer.node = 2, "nobody"
            driver.tell(answer)
        driver.wait(1)
        assert "kill" not in " ".join(driver.sent)

    def test_a_node_speaks_of_its_own_ranks_only(self):
        driver = make("stuck data loader", seed=2)
        driver.answers = False
        (node, order), *others = orders(driver.stalled(), "examine")
        lie = driver.answer(node, order)
        victim = next(r for r, n in driver.stage.nodes.items() if n != node)
        lie.ranks.append(pb.RankEvidence(rank=victim, state="T", stalled=9, threshold=4))
        lie.ranks.append(pb.RankEvidence(rank=10**6, state="T", stalled=9, threshold=4))
        driver.tell(lie)
        for other, asked in others:
            driver.tell(driver.answer(other, asked))
        assert driver.incident.rank == driver.stage.culprit
        assert not driver.incident.actions

    def test_looks_come_less_and_less_often(self):
        driver = make("silent network card")
        driver.stalled()
        times = []
        for _ in range(400):
            driver.sent.clear()
            driver.wait(0.25)
            if any("examine" in sent for sent in driver.sent):
                times.append(driver.now)
        gaps = [round(b - a) for a, b in itertools.pairwise(times)]
        assert gaps[:4] == [2, 4, 8, 15]
        assert set(gaps[4:]) == {15}

    def test_a_coordinator_that_was_stopped_waits_for_what_it_has_not_read(self):
        driver = make("stopped")
        driver.wait(1)
        driver.answers = False
        sent = orders(driver.stalled(), "examine")
        driver.now += 60
        driver._obey(driver.core.tick(driver.now))
        assert driver.records == []
        for node, order in sent:
            driver.tell(driver.answer(node, order))
        assert driver.incident.actions

    @pytest.mark.parametrize(
        "event",
        [
            pb.Stalled(job="nobody", attempt=1, rank=0),
            pb.Stalled(job="job", attempt=9, rank=0),
            pb.Stalled(job="job", attempt=1, rank=999),
            pb.Moved(job="job", attempt=1, rank=999),
            pb.Moved(job="nobody", attempt=1, rank=0),
            pb.Examined(job="job", attempt=1, incident="7", node="n0"),
            pb.Examined(job="nobody", attempt=1),
        ],
    )
    def test_what_is_said_of_others_is_passed_over(self, event):
        driver = make("stopped")
        assert kinds(driver.tell(event)) == []
        assert not driver.core.health.cases


class TestOtherIncidents:
    def test_a_rank_that_dies(self):
        driver = make("stopped")
        driver.tell(left(1, node="n0"))
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=1, status=-9))
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=1))
        (incident,) = driver.records
        assert (incident.kind, incident.rank, incident.node) == ("died", 1, "n0")
        assert incident.sentence == "rank 1 on n0 was killed by signal 9"
        assert list(incident.actions) == ["restart 1 of 2"]

    def test_a_rank_that_dies_and_whose_launcher_says_nothing(self):
        driver = make("stopped")
        driver.tell(left(0, node="n0"))
        driver.wait(3)
        (incident,) = driver.records
        assert (incident.kind, incident.rank, incident.sentence) == ("died", 0, "rank 0 on n0 died")

    def test_one_of_which_it_is_known_that_it_ended_well_is_not_named_for_another(self):
        driver = make("stopped")
        for rank in (0, 1):
            driver.tell(left(rank, node="n0"))
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=0))
        driver.wait(3)
        assert driver.incident.rank == 1

    def test_a_node_that_is_lost(self):
        driver = make("stopped")
        driver.tell(pb.NodeLeft(job="job", node="n1", detail="its launcher is gone"))
        (incident,) = driver.records
        assert (incident.kind, incident.node, incident.rank) == ("node-lost", "n1", -1)

    def test_a_node_whose_doorbell_nobody_answers(self):
        driver = make("stopped")
        driver._obey(driver.core.agent_lost("n1", driver.now))
        driver._obey(driver.core.probed(Probed("job", "n1", Answer.SILENT), driver.now))
        (incident,) = driver.records
        assert (incident.kind, incident.node) == ("node-lost", "n1")
        assert "neither its agent nor its host answers" in incident.sentence
        driver._obey(driver.core.probed(Probed("nobody", "n1", Answer.SILENT), driver.now))

    def test_a_failure_after_the_job_was_asked_to_stop(self):
        driver = make("stopped")
        driver.tell(pb.StopRequested(job="job", reason="the time is over"))
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=1))
        assert list(driver.incident.actions) == ["the job ends"]

    def test_a_node_whose_agent_does_not_come_back(self):
        driver = make("stopped")
        driver._obey(driver.core.agent_lost("n1", driver.now))
        driver.wait(70)
        (incident,) = driver.records
        assert (incident.kind, incident.node) == ("node-lost", "n1")

    def test_a_job_that_ends_well_has_none(self):
        driver = make("stopped")
        for rank, node in driver.stage.nodes.items():
            driver.tell(left(rank, node=node, died=False))
            driver.tell(pb.RankExited(job="job", node=node, attempt=1, rank=rank, status=0))
        assert driver.attempts.phase is Phase.ENDED
        assert driver.records == []

    def test_the_last_one_of_a_job_says_that_it_ends(self):
        driver = make("stopped")
        driver.attempts.restarts = 2
        driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=1))
        assert list(driver.incident.actions) == ["the job ends"]

    def test_a_death_in_a_job_without_a_launcher_is_told_once(self):
        driver = make("stopped", launched=False)
        for rank, node in driver.stage.nodes.items():
            driver.tell(left(rank, node=node, detail="process ended"))
        (incident,) = driver.records
        assert (incident.kind, incident.rank) == ("died", 0)
        assert incident.sentence == "rank 0 on n0 died (process ended)"


def test_what_is_kept_is_bounded():
    stage = next(s for seed in range(100) if (s := stage_of("stuck data loader", random.Random(seed))).world == 64)
    driver = Driver(stage)
    driver.stalled(63)
    assert len(driver.incident.ranks) == 32
    kept = [evidence.rank for evidence in driver.incident.ranks]
    assert kept == sorted(kept)
    assert {stage.culprit, 63} <= set(kept)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_decision_has_a_reason(fault):
    driver = make(fault)
    driver.stalled(next(iter(driver.stage.ranks)))
    driver.wait(200)
    assert all(reason.startswith(("job job", "step")) for reason in driver.reasons)
    assert any(driver.incident.sentence in reason for reason in driver.reasons)
