"""What retention keeps, and why: a pure decision."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.pipeline.catalog import Ref
from ckptsvc.pipeline.retention import NEWEST, Candidate, Policy, best, decide, span

DAY = 86400.0
NOW = 1000 * DAY


def steps(refs):
    return sorted(ref.step for ref in refs)


def at(step, epoch=1, **fields):
    return Candidate(Ref(epoch, step), **fields)


def run(count, every=100, **fields):
    """Checkpoints of a run, one an hour up to now."""
    return [at(every * n, created=NOW - 3600 * (count - n), **fields) for n in range(1, count + 1)]


def test_without_a_number_to_keep_everything_stays():
    verdict = decide(run(5), Policy(steps=200, best=1, metric="loss", age=DAY), NOW)
    assert verdict.gone == []
    assert all("nothing is to be deleted (save.keep is 0)" in why for why in verdict.kept.values())


def test_the_last_ones_stay_and_the_oldest_goes_first():
    verdict = decide(run(5), Policy(last=2), NOW)
    assert [ref.step for ref in verdict.gone] == [100, 200, 300]
    assert verdict.kept == {Ref(1, 500): [NEWEST, "among the last 2"], Ref(1, 400): ["among the last 2"]}


def test_a_later_epoch_is_newer_whatever_its_steps_are():
    assert steps(decide([*run(3), at(50, epoch=2)], Policy(last=2), NOW).kept) == [50, 300]


def test_one_for_every_so_many_steps():
    found = [at(step) for step in (100, 950, 1000, 1050, 1900, 2100, 2200, 5000)]
    assert steps(decide(found, Policy(last=1, steps=1000), NOW).kept) == [100, 1000, 2100, 5000]


def test_the_one_that_is_kept_for_its_steps_stays_the_same_as_the_run_goes_on():
    found = [at(step) for step in range(70, 5000, 70)]
    chosen = {}
    for count in range(1, len(found) + 1):
        for ref, why in decide(found[:count], Policy(last=1, steps=500), NOW).kept.items():
            if "one for every 500 steps" in why:
                assert chosen.setdefault(ref.step // 500, ref) == ref


def test_after_a_step_back_the_later_try_counts_as_soon_as_it_is_there():
    first = [at(step) for step in (500, 1000, 1500, 2000)]
    policy = Policy(last=1, steps=1000)
    assert steps(decide([*first, at(1600, epoch=2)], policy, NOW).kept) == [500, 1000, 1600, 2000]
    later = decide([*first, at(1600, epoch=2), at(2100, epoch=2)], policy, NOW).kept
    assert sorted((ref.epoch, ref.step) for ref in later) == [(1, 500), (1, 1000), (2, 2100)]


def test_one_for_every_so_much_time():
    found = [at(n, created=NOW + 3600.0 * n) for n in range(30)]
    assert steps(decide(found, Policy(last=1, seconds=6 * 3600.0), NOW).kept) == [0, 6, 12, 18, 24, 29]


def test_young_ones_stay_also_where_clocks_differ():
    found = [
        at(1, created=NOW - 3 * DAY),
        at(2, created=NOW - DAY),
        at(3, created=NOW + DAY),
        at(4),
        at(5, created=0.0),
    ]
    assert steps(decide(found, Policy(last=1, age=2 * DAY), NOW).kept) == [2, 3, 4, 5]


def test_the_time_between_two_epochs_makes_nothing_much_older():
    """Before a rest of three weeks, or a clock that is ten years ahead: nobody can tell."""
    policy = Policy(last=1, age=8 * DAY)
    first = [at(n, created=NOW + 3600.0 * n) for n in range(1, 6)]
    for ahead in (21 * DAY, 3650 * DAY, -3650 * DAY):
        second = [at(n, epoch=2, created=NOW + ahead + 3600.0 * n) for n in range(6, 9)]
        third = [at(n, epoch=3, created=NOW + 3600.0 * n) for n in range(9, 12)]
        for found in (first + second, first + second + third):
            assert decide(found, policy, None).gone == []
    # By a clock that is right, it is as old as that says.
    assert steps(decide(first, policy, NOW + 21 * DAY).gone) == [1, 2, 3, 4]


def test_nor_does_a_clock_that_differs_within_one():
    """Another node coordinates the job for a while."""
    policy, found = Policy(last=1, age=8 * DAY), []
    for ahead in (0, 3650 * DAY, 0, -3650 * DAY, 0):
        found += [at(len(found) + n, created=NOW + ahead + 3600.0 * (len(found) + n)) for n in range(1, 6)]
        assert decide(found, policy, None).gone == []
    found += [at(n, created=NOW + 3600.0 * n) for n in range(26, 26 + 8 * 24)]  # so much later they do go
    assert set(steps(decide(found, policy, None).gone)) >= set(range(1, 20))


def test_saves_that_are_further_apart_than_that_are_no_rests():
    found = [at(n, created=NOW + 3700.0 * n) for n in range(10)]
    assert steps(decide(found, Policy(last=1, age=3600.0), None).kept) == [9]


def test_what_is_older_than_that_goes_whatever_the_clock_says():
    policy = Policy(last=1, age=4 * 3600.0)
    for ahead in (0, 3650 * DAY, -3650 * DAY):
        found = [at(n, epoch=1 + n // 4, created=NOW + ahead * (n // 4) + 3600.0 * n) for n in range(12)]
        gone = steps(decide(found, policy, None).gone)
        assert gone == sorted(range(len(gone)))
        assert 4 <= len(gone) <= 7
    apart = [at(n, epoch=n, created=NOW + 7 * DAY * n) for n in range(1, 20)]  # an epoch for each: they do go
    assert steps(decide(apart, policy, None).gone) == list(range(1, 11))


@pytest.mark.parametrize(("highest", "expected"), [(False, [3, 5, 8]), (True, [2, 6, 8])])
def test_the_best_by_a_metric(highest, expected):
    values = {1: 2.0, 2: 9.0, 3: 1.0, 4: math.nan, 5: 1.5, 6: 9.5, 7: math.inf}
    found = [at(step, metrics={"loss": value, "other": 0.0}) for step, value in values.items()] + [at(8)]
    policy = Policy(last=1, best=2, metric="loss", highest=highest)
    assert steps(decide(found, policy, NOW).kept) == expected


def test_what_has_no_value_is_not_among_the_best_and_of_equal_ones_the_newer_is():
    found = [at(1, metrics={"loss": -math.inf}), at(2), *(at(s, metrics={"loss": 1.0}) for s in (3, 4, 5))]
    assert [each.ref.step for each in best(found, Policy(best=2, metric="loss"))] == [5, 4]
    assert best(found, Policy(best=2, metric="accuracy")) == []


def test_what_is_pinned_or_in_use_stays():
    verdict = decide(run(5), Policy(last=1), NOW, pinned=[Ref(1, 100), Ref(9, 9)], needed=[Ref(1, 300)])
    assert verdict.kept[Ref(1, 100)] == ["pinned"]
    assert verdict.kept[Ref(1, 300)] == ["in use"]
    assert steps(verdict.gone) == [200, 400]


def test_what_is_referred_to_stays_with_what_that_refers_to():
    name = lambda step: Ref(1, step).name  # noqa: E731
    found = [
        at(1),
        at(2, refers=(name(1), name(2), "step-000000000099.e00001")),
        at(3),
        at(4, refers=(name(2),)),
        at(5),
    ]
    verdict = decide(found, Policy(last=2), NOW)
    assert steps(verdict.kept) == [1, 2, 4, 5]
    assert verdict.kept[Ref(1, 1)] == [f"{name(2)} needs files of it"]


def test_spans_are_said_as_they_are_set():
    assert [span(s) for s in (90, 600, 7200, 7 * DAY, 5400)] == ["90 s", "10 min", "2 h", "7 d", "90 min"]


REFS = st.builds(Ref, st.integers(1, 3), st.integers(0, 40))
POLICIES = st.builds(
    Policy, last=st.integers(0, 4), steps=st.integers(0, 12), seconds=st.sampled_from([0.0, 10.0, 100.0]),
    best=st.integers(0, 3), metric=st.sampled_from(["", "loss"]), highest=st.booleans(),
    age=st.sampled_from([0.0, 50.0]),
)  # fmt: skip


@st.composite
def whole_runs(draw):
    refs = draw(st.lists(REFS, unique=True, max_size=20))
    number = st.floats(allow_nan=True)
    return [
        Candidate(
            ref,
            draw(st.none() | st.floats(0, 1000)),
            draw(st.dictionaries(st.just("loss"), number)),
            tuple(other.name for other in draw(st.lists(st.sampled_from(refs), max_size=2))),
        )
        for ref in refs
    ]


@given(whole_runs(), POLICIES, st.floats(0, 1000), st.sets(REFS), st.sets(REFS))
def test_whatever_the_run_and_the_policy(found, policy, now, pinned, needed):
    verdict = decide(found, policy, now, pinned=pinned, needed=needed)
    refs = {each.ref for each in found}
    assert verdict.kept.keys() | set(verdict.gone) == refs
    assert len(verdict.kept) + len(verdict.gone) == len(refs)
    assert all(verdict.kept.values()), "whatever stays has a reason"
    if not policy.last:
        assert not verdict.gone
    assert refs & (pinned | needed) <= verdict.kept.keys()
    # the newest so many always stay, so that no more than the rest can go
    assert set(sorted(refs, reverse=True)[: max(policy.last, 1)]) <= verdict.kept.keys()
    by_name = {each.ref.name: each for each in found}
    for each in found:  # closed under references
        if each.ref in verdict.kept:
            assert {by_name[name].ref for name in each.refers} <= verdict.kept.keys()
    # nothing more goes when what has gone is not there any more
    left = [each for each in found if each.ref in verdict.kept]
    again = decide(left, policy, now, pinned=pinned, needed=needed)
    assert again.gone == []


@given(whole_runs(), POLICIES, st.floats(0, 1000))
def test_only_what_a_rule_or_a_reference_names_stays(found, policy, now):
    verdict = decide(found, policy, now)
    plain = [why for reasons in verdict.kept.values() for why in reasons if not why.endswith("needs files of it")]
    assert sum(why.startswith("among the last") for why in plain) <= policy.last
    assert sum(why.startswith(f"among the {policy.best} with") for why in plain) <= policy.best
    assert sum(why == NEWEST for why in plain) == bool(found)
