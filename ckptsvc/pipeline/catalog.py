"""What a run holds: its checkpoints, newest first, and one checkpoint opened for reading; the run's epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ckptsvc.errors import (
    Damaged,
    IncompatibleVersion,
    InvalidInput,
    NoCheckpoint,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from ckptsvc.format.checksum import digest128
from ckptsvc.format.commit import (
    COMMIT,
    EPOCHS,
    CommitRecord,
    EpochRecord,
    checkpoint_name,
    epoch_key,
    parse_checkpoint_name,
    parse_epoch_name,
)
from ckptsvc.format.index import Index
from ckptsvc.format.limits import MAX_RECORD_BYTES
from ckptsvc.storage import Store


class Ref(NamedTuple):
    """Where a checkpoint is; sorts by which is newer."""

    epoch: int
    step: int

    @property
    def name(self) -> str:
        """Its folder."""
        return checkpoint_name(self.step, self.epoch)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, index and commit record verified."""

    store: Store
    ref: Ref
    commit: CommitRecord
    index: Index

    def key(self, shard: int) -> str:
        """The store key of a shard."""
        return f"{self.ref.name}/{self.index.shards[shard].name}"

    def files(self, shard: int) -> dict[str, int]:
        """The objects that hold the bytes of a shard, in this folder and in others: key -> size."""
        segments = self.index.segments
        if segments is None or not segments.is_mapped(shard):
            return {self.key(shard): self.index.shards[shard].nbytes}
        return {file.key: file.nbytes for file in segments.files_of(shard)}

    def own_names(self) -> set[str]:
        """The names of all objects in its folder that belong to it; garbage may lie beside them."""
        names = {COMMIT, self.commit.index, *(shard.name for shard in self.index.shards)}
        if self.index.segments is not None:
            names.update(file.name for file in self.index.segments.files if file.folder == self.ref.name)
        return names


def list_refs(store: Store) -> list[Ref]:
    """Every checkpoint folder, committed or not, newest (highest epoch, then step) first."""
    refs = []
    for name in store.children(""):
        parsed = parse_checkpoint_name(name)
        if parsed is not None:
            refs.append(Ref(parsed[1], parsed[0]))
    return sorted(refs, reverse=True)


def exists(store: Store, key: str) -> bool:
    """Whether an object is there; asks for that one, so it also sees what a listing does not show yet."""
    try:
        store.size(key)
    except NotFound:
        return False
    return True


def read_commit(store: Store, ref: Ref) -> CommitRecord | None:
    """The commit record, or None where the save was never committed.

    Raises:
        Damaged, IncompatibleVersion: there is a record that cannot be trusted.
    """
    key = f"{ref.name}/{COMMIT}"
    try:
        commit = CommitRecord.decode(store.read(key, MAX_RECORD_BYTES), key)
    except NotFound:
        return None
    except InvalidInput:
        raise Damaged(f"{key} is too large for a commit record") from None
    if (commit.step, commit.epoch) != (ref.step, ref.epoch):
        raise Damaged(f"{key} speaks of step {commit.step} in epoch {commit.epoch}")
    return commit


def written_bytes(store: Store, ref: Ref, commit: CommitRecord) -> int:
    """Bytes of the files that were written for a checkpoint, without record and index: what is free when it is gone."""
    if commit.written is not None or commit.format.startswith("1."):
        return commit.bytes if commit.written is None else commit.written
    beside = {f"{ref.name}/{name}" for name in (COMMIT, commit.index)}  # format 2.0, whose records did not say it
    return sum(entry.size for entry in store.list(ref.name) if entry.key not in beside)


def open_checkpoint(store: Store, ref: Ref, commit: CommitRecord | None = None) -> Checkpoint:
    """Read and verify commit record and index.

    Raises:
        NoCheckpoint: not committed.
        Damaged, IncompatibleVersion: the record or the index cannot be trusted.
    """
    commit, image = read_index(store, ref, commit)
    return decode_checkpoint(store, ref, commit, image)


