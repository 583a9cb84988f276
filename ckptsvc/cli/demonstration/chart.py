"""The picture in the report of `ckptsvc demo`: losses, how far from the control, who trained what.

Three panels over one axis of steps, as inline SVG that takes its colours from the page (CSS classes), drawn
once for wide and once for narrow screens so that letters keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ckptsvc.cli.demonstration.facts import TOLERANCE, Facts, Incident, Run, Step, deviation, short

LINE = 18
"""Height of a line of text, in the picture's units (CSS pixels at its natural size)."""

CONTROL = "control"
BRANCH_CLASSES = ("branch0", "branch1")
LOWEST, HIGHEST = -8.5, -4.5
"""Decimal logarithms between which distances are drawn; equal losses have a row of their own below."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One drawing: its width, the plot between `left` and `right`, every how many steps a mark fits in."""

    width: int
    left: int
    right: int
    loss_height: int
    dots: int
    name: str


WIDE = Frame(width=880, left=56, right=864, loss_height=300, dots=1, name="wide")
NARROW = Frame(width=360, left=40, right=352, loss_height=230, dots=2, name="narrow")

Scale = Callable[[float], float]


def chart(facts: Facts, frame: Frame) -> str:
    """One drawing of all runs, as an `<svg>` element; empty when nothing was trained."""
    control, *others = facts.runs
    last = max((step for run in facts.runs for step in run.losses), default=0)
    if not last:
        return ""
    x = _linear(0, last, frame.left, frame.right)
    marks_top, loss_top = 2, 2 + 2 * LINE + 10
    loss_bottom = loss_top + frame.loss_height
    apart_top = loss_bottom + 3 * LINE + 12
    apart_bottom = apart_top + 96
    lanes_top = apart_bottom + 3 * LINE + 6
    lanes = list(_lanes(facts.runs))
    lanes_bottom = lanes_top + len(lanes) * 2 * LINE
    parts = [
        *(mark for incident in facts.incidents for mark in _marks(incident, x, marks_top, lanes_bottom)),
        *_loss_panel(facts, control, others, x, loss_top, loss_bottom, frame),
        *_apart_panel(control, others, x, apart_top, apart_bottom, frame),
        *_lanes_panel(lanes, x, lanes_top, frame),
        *_step_axis(x, last, loss_bottom, frame),
        *_step_axis(x, last, apart_bottom, frame),
        *_step_axis(x, last, lanes_bottom + 4, frame),
    ]
    height = lanes_bottom + 2 * LINE
    label = "Training loss over steps for every run, its distance from the control, and the steps of each run"
    body = "\n".join(parts)
    return (
        f'<svg class="{frame.name}" viewBox="0 0 {frame.width} {height}" width="{frame.width}" '
        f'height="{height}" role="img" aria-label="{label}">\n{body}\n</svg>'
    )


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 2)


def _loss_panel(
    facts: Facts, control: Run, others: list[Run], x: Scale, top: int, bottom: int, frame: Frame
) -> Iterator[str]:
    values = [loss for run in facts.runs for loss in run.losses.values() if math.isfinite(loss)]
    ticks = _ticks(min(values, default=0.0), max(values, default=1.0), 5)
    y = _linear(ticks[0], ticks[-1], bottom, top)
    yield _text(4, top - 6, "loss", "axis title")
    for tick in ticks:
        yield _grid(frame, y(tick))
        yield _text(frame.left - 6, y(tick) + 4, f"{tick:g}", "axis end")
    yield _curve(((step, loss) for step, loss in control.losses.items()), x, y, CONTROL)
    for run in others:
        if run.role == "run":
            for number, steps in enumerate(run.attempts.values()):
                kind = "again" if number else "first"
                yield _curve(((s.step, s.loss) for s in steps), x, y, kind)
    branches = [run for run in others if run.role == "branch"]
    for number, run in enumerate(branches):
        for step, loss in run.losses.items():
            # Branches take turns, else the last one drawn would hide the others: they agree to seven digits.
            if math.isfinite(loss) and step % (len(branches) * frame.dots) == number * frame.dots:
                yield _dot(x(step), y(loss), number, f"{run.title}: step {step}, loss {loss:.6f}")
    for incident in facts.incidents:
        yield from _killed(incident, control, x, y)


def _killed(incident: Incident, control: Run, x: Scale, y: Scale) -> Iterator[str]:
    loss = control.losses.get(incident.step)
    if loss is not None:
        a, b = x(incident.step), y(loss)
        yield f'<path class="kill cross" d="M{a - 6} {b - 6}l12 12m0 -12l-12 12"/>'
    resumed = control.losses.get(incident.resumed_from or 0)
    if incident.resumed_from is not None and resumed is not None:
        yield f'<circle class="back ring" cx="{x(incident.resumed_from)}" cy="{y(resumed)}" r="7"/>'


