from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.control.runs import MOST_RANKS, ranks_of, runs_of
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


@given(st.sets(st.integers(0, 1 << 20)))
def test_all_ranks_come_back_in_order(ranks):
    assert ranks_of(runs_of(sorted(ranks))) == sorted(ranks)


def test_ranks_at_equal_distances_are_one_run():
    assert runs_of(range(100_000)) == [pb.RankRun(first=0, count=100_000, step=1)]
    assert runs_of(range(5, 100_000, 12)) == [pb.RankRun(first=5, count=8333, step=12)]
    assert runs_of([7]) == [pb.RankRun(first=7, count=1, step=1)]


def test_a_run_that_no_job_has_is_cut():
    assert len(ranks_of([pb.RankRun(first=0, count=(1 << 31) - 1, step=1), pb.RankRun(first=0, count=9)])) == MOST_RANKS
    assert ranks_of([pb.RankRun(first=3, count=-1, step=1), pb.RankRun(first=4, count=2, step=-7)]) == [4, 5]
