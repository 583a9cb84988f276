"""What interrupted saves, deletions and conversions have left in a run, and its removal.

A store cannot tell what is abandoned from what somebody is at work on: who removes it decides by its age and by what
the agents say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ckptsvc.errors import Damaged, IncompatibleVersion, NotFound
from ckptsvc.format.commit import (
    COMMIT,
    EPOCHS,
    PINS,
    RETIRED,
    CommitRecord,
    parse_checkpoint_name,
    parse_pin_name,
)
from ckptsvc.pipeline.catalog import (
    Ref,
    Refused,
    list_refs,
    newest_epoch,
    open_checkpoint,
    read_commit,
    read_epoch,
)
from ckptsvc.pipeline.pins import pinned
from ckptsvc.pipeline.retain import LOOK_EVERY, lacking, mentioned, referred, whole
from ckptsvc.storage import TEMPORARY_PREFIX, Entry, Store
from ckptsvc.storage.unfinished import unfinished_by_folder

CONVERSION = re.compile(r"convert-step-[0-9]{12,18}", re.ASCII)
"""Names of folders in which conversions into a run record what they have finished (interop.conversion.ledger)."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects of one folder that nothing refers to.

    Attributes:
        folder: the first part of their keys.
        ref: the checkpoint that is none, whose folder this is; None where only single objects are garbage.
        why: how they came to be there.
        entries: the objects, in the order in which they are to be deleted; none where an empty folder is all that is
            left.
        latest: of a save that is newer than all that is committed, and may yet be, however old its objects are: it may
            wait for its store, or the clock of whoever dated them is wrong.
    """

    folder: str
    ref: Ref | None
    why: str
    entries: tuple[Entry, ...]
    latest: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return sum(entry.size for entry in self.entries)

    @property
    def modified(self) -> float:
        """When the last of them was written, in seconds since 1970: a save that is slow is not an old one."""
        return max((entry.modified for entry in self.entries), default=0.0)


def find_garbage(store: Store) -> Iterator[Garbage]:
    """What interrupted saves, deletions and conversions left, folder by folder.

    A folder without a commit record may belong to a save that is still going on. Checkpoints whose commit record or
    index cannot be read are left alone, and so is what a committed checkpoint refers to. Of a checkpoint that refers to
    what is gone for good, the record is garbage, and then the rest.
    """
    commits: dict[Ref, CommitRecord | None] = {}
    unusable: dict[Ref, Refused] = {}
    for ref in list_refs(store):
        try:
            commits[ref] = read_commit(store, ref)
        except (Damaged, IncompatibleVersion) as error:
            unusable[ref] = error
    marks = {e.key.removeprefix(f"{RETIRED}/"): e for e in store.list(RETIRED)}
    pins = pinned(store)
    # `expire` makes them checkpoints again
    back = {ref: found[1] for ref in pins & commits.keys() if commits[ref] is None and (found := whole(store, ref))}
    late = _late(store, commits, unusable.keys() | back.keys())
    needed = referred([*back.values(), *(c for ref, c in commits.items() if c is not None and ref not in late)])
    needed |= mentioned(store, list(unusable.items())) | back.keys()
    is_latest = _is_latest(store, commits)
    for ref, commit in commits.items():
        if ref in late and ref not in needed | pins:
            record = tuple(entry for entry in store.list(ref.name) if entry.key == f"{ref.name}/{COMMIT}")
            yield Garbage(ref.name, None, f"needs files of {late[ref]}, which was deleted", record)
        elif commit is not None:
            yield from _strays(store, ref, commit)
        elif ref not in needed:
            entries = tuple(store.list(ref.name))
            if ref.name in marks:  # the mark goes last: until then this is known to be half deleted
                yield Garbage(ref.name, ref, "its deletion was interrupted", (*entries, marks[ref.name]))
            else:
                open_end = " (it may still be running)" if is_latest(ref) else ""
                yield Garbage(ref.name, ref, f"save not committed{open_end}", entries, is_latest(ref))
    yield from _unfinished(store, {ref.name for ref in commits.keys() | unusable.keys()}, is_latest)
    yield from _beside(store, commits, marks, pins - commits.keys() - unusable.keys())


def _late(store: Store, commits: Mapping[Ref, CommitRecord | None], others: Collection[Ref]) -> dict[Ref, str]:
    """Committed checkpoints that need files of one that is gone, and its name.

    Their writer was killed when it was to take the record back (see `references.withdraw_if_late`).
    """
    found = {}
    for ref, commit in commits.items():
        if commit is None or not any(commits.get(base) is None and base not in others for base in referred([commit])):
            continue
        with suppress(Damaged, IncompatibleVersion):
            lost = [folder for folder in lacking(store, open_checkpoint(store, ref, commit)) if folder != ref.name]
            if lost:
                found[ref] = lost[0]
    return found


def _strays(store: Store, ref: Ref, commit: CommitRecord) -> Iterator[Garbage]:
    """What is in the folder of a committed checkpoint, and no part of it."""
    entries = list(store.list(ref.name))
    if len(entries) <= commit.shards + 2:
        return  # shards, index and record: no need to read an index that may be large
    try:
        found = open_checkpoint(store, ref, commit)
    except (Damaged, IncompatibleVersion):
        return
    known = found.own_names()
    strays = tuple(e for e in entries if e.key.removeprefix(f"{ref.name}/") not in known)
    if strays:
        yield Garbage(ref.name, None, "not part of the committed checkpoint", strays)


def _is_latest(store: Store, commits: Mapping[Ref, CommitRecord | None]) -> Callable[[Ref], bool]:
    """Tells whether a save that is not committed may yet be, and is newer than all that are.

    Nothing is committed any more of an epoch that is fenced off: when another job has taken a higher one.
    """
    newest = newest_epoch(store)
    owner = _job_of(store, newest) if newest else ""
    committed = max((ref for ref, commit in commits.items() if commit is not None), default=Ref(0, 0))

    def is_latest(ref: Ref) -> bool:
        if not newest or ref < committed:
            return False
        return ref.epoch >= newest or not owner or _job_of(store, ref.epoch) in ("", owner)

    return is_latest


def _job_of(store: Store, epoch: int) -> str:
    """Who has taken an epoch; "" where that cannot be known."""
    try:
        return read_epoch(store, epoch).job
    except (NotFound, Damaged, IncompatibleVersion):
        return ""


def _unfinished(store: Store, folders: Collection[str], is_latest: Callable[[Ref], bool]) -> Iterator[Garbage]:
    """Uploads that were never completed, where nothing else is in the folder, so that nothing shows it."""
    for folder, uploads in unfinished_by_folder(store).items():
        parsed = parse_checkpoint_name(folder)  # others may use the bucket, too
        if parsed is not None and folder not in folders:
            ref = Ref(parsed[1], parsed[0])
            yield Garbage(folder, ref, "upload never completed", tuple(uploads), is_latest(ref))


def _beside(
    store: Store, commits: Mapping[Ref, CommitRecord | None], marks: Mapping[str, Entry], vain: set[Ref]
) -> Iterator[Garbage]:
    """What is in no checkpoint's folder."""
    torn = tuple(
        e
        for folder in (EPOCHS, PINS, RETIRED)
        for e in store.list(folder)
        if e.key.rpartition("/")[2].startswith(TEMPORARY_PREFIX)
    )
    if torn:
        yield Garbage(EPOCHS, None, "left by an interrupted write", torn)
    halves = {ref.name for ref, commit in commits.items() if commit is None}
    done = tuple(e for name, e in marks.items() if name not in halves and parse_checkpoint_name(name))
    if done:
        yield Garbage(RETIRED, None, "left by an interrupted deletion", done)
    if vain:
        entries = tuple(e for e in store.list(PINS) if _ref_of_pin(e) in vain)
        yield Garbage(PINS, None, "pins a checkpoint that is not there", entries)
    for name in store.children():
        if CONVERSION.fullmatch(name):
            yield Garbage(name, None, "records of an unfinished conversion", tuple(store.list(name)))


def remove_garbage(store: Store, garbage: Garbage, pace: Callable[[], None] = lambda: None) -> bool:
    """Delete what was found, unless it is a checkpoint after all; returns whether it was deleted.

    `pace` is called before every object.
    """
    if garbage.ref is not None and read_commit(store, garbage.ref) is not None:
        return False
    for number, entry in enumerate(garbage.entries):
        pace()
        if garbage.ref is not None and (number + 1) % LOOK_EVERY == 0 and read_commit(store, garbage.ref) is not None:
            return False
        store.delete(entry.key)
    if not garbage.entries:  # a driver removes folders that have become empty, here one that already was
        store.delete(f"{garbage.folder}/{TEMPORARY_PREFIX}none")
    return True


def _ref_of_pin(entry: Entry) -> Ref | None:
    parsed = parse_pin_name(entry.key.removeprefix(f"{PINS}/"))
    return parsed and Ref(parsed[1], parsed[0])
