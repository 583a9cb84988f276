"""Who is named, and who is not: recorded faults replayed, healthy noise, slow phases of the whole job."""

import random

import pytest
from harness.nic_world import JOB, NicWorld

from ckptsvc.control.nic_card import Card
from ckptsvc.control.nic_counters import Value
from ckptsvc.control.nic_job import HOLD, MAX_NICS, STALE, JobNics
from ckptsvc.control.nics import CRITICAL, INFO, Medians, judge
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import NicTrouble as Trouble

GHZ = 1e9
STALL = 0.015
"""Share of time for which flow control holds back the median card of a busy job."""

SICK = (2, 1)
VICTIMS = {(0, 0), (1, 3), (3, 2)}


def busy(world):
    """Every card moves 20 GB a second."""

    def step(node, card, second):
        world.card(node, card).move(1e10, 1e10)
        world.card(node, card).count("oxe_stall_fgfc_blk_0", STALL * GHZ)

    return step


def name_of(world, node, card):
    return world.nodes[node], f"cxi{card}"


# ---- the recorded hang


def recorded_hang(world, onset):
    """480 ranks on 60 nodes, an all-to-all: one card is throttled by the switches and its requests are not answered.

    64 packets time out five times each in 34 s (320 timeouts, 256 retries), then come back with an error; at that
    time the cards of three peers close their connections. Held back 23.5 times as long as the median.
    """
    epoch = 1.07
    tries = [onset + epoch * (2**n - 1) for n in range(1, 6)]
    failed = onset + 34.4

    def between(at, second):
        return second - 1 < at <= second

    def step(node, card, second):
        fake = world.card(node, card)
        hung = second > onset + 2
        fake.move(*((2e7, 2e7) if hung else (1e10, 1e10)))
        sick = (node, card) == SICK
        share = STALL * (23.5 if sick and second > onset else 1)
        fake.count("oxe_stall_fgfc_blk_0", share * GHZ)
        if sick:
            for number, at in enumerate(tries):
                if between(at, second):
                    fake.count("pct_spt_timeouts", 64)
                    fake.handle("spt_timeouts", 64)
                    fake.count("pct_retry_srb_requests", 64 if number < 4 else 0)
            if between(failed, second):
                fake.count("pct_rsp_err_rcvd", 64)
                fake.count("pct_bad_seq_nacks", 1)
        elif (node, card) in VICTIMS and between(failed, second):
            fake.count("pct_tct_timeouts", 1)

    return step


@pytest.mark.parametrize(("phase", "version"), [(0.0, 1), (0.05, 1), (0.35, 2), (0.92, 1), (0.93, 1), (0.999, 2)])
def test_the_recorded_hang_is_named_in_three_seconds_and_nobody_else_is(phase, version):
    world = NicWorld(nodes=5, cards=4, version=version, start=2**56 - 1000)
    world.run(15, busy(world))
    assert world.found == []
    onset = 15 + phase
    world.run(40, recorded_hang(world, onset))
    first = next(found for found in world.found if found.kind is Trouble.TIMEOUTS)
    assert (first.node, first.nic, first.severity) == (*name_of(world, *SICK), CRITICAL)
    assert first.at - onset <= 3.0
    assert {found[:2] for found in world.named()} == {name_of(world, *SICK)}
    assert {found[2] for found in world.named()} == {Trouble.TIMEOUTS, Trouble.CONGESTED, Trouble.FAILURES}


def test_the_recorded_hang_at_its_full_size():
    world = NicWorld(nodes=60, cards=4)
    world.run(5, busy(world))
    world.run(3, recorded_hang(world, 5.0))
    worst = world.findings()[0]
    assert (worst.node, worst.nic, worst.kind, worst.severity) == (*name_of(world, *SICK), Trouble.TIMEOUTS, CRITICAL)
    assert worst.sentence == "cxi1 on nid000002: 64 packets got no answer in the last 10 s (median 0)"
    assert worst.numbers["timeouts"] == 64
    assert worst.numbers["retries"] == 64
    assert worst.numbers["stalled"] == pytest.approx(23.5 * STALL, rel=0.01)
    assert worst.numbers["median_timeouts"] == 0


# ---- other faults


def test_congestion_names_the_card_and_says_how_much_slower_it_is():
    world = NicWorld()
    world.run(10, busy(world))

    def slow(node, card, second):
        fake = world.card(node, card)
        sick = (node, card) == SICK
        fake.move(*((2e8, 2e8) if sick else (1e10, 1e10)))
        fake.count("hni_tx_paused_4", (0.7 if sick else 0.004) * GHZ)

    world.run(12, slow)
    (found,) = world.findings()
    assert (found.node, found.nic, found.kind, found.severity) == (*name_of(world, *SICK), Trouble.CONGESTED, CRITICAL)
    assert found.sentence == (
        "cxi1 on nid000002: the network makes it wait 70% of the time (median 0.4%); it moves 0.4 GB/s instead of 20"
    )
    world.run(15, busy(world))
    assert world.findings() == []


