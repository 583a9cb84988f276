import pytest
from told import (
    announced,
    commits,
    dropped,
    durable,
    epoch_done,
    incidents,
    joined,
    kinds,
    left,
    node_joined,
    node_ready,
    orders,
    progressed,
    rewound,
    shard_failed,
    skipped,
    staged,
)

from ckptsvc.control.coordinator import FORGET_AFTER, Coordinator
from ckptsvc.control.effects import (
    Answer,
    CommitDone,
    Drain,
    KeepNodes,
    LookupDone,
    NodesRead,
    Probe,
    Probed,
    Restarted,
)
from ckptsvc.control.growth import SETTLE
from ckptsvc.control.membership import AGENT_PATIENCE
from ckptsvc.control.restart import EXIT_PATIENCE, INTERRUPTED, LAST_CALL, NODE_PATIENCE
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause

FIELDS = {type(getattr(pb.Report(), f.name)): f.name for f in pb.Report.DESCRIPTOR.fields}


class Driver:
    """Feeds reports; keeps the time."""

    def __init__(self):
        self.core = Coordinator(save_timeout=100.0)
        self.now = 0.0

    def tell(self, event, node=None):
        report = pb.Report(**{FIELDS[type(event)]: event})
        return self.core.handle(node or getattr(event, "node", "n0"), report, self.now)


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def running(driver):
    """Job "job" has two ranks and epoch 1."""
    for rank in (0, 1):
        driver.tell(joined(rank))
    driver.core.epoch_done(epoch_done(1), driver.now)
    return driver


def save(driver, **changes):
    for rank in (0, 1):
        driver.tell(staged(rank, **changes))
    for rank in (0, 1):
        decision = driver.tell(durable(rank, **{k: v for k, v in changes.items() if k in ("job", "epoch", "step")}))
    return decision


def test_an_empty_report_and_a_hello_mean_nothing(driver):
    assert kinds(driver.core.handle("n0", pb.Report(), 0.0)) == []
    assert kinds(driver.tell(pb.AgentHello(node="n0"))) == []


@pytest.mark.parametrize("kind", [field.name for field in pb.Report.DESCRIPTOR.fields if field.containing_oneof])
def test_every_kind_of_report_of_a_job_nobody_knows_is_survived(driver, kind):
    report = pb.Report()
    getattr(report, kind).SetInParent()
    driver.core.handle("n0", report, 0.0)
    driver.core.tick(1.0)


def test_from_the_first_rank_to_the_commit(driver):
    assert kinds(driver.tell(joined(0))) == ["AllotEpoch"]
    assert kinds(driver.tell(joined(1))) == []
    assert kinds(driver.core.epoch_done(epoch_done(1), 0.0)) == ["n0: epoch_allotted", "n1: epoch_allotted"]
    driver.tell(announced(0))
    assert kinds(driver.tell(announced(1))) == ["n0: holders", "n1: holders"]
    driver.tell(progressed("n0", 9))
    (effect,) = commits(save(driver))
    assert effect.job == "job"
    decision = driver.core.commit_done(CommitDone("job", 1, 10), 1.0)
    assert kinds(decision) == ["n0: save_ended", "n1: save_ended"]
    (snapshot,) = driver.core.snapshots("job")
    assert (snapshot.epoch, snapshot.step, snapshot.world_size) == (1, 10, 2)
    driver.tell(dropped(1))
    assert driver.core.snapshots("job") == []


@pytest.mark.parametrize("event", [shard_failed(0), skipped(0)])
def test_failures_reach_the_save(running, event):
    running.tell(staged(1))
    assert "n1: save_ended" in kinds(running.tell(event))


def test_the_name_of_a_snapshot_of_no_job(driver):
    assert driver.core.snapshots("nobody") == []


def test_aliases_are_in_the_list(running):
    save(running, aliases={"b": "w"})
    assert dict(running.core.snapshots("job")[0].aliases) == {"b": "w"}