def read_index(store: Store, ref: Ref, commit: CommitRecord | None = None) -> tuple[CommitRecord, bytes]:
    """The commit record and the bytes of the index, verified; see `open_checkpoint`."""
    commit = commit or read_commit(store, ref)
    if commit is None:
        raise NoCheckpoint(f"{store.url}/{ref.name} has no commit record: its save never finished")
    key = f"{ref.name}/{commit.index}"
    try:
        size = store.size(key)
        if size != commit.index_bytes:
            raise Damaged(f"{key} has {size} bytes; its commit record says {commit.index_bytes}")
        image = bytearray(size)
        store.read_into(key, 0, memoryview(image))
    except NotFound:
        raise Damaged(f"{key}, the index, is missing") from None
    if digest128(image) != commit.index_digest:
        raise Damaged(f"{key}, the index, does not match the checksum in its commit record")
    return commit, bytes(image)


def decode_checkpoint(store: Store, ref: Ref, commit: CommitRecord, image: bytes) -> Checkpoint:
    """A checkpoint from its commit record and the verified bytes of its index."""
    index = Index.decode(image, f"{ref.name}/{commit.index}")
    if (index.info.step, index.info.epoch, len(index.shards)) != (commit.step, commit.epoch, commit.shards):
        raise Damaged(f"{ref.name}/{commit.index}, the index, belongs to another checkpoint than its commit record")
    folders = index.segments.folders if index.segments else []
    if sorted({*folders} - {ref.name}) != list(commit.refers):
        raise Damaged(f"{ref.name}/{commit.index}, the index, needs other checkpoints than its commit record names")
    return Checkpoint(store, ref, commit, index)


Refused = Damaged | IncompatibleVersion | StoreError
"""Why a commit record that is there cannot be used."""


def find(store: Store, step: int | None = None, name: str | None = None) -> list[tuple[Ref, CommitRecord | Refused]]:
    """Committed checkpoints, newest first, of one step or all; a record that cannot be used comes as its error.

    Raises:
        InvalidInput: `name` is no name of a checkpoint.
    """
    refs = list_refs(store)
    if name is not None:
        parsed = parse_checkpoint_name(name)
        if parsed is None:
            raise InvalidInput(f"{name!r} is no name of a checkpoint", hint="they look like step-000000000100.e00007")
        refs = [r for r in refs if (r.step, r.epoch) == parsed]
    found: list[tuple[Ref, CommitRecord | Refused]] = []
    for ref in refs:
        if step is not None and ref.step != step:
            continue
        try:
            commit = read_commit(store, ref)
        except (Damaged, IncompatibleVersion, StoreError) as error:
            found.append((ref, error))
            continue
        if commit is not None:
            found.append((ref, commit))
    return found


def newest_epoch(store: Store) -> int:
    """The highest epoch that was ever taken in this run; 0 when none was."""
    return max((parse_epoch_name(n) or 0 for n in store.children(EPOCHS)), default=0)


def read_epoch(store: Store, epoch: int) -> EpochRecord:
    """Who took an epoch."""
    key = epoch_key(epoch)
    return EpochRecord.decode(store.read(key), key)


def check_exclusive(store: Store) -> None:
    """Raise StoreError where two writers of one record might both win: no commit would be safe there."""
    found = store.capabilities()
    if not found.exclusive_create:
        raise StoreError(
            f"nothing can be committed to {store.url}: it does not let exactly one of several writers create an object"
            f" ({'; '.join(found.notes)})",
            hint="choose another store",
        )


def take_epoch(store: Store, job: str, attempt: int, owner: str, created: str) -> int:
    """Take the next epoch: from now on, saves of other jobs with a lower one are fenced off.

    `owner` is a random id of the caller: a create whose answer was lost is recognised by it.

    Raises:
        StoreError: as the store raises, and as `check_exclusive`.
    """
    check_exclusive(store)
    epoch = 0
    for _ in range(100):
        epoch = max(newest_epoch(store), epoch) + 1  # a listing may be behind what was met
        record = EpochRecord(epoch=epoch, job=job, attempt=attempt, owner=owner, created=created)
        if store.put_if_absent(epoch_key(epoch), record.encode()) or read_epoch(store, epoch).owner == owner:
            return epoch
    raise StoreUnavailable(f"{store.url}: a hundred others took epochs meanwhile; is a job restarting in a loop?")
