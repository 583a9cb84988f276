"""How a node holds back before a slow or failing store."""

from ckptsvc.control.backoff import FIRST_PAUSE, LONGEST_PAUSE, Backoff

MIB = 1 << 20


def test_a_steady_store_gets_all() -> None:
    backoff = Backoff(4)
    for _ in range(50):
        backoff.wrote(100 * MIB, 1.0, 4)
    assert (backoff.allowed, backoff.trouble, backoff.pause) == (4, "", 0.0)


def test_a_store_that_becomes_slow_gets_half_and_half_again() -> None:
    backoff = Backoff(4)
    backoff.wrote(400 * MIB, 1.0, 4)
    seen = []
    for _ in range(3):
        backoff.wrote(100 * MIB, 10.0, backoff.allowed)
        seen.append(backoff.allowed)
    assert seen == [2, 1, 1]
    assert backoff.trouble == "is slow"


def test_it_gets_more_step_by_step_when_it_is_well_again() -> None:
    backoff = Backoff(4)
    backoff.wrote(400 * MIB, 1.0, 4)
    for _ in range(2):
        backoff.wrote(100 * MIB, 100.0, 4)
    seen = []
    for _ in range(4):
        backoff.wrote(1600 * MIB // backoff.allowed, 1.0, backoff.allowed)
        seen.append((backoff.allowed, backoff.trouble))
    assert seen == [(2, "recovers"), (3, "recovers"), (4, ""), (4, "")]


def test_a_store_that_is_slower_for_good_is_not_slow_for_ever() -> None:
    backoff = Backoff(4)
    backoff.wrote(1000 * MIB, 1.0, 4)
    for _ in range(400):
        backoff.wrote(100 * MIB, 1.0, 4)
    assert backoff.allowed == 4


def test_small_writes_say_nothing_about_the_rate() -> None:
    backoff = Backoff(4)
    backoff.wrote(400 * MIB, 1.0, 4)
    for _ in range(20):
        backoff.wrote(1000, 5.0, 1)
    assert backoff.allowed == 4


def test_a_failing_store_is_asked_less_and_less_often() -> None:
    backoff = Backoff(4)
    pauses = []
    for _ in range(10):
        backoff.failed()
        pauses.append(backoff.pause)
    assert pauses[:4] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE
    assert backoff.allowed == 1
    assert backoff.trouble == "fails"
    backoff.wrote(1000, 1.0, 1)
    assert (backoff.pause, backoff.trouble) == (0.0, "recovers")
