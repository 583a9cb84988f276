"""Who is at work on a conversion: one record for each of its processes, so that two never make the same files.

    process-00000-of-00004.000007     process 0 of 4 is held, for the seventh time

Whoever creates the record of the next turn holds the process's part of the work from then on. The holder itself does so
every `BEAT` seconds, and finds out by it when another process has taken over. A holder on this node is dead when its
process is; one elsewhere when no turn follows for `STALE` seconds, which is waited for: clocks are not compared.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ckptsvc.errors import CkptsvcError, NotFound, RunBusy, SaveFailed
from ckptsvc.storage import Store

BEAT = 10.0
"""Seconds between two turns of a holder that is alive."""

STALE = 60.0
"""Seconds without a turn after which a holder on another node is taken for dead."""

_NAME = re.compile(r"process-(\d{5,})-of-(\d{5,})\.(\d{6,})")


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lease.

    Attributes:
        host: name of the node, for people.
        place: what process ids are unique in: a boot of a kernel, and a namespace of it.
        pid: of the process.
        started: when it was started, in ticks since boot.
        token: random; tells two leases of one process apart.
    """

    host: str
    place: str
    pid: int
    started: int
    token: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        place, pid = f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid()
        return cls(platform.node(), place, pid, _started(pid), secrets.token_hex(8))


class Lease:
    """The right to do the work of one process of a conversion.

    Args:
        store: where the records are kept.
        folder: below which key; "" for the store's top.
        number: which process this is.
        of: how many there are.
    """

    def __init__(self, store: Store, folder: str, number: int, of: int) -> None:
        self._store, self._folder, self._top = store, folder, f"{folder}/" if folder else ""
        self._number, self._of = number, of
        self._holder = Holder.here()
        self._turn: int | None = None
        self._lost = False
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def key(self) -> str:
        """Key of its record; "" where it is not held."""
        return "" if self._turn is None else self._key(self._turn)

    def take(self) -> None:
        """Hold it until `release`; nothing happens where it is held.

        Raises:
            RunBusy: another process does this work, or live ones share it out differently.
        """
        if self._thread is not None:
            return
        before = self._held()
        me = (self._number, self._of)
        self._check_dead({part: turn for part, turn in before.items() if part == me or part[1] != self._of})
        turn = before.get(me, -1) + 1
        if not self._next(turn):
            raise _busy("another process", self._store.url)
        now = self._held()
        if now.get(me) != turn or any(part[1] != self._of and before.get(part) != now[part] for part in now):
            self._store.delete(self.key)
            raise _busy("another process", self._store.url)
        if turn:
            self._store.delete(self._key(turn - 1))
        self._thread = threading.Thread(target=self._beat, name="ckptsvc-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that it is still held, where it was taken.

        Raises:
            SaveFailed: another process has taken over.
        """
        if self._lost:
            raise SaveFailed(
                f"another process has taken over the work of this one in {self._store.url}",
                hint=f"was this one stopped, or cut off from the store, for more than {STALE:.0f} s?",
            )

    def release(self) -> None:
        """Let others have it."""
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join()
        self._thread = None
        if not self._lost:
            self._store.delete(self.key)
        self._turn = None

    def _beat(self) -> None:
        while not self._ending.wait(BEAT):
            before, turn = self.key, (self._turn or 0) + 1
            try:
                if not self._next(turn):
                    self._lost = True
                    return
                self._store.delete(before)
            except CkptsvcError:  # tried again: what counts is whether the next turn can be had
                continue

    def _next(self, turn: int) -> bool:
        """Whether the record of a turn is ours now."""
        key, mine = self._key(turn), msgspec.json.encode(self._holder)
        try:
            won = self._store.put_if_absent(key, mine) or self._store.read(key) == mine  # an answer may get lost
        except NotFound:
            return False
        if won:
            self._turn = turn
        return won

    def _check_dead(self, rivals: Mapping[tuple[int, int], int]) -> None:
        """Raise RunBusy if one of these holders, with their turns, is alive."""
        waiting = {}
        for part, turn in rivals.items():
            holder = self._read(_name(*part, turn))
            if holder.place != self._holder.place:
                waiting[part] = holder
            elif _started(holder.pid) == holder.started:
                raise _busy(f"process {holder.pid} of this node", self._store.url)
        end = time.monotonic() + STALE
        while waiting and time.monotonic() < end:
            now = self._held()
            waiting = {part: holder for part, holder in waiting.items() if part in now}
            for part, holder in waiting.items():
                if now[part] != rivals[part]:
                    raise _busy(f"process {holder.pid} of {holder.host}", self._store.url)
            time.sleep(STALE / 60)

    def _read(self, name: str) -> Holder:
        try:
            return msgspec.json.decode(self._store.read(f"{self._top}{name}"), type=Holder)
        except (msgspec.MsgspecError, NotFound):  # it has gone on, or is being written: its turns will tell
            return Holder("another node", "", 0, 0, "")

    def _held(self) -> dict[tuple[int, int], int]:
        """The newest turn of every process that holds one."""
        found: dict[tuple[int, int], int] = {}
        for name in self._store.children(self._folder):
            match = _NAME.fullmatch(name)
            if match:
                number, of, turn = map(int, match.groups())
                found[number, of] = max(turn, found.get((number, of), 0))
        return found

    def _key(self, turn: int) -> str:
        return self._top + _name(self._number, self._of, turn)


def _name(number: int, of: int, turn: int) -> str:
    return f"process-{number:05d}-of-{of:05d}.{turn:06d}"


def _busy(who: str, where: str) -> RunBusy:
    return RunBusy(
        f"{who} is at work on a conversion into this target ({where})",
        hint="wait for it, or stop it and give the same command again",
    )


def _started(pid: int) -> int:
    """When a process was started, in ticks since boot (field 22 of proc_pid_stat(5)); -1 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[19])