def test_answers_for_a_job_that_is_gone_are_ignored(driver):
    assert kinds(driver.core.epoch_done(epoch_done(1), 0.0)) == []
    assert kinds(driver.core.commit_done(CommitDone("job", 1, 10), 0.0)) == []
    assert kinds(driver.core.lookup_done(LookupDone("job", 1, 10, True), 0.0)) == []


def test_what_the_store_says_reaches_the_save(driver):
    for rank in (0, 1):
        driver.tell(joined(rank))
    driver.tell(staged(0, again=True))
    decision = driver.core.lookup_done(LookupDone("job", 1, 10, True), 1.0)
    assert kinds(decision) == ["n0: save_ended", "n1: save_ended"]


def test_a_stop_reaches_the_job(running):
    running.tell(pb.StopRequested(job="job", reason="SIGTERM"))
    running.tell(progressed("n0", 5))
    running.now = 1.0
    running.tell(progressed("n0", 5))
    assert kinds(running.core.tick(1.1)) == ["n0: stop_at", "n1: stop_at"]
    running.tell(pb.Skipped(job="job", attempt=1, epoch=1, step=7, rank=0, why="too late"))
    assert "n0: stop_at" in kinds(running.core.tick(1.3))


def test_a_stop_reaches_the_jobs_that_a_launcher_has_started_under_its_name(driver):
    for job in ("job@1", "other@1"):
        driver.tell(joined(0, job=job, world_size=1, store=f"file:///{job}"))
    for driver.now in (0.0, 2.0):  # its pace takes two samples
        for job in ("job@1", "other@1"):
            driver.tell(progressed("n0", 5, job=job))
    driver.tell(pb.StopRequested(job="job", reason="SIGTERM"))
    decision = driver.core.tick(2.1)
    assert [(effect.order.job, kind) for effect, kind in zip(decision.effects, kinds(decision), strict=True)] == [
        ("job@1", "n0: stop_at")
    ]


def test_a_stop_that_was_asked_for_before_there_were_ranks_reaches_them(driver):
    driver.tell(node_joined("n0", min_nodes=1, max_nodes=1, nproc=1))
    driver.tell(pb.StopRequested(job="job", reason="SIGTERM"))
    driver.tell(joined(0, job="job@1", world_size=1))
    for driver.now in (0.0, 2.0):
        driver.tell(progressed("n0", 5, job="job@1"))
    assert "n0: stop_at" in kinds(driver.core.tick(2.1))


def test_a_launched_job_that_has_ended_is_forgotten_after_a_while(driver):
    driver.tell(node_joined("n0", min_nodes=1, max_nodes=1, nproc=1))
    driver.tell(node_ready("n0"))
    driver.tell(pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=0))
    driver.core.tick(FORGET_AFTER - 1.0)
    assert list(driver.core.launched) == ["job"]
    driver.core.tick(FORGET_AFTER + 10.0)
    assert not driver.core.launched


def test_a_launched_job_ends_with_what_is_committed(driver):
    driver.tell(node_joined("n0", min_nodes=1, max_nodes=1, nproc=1))
    driver.tell(node_ready("n0"))
    driver.tell(joined(0, job="job@1", world_size=1, store="file:///run"))
    driver.core.epoch_done(epoch_done(1, job="job@1"), driver.now)
    for step in (10, 20):
        driver.tell(staged(0, job="job@1", step=step, world_size=1))
        driver.tell(durable(0, job="job@1", step=step))
    driver.core.commit_done(CommitDone("job@1", 1, 10), 1.0)
    driver.core.commit_done(CommitDone("job@1", 1, 20, code="store", why="full"), 1.0)
    driver.tell(pb.StopRequested(job="job@1", reason="SIGTERM to rank 0"))
    exited = pb.RankExited(job="job", node="n0", attempt=1, rank=0, status=INTERRUPTED)
    ((_, end),) = orders(driver.tell(exited), "end")
    assert end.reason == "stopped on request (SIGTERM to rank 0); step 10 is committed in file:///run"


def test_a_skip_of_an_older_attempt_does_not_concern_the_pace_of_this_one(running):
    assert "n0: save_ended" in kinds(running.tell(skipped(0, attempt=0, epoch=0)))


