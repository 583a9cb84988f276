"""Deleting checkpoints that nothing keeps (see `retention`), such that an interruption anywhere can be taken up again.

    mark     the commit record is copied to retired/NAME: from now on everybody can see what is being deleted
    retire   the commit record is deleted: it is no checkpoint any more, and all its files are still there
    look     was it pinned meanwhile, or does a new checkpoint refer to it? Then the record is put back
    sweep    the files are deleted, as many in a second as is allowed, and the mark at last

Whoever pins a checkpoint, or commits one that refers to others, looks for their commit records after it has said so:
then either it sees that one is gone, or `look` sees what it has said.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput, NotFound, StoreError, StoreFull
from ckptsvc.format.commit import COMMIT, RETIRED, CommitRecord, parse_checkpoint_name
from ckptsvc.format.limits import MAX_RECORD_BYTES
from ckptsvc.pipeline.catalog import Checkpoint, Ref, Refused, exists, find, open_checkpoint
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.pins import pinned
from ckptsvc.pipeline.retention import Candidate, Policy, Verdict, decide
from ckptsvc.storage import Store
from ckptsvc.storage.clock import store_time

RESUME_AFTER = 600.0
"""Seconds after which a deletion that has begun and not ended is taken up: until then somebody may be at it."""

LOOK_EVERY = 16
"""Objects after which a deletion looks whether somebody has put the checkpoint back."""

_NAME = re.compile(r"step-[0-9]{12,18}\.e[0-9]{5,9}")

_LONGEST_PAUSE = 60.0  # seconds between two objects, however low the rate

Found = Sequence[tuple[Ref, CommitRecord | Refused]]
"""What `catalog.find` returns."""


class Pace:
    """Holds a thread back so that it does no more than so many things in a second.

    Args:
        rate: how many; 0 is no limit.
        clock, sleep: of seconds.
    """

    def __init__(
        self,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._free_at = 0.0

    def __call__(self) -> None:
        """Wait until one more may be done."""
        if not self._rate:
            return
        now = self._clock()
        wait = self._free_at - now
        self._free_at = max(self._free_at, now) + min(1 / self._rate, _LONGEST_PAUSE)
        if wait > 0:
            self._sleep(wait)


@dataclass(slots=True)
class Expired:
    """What `expire` has done.

    Attributes:
        gone: checkpoints that are deleted, in that order; those whose deletion somebody else had begun, too.
        back: checkpoints that turned out to be needed after their commit record was gone, and have it again.
        objects: how many objects were deleted.
    """

    gone: list[Ref] = field(default_factory=list)
    back: list[Ref] = field(default_factory=list)
    objects: int = 0


def candidates(found: Found) -> list[Candidate]:
    """Committed checkpoints as retention looks at them.

    Those whose record cannot be used are not among them, nor those that refer to one that is not there: their writer
    was killed before it could take them back.
    """
    there = {ref.name for ref, _ in found}
    return [
        Candidate(ref, _seconds(commit.created), commit.values, commit.refers)
        for ref, commit in found
        if isinstance(commit, CommitRecord) and there.issuperset(commit.refers)
    ]


def judge(store: Store, found: Found, policy: Policy, now: float | None, needed: Collection[Ref] = ()) -> Verdict:
    """What retention says to the checkpoints of a run.

    Args:
        store: of the run; the pins are read from it.
        found: what `find` returned.
        policy: what to keep.
        now: see `decide`.
        needed: checkpoints that something is at work on.

    Raises:
        StoreError: a commit record could not be read: it may refer to any other checkpoint.
    """
    _check_read(found)
    needed = {*needed, *mentioned(store, found)}
    return decide(candidates(found), policy, now, pinned=pinned(store), needed=needed)


def _check_read(found: Found) -> None:
    for _, commit in found:
        if isinstance(commit, StoreError):
            raise commit


def mentioned(store: Store, found: Found) -> set[Ref]:
    """Every checkpoint whose name is in a record that cannot be used: a newer program, or another look, may need it.

    Raises:
        StoreError: one could not be read.
    """
    names: set[str] = set()
    for ref, commit in found:
        if not isinstance(commit, CommitRecord):
            with suppress(NotFound, InvalidInput):  # taken away meanwhile; no record at all, so large is it
                data = store.read(f"{ref.name}/{COMMIT}", MAX_RECORD_BYTES)
                names.update(_NAME.findall(data.decode("ascii", "replace")))
    return {Ref(epoch, step) for step, epoch in filter(None, map(parse_checkpoint_name, names))}


def expire(
    store: Store,
    policy: Policy,
    needed: Collection[Ref] = (),
    now: float | None = None,
    resume_after: float = RESUME_AFTER,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Expired:
    """Delete what nothing keeps, and what others began to delete.

    A commit record that cannot be used counts as no checkpoint and is left alone, as evidence or for a newer ckptsvc.

    Args:
        store: of the run.
        policy: what to keep.
        needed: checkpoints that a running save or a drain works with.
        now: seconds since 1970, by the clock that dates the objects. None: the store is asked what others have left
            lying, and no clock how old a checkpoint is (see `decide`).
        resume_after: seconds after which deletions that others began are taken up.
        progress: called with the size of every file that is deleted.

    Raises:
        StoreError: the store failed; the next call goes on where this one was interrupted.
    """
    done, pace = Expired(), Pace(policy.rate)
    began = retired(store)
    dated = now if now is not None or not began else _time_of(store)
    marks = [ref for ref, since in began.items() if dated is not None and since <= dated - resume_after]
    if not policy.last and not marks:
        return done
    found = find(store)
    verdict = judge(store, found, policy, now, needed)
    there = {ref for ref, _ in found}
    for ref in there.intersection(marks).difference(verdict.gone):
        store.delete(mark_key(ref))  # whoever set it came no further
    for ref in reversed(verdict.gone):  # newest first: what an older one is needed for goes before it
        retire(store, ref)
        failpoint("in_expire")
    halves = {*(ref for ref in marks if ref not in there), *verdict.gone}
    holds, refers = wanted_now(store) if halves else (set(), set())
    for ref in sorted(halves, reverse=True):  # what comes back may need an older one, which then comes back too
        if ref in holds | refers and (commit := put_back(store, ref)):
            refers |= referred([commit])
            done.back.append(ref)
    for ref in sorted(halves.difference(done.back, refers)):
        # A pin alone came too late if files are gone: whoever set it was told so.
        if is_half(store, ref) and not (ref in pinned(store) and whole(store, ref)):
            done.objects += sweep(store, ref, pace, progress)
            done.gone.append(ref)
    return done


def _time_of(store: Store) -> float | None:
    try:
        return store_time(store, RETIRED)
    except StoreFull:  # what others left half deleted is to go all the more
        return time.time()


def mark_key(ref: Ref) -> str:
    """Key of what says that a checkpoint is being deleted."""
    return f"{RETIRED}/{ref.name}"


def retired(store: Store) -> dict[Ref, float]:
    """Checkpoints whose deletion has begun and not ended, and when it began, in seconds since 1970."""
    found = {}
    for entry in store.list(RETIRED):
        parsed = parse_checkpoint_name(entry.key.removeprefix(f"{RETIRED}/"))
        if parsed is not None:
            found[Ref(parsed[1], parsed[0])] = entry.modified
    return found


def wanted_now(store: Store) -> tuple[set[Ref], set[Ref]]:
    """Every checkpoint that is pinned, and every one that a committed one refers to.

    Raises:
        StoreError: a commit record could not be read.
    """
    found = find(store)
    _check_read(found)
    refers = referred(commit for _, commit in found if isinstance(commit, CommitRecord))
    return pinned(store), refers | mentioned(store, found)


def referred(commits: Iterable[CommitRecord]) -> set[Ref]:
    """The checkpoints whose files these need."""
    names = {name for commit in commits for name in commit.refers}
    return {Ref(epoch, step) for step, epoch in filter(None, map(parse_checkpoint_name, names))}


def is_half(store: Store, ref: Ref) -> bool:
    """Whether the deletion of a checkpoint has begun, and nobody has put it back or ended that."""
    return exists(store, mark_key(ref)) and not exists(store, f"{ref.name}/{COMMIT}")


def put_back(store: Store, ref: Ref) -> CommitRecord | None:
    """Make what was a checkpoint one again, from its mark; None where not all that it needs is there any more."""
    found = whole(store, ref)
    if found is None:
        return None
    data, commit = found
    store.put_if_absent(f"{ref.name}/{COMMIT}", data)
    store.delete(mark_key(ref))
    return commit


def whole(store: Store, ref: Ref) -> tuple[bytes, CommitRecord] | None:
    """The commit record in the mark of a checkpoint whose files are all there, also those of others that it needs."""
    try:
        data = store.read(mark_key(ref), MAX_RECORD_BYTES)
        commit = CommitRecord.decode(data, mark_key(ref))
    except (NotFound, Damaged, IncompatibleVersion):
        return None
    if (commit.epoch, commit.step) != ref:
        return None
    try:
        checkpoint = open_checkpoint(store, ref, commit)
    except (Damaged, IncompatibleVersion):
        return None
    return None if lacking(store, checkpoint) else (data, commit)


def lacking(store: Store, checkpoint: Checkpoint) -> list[str]:
    """The folders in which files are missing that a checkpoint needs, its own and others'."""
    wanted = {checkpoint.ref.name: checkpoint.own_names() - {COMMIT}}
    for file in checkpoint.index.segments.files if checkpoint.index.segments else ():
        wanted.setdefault(file.folder, set()).add(file.name)
    return [folder for folder, names in wanted.items() if names - set(store.children(folder))]


def sweep(store: Store, ref: Ref, pace: Callable[[], None], progress: Callable[[int], None]) -> int:
    """Delete the files of what is no checkpoint any more, and then its mark; returns how many objects went."""
    count = 0
    for entry in list(store.list(ref.name)):
        pace()
        if count % LOOK_EVERY == 0 and exists(store, f"{ref.name}/{COMMIT}"):
            return count  # somebody has put it back, who has looked at its files before they went
        if entry.key == f"{ref.name}/{COMMIT}":
            continue
        store.delete(entry.key)
        progress(entry.size)
        count += 1
        failpoint("in_sweep")
    store.delete(mark_key(ref))
    return count


def retire(store: Store, ref: Ref) -> None:
    """Say that a checkpoint is being deleted, and take its commit record away."""
    key = f"{ref.name}/{COMMIT}"
    with suppress(NotFound):  # somebody else was faster
        store.put_if_absent(mark_key(ref), store.read(key, MAX_RECORD_BYTES))
    store.delete(key)


def _seconds(created: str) -> float | None:
    try:
        found = datetime.fromisoformat(created)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
