import pytest

from ckptsvc.control.exclusion import DIED, FORGOTTEN, HALF_LIFE, LOST, Exclusion, Strikes


def test_three_failures_in_a_row_exclude_a_node():
    exclusion = Exclusion()
    for at in (0.0, 60.0, 120.0):
        assert not exclusion.excluded("a", at)
        exclusion.strike("a", DIED, "died", at)
    assert exclusion.excluded("a", 120.0)
    assert not exclusion.excluded("b", 120.0)


def test_it_is_told_once_for_each_time():
    exclusion = Exclusion({"a": Strikes(2.0, 0.0, "")})
    exclusion.merge({"b": Strikes(9.0, 0.0, "known from another job")}, 0.0)
    assert exclusion.fresh == {}
    exclusion.strike("a", DIED, "third", 1.0)
    assert exclusion.fresh == {"a": "third"}
    exclusion.fresh.clear()
    exclusion.strike("a", DIED, "fourth", 2.0)
    exclusion.strike("b", DIED, "again", 2.0)
    assert exclusion.fresh == {}
    exclusion.strike("a", LOST, "half a day later", 24 * HALF_LIFE)
    assert exclusion.fresh == {}


def test_for_a_while():
    exclusion = Exclusion({"a": Strikes(3.0, 0.0, "")})
    assert exclusion.excluded("a", 0.2 * HALF_LIFE)
    assert not exclusion.excluded("a", 0.3 * HALF_LIFE)


@pytest.mark.parametrize("apart", [HALF_LIFE, 4 * HALF_LIFE])
def test_failures_now_and_then_exclude_nobody(apart):
    exclusion = Exclusion()
    for number in range(100):
        exclusion.strike("a", LOST, "gone", number * apart)
        assert not exclusion.excluded("a", number * apart)


def test_what_has_faded_is_forgotten():
    exclusion = Exclusion({"a": Strikes(1.0, 0.0, ""), "b": Strikes(1.0, 5 * HALF_LIFE, "")})
    assert exclusion.score("a", 5 * HALF_LIFE) < FORGOTTEN
    assert list(exclusion.listed(5 * HALF_LIFE)) == ["b"]


def test_the_heavier_of_two_entries_counts():
    exclusion = Exclusion({"a": Strikes(2.0, 0.0, "ours"), "b": Strikes(1.0, 0.0, "ours")})
    theirs = {"a": Strikes(1.5, 0.0, "theirs"), "b": Strikes(2.9, 0.0, "theirs"), "c": Strikes(4.0, -HALF_LIFE, "")}
    exclusion.merge(theirs, 1.0)
    assert (exclusion.strikes["a"].why, exclusion.strikes["b"].why) == ("ours", "theirs")
    assert exclusion.score("c", 0.0) == pytest.approx(2.0)


def test_a_clock_that_goes_back_makes_nothing_heavier():
    assert Strikes(1.0, 100.0, "").now(0.0) == 1.0


def test_what_has_changed_is_kept_once():
    exclusion = Exclusion()
    exclusion.strike("a", DIED, "died", 0.0)
    assert exclusion.changed
    exclusion.listed(0.0)
    assert not exclusion.changed
