"""What a report of an incident shows, in the order in which it matters.

Pure, and what both the text and the page are made of. Every text is cleaned here: it comes from a file, from logs and
from other processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ckptsvc.agent.incidents import moment
from ckptsvc.agent.logtail import clean, one_line
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

MAX_ROWS = 64
"""Rows of the table of ranks; ranks that look alike share one."""

LOG_LINES = 40
"""Lines of a log that are shown: the last."""

STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "blocked in the kernel",
    "I": "idle",
    "T": "stopped",
    "t": "held by a debugger",
    "Z": "ended, not waited for",
    "X": "gone",
}
"""Words for the states of /proc."""

COLUMNS = ("RANKS", "STEP", "PHASE", "QUIET FOR", "STATE", "CPU", "COLLECTIVES", "ANSWERS", "WAITS IN")


class Row(NamedTuple):
    """Ranks that look alike: cells in the order of COLUMNS, and whether the one to blame is among them."""

    cells: tuple[str, ...]
    blamed: bool


class Place(NamedTuple):
    """Ranks that are at the same place.

    Attributes:
        who: "rank 3", "ranks 0-2, 4".
        blamed: whether the rank that is to blame is among them.
        collective: what they wait in, "" if nothing or not the same.
        frames: the stack, innermost last; empty if nobody knows it.
        native: the native stack of one of them.
        others: the other threads of the one that is to blame.
    """

    who: str
    blamed: bool
    collective: str
    frames: list[str]
    native: list[str]
    others: list[str]


class View(NamedTuple):
    """A report.

    Attributes:
        sentence: who is to blame, why and how sure.
        facts: (name, value).
        signals, actions, nics: sentences.
        rows: the ranks, the one to blame first; `left_out` more rows are not shown.
        common: outer frames that all stacks share; they are left out of `places`.
        places: where the ranks are, the odd ones first.
        log: (who, last lines) of the rank to blame, or of the only one there is.
        unknown: remarks on single ranks, and what could not be found out.
    """

    sentence: str
    facts: list[tuple[str, str]]
    signals: list[str]
    actions: list[str]
    rows: list[Row]
    left_out: int
    common: list[str]
    places: list[Place]
    log: tuple[str, list[str]] | None
    nics: list[str]
    unknown: list[str]


def view(incident: pb.Incident, key: str = "") -> View:
    """The report of an incident, which people call `key`."""
    ranks = sorted(incident.ranks, key=lambda rank: (rank.rank != incident.rank, rank.rank))
    rows = _rows(ranks, incident.rank)
    places = _places(ranks, incident.rank)
    common = _common(places)
    return View(
        sentence=one_line(incident.sentence) or "Nobody could be named.",
        facts=list(_facts(incident, key)),
        signals=list(map(one_line, incident.signals)),
        actions=list(map(one_line, incident.actions)),
        rows=rows[:MAX_ROWS],
        left_out=max(len(rows) - MAX_ROWS, 0),
        common=common,
        places=[place._replace(frames=place.frames[len(common) :]) for place in places],
        log=_log(ranks, incident.rank),
        nics=list(map(one_line, incident.nics)),
        unknown=_unknown(incident),
    )


def together(numbers: Iterable[int]) -> str:
    """Ranks in few words: "rank 3", "ranks 0-2, 5"."""
    listed = spans(numbers)
    return f"rank {listed}" if listed.isdecimal() else f"ranks {listed}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers in few words: "0-2, 5"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def seconds(value: float) -> str:
    """A span of time for people."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def _facts(incident: pb.Incident, key: str) -> Iterable[tuple[str, str]]:
    if key:
        yield "incident", clean(key)
    yield "job", f"{one_line(incident.job)}, attempt {incident.attempt}, step {incident.step:,}"
    yield "kind", one_line(incident.kind)
    yield "to blame", f"rank {incident.rank}" if incident.rank >= 0 else "nobody could be named"
    if incident.node:
        yield "node", one_line(incident.node)
    yield "sure to", f"{100 * incident.confidence:.0f} %"
    opened = moment(incident.opened)
    yield "opened", f"{opened:%Y-%m-%d %H:%M:%S} UTC" if opened else "not known"
    yield "known after", f"{seconds(incident.detected)} from the last sign of life"


def _rows(ranks: Sequence[pb.RankEvidence], blamed: int) -> list[Row]:
    """One for all that differ in nothing but their clocks; of these, the largest values are shown."""
    alike: dict[tuple[object, ...], list[pb.RankEvidence]] = {}
    for rank in ranks:
        same = (rank.step, rank.phase, rank.state, rank.completed, rank.enqueued, rank.answers, rank.waits_in)
        alike.setdefault((rank.rank == blamed, *same), []).append(rank)
    return [_row(members, blamed) for members in alike.values()]


def _row(members: Sequence[pb.RankEvidence], blamed: int) -> Row:
    first = members[0]
    cells = (
        spans(rank.rank for rank in members),
        f"{first.step:,}",
        one_line(first.phase) or "-",
        seconds(max(rank.stalled for rank in members)),
        STATES.get(first.state, "not known"),
        "-" if first.state in ("X", "") else f"{100 * max(rank.cpu for rank in members):.0f} %",
        "-" if first.enqueued < 0 else f"{first.completed:,} of {first.enqueued:,}",
        "yes" if first.answers else "no",
        one_line(first.waits_in) or "-",
    )
    return Row(cells, first.rank == blamed)


def _places(ranks: Sequence[pb.RankEvidence], blamed: int) -> list[Place]:
    """Ranks with equal stacks together; the one to blame first, then the smaller groups: they differ from most."""
    groups: dict[str, list[pb.RankEvidence]] = {}
    for rank in ranks:
        groups.setdefault(clean(rank.stack), []).append(rank)
    places = []
    for stack, members in groups.items():
        numbers = [rank.rank for rank in members]
        collectives = {one_line(rank.collective) for rank in members}
        native = next((rank.native_stack for rank in members if rank.native_stack), "")
        others = next((rank.other_stacks for rank in members if rank.rank == blamed), "")
        place = Place(
            together(numbers), blamed in numbers, collectives.pop() if len(collectives) == 1 else "",
            _lines(stack), _lines(native), _lines(others),
        )  # fmt: skip
        places.append((not place.blamed, not stack, len(numbers), min(numbers), place))
    return [place for *_, place in sorted(places, key=lambda each: each[:4])]


def _common(places: Sequence[Place]) -> list[str]:
    """The outer frames that all known stacks begin with: they say nothing about what went wrong."""
    stacks = [place.frames for place in places if place.frames]
    if len(stacks) < 2:
        return []
    common = []
    for alike in zip(*(stack[:-1] for stack in stacks), strict=False):
        if len(set(alike)) > 1:
            break
        common.append(alike[0])
    return common


def _log(ranks: Sequence[pb.RankEvidence], blamed: int) -> tuple[str, list[str]] | None:
    for rank in ranks:
        if rank.log_tail and (rank.rank == blamed or len(ranks) == 1):
            return f"rank {rank.rank}", _lines(rank.log_tail)[-LOG_LINES:]
    return None


def _unknown(incident: pb.Incident) -> list[str]:
    said: dict[str, list[int]] = {}
    for rank in incident.ranks:
        for note in rank.notes:
            said.setdefault(one_line(note), []).append(rank.rank)
    return [*map(one_line, incident.notes), *(f"{together(ranks)}: {note}" for note, ranks in said.items())]


def _lines(text: str) -> list[str]:
    return clean(text).splitlines() if text else []
