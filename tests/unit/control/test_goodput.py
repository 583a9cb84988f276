"""Where the time of a job goes: every second into one cause, none of it taken back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.control.goodput import Goodput, Mode
from ckptsvc.telemetry import Share


def booked(books):
    return {share.value: pytest.approx(seconds) for share, seconds in books.seconds.items() if seconds}


@pytest.fixture
def stepping():
    """A job that took 5 s until its first step and has done ten of a second each."""
    books = Goodput(0.0)
    books.begin(1, 0.0)
    books.progress(1, 0, None, 0.0, 1.0)
    books.progress(1, 0, 0, 0.0, 4.0)
    assert books.progress(1, 1, 0, 0.0, 5.0)
    for step in range(2, 11):
        assert not books.progress(1, step, 0, 0.0, 4.0 + step)
    return books


def test_start_up_and_the_first_step_are_neither_useful_nor_lost(stepping):
    assert booked(stepping) == {"other": 5.0, "useful": 9.0}
    assert stepping.ratio == pytest.approx(9 / 14)


def test_what_saves_hold_up_is_not_useful(stepping):
    stepping.progress(1, 11, 0, 0.25, 15.25)
    assert booked(stepping) == {"other": 5.0, "useful": 10.0, "blocked": 0.25}


def test_more_blocked_time_than_there_was_is_booked_with_later_steps(stepping):
    stepping.progress(1, 10, 0, 1.5, 14.5)
    stepping.progress(1, 11, 0, 1.5, 15.0)
    assert booked(stepping) == {"other": 5.0, "useful": 9.0, "blocked": 1.0}
    stepping.progress(1, 12, 0, 1.5, 16.5)
    assert booked(stepping) == {"other": 5.0, "useful": 10.0, "blocked": 1.5}


def test_a_rank_dies_and_steps_come_again(stepping):
    stepping.fail(14.5, 14.75)  # half a step is never finished; a quarter of a second until it is known
    stepping.begin(2, 16.0)
    stepping.progress(2, 0, None, 0.0, 16.5)
    stepping.progress(2, 6, 6, 0.0, 17.0)  # restored
    assert stepping.progress(2, 7, 6, 0.0, 18.0)
    assert booked(stepping) == {"other": 5.0, "useful": 9.0, "redone": 0.5, "detection": 0.25, "restart": 3.25}
    stepping.progress(2, 12, 6, 0.0, 23.0)  # five steps at once: three of them had been done
    assert booked(stepping) == {"other": 5.0, "useful": 11.0, "redone": 3.5, "detection": 0.25, "restart": 3.25}


def test_a_hang_counts_from_the_last_step_on_and_before_it_has_a_name(stepping):
    stepping.stall(18.0)
    assert booked(stepping) == {"other": 5.0, "useful": 9.0, "detection": 4.0}
    stepping.tick(19.0)
    stepping.fail(14.0, 20.0)
    stepping.tick(21.0)
    assert booked(stepping) == {"other": 5.0, "useful": 9.0, "detection": 6.0, "restart": 1.0}


def test_a_stall_that_ends_by_itself_was_one_and_the_step_goes_on(stepping):
    stepping.stall(18.0)
    stepping.move(19.0)
    stepping.progress(1, 11, 0, 0.0, 20.0)
    assert booked(stepping) == {"other": 5.0, "useful": 10.0, "detection": 5.0}


def test_an_evaluation_is_what_the_job_is_there_for(stepping):
    stepping.progress(1, 10, 0, 0.0, 600.0)
    stepping.progress(1, 11, 0, 0.0, 601.0)
    assert stepping.seconds[Share.USEFUL] == pytest.approx(596.0)


def test_a_program_that_goes_back_by_itself_does_steps_again(stepping):
    stepping.progress(1, 4, 4, 0.0, 16.0)
    stepping.progress(1, 12, 4, 0.0, 24.0)
    assert booked(stepping) == {"other": 7.0, "useful": 11.0, "redone": 6.0}


def test_what_an_older_attempt_says_late_is_not_heard(stepping):
    stepping.fail(14.0, 14.0)
    stepping.begin(2, 15.0)
    stepping.progress(1, 500, 0, 99.0, 16.0)
    assert stepping.mode is Mode.RESTARTING
    assert stepping.peak == 10


def test_the_time_after_the_end_and_before_another_beginning_is_not_the_jobs(stepping):
    stepping.end(15.0)
    stepping.tick(1000.0)
    assert stepping.total == pytest.approx(15.0)
    stepping.begin(1, 2000.0)
    stepping.tick(2001.0)
    assert stepping.total == pytest.approx(16.0)


def test_whether_a_job_that_nobody_launches_again_was_being_restarted_is_known_when_it_comes(stepping):
    stepping.leave(14.0)
    stepping.tick(100.0)
    assert stepping.total == pytest.approx(14.0)
    stepping.begin(2, 200.0)
    assert booked(stepping) == {"other": 5.0, "useful": 9.0, "restart": 186.0}


def test_nonsense_from_a_rank_is_not_booked(stepping):
    for blocked in (math.nan, math.inf, -1.0):
        stepping.progress(1, 10, 0, blocked, 14.0)
    stepping.progress(1, 11, 0, 0.0, 15.0)
    assert booked(stepping) == {"other": 5.0, "useful": 10.0}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("begin", "progress", "stall", "move", "fail", "leave", "end", "tick")),
        st.floats(0, 100),  # seconds until it
        st.integers(0, 30),  # step
        st.one_of(st.none(), st.integers(0, 30)),  # began
        st.floats(0, 50),  # more blocked; how long ago the fault was
        st.booleans(),  # the next attempt
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens_causes_sum_to_the_time_and_only_grow(events):
    books, now, attempt, blocked, away = Goodput(0.0), 0.0, 1, 0.0, 0.0
    for kind, wait, step, began, more, another in events:
        before, gone = dict(books.seconds), books.mode is Mode.ENDED
        now += wait
        if gone:
            away += wait
        if kind == "end" and books.mode is Mode.GONE:  # nobody came
            away += now - books.since
        blocked += more
        attempt += another
        if kind == "begin":
            blocked = 0.0
            books.begin(attempt, now)
        elif kind == "progress":
            books.progress(attempt, step, began, blocked, now)
        elif kind == "fail":
            books.fail(now - more, now)
        else:
            getattr(books, kind)(now)
        books.tick(now)
        assert all(books.seconds[share] >= before[share] for share in Share)
        assert set(books.seconds) == set(Share)
        assert books.since <= now + 1e-6
        if books.mode not in (Mode.STEPPING, Mode.GONE, Mode.ENDED):
            assert books.total == pytest.approx(now - away, abs=1e-6)
        else:  # the rest is booked when it is known what it was
            assert books.total <= now - away + 1e-6
        assert books.ratio is None or 0 <= books.ratio <= 1
    if books.mode is not Mode.ENDED:
        books.fail(now, now)
        books.begin(attempt + 1, now)
        assert books.total == pytest.approx(now - away, abs=1e-6)