def test_a_bad_second_is_none():
    world = NicWorld()
    world.run(10, busy(world))
    noisy = world.card(*SICK)
    for _ in range(3):
        noisy.count("hni_tx_paused_4", 0.9 * GHZ)
        noisy.count("hni_pcs_uncorrected_cw", 5000)
        noisy.count("pct_spt_timeouts", 3)
        world.run(12, busy(world))
    assert world.found == []


def test_codewords_beyond_repair_name_the_link():
    world = NicWorld()
    world.run(10, busy(world))

    def errors(node, card, second):
        busy(world)(node, card, second)
        if (node, card) == SICK:
            world.card(node, card).count("hni_pcs_uncorrected_cw", 300)

    world.run(8, errors)
    (found,) = world.findings()
    assert (found.kind, found.severity) == (Trouble.BAD_LINK, CRITICAL)
    assert "could not be repaired (median 0): cable or optic" in found.sentence


def test_a_flap_is_told_for_ten_minutes_and_a_link_that_stays_down_at_once():
    world = NicWorld(nodes=3, cards=2)
    world.run(10, busy(world))
    flapping = world.card(*SICK)
    flapping.link = "starting"
    world.run(4, busy(world))
    (found,) = world.findings()
    assert (found.kind, found.severity, found.sentence) == (
        Trouble.LINK_DOWN, CRITICAL, "cxi1 on nid000002: its link is 'starting'")  # fmt: skip
    flapping.link = "up"
    flapping.restart_link(1_743_569_999)
    world.run(15, busy(world))
    (found,) = world.findings()
    assert found.kind is Trouble.FLAPPING
    assert found.sentence == "cxi1 on nid000002: its link was restarted 1 times in the last 10 min (median 0)"
    world.run(570, busy(world))
    assert [found.kind for found in world.findings()] == [Trouble.FLAPPING]
    world.run(30, busy(world))
    assert world.findings() == []


def test_a_link_that_never_was_up_is_named_where_the_others_are():
    unused = NicWorld(nodes=3)
    for node in range(3):
        unused.card(node, 3).link = "down"  # no cable on any node
    unused.run(5, busy(unused))
    assert unused.found == []
    world = NicWorld(nodes=3)
    world.card(*SICK).link = "down"
    world.run(5, busy(world))
    assert world.named() == {(*name_of(world, *SICK), Trouble.LINK_DOWN)}


def test_a_silent_card_supports_a_suspicion_while_the_others_move():
    world = NicWorld()
    world.run(20, busy(world))
    healthy = busy(world)
    world.run(18, lambda node, card, second: None if (node, card) == SICK else healthy(node, card, second))
    (found,) = world.findings()
    assert (found.kind, found.severity, (found.node, found.nic)) == (Trouble.SILENT, INFO, name_of(world, *SICK))


# ---- nobody is to blame


def test_a_hung_job_names_nobody_by_its_silence():
    world = NicWorld()
    world.run(20, busy(world))
    world.run(120, lambda node, card, second: None)
    assert world.found == []


EVERYBODY = {
    "timeouts": lambda fake: fake.count("pct_spt_timeouts", 40),
    "stalls": lambda fake: fake.count("oxe_stall_fgfc_blk_2", 0.6 * GHZ),
    "pauses": lambda fake: fake.count("hni_rx_paused_std", 0.6 * GHZ),
    "refusals": lambda fake: fake.count("pct_no_trs_nacks", 50_000),
    "codewords": lambda fake: fake.count("hni_pcs_uncorrected_cw", 100),
    "flaps": lambda fake: fake.restart_link(fake.restarts[0] + 1),
    "links": lambda fake: setattr(fake, "link", "down"),
}


@pytest.mark.parametrize("kind", EVERYBODY)
def test_what_happens_to_the_whole_job_names_nobody(kind):
    world = NicWorld()
    world.run(10, busy(world))

    def trouble(node, card, second):
        busy(world)(node, card, second)
        EVERYBODY[kind](world.card(node, card))

    world.run(8, trouble)
    assert world.found == []


@pytest.mark.parametrize("kind", EVERYBODY)
def test_the_same_on_one_card_names_it(kind):
    world = NicWorld()
    world.run(10, busy(world))

    def trouble(node, card, second):
        busy(world)(node, card, second)
        if (node, card) == SICK:
            EVERYBODY[kind](world.card(node, card))

    world.run(8, trouble)
    assert {found[:2] for found in world.named()} == {name_of(world, *SICK)}


