"""Who keeps the others waiting, by what the flight recorders say."""

from ckptsvc.control.collectives import odd_ones
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

ALL_REDUCE = "all_reduce of [4] float32 in group default (gloo)"


def rank(number: int, **groups: tuple[int, int, str]) -> pb.RankEvidence:
    return pb.RankEvidence(
        rank=number,
        groups=[
            pb.GroupProgress(group=name, enqueued=enqueued, completed=completed, collective=collective)
            for name, (enqueued, completed, collective) in groups.items()
        ],
    )


def waits(number: int, last: int = 6, collective: str = ALL_REDUCE) -> pb.RankEvidence:
    return rank(number, default=(last, last - 1, collective))


def test_a_rank_that_has_not_come_is_named_with_the_collective_it_is_missed_in() -> None:
    (odd,) = odd_ones([waits(0), rank(1, default=(5, 5, "")), waits(2), waits(3), waits(4)])
    assert (odd.rank, odd.lacks) == (1, 1)
    assert odd.reason == f"it has not started collective 6, {ALL_REDUCE}, in which ranks 0, 2, 3 and 1 more wait"


def test_the_one_that_lacks_most_comes_first() -> None:
    found = odd_ones([rank(0, default=(3, 3, "")), waits(1), rank(2, default=(5, 5, ""))])
    assert [(odd.rank, odd.lacks) for odd in found] == [(0, 3), (2, 1)]
    assert found[0].reason == f"it has not started collective 4, and rank 1 waits in {ALL_REDUCE} (collective 6)"


def test_nobody_is_odd_where_all_wait_or_none_does_or_nothing_is_known() -> None:
    assert odd_ones([waits(0), waits(1)]) == []
    assert odd_ones([rank(0, default=(5, 5, "")), rank(1, default=(4, 4, ""))]) == []  # both compute
    assert odd_ones([waits(0), rank(1)]) == []
    assert odd_ones([]) == []


def test_numbers_of_different_groups_are_not_compared() -> None:
    assert odd_ones([waits(0, 5), rank(1, default=(-1, -1, "recv"))]) == []
    assert odd_ones([waits(0, 600), rank(1, default=(600, 599, ALL_REDUCE), small=(1, 1, ""))]) == []


def test_a_rank_that_waits_itself_is_not_to_blame() -> None:
    """0 waits for 1 in `rows`, 1 waits for 2 in `columns`, 2 has not come."""
    ranks = [
        rank(0, rows=(9, 8, "all_gather in group rows")),
        rank(1, rows=(8, 8, ""), columns=(4, 3, "reduce_scatter in group columns")),
        rank(2, columns=(3, 3, "")),
    ]
    assert [odd.rank for odd in odd_ones(ranks)] == [2]


def test_a_cycle_of_waiting_ranks_names_them_all() -> None:
    ranks = [
        rank(0, a=(2, 1, "all_reduce in group a"), b=(7, 7, "")),
        rank(1, a=(1, 1, ""), b=(8, 7, "all_reduce in group b")),
    ]
    assert [odd.rank for odd in odd_ones(ranks)] == [0, 1]


def test_another_collective_under_the_same_number() -> None:
    (odd,) = odd_ones([waits(0), waits(1), waits(2, collective="broadcast of [4] float32 in group default (gloo)")])
    assert (odd.rank, odd.lacks) == (2, 0)
    assert odd.reason == (
        "it is in broadcast of [4] float32 in group default (gloo), while ranks 0, 1 wait in"
        f" {ALL_REDUCE}, under the same number"
    )
    halves = odd_ones([waits(0), waits(1, collective="barrier in group default (gloo)")])
    assert [odd.rank for odd in halves] == [0, 1]


def test_sizes_may_differ_only_where_ranks_may_bring_different_ones() -> None:
    assert odd_ones([waits(r, collective=f"all_to_all of [{r}] float32 in group g") for r in range(3)]) == []
    ranks = [waits(r, collective=f"all_reduce of [{r // 2}] float32 in group g") for r in range(3)]
    assert [odd.rank for odd in odd_ones(ranks)] == [2]
