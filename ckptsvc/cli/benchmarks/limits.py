"""The raw limits of the machine, measured in the same call as the product: what the bare work would take.

    memcpy         one copy of the bytes into shared memory whose pages were touched before
    direct write   O_DIRECT, 4 threads, 8 MiB blocks, space reserved beforehand, fsync at the end
    cold read      the fastest of several ways to read the same files, their pages evicted from the cache

Nothing here uses the product's own I/O code.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from ckptsvc_drivers.linux import fallocate

from ckptsvc.cli.benchmarks.machine import evict

THREADS = 4
BLOCK = 8 << 20
PAGE = mmap.PAGESIZE

_SOURCE_LIMIT = 1 << 29  # bytes copied from, again and again: more than caches hold, less than the state


class Scratch:
    """Shared memory of the same kind and size as an arena, touched; target of copies, source of writes.

    Args:
        nbytes: how much; rounded up to whole blocks of direct I/O.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        size = -(-max(nbytes, 1) // BLOCK) * BLOCK
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self.view = memoryview(mmap.mmap(-1, size, flags=flags))
        self._target = torch.frombuffer(self.view, dtype=torch.uint8)
        self._target.fill_(1)
        self._source = torch.ones(min(max(nbytes, 1), _SOURCE_LIMIT), dtype=torch.uint8)

    def memcpy(self) -> float:
        """Seconds for one copy of `nbytes` bytes."""
        began = time.perf_counter()
        for start in range(0, self.nbytes, len(self._source)):
            stop = min(start + len(self._source), self.nbytes)
            self._target[start:stop].copy_(self._source[: stop - start])
        return time.perf_counter() - began


def direct_write(directory: Path, scratch: Scratch) -> tuple[float, str]:
    """Write the scratch memory to a new file and sync it.

    Returns:
        (seconds, how it was written). The file is gone afterwards.

    Raises:
        OSError: the directory cannot be written, or is full.
    """
    path = directory / "raw-write"
    try:
        try:
            return _write(path, scratch, os.O_DIRECT), "O_DIRECT, 4 threads x 8 MiB, preallocated, fsync"
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return _write(path, scratch, 0), "buffered (no O_DIRECT here), 4 threads x 8 MiB, preallocated, fsync"
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def _write(path: Path, scratch: Scratch, flag: int) -> float:
    with suppress(FileNotFoundError):
        path.unlink()
    size = -(-scratch.nbytes // PAGE) * PAGE
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flag, 0o600)
    try:
        fallocate(fd, size)
        _in_threads(lambda start, stop: _all(os.pwritev, fd, scratch, start, stop), size, THREADS, BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)
    return time.perf_counter() - began


def cold_reads(paths: Sequence[Path], scratch: Scratch) -> tuple[dict[str, float], str]:
    """Read whole files into the scratch memory, once in each way that is worth trying.

    Args:
        paths: the files, read one after the other.
        scratch: where to; the largest of them fits in.

    Returns:
        (seconds by way, how the page cache was emptied).
    """
    found: dict[str, float] = {}
    how = ""
    for way, (flag, threads) in _WAYS.items():
        how = evict(paths)
        with suppress(OSError):  # no direct I/O here
            found[way] = sum(_read(path, scratch, flag, threads) for path in paths)
    return found, how


_WAYS = {"buffered": (0, 1), "buffered, 2 runs": (0, 2), "O_DIRECT, 4 threads": (os.O_DIRECT, THREADS)}


def _read(path: Path, scratch: Scratch, flag: int, threads: int) -> float:
    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY | flag)
    try:
        size = os.fstat(fd).st_size
        step = BLOCK if flag else -(-size // threads)
        _in_threads(lambda start, stop: _all(os.preadv, fd, scratch, start, stop), size, threads, step)
    finally:
        os.close(fd)
    return time.perf_counter() - began


def _all(call: Callable[..., int], fd: int, scratch: Scratch, start: int, stop: int) -> None:
    """Write or read until the range is through; the last block is padded to a whole page, as direct I/O wants it."""
    while start < stop:
        part = scratch.view[start : -(-stop // PAGE) * PAGE]
        start += call(fd, [part], start)


def _in_threads(work: Callable[[int, int], None], nbytes: int, threads: int, step: int) -> None:
    ranges = [(start, min(start + step, nbytes)) for start in range(0, nbytes, max(step, 1))]
    if threads == 1:
        for start, stop in ranges:
            work(start, stop)
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, start, stop) for start, stop in ranges]:
            future.result()
