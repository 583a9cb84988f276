"""What may be removed from a local disk."""

import random

import pytest

from ckptsvc.control.room import Kept, Stage, expendable

PENDING, LOCAL, COMMITTED = Stage.PENDING, Stage.LOCAL, Stage.COMMITTED


def kept(*stages: Stage) -> list[Kept]:
    """Snapshots of steps 1, 2, ... of 10 bytes each."""
    return [Kept((1, step), stage, 10) for step, stage in enumerate(stages, 1)]


def whole(*steps: int) -> set[tuple[int, int]]:
    return {(1, step) for step in steps}


@pytest.mark.parametrize(
    ("stages", "complete", "keep", "over", "gone"),
    [
        ((COMMITTED, COMMITTED, COMMITTED), (1, 2, 3), 2, 0, [1]),
        ((COMMITTED, COMMITTED, COMMITTED), (1, 2, 3), 1, 0, [1, 2]),
        ((LOCAL, LOCAL, LOCAL), (1, 2, 3), 2, 0, [1]),
        ((LOCAL, LOCAL, LOCAL), (), 2, 0, []),  # nobody knows that they are whole: none of them is known to be newer
        ((LOCAL, LOCAL, PENDING), (2, 3), 1, 0, [1, 2]),
        ((PENDING, PENDING, PENDING), (1, 2, 3), 1, 100, []),
        ((LOCAL,), (1,), 1, 100, []),  # the last good one
        ((COMMITTED,), (1,), 1, 10, [1]),  # it is in the durable store
        ((LOCAL, COMMITTED), (1, 2), 2, 5, [1]),
        ((LOCAL, COMMITTED), (1, 2), 2, 15, [1, 2]),
        ((LOCAL, LOCAL), (1, 2), 2, 100, [1]),
    ],
)
def test_what_goes(stages: tuple[Stage, ...], complete: tuple[int, ...], keep: int, over: int, gone: list[int]) -> None:
    assert expendable(kept(*stages), whole(*complete), keep, over) == [(1, step) for step in gone]


def test_what_is_read_stays() -> None:
    both = [Kept((1, 1), COMMITTED, 10, in_use=True), Kept((1, 2), COMMITTED, 10)]
    assert expendable(both, whole(1, 2), 1, 100) == [(1, 2)]


def test_the_last_good_one_is_never_lost() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        all_kept = [
            Kept((rng.randint(1, 2), step), rng.choice(list(Stage)), rng.randint(1, 50), rng.random() < 0.1)
            for step in rng.sample(range(20), rng.randint(0, 8))
        ]
        complete = {k.key for k in all_kept if rng.random() < 0.7}
        gone = expendable(all_kept, complete, rng.randint(1, 4), rng.choice([0, 0, 20, 1000]))
        stages = {k.key: k for k in all_kept}
        left = stages.keys() - set(gone)
        assert all(stages[key].stage is not PENDING and not stages[key].in_use for key in gone)
        good = {k.key for k in all_kept if k.key in complete or k.stage is COMMITTED}
        if good:  # the newest that is whole somewhere is there yet, or in the durable store
            newest = max(good)
            assert newest in left or stages[newest].stage is COMMITTED
