"""Which nodes protect each other: groups of a few, whose members fail apart from each other as far as that can be had.

A failure domain is a word: nodes with the same one (a chassis, a switch, a zone) may go at the same moment. A node
whose domain nobody knows, "", is one of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

Groups = list[list[str]]
"""Every node is in one group; the order within a group counts."""


def group(domains: Mapping[str, str], size: int, before: Sequence[Sequence[str]] = ()) -> Groups:
    """Divide nodes into groups of at least `size`: nodes that are left over are dealt out. Fewer nodes are one group.

    As few nodes as possible of one domain are in one group: none share it while the domain has no more nodes than there
    are groups. Groups stay as they were while nodes that have come fill the places of those that have gone, so that
    these need not begin anew; otherwise all are made anew, always in the same way.

    Args:
        domains: the nodes, and the failure domain of each.
        size: the fewest nodes in a group, at least 2.
        before: the groups as they were.
    """
    fresh = _divided(domains, size)
    kept = [[node for node in members if node in domains] for members in before]
    known = {node for members in kept for node in members}
    for node in sorted(domains.keys() - known):
        lacking = [members for members, was in zip(kept, before, strict=True) if len(members) < len(was)]
        if not lacking:
            return fresh
        alike = [sum(_same(domains, node, other) for other in members) for members in lacking]
        lacking[alike.index(min(alike))].append(node)
    whole = bool(kept) and all(len(members) == len(was) for members, was in zip(kept, before, strict=True))
    return kept if whole and _worst(kept, domains) <= _worst(fresh, domains) else fresh


def _divided(domains: Mapping[str, str], size: int) -> Groups:
    """Nodes of one domain stand together in a row, and are dealt out to the groups one after the other."""
    count = max(len(domains) // size, 1)
    sizes = Counter(domain for domain in domains.values() if domain)

    def place(node: str) -> tuple[int, str, str]:
        return (-sizes[domains[node]], domains[node], node)

    row = sorted(domains, key=place)
    return [row[first::count] for first in range(count)] if row else []


def _worst(groups: Groups, domains: Mapping[str, str]) -> int:
    """The most nodes of one domain that are in one group."""
    counts = (Counter(domains[node] for node in members if domains[node]) for members in groups)
    return max((max(count.values(), default=1) for count in counts), default=1)


def _same(domains: Mapping[str, str], one: str, other: str) -> bool:
    return bool(domains[one]) and domains[one] == domains[other]
