"""A job that becomes slower is noticed, whatever its steps are like; one that only stumbles is not."""

import random

import pytest

from ckptsvc.control.slowness import ACCEPTED, FACTOR, KNOWN, LEAST, WINDOW, Slowness

TICK = 0.25


class Node:
    """Steps under a virtual clock, seen at the looks of an agent."""

    def __init__(self):
        self.slowness, self.now, self.done = Slowness(), 0.0, 0.0
        self.found = None

    def train(self, seconds, draw):
        """Steps for so long; returns when they were first found slow, counted from now."""
        began, first, took = self.now, None, []
        while self.now - began < seconds:
            self.now += TICK
            while self.done + (step := draw()) <= self.now:
                self.done += step
                took.append(step)
            if took:
                self.slowness.take(sum(took) / len(took), len(took), self.now)
                took = []
            self.found = self.slowness.look(self.now)
            if self.found and first is None:
                first = self.now - began
        return first


def always(seconds):
    return lambda: seconds


@pytest.fixture
def node():
    return Node()


@pytest.mark.parametrize("step", [0.02, 0.05, 0.3, 2.0])
def test_ten_times_slower_is_noticed_after_a_few_steps(node, step):
    assert node.train(60 * step + 20, always(step)) is None
    assert node.train(200 * step + 30, always(10 * step)) <= WINDOW + TICK + 60 * step
    assert node.found.seconds == pytest.approx(10 * step, rel=0.2)
    assert node.found.usual == pytest.approx(step, rel=0.2)


def test_twice_as_slow_is_not(node):
    node.train(60, always(0.1))
    assert node.train(60, always(0.1 * (FACTOR - 1))) is None


def test_neither_are_very_short_steps_that_become_a_little_longer(node):
    node.train(60, always(0.005))
    assert node.train(60, always(0.005 + 0.9 * LEAST)) is None


def test_neither_is_a_job_whose_steps_are_of_very_different_lengths(node):
    rng = random.Random(7)
    assert node.train(3600, lambda: 0.1 * rng.lognormvariate(0, 1) + (5.0 if rng.random() < 0.01 else 0.0)) is None


def test_a_pause_is_none(node):
    node.train(60, always(0.1))
    node.done = node.now + 30
    assert node.train(60, always(0.1)) is None


def test_of_few_steps_nothing_is_known(node):
    assert node.train(KNOWN // 2 - 1, always(1.0)) is None
    assert node.train(300, always(10.0)) is None


def test_as_fast_as_before_is_the_end_of_it_and_it_can_come_again(node):
    node.train(60, always(0.1))
    assert node.train(20, always(1.0))
    node.train(20, always(0.1))
    assert node.found is None
    assert node.train(20, always(1.0))


def test_what_stays_slow_is_the_usual_in_the_end(node):
    node.train(60, always(0.1))
    node.train(ACCEPTED + 60, always(1.0))
    assert node.found is None
    assert node.train(60, always(5.0))
