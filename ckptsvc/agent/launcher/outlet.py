"""Where output goes, written to by a thread: a terminal or a disk that is slow or stands still keeps nobody waiting.

What waits to be written is bounded. What finds no room is dropped; how much, is said at the place where it is missing.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

BUFFER = 32 << 20
"""Bytes that may wait for one outlet."""

CHUNK = 1 << 16
"""Most bytes in one write."""

STANDSTILL, LAST_WORDS = 5.0, 20.0
"""Seconds that an outlet which is being closed may stand still, and have in all, for what still waits."""

_OVERHEAD = 100
"""Bytes that one piece takes besides its own, about."""


class Place:
    """One file that an outlet writes to. It is given up when it fails for the first time.

    Args:
        path: to append to, made when there is something to write; None: `fd` is there already, and stays open.
        fd: the descriptor.
        failed: called, in the outlet's thread, with what went wrong.
    """

    def __init__(self, path: Path | None, fd: int = -1, failed: Callable[[str], None] = lambda why: None) -> None:
        self._path, self._fd, self._failed = path, fd, failed
        self.gone = False
        self.missing = 0  # lines that were dropped since the last that were not

    def write(self, data: bytes) -> None:
        """Write all, or give the place up."""
        try:
            if self._fd < 0 and self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            view = memoryview(data)
            while view:
                with contextlib.suppress(BlockingIOError):  # a terminal that somebody has made non-blocking
                    view = view[os.write(self._fd, view) :]
                    continue
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
        except (OSError, ValueError) as error:
            self.gone = True
            self._failed(getattr(error, "strerror", None) or str(error))

    def close(self) -> None:
        """Close what was opened here."""
        if self._path is not None and self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)


class Outlet:
    """A thread that writes to places, in the order in which it is told to. Only `close` waits for it."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Place, bytes | None]] = deque()  # None: nothing more comes
        self._held = 0
        self._moved = 0.0
        self._closing = False
        # A daemon: one that is stuck in a write does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, place: Place, line: bytes) -> None:
        """Write a line, or drop it if too much waits."""
        with self._changed:
            if place.gone:
                return
            if self._held + len(line) + _OVERHEAD > BUFFER:
                place.missing += 1
                return
            self._tell_missing(place)
            self._append(place, line)

    def finish(self, place: Place) -> None:
        """Nothing more comes for this place."""
        with self._changed:
            self._tell_missing(place)
            self._append(place, None)

    def close(self) -> None:
        """Write what still waits, if that goes on."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._moved = began = time.monotonic()
        while self._thread.is_alive():
            left = min(self._moved + STANDSTILL, began + LAST_WORDS) - time.monotonic()
            if left <= 0:
                return
            self._thread.join(left)

    def _tell_missing(self, place: Place) -> None:
        if place.missing:
            self._append(place, f"[ckptsvc run: {place.missing} lines are missing here: writing was slow]\n".encode())
            place.missing = 0

    def _append(self, place: Place, line: bytes | None) -> None:
        self._waiting.append((place, line))
        self._held += len(line or b"") + _OVERHEAD
        self._changed.notify()

    def _run(self) -> None:
        while taken := self._take():
            place, lines, ends = taken
            if lines and not place.gone:
                place.write(b"".join(lines))
            if ends:
                place.close()
            self._moved = time.monotonic()
            with self._changed:
                self._held -= sum(map(len, lines)) + _OVERHEAD * (len(lines) + ends)

    def _take(self) -> tuple[Place, list[bytes], bool] | None:
        """The next lines for one place, and whether they are its last; None at the end of all."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            place, size = self._waiting[0][0], 0
            lines: list[bytes] = []
            while self._waiting and self._waiting[0][0] is place and size < CHUNK:
                line = self._waiting.popleft()[1]
                if line is None:
                    return place, lines, True
                lines.append(line)
                size += len(line)
            return place, lines, False
