"""The report of `ckptsvc demo`: facts in, one HTML file out, which needs no other file and no script."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources

from ckptsvc.cli.demonstration.chart import NARROW, WIDE, chart
from ckptsvc.cli.demonstration.facts import Facts, Incident, Save, deviation, short
from ckptsvc.html import frame

GLOSSARY = (
    ("rank", "One of the processes that train together, each with a part of the model."),
    ("node", "A machine. Here two agents on this machine play two nodes."),
    ("agent", "The service on every node that owns the snapshots, writes them and watches the ranks."),
    ("step", "One pass of the training over one batch: the unit in which training is counted."),
    (
        "loss",
        "How wrong the model still is. Two trainings with the same losses to the last bit are the same.",
    ),
    ("snapshot", "The state of a rank after a step, copied into shared memory while the training waits."),
    (
        "blocked",
        "How long the training waited for a snapshot. Everything after it happens beside the training.",
    ),
    ("durable", "Written to the store and synced, with the commit record last: it survives a power failure."),
    (
        "checkpoint",
        "The snapshots of all ranks after one step, committed together. It is complete or not there.",
    ),
    ("attempt", "One life of the job's ranks between restarts."),
    (
        "SIGKILL",
        "The way to end a process that it cannot notice, delay or clean up after: like pulling a plug.",
    ),
    ("control", "The same training without interruption and without ckptsvc, to compare with."),
    ("bit for bit", "Equal in every bit, not just nearly."),
    ("FSDP2", "PyTorch's way to spread weights and optimizer state over ranks (fully_shard)."),
    ("TP", "Tensor parallelism: ranks share the arithmetic of single layers, too."),
    (
        "layout",
        "Which rank holds which part of which tensor. A resume at another layout re-cuts all of them.",
    ),
)


def report(facts: Facts) -> str:
    """The whole page.

    Args:
        facts: see `ckptsvc.cli.demonstration.facts`; `facts.runs` starts with the control.

    Returns:
        An HTML document: inline styles and SVG, light and dark, no script, nothing loaded from anywhere.
    """
    colour = "good" if facts.passed else "bad"
    body = [
        f'<header class="{colour}"><p class="kicker">ckptsvc demo</p><h1>{escape(verdict(facts))}</h1>',
        f"<p>{escape(story(facts))}</p></header>",
        _tiles(facts),
        "<h2>Loss across the incidents</h2>",
        *(chart(facts, size) for size in (WIDE, NARROW)),
        _legend(facts),
        "<h2>What was checked</h2>",
        _checks(facts),
        "<h2>Times</h2>",
        _times(facts),
        "<h2>Checkpoints of the run</h2>",
        _checkpoints(facts.saves),
        "<h2>Where and how</h2>",
        _table(("", ""), ((escape(k), escape(v)) for k, v in facts.machine.items()), head=False),
        "<h2>Words</h2>",
        "<dl>" + "".join(f"<dt>{escape(w)}</dt><dd>{escape(m)}</dd>" for w, m in GLOSSARY) + "</dl>",
        f"<footer>Made by <code>ckptsvc demo</code>, {_when(facts.finished)}.</footer>",
    ]
    style = resources.files(__package__).joinpath("report.css").read_text()
    lines = "\n".join(body)
    return frame(verdict(facts), style, f"<main>\n{lines}\n</main>")


def verdict(facts: Facts) -> str:
    """One sentence: did it work?"""
    failed = [check for check in facts.checks if not check.passed]
    if failed:
        return f"{len(failed)} of {len(facts.checks)} checks failed: {failed[0].claim}"
    if not facts.checks:
        return "Nothing was checked"
    again = [i.stepping_after for i in facts.incidents if i.stepping_after is not None]
    if not again:
        return f"All {len(facts.checks)} checks passed"
    killed = "A rank was killed" if len(facts.incidents) == 1 else f"{len(facts.incidents)} ranks were killed"
    return f"{killed} in mid-training; {seconds(max(again))} later the job was stepping again. Nothing was lost"


def story(facts: Facts) -> str:
    """What happened, in a few sentences."""
    control = facts.runs[0]
    words = [f"A small GPT was trained for {len(control.losses)} steps ({control.layout})."]
    words += [_incident_sentence(incident) for incident in facts.incidents]
    branches = [run for run in facts.runs if run.role == "branch" and run.losses]
    if branches:
        start = min(branches[0].losses) - 1
        layouts = " and as ".join(branch.layout for branch in branches)
        apart = short(max(far for branch in branches for far in deviation(branch, control).values()))
        words.append(f"It was also resumed from its checkpoint of step {start} as {layouts}:")
        words.append(f"the losses stay within {apart} of the control's (relative).")
    return " ".join(words)


def _incident_sentence(incident: Incident) -> str:
    text = f"After step {incident.step}, rank {incident.rank} on {incident.node} was killed with SIGKILL"
    if incident.resumed_from is None:
        return text + "; the job did not come back."
    source = f" from {incident.source}" if incident.source else ""
    repeated = incident.repeated or 0
    again = "no step was done twice" if repeated == 0 else f"{count(repeated, 'step')} had to be done again"
    return f"{text}; the job went on{source} after step {incident.resumed_from}, so {again}."


def seconds(value: float | None) -> str:
    """A duration for people: `3.2 ms`, `1.24 s`, `2 min 5 s`; spaces do not break; a dash for None."""
    if value is None:
        return "–"
    if value < 0.00995:
        return f"{value * 1000:.1f}\N{NO-BREAK SPACE}ms"
    if value < 0.0995:
        return f"{value * 1000:.0f}\N{NO-BREAK SPACE}ms"
    if value < 99.95:
        return f"{value:.{2 if value < 9.995 else 1}f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}\N{NO-BREAK SPACE}min\N{NO-BREAK SPACE}{rest}\N{NO-BREAK SPACE}s"


def size(nbytes: float) -> str:
    """A number of bytes for people, in powers of 1000: `39.7 MB`."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            break
        if unit != "GB":
            nbytes /= 1000
    return f"{nbytes:.{0 if unit == 'B' or nbytes >= 99.95 else 1}f}\N{NO-BREAK SPACE}{unit}"


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tiles(facts: Facts) -> str:
    blocked = [save.blocked for save in facts.saves if save.blocked is not None]
    durable = [save.durable for save in facts.saves if save.durable is not None]
    control = facts.runs[0]
    apart = [far for r in facts.runs if r.role == "branch" for far in deviation(r, control).values()]
    tiles = [
        (seconds(statistics.median(blocked) if blocked else None), "training blocked per save"),
        (seconds(statistics.median(durable) if durable else None), "until a save was durable"),
        *((seconds(i.known_after), "from the kill until it was known") for i in facts.incidents),
        *((seconds(i.stepping_after), "from the kill until stepping again") for i in facts.incidents),
        (short(max(apart)) if apart else "–", "largest distance at another layout"),
        (f"{sum(c.passed for c in facts.checks)} of {len(facts.checks)}", "checks passed"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def _legend(facts: Facts) -> str:
    names = {"control": "control (wide grey line)", "first": "the run until the kill"}
    names |= {"again": "the run after its restart"}
    names |= {f"branch{n}": r.title for n, r in enumerate(r for r in facts.runs if r.role == "branch")}
    items = "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for kind, name in names.items())
    more = '<li><i class="kill"></i>rank killed</li><li><i class="back"></i>went on from here</li>'
    return f'<ul class="legend">{items}{more}</ul>'


def _checks(facts: Facts) -> str:
    def row(passed: bool, claim: str, detail: str) -> tuple[str, str]:
        word, kind = ("passed", "good") if passed else ("FAILED", "bad")
        return f'<span class="badge {kind}">{word}</span>', f"{escape(claim)}<small>{escape(detail)}</small>"

    rows = (row(check.passed, check.claim, check.detail) for check in facts.checks)
    return _table(("", "claim and numbers"), rows)


def _times(facts: Facts) -> str:
    return _table(("what", "time"), ((escape(what), seconds(took)) for what, took in times(facts)))


def times(facts: Facts) -> Iterator[tuple[str, float | None]]:
    """(what, seconds), None where it is not known."""
    for name, values in (
        ("training blocked per save", [s.blocked for s in facts.saves if s.blocked is not None]),
        ("save until durable", [s.durable for s in facts.saves if s.durable is not None]),
    ):
        if values:
            yield f"{name}, median of {len(values)}", statistics.median(values)
            yield f"{name}, longest", max(values)
    for incident in facts.incidents:
        yield f"rank {incident.rank} killed → known", incident.known_after
        if incident.known is not None and incident.stepping is not None:
            yield "known → first step done again", incident.stepping - incident.known
        yield f"rank {incident.rank} killed → first step done again", incident.stepping_after
    for run in facts.runs:
        if run.steps:
            yield (
                f"a step, {run.title}, median",
                statistics.median(s.seconds for s in run.steps),
            )
    for what, took in facts.phases:
        yield f"the demo: {what}", took


def _checkpoints(saves: Sequence[Save]) -> str:
    names = ("step", "attempt of the job", "size", "files", "blocked", "durable after")
    return _table(
        names,
        (
            (str(s.step), str(s.epoch), size(s.nbytes), str(s.shards), seconds(s.blocked), seconds(s.durable))
            for s in saves
        ),
        numbers=True,
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], *, head: bool = True, numbers: bool = False) -> str:
    """An HTML table; cells are HTML already."""
    top = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="scroll"><table{kind}>{f"<tr>{top}</tr>" if head else ""}{lines}</table></div>'


def _when(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")
