"""The fault matrix as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptsvc.cli.benchmarks.faults.outcome import Outcome, Row, median
from ckptsvc.cli.terminal import Screen, printable

_HEADER = ("fault", "seen", "named", "new process", "next step", "lost", "from", "runs", "bar", "")


def show(screen: Screen, facts: Mapping[str, str], rows: Sequence[Row], *, separate: bool, confirm: str) -> None:
    """Write everything: the machine, the table, torchrun's, and what was not as it should be."""
    for name, fact in facts.items():
        screen.line(f"{screen.paint(name.ljust(12), 'head')}{fact}")
    where = "network namespaces" if separate else "processes on one host: nothing was cut off from anything"
    screen.line(f"{screen.paint('nodes'.ljust(12), 'head')}{where}; health.confirm = {confirm}")
    screen.line()
    ran = [row for row in rows if row.outcomes]
    cells = [_cells(row) for row in ran]
    styles = {"met": "good", "not met": "bad"}
    screen.table(_HEADER, cells, style=lambda number, column: styles.get(cells[number][-1], "") if not column else "")
    _show_peer(screen, [row for row in ran if row.peer])
    screen.line()
    screen.line("seconds from the fault on, medians; where the job goes on, `next step` is its longest pause")
    for row in rows:
        if row.missing:
            screen.line(screen.paint(f"not run: {row.kind.what}: {row.missing}", "doubt"))
        for number, outcome in enumerate(row.outcomes, 1):
            if outcome.problem:
                said = f" ({printable(outcome.sentence)})" if outcome.sentence else ""
                screen.line(screen.paint(f"{row.kind.what}, run {number}: {outcome.problem}{said}", "bad"))


def _show_peer(screen: Screen, rows: Sequence[Row]) -> None:
    if not rows:
        return
    screen.line()
    lines = [
        (
            row.kind.what, *_times(row.outcomes), *_times(row.peer),
            next((o.problem for o in row.peer if o.problem), ""),
        )
        for row in rows
    ]  # fmt: skip
    header = ("fault", "ckptsvc: new process", "next step", "runs", "torchrun: new process", "next step ", "runs ", " ")
    screen.table(header, lines)


def _times(outcomes: Sequence[Outcome]) -> tuple[str, str, str]:
    good = [o for o in outcomes if not o.problem]
    return (_seconds(median(good, "process")), _seconds(median(good, "step")), f"{len(good)} of {len(outcomes)}")


def _cells(row: Row) -> tuple[str, ...]:
    good = row.good
    lost, named = median(good, "lost"), [o.named for o in row.outcomes]
    process, step, runs = _times(row.outcomes)
    return (
        row.kind.what,
        _seconds(median(good, "seen")),
        f"{named.count(True)} of {len(named)}",
        process,
        step,
        "" if lost is None else f"{lost:g}",
        ", ".join(dict.fromkeys(o.source for o in good if o.source)),
        runs,
        _bar(row),
        {True: "met", False: "not met", None: ""}[row.met()],
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _bar(row: Row) -> str:
    bars = row.kind.bars
    parts = (("seen", bars.seen), ("process +", bars.process), ("step", bars.step))
    return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None)
