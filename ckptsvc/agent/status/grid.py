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

from ckptsvc.agent.http.incident_view import spans
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


class Row(NamedTuple):
    """A node: its ranks, what most of them do, how far these are behind, and the others."""

    ranks: list[int]
    word: str
    behind: int
    odd: list[Cell]


def grid(job: Job, stalled: Iterable[int] = (), expected: Mapping[int, str] | None = None) -> dict[str, Any]:
    """The ranks of the job's attempt; of a hundred thousand that all do the same, in a twentieth of a second.

    Args:
        job: the job.
        stalled: ranks that are known to make no progress.
        expected: on which nodes ranks are to come that have not, where that is known.
    """
    nodes: dict[str, list[int]] = {}
    for rank, node in job.ranks.items():
        nodes.setdefault(node, []).append(rank)
    stuck, unreachable, missing = set(stalled), job.unreachable if job.away else set(), _missing(job, expected or {})
    uneven = {job.ranks[rank] for rank in stuck & job.ranks.keys()} | missing.keys()
    rows: dict[str, Row] = {}
    for node, ranks in nodes.items():
        ranks.sort()
        told = job.doing.get(node)
        if node not in uneven and told is not None and not told.behind and len(told.phases) < 2:
            word = "away" if node in unreachable else _word(told.phases[0]) if told.phases else "training"
            rows[node] = Row(ranks, word, max(job.highest - told.highest, 0), [])
        else:
            cells = _cells(ranks, "away" if node in unreachable else "", told, job.highest, stuck)
            rows[node] = _row(cells + missing.pop(node, []))
    for node, cells in missing.items():
        rows[node] = _row(cells)
    return {"front": job.highest, **_columns(rows)}


def _missing(job: Job, expected: Mapping[int, str]) -> dict[str, list[Cell]]:
    """Ranks that have ended, or have not come, by node."""
    found: dict[str, list[Cell]] = {}
    if len(job.ranks) < job.world_size:
        for rank in range(job.world_size):
            if rank not in job.ranks:
                node, died = job.ended.get(rank, ("", False))
                word = "dead" if died else "ended" if node else "waiting"
                found.setdefault(node or expected.get(rank, ""), []).append(Cell(rank, word, 0))
    return found


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


def _row(cells: list[Cell]) -> Row:
    cells.sort()
    (word, late), _ = Counter((cell.word, cell.behind) for cell in cells).most_common(1)[0]
    odd = [cell for cell in cells if (cell.word, cell.behind) != (word, late)]
    return Row([cell.rank for cell in cells], word, late, odd)


def _word(phase: str) -> str:
    return _PHASES.get(phase) or one_line(phase)[:MAX_PHASE] or "starting"


def _columns(rows: Mapping[str, Row]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for row in rows.values():
        counts[row.word] += len(row.ranks) - len(row.odd)
        counts.update(cell.word for cell in row.odd)
    words = [word for word in WORDS if counts[word]]
    words += sorted(word for word in counts if word not in WORDS)[:MAX_WORDS]
    index = {word: number for number, word in enumerate(words)}
    other = index.get("training", 0)  # of more phases than anybody needs
    order = sorted(rows, key=lambda node: (not node, rows[node].ranks[0]))
    odd = [cell for node in order[:MAX_NODES] for cell in rows[node].odd]
    odd.sort(key=lambda cell: (_urgency(cell.word), -cell.behind, cell.rank))
    listed = [rows[node] for node in order[:MAX_NODES]]
    return {
        "counts": {word: counts[word] for word in words},
        "words": words,
        "nodes": order[:MAX_NODES],
        "ranks": [_span(row.ranks) for row in listed],
        "state": [index.get(row.word, other) for row in listed],
        "behind": [row.behind for row in listed],
        "odd": [[cell.rank, index.get(cell.word, other), cell.behind] for cell in odd[:MAX_ODD]],
        "left_out": max(len(odd) - MAX_ODD, 0) + max(len(order) - MAX_NODES, 0),
    }


def _span(ranks: list[int]) -> str:
    if 1 < len(ranks) == ranks[-1] - ranks[0] + 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return spans(ranks)


def _urgency(word: str) -> int:
    return WORDS.index(word) if word in WORDS else len(WORDS)
