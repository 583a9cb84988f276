"""What a conversion has finished, kept beside its target so that it can be resumed.

    plan            what is being made, from what: put if absent, so that a second conversion into the target sees it
    done-000007     a finished task: its files, their sizes and digests
    turn-0          one of several processes completes the target
    process-...     who is at work on it (interop.conversion.lease)
    renaming        all files are there, and only the target's name is missing

The first two verify themselves. All of it is removed when the target is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ckptsvc.errors import Damaged, NotFound, RunBusy, SaveFailed
from ckptsvc.format.checksum import EXTENT, Digests, digest128, extent_count
from ckptsvc.format.record import R
from ckptsvc.interop.conversion.tasks import Task
from ckptsvc.storage import Store

_PLAN, _RENAMING = "plan", "renaming"
_LIMIT = 1 << 30  # bytes of a record: 8 for every MiB of a task


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a conversion is.

    Attributes:
        identity: digest of the sources, the options and the target's format.
        title: for people.
        created: ISO 8601 in UTC; becomes the time of what is written, also when it is resumed.
        epoch: of a target of our own format.
    """

    identity: str
    title: str
    created: str
    epoch: int = 0


class _Done(msgspec.Struct, frozen=True):
    identity: str
    layout: str
    files: list[tuple[str, int]]
    digests: bytes


class Ledger:
    """The records of a conversion.

    Args:
        store: where they are kept.
        folder: below which key; "" for the store's top.
    """

    def __init__(self, store: Store, folder: str = "") -> None:
        self._store, self._folder = store, folder
        self._plan: Plan | None = None

    def read(self) -> Plan | None:
        """The plan of the conversion that is under way, if one is.

        Raises:
            Damaged: it cannot be read.
        """
        key = self._key(_PLAN)
        try:
            return _opened(self._store.read(key), Plan, self._where(key))
        except NotFound:
            return None

    def claim(self, plan: Plan) -> Plan:
        """Begin, or go on with, a conversion; returns the plan that counts: that of who began.

        Raises:
            RunBusy: another conversion into this target is unfinished.
        """
        found = self.read()
        if found is None:
            if not self._store.put_if_absent(self._key(_PLAN), _sealed(plan)):
                found = self.read()
            if found is None:
                found = plan
        if found.identity != plan.identity:
            raise RunBusy(
                f"another conversion is unfinished here, begun {found.created}: {found.title}",
                hint="give the same command again to finish it, or --restart to throw away what it has done",
            )
        self._plan = found
        return found

    def done(self, tasks: Sequence[Task], layouts: Sequence[str], files: Store) -> dict[int, dict[str, Digests]]:
        """Digests by file of the tasks that are finished.

        A task counts only if all its files are there in full size; what does not count is forgotten.

        Args:
            tasks: of the plan.
            layouts: what identifies the files of each.
            files: where the files are.

        Raises:
            Damaged: a record cannot be read, or is of another plan.
        """
        there = {name for name in self._store.children(self._folder) if name.startswith("done-")}
        found = {}
        for task, layout in zip(tasks, layouts, strict=True):
            name = _name(task)
            if name not in there:
                continue
            record = self._record(name, layout)
            if all(_has(files, key, nbytes) for key, nbytes in record.files):
                found[task.number] = _split(record)
            else:
                self._store.delete(self._key(name))
        return found

    def record(self, task: Task, layout: str, digests: Mapping[str, Digests]) -> None:
        """Note a finished task, durably."""
        assert self._plan is not None
        files = [(file.key, file.nbytes) for file in task.files]
        data = np.concatenate([np.empty(0, np.uint64), *(digests[key] for key, _ in files)]).astype("<u8").tobytes()
        self._store.put_if_absent(self._key(_name(task)), _sealed(_Done(self._plan.identity, layout, files, data)))

    def needs(self, task: Task) -> bool:
        """Whether a task is still to be made.

        Raises:
            SaveFailed: this conversion is not the one under way any more.
        """
        if self.read() != self._plan:
            raise SaveFailed(
                f"what was done for {self._store.url} is somebody else's now, or was thrown away",
                hint="did another command say --restart? then give this one again",
            )
        return not _has(self._store, self._key(_name(task)))

    def elect(self, turn: int) -> bool:
        """Whether this process is the one of several that completes the target in this turn."""
        return self._store.put_if_absent(self._key(f"turn-{turn}"), b"1")

    def note_renaming(self) -> None:
        """Note that all is written, and only the target's name is missing."""
        self._store.put_if_absent(self._key(_RENAMING), b"1")

    def is_renaming(self) -> bool:
        """Whether that was noted."""
        return _RENAMING in self._store.children(self._folder)

    def forget(self, keep: str = "") -> None:
        """Remove all records but `keep`, and what interrupted writes of them have left, the plan last."""
        plan = self._key(_PLAN)
        for entry in list(self._store.list(self._folder)):
            if entry.key not in (plan, keep):
                self._store.delete(entry.key)
        self._store.delete(plan)

    def _record(self, name: str, layout: str) -> _Done:
        assert self._plan is not None
        key = self._key(name)
        record = _opened(self._store.read(key, _LIMIT), _Done, self._where(key))
        if (record.identity, record.layout) != (self._plan.identity, layout):
            raise Damaged(
                f"{self._where(key)} is of another plan", hint="another version of ckptsvc began it? give --restart"
            )
        return record

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _where(self, key: str) -> str:
        return f"{self._store.url}/{key}"


def put_same(store: Store, key: str, data: bytes) -> None:
    """Create a small object whose bytes are the same whoever writes it.

    Raises:
        SaveFailed: there is one with other bytes.
    """
    if not store.put_if_absent(key, data) and store.read(key, max(len(data), 1 << 20)) != data:
        raise SaveFailed(f"{store.url}/{key} is there already, and is not of this conversion")


def _name(task: Task) -> str:
    return f"done-{task.number:06d}"


def _has(files: Store, key: str, nbytes: int | None = None) -> bool:
    try:
        return files.size(key) == nbytes or nbytes is None
    except NotFound:
        return False


def _split(record: _Done) -> dict[str, Digests]:
    all_of_them = np.frombuffer(record.digests, "<u8").astype(np.uint64)
    counts = [extent_count(nbytes, EXTENT) for _, nbytes in record.files]
    if sum(counts) != len(all_of_them):
        raise Damaged("a record of a finished task has another number of digests than its files have extents")
    parts = np.split(all_of_them, np.cumsum(counts)[:-1])
    return {key: part for (key, _), part in zip(record.files, parts, strict=True)}


def _sealed(record: msgspec.Struct) -> bytes:
    data = msgspec.json.encode(record)
    return digest128(data).encode() + b"\n" + data


def _opened(data: bytes, cls: type[R], what: str) -> R:
    check, _, body = data.partition(b"\n")
    if check.decode("latin-1") != digest128(body):
        raise Damaged(f"{what} does not match its own checksum", hint="--restart throws it away")
    try:
        return msgspec.json.decode(body, type=cls)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Damaged(f"{what} is malformed: {error}", hint="--restart throws it away") from None
