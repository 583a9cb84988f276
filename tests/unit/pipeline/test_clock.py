"""The time of day that commits are stamped with."""

from datetime import UTC, datetime

from ckptsvc.pipeline.clock import Steady, now_iso


def test_a_clock_that_is_set_moves_it_not():
    wall, passed = [1e9], [500.0]
    clock = Steady(lambda: wall[0], lambda: passed[0])
    wall[0] += 3e8
    passed[0] += 60
    assert clock.now() == 1e9 + 60


def test_it_is_the_time_of_day():
    stamped = datetime.fromisoformat(now_iso())
    assert stamped.tzinfo is UTC
    assert abs((datetime.now(UTC) - stamped).total_seconds()) < 60