def _apart_panel(control: Run, others: list[Run], x: Scale, top: int, bottom: int, frame: Frame) -> Iterator[str]:
    equal = bottom - 8
    y = _linear(LOWEST, HIGHEST, bottom - 26, top)
    yield _text(4, top - 22, "relative distance of the loss from the control", "axis title")
    for power in range(math.ceil(LOWEST), math.floor(HIGHEST) + 1, 1 if frame is WIDE else 2):
        yield _grid(frame, y(power))
        yield _text(frame.left - 6, y(power) + 4, f"1e{power}", "axis end")
    yield _text(frame.left - 6, equal + 4, "equal", "axis end")
    yield _grid(frame, equal)
    limit = y(math.log10(TOLERANCE))
    yield f'<line class="limit" x1="{frame.left}" x2="{frame.right}" y1="{limit}" y2="{limit}"/>'
    yield _text(frame.left + 4, limit - 5, f"tolerance {short(TOLERANCE)}", "limit-text")
    branches = [run for run in others if run.role == "branch"]
    for run in others:
        for step, far in deviation(run, control).items():
            height = y(min(max(math.log10(far), LOWEST), HIGHEST)) if far else equal
            words = f"{run.title}: step {step}, " + (f"{short(far)} apart" if far else "equal")
            if run.role == "run":
                yield _bar(x(step), height, words)
            else:
                yield _dot(x(step), height, branches.index(run), words)


def _lanes(runs: Sequence[Run]) -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """(label, CSS class, steps) of each attempt of each run."""
    branches = [run for run in runs if run.role == "branch"]
    for run in runs:
        for number, (attempt, steps) in enumerate(run.attempts.items()):
            label = f"{run.title}, attempt {attempt}" if len(run.attempts) > 1 else run.title
            if run.role == "branch":
                kind = BRANCH_CLASSES[branches.index(run) % len(BRANCH_CLASSES)]
            else:
                kind = CONTROL if run.role == "control" else ("again" if number else "first")
            yield label, kind, steps


def _lanes_panel(lanes: list[tuple[str, str, tuple[Step, ...]]], x: Scale, top: int, frame: Frame) -> Iterator[str]:
    yield _text(4, top - 16, "who trained which steps", "axis title")
    for number, (label, kind, steps) in enumerate(lanes):
        y = top + number * 2 * LINE
        yield _text(frame.left, y + 12, label, "lane")
        if steps:
            start, end = x(steps[0].step - 1), x(steps[-1].step)
            title = f"<title>{escape(label)}: steps {steps[0].step} to {steps[-1].step}</title>"
            size = f'x="{start}" y="{y + LINE}" width="{round(end - start, 2)}" height="10" rx="3"'
            yield f'<rect class="bar {kind}" {size}>{title}</rect>'


def _marks(incident: Incident, x: Scale, top: int, bottom: int) -> Iterator[str]:
    """Where a rank was killed and where the job went on, over all panels; the words stand above the curve."""
    at = x(incident.step)
    yield f'<line class="kill mark" x1="{at}" x2="{at}" y1="{top + LINE - 2}" y2="{bottom}"/>'
    yield _text(at + 6, top + 12, f"rank {incident.rank} killed", "kill-text")
    if incident.resumed_from is not None:
        back = x(incident.resumed_from)
        yield f'<line class="back mark" x1="{back}" x2="{back}" y1="{top + 2 * LINE - 2}" y2="{bottom}"/>'
        yield _text(back - 6, top + LINE + 10, f"goes on from step {incident.resumed_from}", "back-text end")


def _step_axis(x: Scale, last: int, y: float, frame: Frame) -> Iterator[str]:
    ticks = [tick for tick in _ticks(0, last, 8 if frame is WIDE else 5) if tick <= last]
    for tick in ticks[:-1]:
        yield _text(x(tick), y + 18, f"{tick:g}", "axis middle")
    yield _text(x(ticks[-1]) + 8, y + 18, f"step {ticks[-1]:g}", "axis end")


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that span `low` to `high`, about so many of them."""
    raw = max(high - low, 1e-9) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first, count = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, count + 1)]


def _grid(frame: Frame, y: float) -> str:
    return f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y}" y2="{y}"/>'


def _curve(points: Iterable[tuple[int, float]], x: Scale, y: Scale, kind: str) -> str:
    path = " ".join(f"{x(step)},{y(loss)}" for step, loss in points if math.isfinite(loss))
    return f'<polyline class="{kind}" points="{path}"/>'


def _dot(x: float, y: float, branch: int, words: str) -> str:
    """A mark of a branch: a circle for the first, a diamond for the second."""
    kind = BRANCH_CLASSES[branch % len(BRANCH_CLASSES)]
    title = f"<title>{escape(words)}</title>"
    if branch % 2:
        return f'<path class="dot {kind}" d="M{x} {round(y - 5, 2)}l5 5l-5 5l-5 -5z">{title}</path>'
    return f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="4">{title}</circle>'


def _bar(x: float, y: float, words: str) -> str:
    """A mark of the run: a short upright stroke."""
    title = f"<title>{escape(words)}</title>"
    return f'<line class="tick" x1="{x}" x2="{x}" y1="{y - 5}" y2="{y + 5}">{title}</line>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'