def test_going_back_takes_another_epoch(running):
    running.now = 1.0
    decision = running.tell(rewound(1))
    assert kinds(decision) == ["AllotEpoch"]


class TestTwoJobsOfOneRun:
    def test_the_second_is_refused_while_the_first_has_ranks(self, running):
        decision = running.tell(joined(0, job="other", node="n9"))
        ((node, refused),) = orders(decision, "job_refused")
        assert (node, refused.code) == ("n9", "run-busy")
        assert refused.why == "job job with 2 live ranks on n0, n1 writes to this run"
        assert "other" not in running.core.jobs
        assert decision.reasons == [refused.why]

    def test_another_run_is_another_matter(self, running):
        assert kinds(running.tell(joined(0, job="other", store="file:///other"))) == ["AllotEpoch"]

    def test_the_first_may_register_again(self, running):
        running.core.agent_lost("n0", 0.0)
        assert kinds(running.tell(joined(0, epoch=1))) == ["n0: epoch_allotted"]

    def test_the_second_comes_in_when_the_ranks_are_gone(self, running):
        for rank in (0, 1):
            running.tell(left(rank))
        assert kinds(running.tell(joined(0, job="other"))) == ["AllotEpoch"]

    def test_it_waits_for_saves_that_still_run(self, running):
        for rank in (0, 1):
            running.tell(staged(rank))
        for rank in (0, 1):
            running.tell(left(rank))
        assert kinds(running.tell(joined(0, job="other"))) == []
        running.tell(durable(0))
        running.tell(durable(1))
        running.now = 11.0
        decision = running.core.commit_done(CommitDone("job", 1, 10), running.now)
        assert "AllotEpoch" in kinds(decision)

    def test_ranks_whose_agent_is_lost_do_not_block_the_run_for_ever(self, running):
        for node in ("n0", "n1"):
            running.core.agent_lost(node, 1.0)
        running.core.tick(AGENT_PATIENCE + 1.1)
        running.now = AGENT_PATIENCE + 2
        assert kinds(running.tell(joined(0, job="other"))) == ["AllotEpoch"]


class TestLostAgents:
    def test_memory_is_out_of_reach_until_it_is_reported_again(self, running):
        save(running)
        assert running.core.agent_lost("n1", 1.0).reasons == ["agent of n1 disconnected"]
        assert running.core.snapshots("job") == []
        running.tell(staged(1, ended=True))
        assert len(running.core.snapshots("job")) == 1

    def test_a_launched_job_waits_for_the_node_and_then_restarts(self, driver):
        launch(driver)
        driver.core.agent_lost("b", 0.0)
        assert kinds(driver.core.tick(NODE_PATIENCE)) == []
        assert kinds(driver.core.tick(NODE_PATIENCE + 0.1)) == ["a: stop", "KeepNodes"]

    def test_or_is_told_that_it_is_gone(self, driver):
        launch(driver)
        driver.tell(node_joined("b", attempt=1, first_rank=2, doorbell=7000))
        assert driver.core.agent_lost("b", 1.0).effects == [Probe("job", "b", "address-of-b", 7000)]
        assert kinds(driver.core.probed(Probed("job", "b", Answer.SILENT), 1.5)) == ["a: stop"]
        assert kinds(driver.core.probed(Probed("another", "b", Answer.SILENT), 1.5)) == []


class TestNodesThatFail:
    def test_the_list_of_earlier_jobs_counts(self, driver):
        assert kinds(driver.tell(node_joined("a"))) == ["ReadNodes"]
        for node in "abc":
            assert kinds(driver.tell(node_joined(node))) == []
            driver.tell(node_ready(node))
        listed = {"a": (5.0, 60.0, "it lost power"), "b": (1.0, 60.0, "gone")}
        decision = driver.core.nodes_read(NodesRead(listed), driver.now)
        assert kinds(decision) == ["b: start", "c: start"]
        assert decision.reasons[0] == "node a has failed too often: it lost power"

    def test_what_has_failed_is_kept(self, driver):
        launch(driver)
        driver.tell(pb.NodeLeft(job="job", node="b", detail="gone"))
        (kept,) = [e for e in driver.core.tick(30.0).effects if isinstance(e, KeepNodes)]
        assert kept.strikes == {"b": (1.0, 30.0, "gone")}
        assert kinds(driver.core.tick(31.0)) == []

    def test_but_nothing_is_before_the_list_is_known(self, driver):
        launch(driver)
        driver.core.exclusion.known = False
        driver.tell(pb.NodeLeft(job="job", node="b", detail="gone"))
        assert kinds(driver.core.tick(30.0)) == []

    def test_a_job_of_one_node_asks_for_no_list(self, driver):
        assert kinds(driver.tell(node_joined("a", min_nodes=1, max_nodes=1))) == []


