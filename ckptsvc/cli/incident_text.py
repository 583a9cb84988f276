"""The report of an incident on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ckptsvc.agent.http.incident_view import COLUMNS, Place, View
from ckptsvc.cli.terminal import Screen

WIDTH = 100
"""Columns for sentences where the output is no terminal."""

_RIGHT = ("STEP", "QUIET FOR", "CPU")


def show(screen: Screen, report: View) -> None:
    """Write the report."""
    for line in wrapped(screen, report.sentence, ""):
        screen.line(screen.paint(line, "bad"))
    screen.line()
    most = max(len(name) for name, _ in report.facts)
    for name, value in report.facts:
        screen.line(f"  {name:<{most}}  {value}")
    _list(screen, "what says so", report.signals, "- ")
    _list(screen, "what was done", report.actions, "- ")
    if report.rows:
        _head(screen, "what the ranks were doing")
        rows = [row.cells for row in report.rows]
        screen.table(COLUMNS, rows, right=_RIGHT, fold="RANKS", indent="  ",
            style=lambda number, column: "bad" if report.rows[number].blamed and column == "RANKS" else "")  # fmt: skip
        if report.left_out:
            screen.line(f"  {report.left_out:,} more lines (--json shows them)")
        _head(screen, "where they were")
        if report.common:
            screen.line(screen.paint(f"  ({len(report.common)} outer frames that all share are left out)", "quiet"))
        for place in report.places:
            _place(screen, place)
    if report.log:
        who, lines = report.log
        _head(screen, f"the last output of {who}")
        for line in lines:
            screen.line(f"  {line}")
    _list(screen, "network cards", report.nics, "- ")
    _list(screen, "remarks, and what could not be found out", report.unknown, "- ")


def wrapped(screen: Screen, text: str, indent: str, mark: str = "") -> list[str]:
    """A sentence in lines that fit."""
    return textwrap.wrap(
        text,
        screen.width or WIDTH,
        initial_indent=indent + mark,
        subsequent_indent=indent + " " * len(mark),
        break_on_hyphens=False,
    )


def _head(screen: Screen, title: str) -> None:
    screen.line()
    screen.line(screen.paint(title, "head"))


def _list(screen: Screen, title: str, sentences: Iterable[str], mark: str) -> None:
    sentences = list(sentences)
    if sentences:
        _head(screen, title)
    for sentence in sentences:
        for line in wrapped(screen, sentence, "  ", mark):
            screen.line(line)


def _place(screen: Screen, place: Place) -> None:
    who = f"{place.who} (to blame)" if place.blamed else place.who
    where = f" in {place.collective}" if place.collective else ""
    screen.line(f"  {screen.paint(who, 'bad' if place.blamed else '')}{where}")
    for line in place.frames or ["nobody could read their stacks"]:
        screen.line(f"    {line}")
    for title, lines in (("native stack", place.native), ("other threads", place.others)):
        if lines:
            screen.line(screen.paint(f"    {title}", "quiet"))
        for line in lines:
            screen.line(f"      {line}")