def test_a_healthy_noisy_job_names_nobody_for_an_hour():
    """Bursts, lone timeouts, lone bursts of errors, evaluations and saves without traffic, congestion of all."""
    rng = random.Random("a healthy hour")
    nodes, cards = 3, 2
    world = NicWorld(nodes, cards, start=2**56 - 10**12)
    phases = {second: "still" for start in range(300, 3600, 600) for second in range(start, start + 45)}
    phases |= {second: "crowded" for start in range(500, 3600, 900) for second in range(start, start + 60)}

    def step(node, card, second):
        fake = world.card(node, card)
        phase = phases.get(second, "busy")
        if phase != "still":
            burst = rng.lognormvariate(0, 0.7) if second % 4 else 0.02  # a step of four seconds, one of them computing
            fake.move(8e9 * burst, 8e9 * burst)
        level = 0.15 if phase == "crowded" else 0.01
        for counter in ("hni_tx_paused_0", "hni_rx_paused_4", "oxe_stall_fgfc_blk_0"):
            fake.count(counter, min(0.95, level * rng.lognormvariate(0, 0.5)) * GHZ)
        fake.count("pct_no_trs_nacks", rng.expovariate(1 / 50))
        for counter, each, most in (
            ("pct_spt_timeouts", 600, 3),
            ("pct_sct_timeouts", 900, 2),
            ("hni_pcs_uncorrected_cw", 400, 3000),
            ("hni_llr_tx_replay_event", 100, 40),
            ("hni_tx_paused_4", 200, 0.9 * GHZ),
        ):
            if rng.random() < 1 / each:
                fake.count(counter, rng.randint(1, round(most)))

    world.run(3600, step)
    assert world.found == []
    assert world.messages < nodes * 3600 * 0.5


# ---- what is kept


@pytest.fixture
def troubled():
    """A job in which one card has timeouts."""
    world = NicWorld()
    world.run(5, busy(world))
    world.card(*SICK).count("pct_spt_timeouts", 100)
    world.run(2, busy(world))
    assert [found.kind for found in world.findings()] == [Trouble.TIMEOUTS]
    return world


def test_a_finding_ends_some_time_after_its_cause(troubled):
    troubled.run(7, busy(troubled))
    assert [found.since for found in troubled.findings()] == [6.0]
    troubled.run(12, busy(troubled))
    assert troubled.findings() == []
    assert len(troubled.found) == 1, "it did not come and go"


def test_a_new_attempt_starts_with_nothing_against_anybody(troubled):
    troubled.join(2)
    assert troubled.findings() == []
    troubled.run(5, busy(troubled))
    assert troubled.findings() == []


def test_what_is_told_of_an_earlier_attempt_is_refused(troubled):
    summary = pb.NicSummary(job=JOB, node="nid000000", attempt=0, nics=[pb.NicReading(nic="cxi0", timeouts=500)])
    troubled.core.handle("nid000000", pb.Report(nic_summary=summary), troubled.now)
    troubled.run(1, busy(troubled))
    assert [found.node for found in troubled.findings()] == ["nid000002"]


def test_a_node_that_tells_nothing_any_more_is_forgotten(troubled):
    troubled.silent_nodes.add(SICK[0])
    troubled.run(int(STALE) - 5, busy(troubled))
    assert [found.node for found in troubled.findings()] == ["nid000002"], "why it is silent may be just this"
    troubled.run(int(HOLD) + 8, busy(troubled))
    assert troubled.findings() == []


def test_a_new_coordinator_hears_of_it_within_ten_seconds(troubled):
    fresh = type(troubled.core)()
    troubled.core = fresh
    for rank, node in enumerate(troubled.nodes):
        joined = pb.RankJoined(job=JOB, node=node, store="file:///run", attempt=1, rank=rank, world_size=4)
        fresh.handle(node, pb.Report(rank_joined=joined), troubled.now)

    def errors(node, card, second):
        busy(troubled)(node, card, second)
        if (node, card) == SICK:
            troubled.card(node, card).count("pct_spt_timeouts", 10)

    troubled.run(11, errors)
    assert [found.node for found in troubled.findings()] == ["nid000002"]


NAN = float("nan")


