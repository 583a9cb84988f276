"""Thousands of fault schedules through the control plane, in virtual time."""

import logging

import pytest
from check import Violation
from simulation import Fault, Schedule


@pytest.fixture(autouse=True)
def quiet():
    """The agents have a lot to say about faults."""
    logger = logging.getLogger("ckptsvc")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def run(seeds):
    """Run them all; the first that fails is made as short as it gets and told."""
    for seed in seeds:
        schedule = Schedule.draw(seed)
        try:
            schedule.run()
        except Violation:
            schedule.shrink().run()
            raise


def test_no_schedule_of_faults_breaks_a_promise():
    run(range(300))


def test_no_loss_of_nodes_breaks_a_promise_where_they_keep_copies_or_parity():
    lost = rebuilt = 0
    for seed in range(80):
        schedule = Schedule.losses(seed)
        try:
            world = schedule.run()
        except Violation:
            schedule.shrink().run()
            raise
        said = "\n".join(world.trace)
        lost += "lose node" in said
        rebuilt += "they are rebuilt from parity" in said
    assert lost > 15
    assert rebuilt > 2


def test_no_order_of_a_person_breaks_a_promise():
    said = []
    for seed in range(110):
        schedule = Schedule.ordered(seed)
        try:
            world = schedule.run()
        except Violation:
            schedule.shrink().run()
            raise
        said += world.trace
    told = "\n".join(said)
    for what in (
        "automatic snapshots are paused from step", "automatic snapshots are taken again from step",
        "the time it was paused for is over", "is committed in", "restarted by somebody", "is drained by somebody",
        "needs n1 no more", "cannot do without", "is excluded",
    ):  # fmt: skip
        assert what in told, what


TAKEOVERS = {
    "a node runs whose agent is away": Schedule(
        seed=8184, nodes=2, least=1, most=1, nproc=2, steps=28, every_steps=2, every_seconds=10.0,
        faults=(
            Fault(6.91, "kill rank and agent", 77, 0.9),
            Fault(21.63, "kill agent", 61, 62.9),
            Fault(23.5, "kill coordinator", 99, 2.0),
        ),
    ),
    "and others have stopped already": Schedule(
        seed=6537, nodes=3, least=2, most=3, nproc=2, steps=40, every_steps=3, every_seconds=0.0,
        faults=(
            Fault(15.846, "kill rank", 30),
            Fault(28.017, "another job", 56, 2.823),
            Fault(29.419, "cut off", 98, 4.216),
            Fault(30.028, "kill agent", 28, 14.556),
            Fault(30.669, "kill coordinator", 85, 3.172),
        ),
    ),
    "it runs since just now, and its spares are first": Schedule(
        seed=448, nodes=4, least=1, most=1, nproc=1, steps=33, every_steps=5, every_seconds=0.0,
        faults=(Fault(4.96, "kill coordinator", 93, 1.0),),
    ),
    "it is a spare that runs, and the node that has stopped is first": Schedule(
        seed=4443, nodes=3, least=1, most=1, nproc=2, steps=34, every_steps=2, every_seconds=0.0, late=29.9937,
        faults=(Fault(1.3551, "kill coordinator", 85, 4.4539), Fault(31.4713, "kill coordinator", 72, 1.019)),
    ),
}  # fmt: skip
"""One coordinator follows another, and must start no second attempt."""


@pytest.mark.parametrize("case", TAKEOVERS)
def test_a_coordinator_that_takes_over_starts_nothing_beside_what_runs(case):
    TAKEOVERS[case].run()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
def test_nor_do_thousands_of_orders(part):
    for seed in range(1000 + part * 1000, 2000 + part * 1000):
        schedule = Schedule.ordered(seed)
        try:
            schedule.run()
        except Violation:
            schedule.shrink().run()
            raise


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_nor_do_thousands(part):
    run(range(1000 + part * 1000, 2000 + part * 1000))
