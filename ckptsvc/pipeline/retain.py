"""Deleting checkpoints that nothing keeps (see `retention`), such that an interruption anywhere can be taken up again.

    mark     the commit record is copied to retired/NAME: from now on everybody can see what is being deleted
    retire   the commit record is deleted: it is no checkpoint any more, and all its files are still there
    look     was it pinned meanwhile, or does a new checkpoint refer to it? Then the record is put back
    sweep    the files are deleted, as many in a second as is allowed, and the mark at last

Whoever pins a checkpoint, or commits one that refers to others, looks for their commit records after it has said so:
then either it sees that one is gone, or `look` sees what it has said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ckptsvc.errors import Damaged, IncompatibleVersion, NotFound, StoreError
from ckptsvc.format.commit import COMMIT, RETIRED, CommitRecord, parse_checkpoint_name
from ckptsvc.format.limits import MAX_RECORD_BYTES
from ckptsvc.pipeline.catalog import Ref, Refused, find, open_checkpoint
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.pins import pinned
from ckptsvc.pipeline.retention import Candidate, Policy, Verdict, decide
from ckptsvc.storage import Store

RESUME_AFTER = 600.0
"""Seconds after which a deletion that has begun and not ended is taken up: until then somebody may be at it."""

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
    """Committed checkpoints as retention looks at them; those whose record cannot be used are not among them."""
    return [
        Candidate(ref, _seconds(commit.created), commit.values, commit.refers)
        for ref, commit in found
        if isinstance(commit, CommitRecord)
    ]


def judge(store: Store, found: Found, policy: Policy, now: float, needed: Collection[Ref] = ()) -> Verdict:
    """What retention says to the checkpoints of a run.

    Args:
        store: of the run; the pins are read from it.
        found: what `find` returned.
        policy: what to keep.
        now: seconds since 1970.
        needed: checkpoints that something is at work on.

    Raises:
        StoreError: a commit record could not be read: it may refer to any other checkpoint.
    """
    for _, commit in found:
        if isinstance(commit, StoreError):
            raise commit
    return decide(candidates(found), policy, now, pinned=pinned(store), needed=needed)


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
        now: seconds since 1970; None asks the clock.
        resume_after: seconds after which deletions that others began are taken up.
        progress: called with the size of every file that is deleted.

    Raises:
        StoreError: the store failed; the next call goes on where this one was interrupted.
    """
    done, pace = Expired(), Pace(policy.rate)
    now = time.time() if now is None else now
    marks = [ref for ref, since in retired(store).items() if since <= now - resume_after]
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
    halves = [*(ref for ref in sorted(marks) if ref not in there), *verdict.gone]
    holds, refers = wanted_now(store) if halves else (set(), set())
    for ref in halves:
        if ref in holds | refers and put_back(store, ref):
            done.back.append(ref)
        elif ref not in refers:  # a pin alone came too late if files are gone: whoever set it was told so
            done.objects += sweep(store, ref, pace, progress)
            done.gone.append(ref)
    return done


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
    for _, commit in found:
        if isinstance(commit, StoreError):
            raise commit
    return pinned(store), referred(commit for _, commit in found if isinstance(commit, CommitRecord))


def referred(commits: Iterable[CommitRecord]) -> set[Ref]:
    """The checkpoints whose files these need."""
    names = {name for commit in commits for name in commit.refers}
    return {Ref(epoch, step) for step, epoch in filter(None, map(parse_checkpoint_name, names))}


def put_back(store: Store, ref: Ref) -> bool:
    """Make what was a checkpoint one again, from its mark; False where its files are not all there any more."""
    record = whole(store, ref)
    if not record:
        return False
    store.put_if_absent(f"{ref.name}/{COMMIT}", record)
    store.delete(mark_key(ref))
    return True


def whole(store: Store, ref: Ref) -> bytes:
    """The commit record in the mark of a checkpoint whose files are all there; b"" where one is missing."""
    try:
        data = store.read(mark_key(ref), MAX_RECORD_BYTES)
        commit = CommitRecord.decode(data, mark_key(ref))
    except (NotFound, Damaged, IncompatibleVersion):
        return b""
    if (commit.epoch, commit.step) != ref:
        return b""
    try:
        missing = open_checkpoint(store, ref, commit).own_names() - {COMMIT} - set(store.children(ref.name))
    except (Damaged, IncompatibleVersion):
        return b""
    return b"" if missing else data


def sweep(store: Store, ref: Ref, pace: Callable[[], None], progress: Callable[[int], None]) -> int:
    """Delete the files of what is no checkpoint any more, and then its mark; returns how many objects went."""
    count = 0
    for entry in list(store.list(ref.name)):
        pace()
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
