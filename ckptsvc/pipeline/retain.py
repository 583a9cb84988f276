"""What may be deleted: committed checkpoints beyond the number to keep, and the garbage of interrupted saves.

The commit record goes first, so that a checkpoint that is being deleted is already no checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ckptsvc.errors import Damaged, IncompatibleVersion
from ckptsvc.format.commit import EPOCHS, CommitRecord, parse_checkpoint_name
from ckptsvc.pipeline.catalog import Ref, find, list_refs, newest_epoch, open_checkpoint, read_commit
from ckptsvc.pipeline.references import delete_checkpoint, needed, referrers
from ckptsvc.storage import TEMPORARY_PREFIX, Entry, Store
from ckptsvc.storage.unfinished import unfinished_by_folder


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects of one folder that nothing refers to.

    Attributes:
        folder: the first part of their keys.
        ref: the checkpoint that was never committed, whose folder this is; None where only single objects are garbage.
        why: how they came to be there.
        entries: the objects; none where an empty folder is all that is left.
    """

    folder: str
    ref: Ref | None
    why: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> float:
        """When the last of them was written, in seconds since 1970: a save that is slow is not an old one."""
        return max((entry.modified for entry in self.entries), default=0.0)


def expire(store: Store, keep: int, protect: Collection[Ref] = ()) -> list[Ref]:
    """Delete all but the newest `keep` committed checkpoints; those in `protect` stay. Returns what went.

    What those that stay refer to stays as well.

    A commit record that cannot be used counts as no checkpoint and is left alone, as evidence or for a newer ckptsvc.
    """
    if keep <= 0:
        return []
    good = {ref: commit for ref, commit in find(store) if isinstance(commit, CommitRecord)}
    stay = {*list(good)[:keep], *protect}
    stay |= needed(commit for ref, commit in good.items() if ref in stay)
    gone = []
    for ref, commit in good.items():
        if ref in stay:
            continue
        if delete_checkpoint(store, ref, good):
            gone.append(ref)
        else:
            stay |= needed([commit])
    return gone


def find_garbage(store: Store) -> Iterator[Garbage]:
    """What interrupted saves and deletions left: folders without a commit record, and strays elsewhere.

    A folder without a commit record may belong to a save that is still going on. The store cannot tell: the caller
    decides by age and by what the agents say. Checkpoints whose commit record or index cannot be read are left alone.
    """
    newest = newest_epoch(store)
    refs = list_refs(store)
    for ref in refs:
        try:
            commit = read_commit(store, ref)
            if commit is None:
                if referrers(store, ref):
                    continue
                open_end = " (it may still be running)" if ref.epoch == newest else ""
                yield Garbage(ref.name, ref, "save not committed" + open_end, tuple(store.list(ref.name)))
                continue
            entries = list(store.list(ref.name))
            if len(entries) <= commit.shards + 2:
                continue  # shards, index and record: no need to read an index that may be large
            known = open_checkpoint(store, ref, commit).own_names()
        except (Damaged, IncompatibleVersion):
            continue
        strays = tuple(e for e in entries if e.key.removeprefix(f"{ref.name}/") not in known)
        if strays:
            yield Garbage(ref.name, None, "not part of the committed checkpoint", strays)
    folders = {ref.name for ref in refs}
    for folder, uploads in unfinished_by_folder(store).items():
        parsed = parse_checkpoint_name(folder)  # others may use the bucket, too
        if parsed is not None and folder not in folders:  # nothing else is in it, so that nothing shows it
            yield Garbage(folder, Ref(parsed[1], parsed[0]), "upload never completed", tuple(uploads))
    torn = tuple(e for e in store.list(EPOCHS) if e.key.rpartition("/")[2].startswith(TEMPORARY_PREFIX))
    if torn:
        yield Garbage(EPOCHS, None, "left by an interrupted write", torn)


def remove_garbage(store: Store, garbage: Garbage) -> bool:
    """Delete what was found, unless its save has committed after all; returns whether it was deleted.

    Nor is anything deleted that has come to be referred to.
    """
    ref = garbage.ref
    if ref is not None and (read_commit(store, ref) is not None or referrers(store, ref)):
        return False
    for entry in garbage.entries:
        store.delete(entry.key)
    if not garbage.entries:  # a driver removes folders that have become empty, here one that already was
        store.delete(f"{garbage.folder}/{TEMPORARY_PREFIX}none")
    return True
