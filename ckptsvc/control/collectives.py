"""Who keeps the others waiting: what the ranks' flight recorders say when they are put side by side.

The collectives of one process group are numbered alike on all its ranks. A rank that has not started the one that
others wait in is late; one that has started another under the same number has gone another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ckptsvc.rpc.v1 import coordinator_pb2 as pb

_SAME_SIZES = ("all_reduce", "broadcast", "reduce")
"""Operations for which every rank must bring the same sizes."""

_NAMED = 3

_KINDS = 16
"""Different collectives under one number beyond which no more ranks are named."""


@dataclass(frozen=True, slots=True)
class Odd:
    """A rank that does not do what the others do.

    Attributes:
        rank: which.
        lacks: collectives of the group by which it is behind; 0: it is in another one than the others.
        reason: for a person.
    """

    rank: int
    lacks: int
    reason: str


def odd_ones(ranks: Iterable[pb.RankEvidence]) -> list[Odd]:
    """Ranks that others wait for, those that lack most first; none where all wait alike, or nothing is recorded.

    A rank that could not be asked is not among them: nothing is known of its collectives.
    """
    groups: dict[str, dict[int, pb.GroupProgress]] = {}
    for evidence in ranks:
        for group in evidence.groups:
            if group.enqueued >= 0:  # else it has only sent and received there
                groups.setdefault(group.group, {})[evidence.rank] = group
    found: dict[int, Odd] = {}
    for members in groups.values():
        for odd in (*_late(members), *_astray(members)):
            if odd.rank not in found or found[odd.rank].lacks < odd.lacks:
                found[odd.rank] = odd
    # A rank that itself waits, in another group, for one that is late is not to blame.
    waiting = {rank for members in groups.values() for rank, group in members.items() if group.collective}
    idle = [odd for odd in found.values() if odd.rank not in waiting or odd.lacks == 0]
    return sorted(idle or found.values(), key=lambda odd: (-odd.lacks, odd.rank))


def _late(members: dict[int, pb.GroupProgress]) -> Iterable[Odd]:
    last = max(group.enqueued for group in members.values())
    waiting = {rank: group for rank, group in members.items() if group.enqueued == last and group.collective}
    if not waiting:
        return
    collective, listed = next(iter(waiting.values())).collective, _listed(waiting)
    for rank, group in members.items():
        lacks = last - group.enqueued
        if lacks == 1:
            yield Odd(rank, 1, f"it has not started collective {last}, {collective}, in which {listed}")
        elif lacks > 1:
            what = f"it has not started collective {group.enqueued + 1}, and {listed} in {collective}"
            yield Odd(rank, lacks, f"{what} (collective {last})")


def _astray(members: dict[int, pb.GroupProgress]) -> Iterable[Odd]:
    """Ranks in another collective than most, under the same number."""
    pending = {rank: group for rank, group in members.items() if group.collective}
    numbers = {group.completed for group in pending.values()}
    kinds = Counter(_kind(group.collective) for group in pending.values())
    if len(numbers) != 1 or len(kinds) < 2:
        return
    (most, count), (_, second) = kinds.most_common(2)
    others: dict[str, str] = {}
    for kind in kinds:
        those = {r: g for r, g in pending.items() if _kind(g.collective) != kind}
        others[kind] = f"{_listed(those)} in {next(iter(those.values())).collective}"
        if len(others) == _KINDS:
            break
    for rank, group in pending.items():
        kind = _kind(group.collective)
        # Of two halves, neither is known to be right.
        if (kind != most or count == second) and kind in others:
            yield Odd(rank, 0, f"it is in {group.collective}, while {others[kind]}, under the same number")


def _kind(collective: str) -> str:
    operation = collective.partition(" ")[0]
    return collective if operation in _SAME_SIZES else operation


def _listed(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    shown = ", ".join(map(str, numbers[:_NAMED]))
    if len(numbers) == 1:
        return f"rank {shown} waits"
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"ranks {shown}{more} wait"
