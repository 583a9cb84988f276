"""What `ckptsvc demo` says in the terminal, while it happens and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckptsvc.cli.demonstration.facts import Facts
from ckptsvc.cli.demonstration.report import seconds, times


class Story:
    """Tells what happens while it happens; says nothing when `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console

        self._console = Console(quiet=quiet, highlight=False)
        self._began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        """One line, with the time since the start in front."""
        from rich.markup import escape

        elapsed = f"{time.monotonic() - self._began:6.1f} s"
        line = f"[{style}]{escape(text)}[/]" if style else escape(text)
        self._console.print(f"[dim]{elapsed}[/]  {line}", soft_wrap=True)

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar over training steps; gives a function that takes the number of steps done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("          {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        silent = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=silent) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done)

    def tables(self, facts: Facts) -> None:
        """The checks and the times, at the end."""
        from rich.table import Table

        checks = Table("check", "", "numbers", title="Checks", title_justify="left")
        for check in facts.checks:
            word = "[green]passed[/]" if check.passed else "[bold red]FAILED[/]"
            checks.add_row(check.claim, word, check.detail)
        measured = Table("what", "time", title="Times", title_justify="left")
        for what, took in times(facts):
            measured.add_row(what, seconds(took))
        self._console.print(checks, measured, sep="\n")
