"""`ckptsvc ls`: the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click

from ckptsvc.cli import address
from ckptsvc.cli.terminal import Screen, age, emit, note, plural, printable, size, when
from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.commit import CommitRecord
from ckptsvc.pipeline.catalog import Ref, Refused, list_refs, read_commit
from ckptsvc.storage import Store

_STYLE = {"damaged": "bad", "newer format": "doubt", "not committed": "doubt"}


class Found(NamedTuple):
    """A checkpoint folder.

    Attributes:
        ref: which.
        commit: its commit record, why that cannot be used, or None where there is none.
        nbytes: of all shards, or of all that is there where nothing is committed; None if not known.
        created: when it was committed, or last written to; None if not known.
    """

    ref: Ref
    commit: CommitRecord | Refused | None
    nbytes: int | None
    created: datetime | None

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
      "world_size", "attempt", "job", "shards", "bytes", "created", "why"}],
      "not_committed"}
    state is "committed", "damaged", "newer format" or "not committed"; bytes
    are those of the shards; created is ISO 8601 in UTC, of the commit or else
    of the last write; not_committed counts such saves, listed or not; what is
    not known is null.
    """  # noqa: D301  \b is click's
    place = address.parse(store)
    with address.opened(place) as opened:
        url = opened.url
        found = [_look(opened, ref) for ref in list_refs(opened) if place.name in (None, ref.name)]
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
        return Found(ref, error, None, None)
    if commit is not None:
        return Found(ref, commit, commit.bytes, when(commit.created))
    entries = list(store.list(ref.name))
    last = max((entry.modified for entry in entries), default=None)
    return Found(
        ref, None, sum(entry.size for entry in entries), None if last is None else datetime.fromtimestamp(last, UTC)
    )


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
        "created": found.created and found.created.isoformat(),
        "why": str(found.commit) if isinstance(found.commit, Damaged | IncompatibleVersion) else None,
    }


def _show(url: str, found: Sequence[Found], hint: str) -> None:
    if not found:
        note(f"no committed checkpoints in {url}")
        if hint:
            note(f"hint: {hint}")
        return
    rows = [
        (
            each.ref.name,
            f"{each.ref.step:,}",
            str(each.ref.epoch),
            f"{each.commit.world_size:,}" if isinstance(each.commit, CommitRecord) else "?",
            "?" if each.nbytes is None else size(each.nbytes),
            age(each.created),
            each.state,
        )
        for each in found
    ]
    Screen().table(
        ("NAME", "STEP", "EPOCH", "RANKS", "SIZE", "AGE", "STATE"),
        rows,
        right=("STEP", "EPOCH", "RANKS", "SIZE", "AGE"),
        style=lambda row, column: _STYLE.get(found[row].state, "") if column == "STATE" else "",
    )
    for each in found:
        if isinstance(each.commit, Damaged | IncompatibleVersion):
            note(printable(str(each.commit)))
