"""Checkpoints that need files of others: what they need is there when they are committed, and stays as long as they do.

A checkpoint names in its commit record the folders of all others whose files it needs. One that is referred to stays
whole, a checkpoint like any other, however old it is; it may go when nothing refers to it any more (see `retain`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptsvc.errors import Damaged, IncompatibleVersion, NoCheckpoint, SaveFailed
from ckptsvc.format.commit import COMMIT, CommitRecord, parse_checkpoint_name
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.segments import StoredFile
from ckptsvc.pipeline.catalog import Ref, exists, open_checkpoint, read_commit
from ckptsvc.storage import Store


def ref_of(folder: str) -> Ref:
    """The checkpoint of a folder; Damaged for a name that is none."""
    parsed = parse_checkpoint_name(folder)
    if parsed is None:
        raise Damaged(f"{folder[:200]!r} is no name of a checkpoint")
    return Ref(parsed[1], parsed[0])


REMEMBERED = 16
"""Checkpoints whose files are remembered."""


def withdraw_if_late(store: Store, ref: Ref, commit: CommitRecord) -> None:
    """Take a record back that was put when something it refers to was just being deleted.

    Who commits puts its record and then looks for those it refers to; who deletes takes a record away and then looks
    for others that refer to it. Whichever comes second sees the other.

    Raises:
        SaveFailed: that is how it was.
    """
    for folder in commit.refers:
        if read_commit(store, ref_of(folder)) is None:
            if read_commit(store, ref_of(folder)) is not None:
                continue  # it has come back just now
            store.delete(f"{ref.name}/{COMMIT}")
            raise _gone(folder)


def is_there(store: Store, files: Iterable[StoredFile]) -> bool:
    """Whether the checkpoints of all these files are still committed."""
    return all(exists(store, f"{folder}/{COMMIT}") for folder in sorted({file.folder for file in files}))


def _gone(folder: str) -> SaveFailed:
    return SaveFailed(
        f"it refers to {folder}, which has been deleted meanwhile",
        hint="the next checkpoints will not; keep more of them if this happens often",
    )


class Bases:
    """Which files the checkpoints of a store have, remembered: what is committed does not change."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def remember(self, folder: str, names: Iterable[str]) -> None:
        """These are the files of a committed checkpoint."""
        self._names[folder] = frozenset(names)
        while len(self._names) > REMEMBERED:
            self._names.pop(next(iter(self._names)), None)

    def check(self, store: Store, shards: Sequence[ShardRecord], own: str) -> tuple[str, ...]:
        """The other checkpoints that these shards need, ascending; all they need of them is committed and there.

        Args:
            store: where they are.
            shards: what is to be committed.
            own: the folder of that.

        Raises:
            SaveFailed: something is missing: its checkpoint has been deleted meanwhile.
            StoreError: as the store raises.
        """
        wanted: dict[str, set[str]] = {}
        for shard in shards:
            for file in shard.segments.files if shard.segments else ():
                if file.folder != own:
                    wanted.setdefault(file.folder, set()).add(file.name)
        for folder, names in wanted.items():
            there = {*store.children(folder)}
            if COMMIT in there and not names <= self._committed(store, folder):
                there = set()  # files of an earlier try of that save, which are garbage
            if COMMIT not in there or not names <= there:
                raise _gone(folder)
        return tuple(sorted(wanted))

    def _committed(self, store: Store, folder: str) -> frozenset[str]:
        if folder not in self._names:
            try:
                self.remember(folder, open_checkpoint(store, ref_of(folder)).own_names())
            except (Damaged, IncompatibleVersion, NoCheckpoint) as error:
                raise SaveFailed(f"it refers to {folder}, which cannot be used: {error.what}") from None
        return self._names[folder]
