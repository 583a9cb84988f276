"""The findings of a benchmark as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from ckptsvc.cli.benchmarks.table import Row, Value
from ckptsvc.cli.terminal import Screen

_TITLES = {
    "save": "save: one checkpoint, nothing beside it",
    "restore": "restore: until the live state is filled",
    "reshard": "reshard: stored in one layout, wanted in another, all ranks together",
    "small": "small: very many small tensors",
    "overlap": "overlap: a save beside a compute loop",
}


def show(
    screen: Screen,
    facts: Mapping[str, str],
    rows: Sequence[Row],
    unavailable: Mapping[str, str],
    notes: Mapping[str, str],
    warm_up: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Write everything: the machine, a table for each workload, the peers, and what has to be known to judge it."""
    for name, fact in facts.items():
        screen.line(f"{screen.paint(name.ljust(12), 'head')}{fact}")
    for workload, some in groupby(rows, key=lambda row: row.workload):
        screen.line()
        screen.line(screen.paint(_TITLES[workload], "head"))
        _show_workload(screen, list(some))
        first = warm_up.get(workload, {}).get("ckptsvc", {}).get("blocked")
        if first is not None:
            screen.line(f"  the first save of the session, not counted above: blocked {first:.3f} s")
    screen.line()
    screen.line("numbers are medians (minimum - maximum); a ratio is of what was measured in the same repetition")
    for name, how in notes.items():
        screen.line(f"{name}: {how}")
    for name, why in unavailable.items():
        screen.line(screen.paint(f"not measured: {name}: {why}", "doubt"))


def _show_workload(screen: Screen, rows: Sequence[Row]) -> None:
    cells = [
        (
            f"{row.what} [{row.unit}]",
            _value(row.ours),
            f"{row.against} {_value(row.limit)}" if row.limit else row.missing,
            f"{_value(row.ratio)}x" if row.ratio else "",
            _bar(row),
            {True: "met", False: "not met", None: ""}[row.met],
        )
        for row in rows
    ]
    style = {"met": "good", "not met": "bad"}
    screen.table(
        ("measure", "ckptsvc", "against", "ratio", "bar", ""),
        cells,
        style=lambda number, column: style.get(cells[number][5], "") if column == "" else "",
        indent="  ",
    )
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    if peers:
        screen.line()
        lines = [
            (f"{row.what} [{row.unit}]", *(_value(row.peers[p]) if p in row.peers else "" for p in peers))
            for row in rows
            if row.peers
        ]
        screen.table(("the others", *peers), lines, indent="  ")


def _value(value: Value | None) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value.median) >= 100 else 1 if abs(value.median) >= 10 else 2 if abs(value.median) >= 1 else 3
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} - {value.high:.{digits}f})"


def _bar(row: Row) -> str:
    if row.bar is None:
        return ""
    if row.faster:
        return f">= {row.bar:g}x faster"
    return f"<= {row.bar:g}{'x' if row.against else f' {row.unit}'}"
