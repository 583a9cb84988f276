"""A file that is written while it is made.

It is made in memory, in order, and written behind that by the store's own write path; what is written is given back.
The memory is one mapping as long as the file, of which only the part between the two is ever there: files may be
larger than memory.

    filled by the reader ----> [final] ----> prepared (fixed bytes, CRCs, digests) ----> written, given back
"""

from __future__ import annotations

import mmap
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput, SaveFailed, StoreError
from ckptsvc.format.checksum import EXTENT, Digests, extent_digests
from ckptsvc.interop.outputs import OutputFile
from ckptsvc.pipeline.read import carrier
from ckptsvc.storage import Store
from ckptsvc.types import DTYPES

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux: the pages need no promise of memory or swap. The mmap module has the name from Python 3.13 on."""

_HUGE = 2 << 20
_CHECKED = 1 << 20  # bytes of a CRC at a time


class StoppedError(Exception):
    """Another part of the conversion failed; this one gives up. Never seen outside."""


class Gate:
    """What the threads of a conversion share: how much is in memory, and whether one of them has failed.

    Args:
        limit: bytes of files that may be in memory, filled and not yet written.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.changed = threading.Condition()
        self.held = 0
        self.most = 0
        self.unpublished = 0
        self.open = 0
        self.waiting = 0
        self.error: BaseException | None = None

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes more may be in memory.

        Raises:
            StoppedError: something failed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.error or self._may_take(nbytes))
            if self.error:
                raise StoppedError
            self.held += nbytes
            self.most = max(self.most, self.held)
            self.unpublished += 1

    def room(self, most: int) -> None:
        """Wait until fewer than so many files are being written.

        Raises:
            StoppedError: something failed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.error or self.open < most or self.waiting == self.open)
            if self.error:
                raise StoppedError

    def _may_take(self, nbytes: int) -> bool:
        # Where every writer waits for more than there is, only more will free anything.
        stuck = not self.unpublished and self.waiting == self.open
        return not self.held or self.held + nbytes <= self.limit or stuck

    def fail(self, error: BaseException) -> None:
        """Let all others give up; the first error is the one that is told."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


