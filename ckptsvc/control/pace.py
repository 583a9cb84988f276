"""How often the agents of a large job speak, so that their coordinator has time for what matters."""

from __future__ import annotations

PROGRESS_EVERY = 0.25
"""Seconds between two reports of a node's progress, in a small job."""

PROGRESS_REPORTS = 1000.0
"""Reports of progress that a coordinator takes in a second: a tenth of a core (`ckptsvc bench control`)."""


STALL_REPORTS = 2000.0
"""Reports of stalled ranks in a second: when one rank hangs, all others soon stand still too."""

BRIEF_FROM = 64
"""Nodes from which on evidence is shortened: of 100,000 ranks, whole logs would be gigabytes."""


def progress_every(nodes: float) -> float:
    """Seconds between two reports of how far a node's ranks are, in a job of so many nodes.

    What is wanted is the newest step of any rank. Agents report at times of their own: in a large job somebody always
    just has, and the ranks of a job are hardly ever more than a step apart.
    """
    return max(PROGRESS_EVERY, nodes / PROGRESS_REPORTS)


def stalls_within(nodes: float) -> float:
    """Seconds over which the agents of so many nodes spread their reports of ranks that stand still.

    The first one has all nodes examined; an agent that sees why its rank does not move (it is stopped) does not wait.
    """
    return nodes / STALL_REPORTS
