"""How a large object is cut into requests, and the parts themselves as they are handed to obstore and come free."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from ckptsvc.storage.api import Progress
from ckptsvc_drivers.object_clients import LEAST_PART

MiB = 1 << 20
MOST_PARTS = 10_000
"""Parts of one object at S3 and Google (Azure: 50,000)."""

_PATIENCE = 30.0  # seconds for requests that were given up to let go of the memory; it takes some milliseconds


class Cut(NamedTuple):
    """Bytes of a part, and how many are sent at a time."""

    part: int
    connections: int


def cut(size: int, part: int = 0, connections: int = 0) -> Cut:
    """How an object of `size` bytes is sent: one request where that is enough, else many of some MiB each.

    One connection to a cloud's store carries some 100 MB/s, so that it takes many for a large object. All parts of one
    up to 128 MiB are under way at once: with half as many connections the last ones would wait for the first.

    Args:
        size: of the object, in bytes.
        part: bytes of a part, where they are set; 0 chooses.
        connections: requests at a time; 0 chooses.
    """
    if not part:
        part = 8 * MiB if size < 64 * MiB else 16 * MiB
    least = -(-size // MOST_PARTS)
    part = max(part, LEAST_PART, -(-least // MiB) * MiB)
    if not connections:
        connections = min(max(8, size // (64 * MiB)), 16)
    return Cut(part, max(1, min(connections, -(-size // part))))


class Parts:
    """The parts of an object, in order; obstore asks for the next one in the thread that called it.

    It sends a part from where it lies, and holds on to it until the server has acknowledged it: only then can our view
    of it be released, which is how we know.

    Args:
        view: the object.
        part: bytes of each part but the last.
        ready: see `Store.write`.
        progress: see `Store.write`.
    """

    def __init__(self, view: memoryview, part: int, ready: Progress | None, progress: Progress | None) -> None:
        self._view, self._part, self._ready, self._progress = view, part, ready, progress
        self._sent: deque[tuple[memoryview, int]] = deque()
        self._begun = 0

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> memoryview:
        self.report()
        if self._begun >= len(self._view):
            raise StopIteration
        stop = min(self._begun + self._part, len(self._view))
        if self._ready is not None:
            self._ready(stop)
        part = self._view[self._begun : stop]
        self._sent.append((part, stop - self._begun))
        self._begun = stop
        return part

    def report(self) -> None:
        """Report what has been acknowledged, in the order of the object."""
        while self._sent and _released(self._sent[0][0]):
            _, nbytes = self._sent.popleft()
            if self._progress is not None:
                self._progress(nbytes)

    def let_go(self) -> bool:
        """After the last request has ended or was given up: wait until nobody holds a part; False if one is held."""
        deadline = time.monotonic() + _PATIENCE
        for part, _ in self._sent:
            while not _released(part):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
        return True


def _released(part: memoryview) -> bool:
    try:
        part.release()
    except BufferError:  # somebody holds it
        return False
    return True
