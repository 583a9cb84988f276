"""What `ckptsvc convert` says at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

from ckptsvc.cli.terminal import Screen, duration, emit, plural, printable, size
from ckptsvc.interop.conversion.convert import Conversion
from ckptsvc.interop.conversion.estimate import Estimate

_STYLE = {"lost": "doubt", "warning": "doubt", "repaired": "good"}


class Result(NamedTuple):
    """How a conversion went.

    Attributes:
        complete: the target is.
        resumed: bytes that an earlier try had made.
        seconds: how long it took.
    """

    complete: bool
    resumed: int
    seconds: float


def show(conversion: Conversion, result: Result, as_json: bool) -> None:
    """Say what was made."""
    name = conversion.ref.name if conversion.ref else None
    if as_json:
        emit(
            _head(conversion)
            | {
                "checkpoint": name,
                "step": conversion.logical.step,
                "files": len(conversion.output.files),
                "bytes": conversion.nbytes,
                "bytes_read": conversion.bytes_read,
                "resumed": result.resumed,
                "seconds": round(result.seconds, 3),
                "complete": result.complete,
                "notes": [note._asdict() for note in conversion.notes],
            }
        )
        return
    screen = Screen()
    where = f"{conversion.target.url}/{name}" if name else f"{conversion.format}:{conversion.target.url}"
    state = screen.paint("complete", "good") if result.complete else "this share is done, others are not"
    if conversion.complete:
        state = f"{screen.paint('complete', 'good')} already, nothing was done"
    screen.line(printable(f"{conversion.logical.origin} -> {where}"))
    made = f"{size(conversion.nbytes)} in {plural(len(conversion.output.files), 'file')}"
    before = f", of which {size(result.resumed)} were there" if result.resumed else ""
    screen.line(f"{state}: {made}{before}; {size(conversion.bytes_read)} read, {duration(result.seconds)}")
    _show_notes(screen, conversion)


def show_plan(conversion: Conversion, cost: Estimate, seconds: float | None, as_json: bool) -> None:
    """Say what it would cost."""
    if as_json:
        emit(
            _head(conversion)
            | {
                "files": cost.files,
                "bytes_needed": cost.needed,
                "bytes_read": cost.read,
                "bytes_written": cost.written,
                "amplification": round(cost.amplification, 4),
                "memory": cost.memory,
                "seconds": None if seconds is None else round(seconds, 3),
                "notes": [note._asdict() for note in conversion.notes],
            }
        )
        return
    screen = Screen()
    screen.line(printable(f"{conversion.logical.origin} -> {conversion.format}:{conversion.target.url}"))
    rows = [
        ("read", f"{size(cost.read)}, {cost.amplification:.3f} for every byte that is needed"),
        ("written", f"{size(cost.written)} in {plural(cost.files, 'file')}"),
        ("memory", f"{size(cost.memory)} at most, beside the program"),
        *([("time", f"{duration(seconds)} at these bandwidths")] if seconds is not None else []),
    ]
    for name, text in rows:
        screen.line(f"  {name:<8} {text}")
    _show_notes(screen, conversion)


def _head(conversion: Conversion) -> dict[str, Any]:
    return {"source": conversion.logical.origin, "target": conversion.target.url, "format": conversion.format}


def _show_notes(screen: Screen, conversion: Conversion) -> None:
    for note in conversion.notes:
        screen.line(f"{screen.paint(f'{note.kind}:', _STYLE.get(note.kind, ''))} {printable(note.what)}")
