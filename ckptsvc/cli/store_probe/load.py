"""Load on a store for measurements: many objects at a time, and how long each call takes."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptsvc.cli.benchmarks.machine import evict
from ckptsvc.storage import TEMPORARY_PREFIX, Store
from ckptsvc.storage.opening import open_store

FOLDER = "ckptsvc-trial-"
"""Beginning of the keys of all that is written for a measurement."""

_RANDOM = 1 << 20  # bytes that repeat in what is written: more than any compression or deduplication looks back


class Buffers:
    """Page-aligned memory that was touched before: one source, and a target for each of some readers.

    Args:
        size: bytes of each.
        readers: how many targets.
    """

    def __init__(self, size: int, readers: int) -> None:
        self._maps = [mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE) for _ in range(readers + 1)]
        piece = os.urandom(min(_RANDOM, size))
        for memory in self._maps:
            for start in range(0, size, len(piece)):
                memory[start : start + len(piece)] = piece[: min(len(piece), len(memory) - start)]
        self._views = [memoryview(memory) for memory in self._maps]

    @property
    def source(self) -> memoryview:
        """What is written."""
        return self._views[0]

    def target(self, number: int) -> memoryview:
        """Where a reader reads to."""
        return self._views[1 + number]

    def close(self) -> None:
        """Give the memory back."""
        for view in self._views:
            view.release()
        for memory in self._maps:
            memory.close()


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are there already."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(time.sleep, [0.001] * count))
        yield pool


def each(pool: ThreadPoolExecutor, count: int, items: Sequence[str], work: Callable[[int, str], None]) -> float:
    """Do something with all items, `count` at a time; returns the seconds it took.

    Args:
        pool: with at least `count` threads.
        count: how many at a time; each has a number of its own from 0 on.
        items: what is to be done.
        work: called with the number of the worker and an item.
    """
    waiting = iter(items)

    def one(number: int) -> None:
        while (item := next(waiting, None)) is not None:
            work(number, item)

    began = time.perf_counter()
    for future in [pool.submit(one, number) for number in range(count)]:
        future.result()
    return time.perf_counter() - began


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def connect_as_set(url: str, options: Mapping[str, Any] | None = None) -> Store:
    """Open a store as the agent would, with further options of its driver."""
    return open_store(url, options)


def make_cold(store: Store, keys: Sequence[str]) -> str:
    """Take objects out of this node's page cache, where that can be done.

    Returns:
        how it was done, or why nothing is cold.
    """
    if not store.url.startswith(("file://", "lustre://")):
        return "as the server has them"
    root = Path(store.url.partition("://")[2])
    return evict([root / key for key in keys])


def clear(store: Store, folder: str) -> None:
    """Delete all that is below a folder, and with it the folder."""
    for entry in list(store.list(folder)):
        store.delete(entry.key)
    store.delete(f"{folder}/{TEMPORARY_PREFIX}none")  # a driver removes folders that have become empty
