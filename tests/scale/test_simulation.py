"""Thousands of fault schedules through the control plane, in virtual time."""

import logging

import pytest
from check import Violation
from simulation import Schedule


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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_nor_do_thousands(part):
    run(range(1000 + part * 1000, 2000 + part * 1000))
