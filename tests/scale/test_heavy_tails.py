"""A job that is only slow at times is left alone; one that then hangs is not."""

import pytest
from heavy_tails import STANDS_STILL, Job


def run(seed: int, steps: int) -> Job:
    job = Job(seed)
    job.run(steps)
    assert job.killed == []
    assert job.step == steps
    return job


def hang(job: Job, seconds: float, **seen: object) -> float:
    """One rank hangs; returns how long it takes until it is killed."""
    began = job.now
    job.pausing[3] = {"answers": False, **seen}
    while not job.killed:
        assert job.now - began < seconds, "not killed in time"
        job.wait(0.25)
    assert job.killed[0].startswith("rank 3 on n1 hung: ")
    return job.now - began


@pytest.mark.parametrize("seed", range(3))
def test_pauses_do_no_harm_and_hide_no_hang(seed: int) -> None:
    job = run(seed, 10_000)
    assert job.stalls > 3
    assert hang(job, 3 * STANDS_STILL, state="D", cpu=0.0, stack="main\nread") > STANDS_STILL


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_false_kill_in_a_million_steps() -> None:
    job = run(7, 1_000_000)
    assert min(job.pauses.values()) > 50
    assert job.stalls > 300
    hang(job, 3 * STANDS_STILL, state="D", cpu=0.0, stack="main\nread")
