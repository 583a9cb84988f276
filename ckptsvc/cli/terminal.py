"""What a person sees: results on standard output, progress and messages on standard error.

Results look the same on a terminal, in a file and in a pipe, but for what helps on a terminal only: colours (unless
NO_COLOR is set) and long names folded to its width. Tables are our own: rich takes a second for a thousand rows.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from typing import Any, TextIO

import click

from ckptsvc.quantities import duration as duration
from ckptsvc.quantities import size as size

GAP = "  "
_MIN_FOLD = 16  # columns that a folded column has at least
_STYLES: Mapping[str, Mapping[str, Any]] = {
    "head": {"bold": True},
    "good": {"fg": "green"},
    "bad": {"fg": "red", "bold": True},
    "doubt": {"fg": "yellow"},
    "quiet": {"dim": True},
}


class Screen:
    """Standard output.

    Attributes:
        width: columns of the terminal; None where it is none, and nothing is ever folded.
        colour: whether to colour.
    """

    def __init__(self, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self._stream = stream or sys.stdout
        if isinstance(self._stream, TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")  # names that the locale cannot write
        terminal = self._stream.isatty()
        self.width = _columns(self._stream, environ) if terminal else None
        self.colour = terminal and wants_colour(environ)

    def line(self, text: str = "") -> None:
        """Write one line."""
        self._stream.write(text + "\n")

    def paint(self, text: str, style: str) -> str:
        """The text in a style ("head", "good", "bad", "doubt", "quiet", or "" for none)."""
        return click.style(text, **_STYLES[style]) if self.colour and style else text

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Collection[str] = (),
        fold: str = "",
        style: Callable[[int, str], str] | None = None,
        indent: str = "",
    ) -> None:
        """Write a table whose columns are as wide as they must be.

        Args:
            header: names of the columns.
            rows: cells, printable (see `printable`).
            right: names of the columns that are aligned to the right.
            fold: the column that is folded where the terminal is too narrow.
            style: (number of the row, name of the column) -> style.
            indent: before each line.
        """
        widths = [max([len(name), *(cells(row[i]) for row in rows)]) for i, name in enumerate(header)]
        folded = header.index(fold) if fold else -1
        if fold and self.width is not None:
            others = sum(widths) - widths[folded] + len(GAP) * (len(header) - 1) + len(indent)
            widths[folded] = min(widths[folded], max(self.width - others, _MIN_FOLD))
        titles = [_padded(name, name, w, name in right) for name, w in zip(header, widths, strict=True)]
        self.line(self.paint((indent + GAP.join(titles)).rstrip(), "head"))
        for number, row in enumerate(rows):
            pieces = fold_name(row[folded], widths[folded]) if folded >= 0 else [""]
            for at, piece in enumerate(pieces):
                texts = [piece if i == folded else ("" if at else text) for i, text in enumerate(row)]
                line = [
                    _padded(text, self.paint(text, style(number, name)) if style and text else text, w, name in right)
                    for text, w, name in zip(texts, widths, header, strict=True)
                ]
                self.line((indent + GAP.join(line)).rstrip())


def wants_colour(environ: Mapping[str, str]) -> bool:
    """Whether a terminal gets colours: https://no-color.org."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """A message for the person, on standard error."""
    sys.stdout.flush()  # so that it comes after the results it is about
    click.echo(text, err=True)


def emit(document: Mapping[str, Any]) -> None:
    """The result as one line of JSON; numbers in it are finite."""
    click.echo(json.dumps(document, allow_nan=False))


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on standard error while the block runs; nothing where that is no terminal.

    Yields:
        what to call, from any thread, with the bytes dealt with since the last call.
    """
    if not total or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        """Bytes per second in the units that sizes have."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{size(speed)}/s" if speed else "")

    console = Console(stderr=True, color_system="auto" if wants_colour(os.environ) else None)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        Speed(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def printable(text: str) -> str:
    """The text with everything escaped that a terminal could take for a command: it comes from a file."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and "..." where it has more than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def cells(text: str) -> int:
    """Columns that a printable text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fold_name(name: str, width: int) -> list[str]:
    """A text in pieces of at most `width` columns, cut after a space, or "/" or ".", where that is not too early."""
    pieces = []
    while cells(name) > width:
        cut = width
        while cells(name[:cut]) > width:
            cut -= 1
        space = name.rfind(" ", 0, cut + 1) + 1
        nice = space if space > cut // 2 else max(name.rfind("/", 0, cut), name.rfind(".", 0, cut)) + 1
        cut = nice if nice > cut // 2 else cut
        pieces.append(name[:cut].rstrip())
        name = "  " + name[cut:]
    return [*pieces, name]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names as people count: layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def plural(count: int, noun: str) -> str:
    """A number of things: "1 shard", "3,000 shards"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def age(then: datetime | None) -> str:
    """How long ago that was, for people; "?" if it is not known."""
    return duration((datetime.now(UTC) - then).total_seconds()) if then else "?"


def _padded(text: str, painted: str, width: int, right: bool) -> str:
    space = " " * (width - cells(text))
    return space + painted if right else painted + space


def _columns(stream: TextIO, environ: Mapping[str, str]) -> int:
    given = environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
