"""What may be deleted: committed checkpoints beyond the number to keep, and the garbage of interrupted saves.

The commit record goes first, so that a checkpoint that is being deleted is already no checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ckptsvc.errors import Damaged
from ckptsvc.format.commit import COMMIT
from ckptsvc.pipeline.catalog import Ref, find, list_refs, newest_epoch, open_checkpoint, read_commit
from ckptsvc.storage import Store


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object nothing refers to; `modified` in seconds since the epoch of Unix time."""

    key: str
    size: int
    modified: float
    why: str


def expire(store: Store, keep: int, protect: Collection[Ref] = ()) -> list[Ref]:
    """Delete all but the newest `keep` committed checkpoints; those in `protect` stay. Returns what went.

    A damaged commit record counts as no checkpoint and is left alone, as evidence.
    """
    if keep <= 0:
        return []
    good = [ref for ref, commit in find(store) if not isinstance(commit, Damaged)]
    gone = [ref for ref in good[keep:] if ref not in protect]
    for ref in gone:
        delete_checkpoint(store, ref)
    return gone


def delete_checkpoint(store: Store, ref: Ref) -> None:
    """Delete one checkpoint, commit record first."""
    store.delete(f"{ref.name}/{COMMIT}")
    for entry in list(store.list(ref.name)):
        store.delete(entry.key)


def find_garbage(store: Store, running: Collection[Ref] = ()) -> Iterator[Garbage]:
    """Objects that interrupted saves left: whole folders without a commit record, and strays in committed ones.

    Folders in `running`, and uncommitted ones of the newest epoch that are newer than every commit in it, may belong to
    a save that is still going on; the caller decides by age (`modified`).
    """
    newest = newest_epoch(store)
    for ref in list_refs(store):
        if ref in running:
            continue
        try:
            commit = read_commit(store, ref)
        except Damaged:
            continue  # evidence; `ckptsvc verify` names it
        if commit is None:
            why = "save not committed" + (" (yet?)" if ref.epoch == newest else "")
            yield from (Garbage(e.key, e.size, e.modified, why) for e in store.list(ref.name))
            continue
        try:
            index = open_checkpoint(store, ref, commit).index
        except Damaged:
            continue
        known = {f"{ref.name}/{COMMIT}", f"{ref.name}/{commit.index}"}
        known |= {f"{ref.name}/{s.name}" for s in index.shards}
        for entry in store.list(ref.name):
            if entry.key not in known:
                yield Garbage(entry.key, entry.size, entry.modified, "not part of the committed checkpoint")