class TestProgress:
    def test_what_can_be_restored_counts_against_a_crash_loop(self, driver):
        driver.tell(node_joined("a", min_nodes=1, max_nodes=1, crash_loop=1, max_restarts=9))
        driver.tell(node_ready("a"))
        for rank in (0, 1):
            driver.tell(joined(rank, job="job@1234", node="a"))
        driver.core.epoch_done(epoch_done(1, job="job@1234"), 0.0)
        save(driver, job="job@1234", node="a")
        exited = pb.RankExited(job="job", node="a", attempt=1, rank=0, status=1)
        assert kinds(driver.tell(exited)) == ["a: stop"]
        driver.tell(node_ready("a", 1))
        exited.attempt = 2
        ((_, end),) = orders(driver.tell(exited), "end")
        assert end.status == 86
        assert "none has come beyond step 10" in end.reason


class TestForgetting:
    def test_a_job_without_ranks_saves_and_memory_is_forgotten_after_a_while(self, running):
        running.core.tick(1.0)
        for rank in (0, 1):
            running.tell(left(rank, died=False))
        running.core.tick(1.0 + FORGET_AFTER)
        assert list(running.core.jobs) == ["job"]
        running.core.tick(1.1 + FORGET_AFTER)
        assert running.core.jobs == {}

    @pytest.mark.parametrize("why", ["ranks", "open", "held"])
    def test_not_before(self, running, why):
        if why != "ranks":
            save(running)
            for rank in (0, 1):
                running.tell(left(rank, died=False))
            if why == "held":
                running.core.commit_done(CommitDone("job", 1, 10), 1.0)
        running.core.tick(10 * FORGET_AFTER)
        assert list(running.core.jobs) == ["job"]

    def test_an_agent_that_was_away_hears_how_a_save_ended(self, running):
        running.tell(staged(0))
        for rank in (0, 1):
            running.tell(left(rank))
        running.core.tick(FORGET_AFTER / 2)
        assert "n0: save_ended" in kinds(running.tell(staged(0)))


def launch(driver):
    for node in "ab":
        if "ReadNodes" in kinds(driver.tell(node_joined(node))):
            driver.core.nodes_read(NodesRead({}), driver.now)
        decision = driver.tell(node_ready(node))
    return decision


