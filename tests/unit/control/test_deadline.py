"""When a job begins to stop so that its last save is committed before its time is over."""

from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.control.deadline import (
    LARGEST_SHARE,
    RECENT,
    SAFETY,
    STEPS_AHEAD,
    UNKNOWN_SAVE,
    Limit,
    Pace,
    reason,
    stop_at,
)

HOUR = Limit(began=1000.0, ends=4600.0, margin=30.0)


def pace(*saves: float, step: float = 0.0) -> Pace:
    it = Pace(step=step)
    it.saves.extend(saves)
    return it


def test_the_slowest_of_the_recent_saves_counts() -> None:
    assert stop_at(HOUR, pace(5.0, 20.0, 7.0)) == 4600.0 - 30.0 - SAFETY * 20.0


def test_saves_of_long_ago_do_not() -> None:
    assert stop_at(HOUR, pace(500.0, *[10.0] * RECENT)) == 4600.0 - 30.0 - SAFETY * 10.0


def test_long_steps_begin_earlier() -> None:
    assert stop_at(HOUR, pace(5.0)) - stop_at(HOUR, pace(5.0, step=60.0)) == STEPS_AHEAD * 60.0


def test_before_the_first_save_there_is_a_guess() -> None:
    assert stop_at(HOUR, pace()) == 4600.0 - 30.0 - SAFETY * UNKNOWN_SAVE
    assert reason(HOUR, pace(), 4500.0) == "the scheduler ends the job in 100 s; no save has been measured yet"
    assert reason(HOUR, pace(1.26), 4500.0) == "the scheduler ends the job in 100 s; a save takes up to 1.3 s"


def test_a_job_with_little_time_still_gets_on() -> None:
    short = Limit(began=0.0, ends=100.0, margin=30.0)
    assert stop_at(short, pace(300.0)) == 100.0 * (1 - LARGEST_SHARE)


SECONDS = st.floats(0.0, 1e7)


@given(SECONDS, SECONDS, SECONDS, st.lists(SECONDS, max_size=20), SECONDS)
def test_it_is_always_within_the_job_s_time(
    began: float, length: float, margin: float, saves: list[float], step: float
) -> None:
    limit = Limit(began, began + length, margin)
    assert began <= stop_at(limit, pace(*saves, step=step)) <= limit.ends
