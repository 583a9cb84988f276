"""The nodes of a launched job: what is known of each, and which of them run the next attempt.

More nodes than the job may use wait as spares. A spare takes the place of a node that is gone, so that the other nodes
keep their ranks, and with them the snapshots in their memory.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ckptsvc.rpc.v1 import agent_pb2

SLOW = 10.0
"""A node is unfit whose way to the others is so many times slower than the median of theirs."""

FEWEST = 2
"""Others that must have been measured: of two nodes nobody can say which one is slow."""


@dataclass(slots=True, eq=False)
class Node:
    """One `ckptsvc run`.

    Attributes:
        wanted: the place its user gave it, -1: none.
        arrival: how many had come before it.
        doorbell: a port of its launcher that answers for as long as the launcher lives; 0: there is none.
        rung: whether it has been tried.
        bandwidth: bytes per second between it and the coordinator's node; 0: not known.
        ready: the attempt after which it is ready for the next, -1: not yet.
        port: where a rendezvous store could listen on it.
        start: the last order to start, to be repeated if it was lost.
        away_since: when its agent's connection ended; None: it is there.
        ring_at: when to look after its launcher again.
    """

    name: str
    wanted: int
    arrival: int
    address: str
    nproc: int
    doorbell: int = 0
    rung: bool = False
    bandwidth: float = 0.0
    ready: int = -1
    port: int = 0
    start: agent_pb2.StartRanks | None = None
    away_since: float | None = None
    ring_at: float = math.inf


def choose(
    nodes: Iterable[Node], least: int, most: int, excluded: Callable[[str], bool], places: Mapping[str, float]
) -> list[Node]:
    """The nodes of the next attempt, in order; fewer than `least` if there are no more.

    Those of the last attempt come first, then in the order their user gave, then as they came. An excluded node is
    taken only where there would be fewer than `least` without it: a job that can run at all does.

    Args:
        nodes: all that are there.
        least: how many the job needs.
        most: how many it can use.
        excluded: whether a node has failed too often.
        places: where each node stood in the last attempt, those that are gone too; smaller is further in front.
    """
    queue = sorted(nodes, key=lambda n: (excluded(n.name), n.name not in places, *_order(n)))
    good = sum(not excluded(node.name) for node in queue)
    chosen = queue[: min(most, max(good, least))]
    names = {node.name for node in chosen}
    vacant = sorted(place for name, place in places.items() if name not in names)
    behind = itertools.count(max(places.values(), default=-1.0) + 1.0)
    place: dict[str, float] = {}
    for node in chosen:
        place[node.name] = places[node.name] if node.name in places else vacant.pop(0) if vacant else next(behind)
    return sorted(chosen, key=lambda n: place[n.name])


def too_slow(nodes: Collection[Node]) -> dict[str, str]:
    """The nodes whose network makes them unfit, each with why, as a clause."""
    known = sorted(node.bandwidth for node in nodes if node.bandwidth)
    if len(known) <= FEWEST:
        return {}
    median = statistics.median(known[1:])  # that of the others: whichever slow one is left out, the middle is the same
    return {
        node.name: f"network: {node.bandwidth / 1e6:.1f} MB/s between it and the coordinator's node, where the median"
        f" of {len(known) - 1} others is {median / 1e6:.1f} MB/s"
        for node in nodes
        if 0 < node.bandwidth * SLOW < median
    }


def _order(node: Node) -> tuple[int, int, str]:
    return (node.wanted if node.wanted >= 0 else node.arrival, node.arrival, node.name)
