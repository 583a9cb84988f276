"""The ranks of a job, node by node, small enough to be sent every second: columns, and what differs from them.

    {"front": the newest step of any rank, "counts": {word: ranks}, "words": [word, ...],
     "nodes": [name, ...], "ranks": ["0-7", ...], "state": [index of a word, ...], "behind": [steps, ...],
     "odd": [[rank, index of a word, steps behind], ...], "left_out": odd ranks and nodes that are not listed}

A node's columns say what most of its ranks do and how far they are behind the front; "odd" are the ranks that differ,
those in trouble first. The last node may be "": ranks that have not come yet. Words are those of `WORDS`, or phases
that the program has declared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ckptsvc.agent.incident_view import spans
from ckptsvc.agent.logtail import one_line
from ckptsvc.control.membership import Job
from ckptsvc.control.stalls import STEP
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

WORDS = ("dead", "stalled", "away", "waiting", "restoring", "starting", "saving", "training", "ended")
"""What a rank is or does, the most urgent first. "away": its agent is out of reach, nothing is known of it."""

MAX_NODES, MAX_ODD, MAX_WORDS, MAX_PHASE = 16384, 1024, 32, 32

_PHASES = {STEP: "training", "save": "saving", "restore": "restoring", "attach": "starting", "first step": "starting"}


class Cell(NamedTuple):
    """A rank."""

    rank: int
    word: str
    behind: int


def grid(job: Job, stalled: Iterable[int] = (), expected: Mapping[int, str] | None = None) -> dict[str, Any]:
    """The ranks of the job's attempt.

    Args:
        job: the job.
        stalled: ranks that are known to make no progress.
        expected: on which nodes ranks are to come that have not, where that is known.
    """
    nodes: dict[str, list[int]] = {}
    for rank, node in job.ranks.items():
        nodes.setdefault(node, []).append(rank)
    stuck, unreachable, front = set(stalled), job.unreachable, job.highest
    cells = {
        node: _cells(sorted(ranks), "away" if node in unreachable else "", job.doing.get(node), front, stuck)
        for node, ranks in nodes.items()
    }
    if len(job.ranks) < job.world_size:
        for rank in range(job.world_size):
            if rank not in job.ranks:
                node, died = job.ended.get(rank, ("", False))
                word = "dead" if died else "ended" if node else "waiting"
                cells.setdefault(node or (expected or {}).get(rank, ""), []).append(Cell(rank, word, 0))
    return _columns(cells, front)


def _cells(ranks: list[int], known: str, told: pb.Progressed | None, front: int, stuck: set[int]) -> list[Cell]:
    if told is None:
        return [Cell(rank, "stalled" if rank in stuck else known or "starting", 0) for rank in ranks]
    lag = max(front - told.highest, 0)
    behind = told.behind if len(told.behind) == len(ranks) else [0] * len(ranks)
    phases = [_word(phase) for phase in told.phases] or ["training"]
    if len(phases) != len(ranks):
        phases = phases[:1] * len(ranks)
    return [
        Cell(rank, "stalled" if rank in stuck else known or word, lag + late)
        for rank, late, word in zip(ranks, behind, phases, strict=True)
    ]


def _word(phase: str) -> str:
    return _PHASES.get(phase) or one_line(phase)[:MAX_PHASE] or "starting"


def _columns(cells: Mapping[str, list[Cell]], front: int) -> dict[str, Any]:
    counts = Counter(cell.word for own in cells.values() for cell in own)
    words = [word for word in WORDS if counts[word]]
    words += sorted(counts.keys() - set(WORDS))[:MAX_WORDS]
    index = {word: number for number, word in enumerate(words)}
    other = index.get("training", 0)  # of more phases than anybody needs
    order = sorted(cells, key=lambda node: (not node, cells[node][0].rank))
    names, ranks, state, behind, odd = [], [], [], [], []
    for node in order[:MAX_NODES]:
        own = cells[node]
        (word, late), _ = Counter((cell.word, cell.behind) for cell in own).most_common(1)[0]
        names.append(node)
        ranks.append(spans(cell.rank for cell in own))
        state.append(index.get(word, other))
        behind.append(late)
        odd += [cell for cell in own if (cell.word, cell.behind) != (word, late)]
    odd.sort(key=lambda cell: (_urgency(cell.word), -cell.behind, cell.rank))
    return {
        "front": front,
        "counts": {word: counts[word] for word in words},
        "words": words,
        "nodes": names,
        "ranks": ranks,
        "state": state,
        "behind": behind,
        "odd": [[cell.rank, index.get(cell.word, other), cell.behind] for cell in odd[:MAX_ODD]],
        "left_out": max(len(odd) - MAX_ODD, 0) + max(len(order) - MAX_NODES, 0),
    }


def _urgency(word: str) -> int:
    return WORDS.index(word) if word in WORDS else len(WORDS)