@pytest.mark.parametrize(
    "nics",
    [
        [pb.NicReading(nic="cxi0", stalled=NAN)],
        [pb.NicReading(nic="cxi0", usual=float("inf"))],
        [pb.NicReading(nic="cxi0", idle=-1)],
        [pb.NicReading(nic="", timeouts=99)],
        [pb.NicReading(nic="x" * 65, timeouts=99)],
        [pb.NicReading(nic=f"cxi{n}", timeouts=99) for n in range(MAX_NICS + 1)],
    ],
)
def test_a_strangers_numbers_are_refused(nics):
    job = JobNics("job")
    for now in (0.0, 2.0, 4.0):
        job.take(pb.NicSummary(job="job", node="n", nics=nics), now)
        job.tick(now)
    assert job.findings() == []


def test_reasons_are_sentences_for_the_log(troubled):
    job = JobNics("job")
    summary = pb.NicSummary(job="job", node="n7", nics=[pb.NicReading(nic="mlx5_0:1", family="ib", timeouts=50)])
    assert job.take(summary, 0.0).reasons == []
    assert job.tick(0.6).reasons == ["job job: mlx5_0:1 on n7: 50 packets got no answer in the last 10 s (median 0)"]
    job.take(pb.NicSummary(job="job", node="n7", nics=[pb.NicReading(nic="mlx5_0:1", family="ib")]), 1.0)
    assert job.tick(9.0).reasons == ["job job: mlx5_0:1 on n7 is well again (timeouts)"]


# ---- one card


def test_the_families_are_judged_apart():
    slingshot = [pb.NicReading(nic="cxi0", family="cxi", stalled=0.5) for _ in range(9)]
    port = pb.NicReading(nic="mlx5_0:1", family="ib", waits=5e6)
    (found,) = judge("n", port, Medians([*slingshot, port, pb.NicReading(nic="mlx5_0:1", family="ib")]))
    assert found.kind is Trouble.CONGESTED
    assert judge("n", slingshot[0], Medians([*slingshot, port])) == []


def test_what_is_known_is_kept_at_half_the_threshold():
    half = pb.NicReading(nic="cxi0", family="cxi", stalled=0.03)
    assert judge("n", half, Medians([half])) == []
    assert [f.kind for f in judge("n", half, Medians([half]), [Trouble.CONGESTED])] == [Trouble.CONGESTED]


def test_a_card_that_cannot_be_read_or_has_gone():
    late = pb.NicReading(nic="cxi0", unanswered=4.2)
    assert [f.sentence for f in judge("n", late, Medians([late]))] == [
        "cxi0 on n: its counters have not been readable for 4 s"
    ]
    gone = pb.NicReading(nic="cxi0", unanswered=99, gone=True)
    (found,) = judge("n", gone, Medians([gone]))
    assert (found.severity, found.sentence) == (CRITICAL, "cxi0 on n: the card is not on the node any more")


def test_a_retry_handler_is_missed_where_there_was_one_or_the_others_have_one():
    without = pb.NicReading(nic="cxi0", family="cxi", handler_absent=True)
    lost = pb.NicReading(nic="cxi0", family="cxi", handler_absent=True, handler_lost=True)
    well = pb.NicReading(nic="cxi0", family="cxi")
    assert judge("n", without, Medians([without])) == []
    assert judge("n", without, Medians([without, without, without, well])) == []
    for nic, others in ((lost, [lost]), (without, [without, well, well])):
        (found,) = judge("n", nic, Medians(others))
        assert (found.kind, found.severity) == (Trouble.NO_HANDLER, CRITICAL)
        assert "(cxi_rh@cxi0) does not run" in found.sentence


def test_traffic_that_is_not_known_is_not_nothing():
    card = Card("mlx5_0:1", "ib")
    stuck = {"counters/port_xmit_data": Value(2**32 - 1), "counters/port_rcv_data": Value(2**32 - 1)}
    for now in range(5):
        card.add(stuck, float(now))
    reading = card.reading(4.0)
    assert not reading.HasField("sent")
    assert reading.idle == 0


def test_a_card_that_carries_no_training_is_never_idle():
    card = Card("cxi3", "cxi")
    for now in range(60):
        card.add({"telemetry/hni_sts_tx_ok_octets": Value(now * 1000 if now < 5 else 5000)}, float(now))
    reading = card.reading(59.0)
    assert (reading.idle, reading.usual, reading.sent, reading.HasField("sent")) == (0, 0, 0, True)


def test_time_that_goes_back_or_stands_still_is_survived():
    card = Card("cxi0", "cxi")
    for now, stamp in ((5.0, 10**18), (5.0, 10**18 + 1), (4.0, 0), (6.0, 5), (7.0, 10**18)):
        card.add({"telemetry/hni_tx_paused_0": Value(round(now * 1e8), stamp)}, now)
    assert 0 <= card.reading(7.0).paused_tx <= 1
