"""What retention would keep and delete in a run, and why, as a person and a program read it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import click

from ckptsvc.cli.terminal import Screen, age, plural, printable, size
from ckptsvc.config import load
from ckptsvc.errors import ConfigError
from ckptsvc.format.commit import CommitRecord
from ckptsvc.pipeline.catalog import Ref, find, written_bytes
from ckptsvc.pipeline.retain import judge
from ckptsvc.pipeline.retention import Policy, Verdict, policy_of
from ckptsvc.quantities import when
from ckptsvc.storage import Store

_FLAGS = {
    "keep": "save.keep",
    "every": "retention.every",
    "best": "retention.best",
    "metric": "retention.metric",
    "order": "retention.order",
    "age": "retention.age",
    "rate": "retention.rate",
}


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each rule; what is not given is taken from the settings."""
    for decorate in (
        click.option("--rate", metavar="N", help="Delete at most N objects in a second; 0: no limit."),
        click.option("--age", metavar="TIME", help="Keep those that are younger."),
        click.option("--order", type=click.Choice(["lowest", "highest"]), help="Which values are the best."),
        click.option("--metric", metavar="NAME", help="By which metric."),
        click.option("--best", metavar="N", help="Keep the N best."),
        click.option("--every", metavar="STEPS|TIME", help="Keep one for each so many steps, or so much time."),
        click.option("--keep", metavar="N", help="Keep the newest N; 0: all."),
    ):
        command = decorate(command)
    return command


def policy(given: dict[str, str | None]) -> Policy:
    """The policy of the settings, with the options that were given.

    Raises:
        ConfigError: an option or a setting is wrong.
    """
    overrides = {_FLAGS[name]: value for name, value in given.items() if value is not None}
    return policy_of(load(os.environ, overrides))


def refuse_nothing_to_expire(wanted: Policy) -> None:
    """Raise ConfigError for a policy that keeps everything."""
    if not wanted.last:
        raise ConfigError("save.keep is 0, which keeps every checkpoint", hint="say how many with --keep")


@dataclass(slots=True)
class Judged:
    """The checkpoints of a run, and what is to become of them.

    Attributes:
        commits: of all that are committed and can be read, newest first.
        written: bytes of the files written for each of them.
        verdict: what retention says.
        removed: those that are deleted by now.
    """

    policy: Policy
    commits: dict[Ref, CommitRecord]
    written: dict[Ref, int]
    verdict: Verdict
    removed: Collection[Ref] = ()

    @property
    def going(self) -> int:
        """Bytes that are free when what goes is gone; what others need stays, and is not among it."""
        return sum(self.written[ref] for ref in self.verdict.gone)


def look(store: Store, wanted: Policy, now: float, running: Collection[int]) -> Judged:
    """Ask retention; checkpoints of `running` steps count as in use."""
    found = find(store)
    needed = [ref for ref, _ in found if ref.step in running]
    verdict = judge(store, found, wanted, now, needed)
    commits = {ref: commit for ref, commit in found if isinstance(commit, CommitRecord)}
    written = {ref: written_bytes(store, ref, commit) for ref, commit in commits.items()}
    return Judged(wanted, commits, written, verdict)


def show(screen: Screen, judged: Judged) -> None:
    """Write a line for every checkpoint, and the sum."""
    metric = judged.policy.metric if judged.policy.best else ""
    rows = []
    for ref, commit in judged.commits.items():
        fate = "keep" if ref in judged.verdict.kept else "removed" if ref in judged.removed else "remove"
        why = "; ".join(judged.verdict.kept.get(ref, ())) or "no rule keeps it"
        value = [metric_text(commit.values.get(metric))] if metric else []
        rows.append((ref.name, age(when(commit.created)), size(judged.written[ref]), *value, fate, printable(why)))
    header = ["CHECKPOINT", "AGE", "SIZE", *([printable(metric).upper()] if metric else []), "FATE", "WHY"]
    style = {"removed": "good", "remove": "doubt"}
    fate_at = header.index("FATE")
    screen.table(
        header, rows, right=("AGE", "SIZE", printable(metric).upper()), fold="WHY",
        style=lambda row, column: style.get(rows[row][fate_at], "quiet") if column == "FATE" else "",
    )  # fmt: skip
    screen.line()
    kept = len(judged.verdict.kept)
    screen.line(f"{kept:,} of {plural(len(rows), 'checkpoint')} {'is' if kept == 1 else 'are'} kept")


def metric_text(value: float | None) -> str:
    """A metric for people."""
    return "-" if value is None else f"{value:.6g}"


def document(judged: Judged) -> list[dict[str, Any]]:
    """For --json."""
    return [
        {
            "name": ref.name,
            "step": ref.step,
            "epoch": ref.epoch,
            "created": commit.created,
            "bytes": commit.bytes,
            "written": judged.written[ref],
            "metrics": as_json(commit.values),
            "fate": "keep" if ref in judged.verdict.kept else "removed" if ref in judged.removed else "remove",
            "why": judged.verdict.kept.get(ref, []),
        }
        for ref, commit in judged.commits.items()
    ]


def as_json(values: dict[str, float]) -> dict[str, float | str]:
    """Metrics in JSON, which has no number for NaN and infinity: these are text."""
    return {name: value if math.isfinite(value) else repr(value) for name, value in values.items()}
