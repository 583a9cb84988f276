"""What each user of a node may take of it, where one service serves several."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """What there is to divide, and what one user may have at most.

    Attributes:
        memory: bytes for the arenas of all.
        user_memory: bytes for those of one.
        write_rate: bytes per second that all may write; 0: no limit.
        jobs, ranks: of one user.
        local: bytes that the snapshots of all may take on the local disk; 0: no limit.
    """

    memory: int
    user_memory: int
    write_rate: int
    jobs: int
    ranks: int
    local: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """One user's part; the fields of Node, for him alone."""

    memory: int
    write_rate: int
    jobs: int
    ranks: int
    local: int = 0


def share_of(node: Node, users: int) -> Share:
    """The part of each user, where so many have something to do; an idle one gets what it would get as another one.

    Memory: no more than one user may take, nor than an even part, which is what he gets of the local disk. Who holds
    more than that when another comes keeps it, and gets nothing new until he is below.
    """
    users = max(users, 1)
    memory = min(node.user_memory, node.memory // users)
    rate = max(node.write_rate // users, 1) if node.write_rate else 0
    local = max(node.local // users, 1) if node.local else 0
    return Share(memory, rate, node.jobs, node.ranks, local)