class Stream:
    """One file on its way; `open` starts to write it.

    Attributes:
        file: the plan of it.
        digests: xxh3_64 of every extent, once it is written.
    """

    def __init__(self, file: OutputFile, gate: Gate, store: Store, on_written: Callable[[int], None]) -> None:
        self.file = file
        self._gate, self._store, self._on_written = gate, store, on_written
        self._memory: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._thread: threading.Thread | None = None
        self._final = self._asked = self._prepared = self._written = self._dropped = 0
        self._blocked = False
        self._fixed = self._crc = 0
        self._sum = 0
        self._patches: list[tuple[int, bytes]] = []
        self._digests: list[NDArray[np.uint64]] = []
        self._partial = xxhash.xxh3_64()

    @property
    def digests(self) -> Digests:
        """xxh3_64 of every extent of the file."""
        return np.concatenate([np.empty(0, np.uint64), *self._digests])

    def open(self, done: Callable[[Stream], None]) -> None:
        """Map the memory and start to write; `done` is called in the writing thread at the end.

        Raises:
            InvalidInput: the system does not give so many addresses.
        """
        nbytes = self.file.nbytes
        if nbytes:
            self._memory = _mapping(nbytes)
            self._view = memoryview(self._memory)[:nbytes]
        with self._gate.changed:
            self._gate.open += 1
        self._thread = threading.Thread(target=self._write, args=(done,), name="ckptsvc-convert")
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is written or has failed."""
        return self._thread is not None and not self._thread.is_alive()

    def join(self) -> None:
        """Wait until it is written or has failed."""
        if self._thread is not None:
            self._thread.join()

    def array(self, offset: int, dtype: str, count: int) -> NDArray[Any]:
        """Elements of the file, to be filled; only while they are not published."""
        return np.frombuffer(self._view, carrier(DTYPES[dtype].itemsize), count, offset)

    def publish(self, final: int) -> None:
        """All fills before this byte are made. The caller holds `gate.changed` and wakes those who wait."""
        self._final = final
        if self._blocked and final >= self._asked:  # not when it wakes up: until then it would seem to be stuck
            self._blocked = False
            self._gate.waiting -= 1

    def _write(self, done: Callable[[Stream], None]) -> None:
        try:
            self._store.write(self.file.key, self._view, self.file.nbytes, ready=self._ready, progress=self._progress)
            if self._prepared < self.file.nbytes:
                raise SaveFailed(f"the store {self._store.url} does not wait for what it writes")
            if self.file.nbytes % EXTENT:
                self._digests.append(np.array([self._partial.intdigest()], np.uint64))
            done(self)
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001  told by the thread that waits for all
            self._gate.fail(error)
        finally:
            self._close()

    def _close(self) -> None:
        # An array may still look at the mapping, so that it cannot be closed; its pages go all the same.
        if self._memory is not None:
            with suppress(ValueError, OSError):
                self._memory.madvise(mmap.MADV_DONTNEED)
        self._memory, self._view = None, memoryview(b"")
        with self._gate.changed:
            self._gate.open -= 1
            self._gate.changed.notify_all()

    # ---- in the writing thread ------------------------------------------------------------------------------

    def _ready(self, nbytes: int) -> None:
        """See `Store.write`."""
        if nbytes < self._asked:
            error = StoreError(f"{self._store.url}/{self.file.key} is to be written again from its beginning")
            error.retryable = True  # as a whole: its first bytes are not in memory any more
            raise error
        self._asked = nbytes
        with self._gate.changed:
            if self._final < nbytes and not self._gate.error:
                self._blocked = True
                self._gate.waiting += 1
                self._gate.changed.notify_all()
                self._gate.changed.wait_for(lambda: not self._blocked or self._gate.error)
            if self._gate.error:
                raise StoppedError
        start, self._prepared = self._prepared, nbytes
        if start < nbytes:
            self._lay(start, nbytes)
            self._sum_up(start, nbytes)
            self._patch(start, nbytes)
            self._digest(start, nbytes)

    def _lay(self, start: int, stop: int) -> None:
        """Put the fixed bytes that lie in this range."""
        fixed = self.file.fixed
        while self._fixed < len(fixed):
            at, data = fixed[self._fixed]
            if at >= stop:
                return
            low, high = max(at, start), min(at + len(data), stop)
            self._view[low:high] = data[low - at : high - at]
            if at + len(data) > stop:
                return
            self._fixed += 1

    def _sum_up(self, start: int, stop: int) -> None:
        """Carry the CRCs on over this range."""
        crcs = self.file.crcs
        while self._crc < len(crcs):
            first, nbytes, places = crcs[self._crc]
            for low in range(max(first, start), min(first + nbytes, stop), _CHECKED):
                with self._view[low : min(low + _CHECKED, first + nbytes, stop)] as part:
                    self._sum = zlib.crc32(part, self._sum)
            if first + nbytes > stop:
                return
            self._patches += [(at, self._sum.to_bytes(4, "little")) for at in places]
            self._sum = 0
            self._crc += 1

    def _patch(self, start: int, stop: int) -> None:
        later = []
        for at, data in self._patches:
            low, high = max(at, start), min(at + len(data), stop)
            if low < high:
                self._view[low:high] = data[low - at : high - at]
            if at + len(data) > stop:
                later.append((at, data))
        self._patches = later

    def _digest(self, start: int, stop: int) -> None:
        """Carry the digests on; an extent may end in a later range."""
        head = min(stop, -(-start // EXTENT) * EXTENT)
        if start < head:
            self._partial.update(self._view[start:head])
            if head % EXTENT == 0:
                self._digests.append(np.array([self._partial.intdigest()], np.uint64))
                self._partial.reset()
        whole = max(head, stop // EXTENT * EXTENT)
        if head < whole:
            with self._view[head:whole] as part:
                self._digests.append(extent_digests(part))
        if whole < stop:
            self._partial.update(self._view[whole:stop])

    def _progress(self, nbytes: int) -> None:
        """See `Store.write`: what is written is given back, to the system and to the others."""
        self._written += nbytes
        step = _HUGE if self.file.nbytes >= _HUGE else mmap.PAGESIZE
        stop = self._written // step * step
        if stop > self._dropped and self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED, self._dropped, stop - self._dropped)
            self._dropped = stop
        with self._gate.changed:
            self._gate.held -= nbytes
            self._gate.changed.notify_all()
        self._on_written(nbytes)


def _mapping(nbytes: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        raise InvalidInput(
            f"the system does not map {nbytes} bytes for a file: {error.strerror}",
            hint="lift `ulimit -v`, or set vm.overcommit_memory to 0 or 1",
        ) from None
    if nbytes >= _HUGE:
        with suppress(OSError):  # a kernel without huge pages; small ones cost more to touch than to fill
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
