"""The commit: index first, then one small record, written last and only if absent. Its presence is the commit.

fence       is there an epoch above ours, taken by another job? then this job may not commit any more
index       built from what the ranks' agents reported, written under a unique name, synced
record      put if absent; a lost answer is resolved by reading the record back
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from ckptsvc.errors import Damaged, Fenced, NotFound, SaveFailed, StoreError
from ckptsvc.format.checksum import digest128
from ckptsvc.format.commit import COMMIT, CommitRecord, index_name
from ckptsvc.format.compat import FORMAT, SEGMENTED, WITH_METRICS, WITH_WRITTEN
from ckptsvc.format.index import Index, IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.pipeline.catalog import Ref, exists, newest_epoch, read_commit, read_epoch
from ckptsvc.pipeline.clock import now_iso
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.references import Bases, withdraw_if_late
from ckptsvc.storage import Store


def check_fence(store: Store, job: str, epoch: int) -> None:
    """Raise `Fenced` when another job has taken a higher epoch of this run."""
    newest = newest_epoch(store)
    if newest <= epoch:
        return
    try:
        owner = read_epoch(store, newest)
    except (NotFound, Damaged):
        return  # being written, or unreadable: it fences nobody
    if owner.job != job:
        raise Fenced(f"job {owner.job} took this run over at {owner.created} (epoch {newest}; ours is {epoch})")


def commit_checkpoint(
    store: Store,
    info: IndexInfo,
    shards: Sequence[ShardRecord],
    writer: str,
    bases: Bases | None = None,
    *,
    metrics: Mapping[str, str] = MappingProxyType({}),
    on_index: Callable[[], None] = lambda: None,
) -> CommitRecord:
    """Commit one checkpoint whose shards are all durable.

    Args:
        store: where the shards are.
        info: step, epoch, attempt, job and so on.
        shards: one record for each rank.
        writer: a random id of the caller, the same when it tries again.
        bases: what is known of other checkpoints of this store.
        metrics: as the record has them (see `format.commit.metrics_text`).
        on_index: called when the index has been written.

    Returns:
        the record that is in the store: ours, or that of an earlier try of this very save.

    Raises:
        Fenced: a newer job has taken the run over.
        LayoutError: the shards do not cover every tensor.
        SaveFailed: a record of somebody else is there, or a checkpoint that a shard refers to is not there any more.
        StoreError: as the store raises.
    """
    check_fence(store, info.job, info.epoch)
    bases = bases or Bases()
    ref = Ref(info.epoch, info.step)
    earlier = read_commit(store, ref)
    is_earlier = earlier is not None
    if earlier is None:
        _check_there(store, ref, shards)
        record = _write_index(store, ref, info, shards, writer)
        on_index()
        failpoint("before_record")
        version = WITH_METRICS if metrics and record.format == FORMAT else record.format
        refers = bases.check(store, shards, ref.name)
        record = msgspec.structs.replace(record, refers=refers, metrics=dict(metrics), format=version)
        earlier = _put(store, ref, record)
    if earlier is None or earlier.job != info.job:
        other = earlier.job if earlier else "somebody who removed it again"
        raise SaveFailed(f"{ref.name} was committed by {other}")
    if is_earlier:
        confirm(store, ref, earlier)
    else:
        withdraw_if_late(store, ref, earlier)
    if earlier.writer == writer:
        bases.remember(ref.name, _names(ref, shards))
    return earlier


def confirm(store: Store, ref: Ref, commit: CommitRecord) -> None:
    """See that a record that is there stays there, also through a loss of power, and may.

    An earlier try may have failed after it had put the record, when the store was to make it durable.

    Raises:
        SaveFailed: something it refers to was deleted meanwhile; it is taken back.
        StoreError: it could not be made durable.
    """
    store.put_if_absent(f"{ref.name}/{COMMIT}", commit.encode())
    withdraw_if_late(store, ref, commit)


def _write_index(store: Store, ref: Ref, info: IndexInfo, shards: Sequence[ShardRecord], writer: str) -> CommitRecord:
    """Write the index; returns the record that will point to it."""
    index = Index.build(info, shards)
    index.check_cover()
    image = index.encode()
    name = index_name(secrets.token_hex(4))
    _write_aligned(store, f"{ref.name}/{name}", image)
    has_segments = index.info.format == SEGMENTED
    return CommitRecord(
        step=info.step,
        epoch=info.epoch,
        attempt=info.attempt,
        job=info.job,
        writer=writer,
        index=name,
        index_bytes=len(image),
        index_digest=digest128(image),
        shards=len(shards),
        bytes=sum(s.nbytes for s in shards),
        world_size=info.world_size,
        created=now_iso(),
        written=sum(_written(s, ref.name) for s in shards) if has_segments else None,
        format=WITH_WRITTEN if has_segments else index.info.format,
    )


def _written(shard: ShardRecord, folder: str) -> int:
    """Bytes of the files of a shard that are in its own checkpoint's folder."""
    if shard.segments is None:
        return shard.nbytes
    return sum(file.nbytes for file in shard.segments.files if file.folder == folder)


def _check_there(store: Store, ref: Ref, shards: Sequence[ShardRecord]) -> None:
    """Raise SaveFailed for a shard that only its writer can see: the store is a local directory on every node."""
    there = set(store.children(ref.name))
    names = _names(ref, shards)
    # A listing may be behind: the object itself is asked before it counts as missing.
    unseen = [name for name in names if name not in there and not exists(store, f"{ref.name}/{name}")]
    if unseen:
        raise SaveFailed(
            f"{len(unseen)} of {len(names)} shards are not in {store.url}/{ref.name}, for example {unseen[0]}",
            hint="does every node see the same store?",
        )


def _names(ref: Ref, shards: Sequence[ShardRecord]) -> list[str]:
    """The names of all files of these shards in their own checkpoint's folder."""
    names = [shard.name for shard in shards]
    for shard in shards:
        if shard.segments is not None:
            names += [file.name for file in shard.segments.files if file.folder == ref.name]
    return list(dict.fromkeys(names))


def _put(store: Store, ref: Ref, record: CommitRecord) -> CommitRecord | None:
    """Write the record if there is none; returns the one that is there then."""
    try:
        if store.put_if_absent(f"{ref.name}/{COMMIT}", record.encode()):
            return record
    except StoreError:
        # Maybe only the answer was lost; or it is there, and not for good: that is asked once more.
        found = read_commit(store, ref)
        if found is None or found.writer != record.writer:
            raise
        store.put_if_absent(f"{ref.name}/{COMMIT}", record.encode())
        return found
    return read_commit(store, ref)


def _write_aligned(store: Store, key: str, data: bytes) -> None:
    with mmap.mmap(-1, max(len(data), 1)) as buffer:
        buffer[: len(data)] = data
        view = memoryview(buffer)
        try:
            store.write(key, view, len(data))
        finally:
            view.release()
