"""The report of an incident as one HTML file, which needs no other file and no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources

import ckptsvc
from ckptsvc.agent.http.incident_view import COLUMNS, Place, Row, View, view
from ckptsvc.html import frame, policy
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


def page(incident: pb.Incident, key: str = "") -> str:
    """The whole page: inline styles, light and dark, nothing loaded from anywhere.

    Args:
        incident: what is known.
        key: what people call it.
    """
    report = view(incident, key)
    body = "\n".join(_body(report))
    return frame(report.sentence, _STYLE, f"<main>\n{body}\n</main>")


def _body(report: View) -> Iterator[str]:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts)
    yield f'<header><p class="kicker">incident</p><h1>{escape(report.sentence)}</h1><dl>{facts}</dl></header>'
    if report.signals:
        yield _section("What says so", _list("ul", report.signals))
    if report.actions:
        yield _section("What was done", _list("ol", report.actions))
    if report.rows:
        yield _section("What the ranks were doing", _table(report.rows, report.left_out))
        yield _section("Where they were", "".join(_places(report)))
    if report.log:
        who, lines = report.log
        yield _section(f"The last output of {who}", _pre(lines))
    if report.nics:
        yield _section("Network cards", _list("ul", report.nics))
    if report.unknown:
        yield _section("Remarks, and what could not be found out", _list("ul", report.unknown))
    yield f"<footer>Made by ckptsvc {escape(ckptsvc.__version__)}.</footer>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _list(kind: str, items: Iterable[str]) -> str:
    return f"<{kind}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</{kind}>"


def _pre(lines: Iterable[str]) -> str:
    return f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>'


def _table(rows: Sequence[Row], left_out: int) -> str:
    head = "".join(f'<th scope="col">{escape(name.lower())}</th>' for name in COLUMNS)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
        lines.append(f'<tr class="blamed">{cells}</tr>' if row.blamed else f"<tr>{cells}</tr>")
    more = f"<p>{left_out:,} more lines are in the JSON report.</p>" if left_out else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f"</div>{more}"
    )


def _places(report: View) -> Iterator[str]:
    if report.common:
        yield f"<details><summary>{len(report.common)} outer frames that all share</summary>"
        yield f"{_pre(report.common)}</details>"
    for place in report.places:
        kind = ' class="blamed"' if place.blamed else ""
        yield f"<article{kind}><h3>{escape(place.who)}{escape(_role(place))}</h3>"
        if place.collective:
            yield f"<p>waits in {escape(place.collective)}</p>"
        yield _pre(place.frames) if place.frames else "<p>Nobody could read their stacks.</p>"
        for title, lines in (("native stack", place.native), ("other threads", place.others)):
            if lines:
                yield f"<details><summary>{title}</summary>{_pre(lines)}</details>"
        yield "</article>"


def _role(place: Place) -> str:
    return " · to blame" if place.blamed else ""


_STYLE = resources.files(__package__).joinpath("incident_page.css").read_text("utf-8")
POLICY = policy(_STYLE)
"""The Content-Security-Policy that a server sends with it."""