class TestLaunchedJobs:
    def test_start_fail_and_restart(self, driver):
        assert kinds(launch(driver)) == ["a: start", "b: start"]
        exited = pb.RankExited(job="job", node="b", attempt=1, rank=2, status=1)
        assert kinds(driver.tell(exited)) == ["a: stop", "b: stop"]

    def test_a_rank_that_an_agent_sees_die_stops_the_attempt_unless_its_launcher_knows_better(self, driver):
        launch(driver)
        for rank in range(4):
            driver.tell(joined(rank, job="job@1234", world_size=4, node="ab"[rank // 2]))
        driver.tell(left(2, job="job@1234", node="b"))
        driver.tell(left(3, job="job@1234", node="b"))
        driver.tell(pb.RankExited(job="job", node="b", attempt=1, rank=2, status=0))
        assert kinds(driver.core.tick(EXIT_PATIENCE)) == []
        decision = driver.core.tick(EXIT_PATIENCE + 0.1)
        assert kinds(decision) == ["a: stop", "b: stop", "KeepNodes"]
        assert driver.core.launched["job"].last_failure == "rank 3 on b died"

    def test_the_incident_says_how_far_the_job_had_come(self, driver):
        launch(driver)
        for rank in range(4):
            driver.tell(joined(rank, world_size=4, node="ab"[rank // 2]))
        driver.tell(progressed("a", 60))
        (incident, *_) = incidents(driver.tell(pb.RankExited(job="job", node="b", attempt=1, rank=2, status=-9)))
        assert (incident.kind, incident.step) == ("died", 60)

    def test_a_rank_that_leaves_in_good_order_does_not(self, driver):
        launch(driver)
        driver.tell(joined(3, world_size=4, node="b"))
        assert kinds(driver.tell(left(3, node="b", died=False))) == []

    def test_a_node_that_leaves_stops_the_attempt(self, driver):
        launch(driver)
        assert kinds(driver.tell(pb.NodeLeft(job="job", node="b", detail="gone"))) == ["a: stop"]

    def test_the_same_name_may_be_launched_again(self, driver):
        launch(driver)
        end(driver)
        driver.tell(pb.NodeLeft(job="job", node="a"))
        driver.tell(pb.NodeLeft(job="job", node="b"))
        assert kinds(launch(driver)) == ["a: start", "b: start"]

    def test_a_launcher_that_missed_the_end_hears_it_from_the_old_job(self, driver):
        launch(driver)
        end(driver)
        assert kinds(driver.tell(node_joined("b", attempt=1, first_rank=2))) == ["b: end"]

    def test_and_so_does_one_without_ranks_that_was_there_before(self, driver):
        launch(driver)
        driver.now = 10.0
        end(driver)
        driver.now = 20.0
        assert kinds(driver.tell(node_joined("c", uptime=11.0))) == ["c: end"]
        assert kinds(driver.tell(node_joined("c", uptime=9.0))) == ["ReadNodes"]

    def test_and_from_the_next_one(self, driver):
        launch(driver)
        end(driver)
        driver.tell(node_joined("b"))
        ((_, order),) = orders(driver.tell(node_ready("b", 1)), "end")
        assert (order.status, order.reason) == (0, "all ranks have ended")


class TestWhatIsCounted:
    def test_a_restart_by_its_cause(self, driver):
        launch(driver)
        decision = driver.tell(pb.RankExited(job="job", node="b", attempt=1, rank=2, status=1))
        assert restarted(decision) == [Restarted("job", Cause.DIED)]
        for node in "ab":
            driver.tell(node_ready(node, 1))
        assert restarted(driver.tell(pb.NodeLeft(job="job", node="b", detail="gone"))) == [
            Restarted("job", "node-lost")
        ]

    def test_not_the_end_of_a_job(self, driver):
        for node in "ab":
            driver.tell(node_joined(node, max_restarts=0))
        driver.core.nodes_read(NodesRead({}), 0.0)
        for node in "ab":
            driver.tell(node_ready(node))
        decision = driver.tell(pb.RankExited(job="job", node="b", attempt=1, rank=2, status=1))
        assert kinds(decision) == ["a: end", "b: end"]
        assert restarted(decision) == []


def restarted(decision):
    return [effect for effect in decision.effects if isinstance(effect, Restarted)]


class TestGrowing:
    @pytest.fixture
    def shrunk(self, driver):
        """A job of one or two nodes: it runs on a alone, nothing is saved after step 40, and b has come."""
        driver.tell(node_joined("a", min_nodes=1, nproc=1, grow=100.0))
        driver.core.nodes_read(NodesRead({}), 0.0)
        driver.tell(node_ready("a"))
        driver.core.tick(LAST_CALL)
        driver.tell(joined(0, node="a", job="job@1", world_size=1))
        driver.core.epoch_done(epoch_done(1, job="job@1"), 6.0)
        for driver.now, step in ((6.0, 0), (8.0, 40), (10.0, 80)):
            driver.tell(progressed("a", step, job="job@1"))
        driver.tell(node_joined("b", nproc=1))
        driver.tell(node_ready("b"))
        assert kinds(driver.core.tick(10.0)) == []
        return driver

    def test_a_checkpoint_is_asked_for_and_waited_for(self, shrunk):
        shrunk.core.tick(10.0 + SETTLE)
        assert kinds(shrunk.core.tick(11.0 + SETTLE)) == ["a: save_at"]
        assert kinds(shrunk.core.tick(12.0 + SETTLE)) == []
        shrunk.now = 20.0
        shrunk.tell(staged(0, node="a", job="job@1", step=90, world_size=1))
        shrunk.tell(durable(0, job="job@1", step=90))
        shrunk.core.commit_done(CommitDone("job@1", 1, 90), 21.0)
        shrunk.tell(progressed("a", 100, job="job@1"))
        decision = shrunk.core.tick(21.0)
        assert kinds(decision) == ["a: stop", "b: stop"]
        assert restarted(decision) == [Restarted("job", Cause.GROWN)]
        assert "grows from 1 to 2 nodes, at the checkpoint of step 90" in decision.reasons[-1]
        assert [n for n, _ in orders(shrunk.tell(node_ready("a", 1)), "start")] == ["a", "b"]

    def test_and_asked_for_again_if_a_rank_skips_it(self, shrunk):
        shrunk.core.tick(10.0 + SETTLE)
        ((_, order),) = orders(shrunk.core.tick(11.0 + SETTLE), "save_at")
        shrunk.now = 12.0 + SETTLE
        shrunk.tell(skipped(0, job="job@1", step=order.step - 1))
        assert kinds(shrunk.core.tick(13.0 + SETTLE)) == []
        shrunk.tell(skipped(0, job="job@1", step=order.step))
        assert kinds(shrunk.core.tick(14.0 + SETTLE)) == ["a: save_at"]
        assert kinds(shrunk.core.tick(15.0 + SETTLE)) == []

    def test_but_not_longer_than_was_agreed_on(self, shrunk):
        shrunk.core.tick(50.0)
        assert kinds(shrunk.core.tick(109.9)) == ["a: save_at"]
        assert kinds(shrunk.core.tick(110.0)) == ["a: stop", "b: stop"]

    def test_a_job_that_has_lost_nothing_yet_grows_at_once(self, driver):
        driver.tell(node_joined("a", min_nodes=1))
        driver.core.nodes_read(NodesRead({}), 0.0)
        driver.tell(node_ready("a"))
        driver.core.tick(LAST_CALL)
        driver.now = 7.0
        driver.tell(node_joined("b"))
        driver.tell(node_ready("b"))
        driver.core.tick(7.0)
        assert kinds(driver.core.tick(7.0 + SETTLE)) == ["a: stop", "b: stop"]

    def test_or_never(self, driver):
        driver.tell(node_joined("a", grow=-1.0))
        assert driver.core.launched["job"].growth.patience is None


class TestDraining:
    def test_a_node_that_fails_too_often_is_to_be_drained_once(self, driver):
        launch(driver)
        for attempt in (1, 2):
            driver.tell(pb.RankExited(job="job", node="b", attempt=attempt, rank=2, status=-9))
            assert "Drain" not in kinds(driver.core.tick(1.0))
            for node in "ab":
                driver.tell(node_ready(node, attempt))
        driver.tell(node_joined("c"))
        driver.core.launched["job"].max_restarts = 3
        driver.tell(pb.RankExited(job="job", node="b", attempt=3, rank=2, status=-9))
        decision = driver.core.tick(1.0)
        (drain,) = [effect for effect in decision.effects if isinstance(effect, Drain)]
        assert drain == Drain("b", "incident 3-1 of job job: rank 2 was killed by signal 9")
        assert "node b has failed too often and is not used while there are others" in decision.reasons[-1]
        assert "Drain" not in kinds(driver.core.tick(2.0))

    def test_a_node_that_was_known_to_be_bad_is_not_drained_again(self, driver):
        driver.tell(node_joined("a"))
        driver.core.nodes_read(NodesRead({"b": (9.0, 0.0, "it lost power")}), 0.0)
        assert "Drain" not in kinds(driver.core.tick(1.0))


def end(driver):
    for rank in range(4):
        decision = driver.tell(pb.RankExited(job="job", node="ab"[rank // 2], attempt=1, rank=rank, status=0))
    assert kinds(decision) == ["a: end", "b: end"]
