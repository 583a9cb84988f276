"""`ckptsvc ls`: the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click

from ckptsvc.cli import address
from ckptsvc.cli.retention import as_json as metrics_json
from ckptsvc.cli.retention import metric_text
from ckptsvc.cli.terminal import Screen, age, emit, note, plural, printable, size
from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.commit import CommitRecord
from ckptsvc.pipeline.catalog import Ref, Refused, list_refs, read_commit, written_bytes
from ckptsvc.pipeline.pins import pinned
from ckptsvc.quantities import when
from ckptsvc.storage import Store

WIDE = 100
"""Columns from which on a terminal gets everything beside the metrics."""

_STYLE = {"damaged": "bad", "newer format": "doubt", "not committed": "doubt", "pinned": "good"}


class Found(NamedTuple):
    """A checkpoint folder.

    Attributes:
        ref: which.
        commit: its commit record, why that cannot be used, or None where there is none.
        nbytes: of all shards, or of all that is there where nothing is committed; None if not known.
        written: bytes of the files that were written for it; None if not known.
        created: when it was committed, or last written to; None if not known.
        pinned: it is not deleted, whatever retention says.
    """

    ref: Ref
    commit: CommitRecord | Refused | None
    nbytes: int | None
    written: int | None
    created: datetime | None
    pinned: bool = False

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.commit is None:
            return "not committed"
        if isinstance(self.commit, Damaged):
            return "damaged"
        return "committed" if isinstance(self.commit, CommitRecord) else "newer format"


@click.command()
@click.argument("store")
@click.option("--all", "show_all", is_flag=True, help="Show saves that were never committed, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(store: str, show_all: bool, as_json: bool) -> None:
    """List the checkpoints of the run at STORE (a URL or a path), newest first.

    A later epoch (attempt of the job) is newer than an earlier one, whatever its steps are.

    \b
    JSON: {"store", "checkpoints": [{"name", "step", "epoch", "state",
      "world_size", "attempt", "job", "shards", "bytes", "written", "created",
      "why", "pinned", "metrics", "refers"}], "not_committed"}
    state is "committed", "damaged", "newer format" or "not committed"; bytes
    are those of the shards, written those of the files written for them (fewer,
    where they are compressed or lie in others' files); created is ISO 8601 in
    UTC, of the commit or else of the last write; not_committed counts such
    saves, listed or not; refers are checkpoints whose files this one needs; what
    is not known is null; metrics that are no finite numbers are text ("nan").
    """  # noqa: D301  \b is click's
    place = address.parse(store)
    with address.opened(place) as opened:
        url = opened.url
        pins = pinned(opened)
        found = [
            _look(opened, ref)._replace(pinned=ref in pins)
            for ref in list_refs(opened)
            if place.name in (None, ref.name)
        ]
        hint = "" if found else address.what_instead(opened)
    hidden = sum(1 for each in found if each.commit is None)
    shown = found if show_all or place.name else [each for each in found if each.commit is not None]
    if as_json:
        emit({"store": url, "checkpoints": [_json(each) for each in shown], "not_committed": hidden})
        return
    _show(url, shown, hint)
    if hidden and len(shown) < len(found):
        note(f"{plural(hidden, 'save')} not committed (--all shows them)")


def _look(store: Store, ref: Ref) -> Found:
    try:
        commit = read_commit(store, ref)
    except (Damaged, IncompatibleVersion) as error:
        return Found(ref, error, None, None, None)
    if commit is not None:
        return Found(ref, commit, commit.bytes, written_bytes(store, ref, commit), when(commit.created))
    entries = list(store.list(ref.name))
    there = sum(entry.size for entry in entries)
    last = max((entry.modified for entry in entries), default=None)
    return Found(ref, None, there, there, None if last is None else datetime.fromtimestamp(last, UTC))


def _json(found: Found) -> dict[str, Any]:
    commit = found.commit if isinstance(found.commit, CommitRecord) else None
    return {
        "name": found.ref.name,
        "step": found.ref.step,
        "epoch": found.ref.epoch,
        "state": found.state,
        "world_size": commit and commit.world_size,
        "attempt": commit and commit.attempt,
        "job": commit and commit.job,
        "shards": commit and commit.shards,
        "bytes": found.nbytes,
        "written": found.written,
        "created": found.created and found.created.isoformat(),
        "why": str(found.commit) if isinstance(found.commit, Damaged | IncompatibleVersion) else None,
        "pinned": found.pinned,
        "metrics": metrics_json(commit.values if commit else {}),
        "refers": commit.refers if commit else [],
    }


def _show(url: str, found: Sequence[Found], hint: str) -> None:
    if not found:
        note(f"no committed checkpoints in {url}")
        if hint:
            note(f"hint: {hint}")
        return
    screen = Screen()
    header, rows = (
        ["NAME", "STEP", "EPOCH", "RANKS", "SIZE", "WRITTEN", "AGE", "STATE", "METRICS"],
        [
            [
                each.ref.name,
                f"{each.ref.step:,}",
                str(each.ref.epoch),
                f"{each.commit.world_size:,}" if isinstance(each.commit, CommitRecord) else "?",
                "?" if each.nbytes is None else size(each.nbytes),
                "?" if each.written is None else size(each.written),
                age(each.created),
                "pinned" if each.pinned and each.state == "committed" else each.state,
                metrics_text(each.commit) if isinstance(each.commit, CommitRecord) else "",
            ]
            for each in found
        ],
    )
    if all(each.written == each.nbytes for each in found):
        header, rows = [*header[:5], *header[6:]], [[*row[:5], *row[6:]] for row in rows]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    elif screen.width is not None and screen.width < WIDE:  # the name says the epoch
        header, rows = [*header[:2], *header[4:]], [[*row[:2], *row[4:]] for row in rows]
    screen.table(
        header,
        rows,
        right=("STEP", "EPOCH", "RANKS", "SIZE", "WRITTEN", "AGE"),
        fold="METRICS" if "METRICS" in header else "",
        style=lambda row, column: _STYLE.get(rows[row][header.index("STATE")], "") if column == "STATE" else "",
    )
    for each in found:
        if isinstance(each.commit, Damaged | IncompatibleVersion):
            note(printable(str(each.commit)))


def metrics_text(commit: CommitRecord) -> str:
    """The metrics of a checkpoint for people: "loss=1.25 lr=0.0001"."""
    return " ".join(f"{printable(name)}={metric_text(value)}" for name, value in sorted(commit.values.items()))
