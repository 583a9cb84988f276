"""Sets of ranks as runs: of 100,000 ranks that hold the same, every agent hears in a few bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptsvc.rpc.bounds import MOST_RANKS
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


def runs_of(ranks: Sequence[int]) -> list[pb.RankRun]:
    """Ascending ranks as runs with equal distances, each as long as it gets."""
    runs, at = [], 0
    while at < len(ranks):
        step = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 1
        end = at + 1
        while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
            end += 1
        runs.append(pb.RankRun(first=ranks[at], count=end - at, step=step))
        at = end
    return runs


def ranks_of(runs: Iterable[pb.RankRun]) -> list[int]:
    """The ranks of such runs; those beyond a number that no job has are left out."""
    ranks: list[int] = []
    for run in runs:
        step, count = max(run.step, 1), min(run.count, MOST_RANKS - len(ranks))
        ranks += range(run.first, run.first + step * count, step)
    return ranks
