"""Whether the clock of a node has been set."""

from ckptsvc.control.clocks import JUMP, Clocks


def test_a_jump_is_said_once_and_the_way_back_too():
    clocks = Clocks(1e9, 100.0)
    assert clocks.look(1e9 + 5, 105.0) == ""
    assert clocks.look(1e9 + 10 + 40 * 86400, 110.0).startswith("the clock of this node was put 40 d forward: ")
    assert clocks.look(1e9 + 15 + 40 * 86400, 115.0) == ""
    assert clocks.look(1e9 + 20, 120.0).startswith("the clock of this node was put 40 d back: ")
    assert clocks.look(1e9 + 25, 125.0) == ""


def test_small_steps_are_said_when_they_have_become_a_large_one():
    clocks = Clocks(0.0, 0.0)
    said = [clocks.look(n + 0.4 * JUMP * n, float(n)) for n in range(1, 7)]
    assert [bool(each) for each in said] == [False, False, True, False, False, True]


def test_a_machine_that_was_suspended_has_a_clock_like_any_other():
    assert Clocks(1e9, 0.0).look(1e9 + 86400, 86400.0) == ""
