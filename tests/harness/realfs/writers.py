"""Writers of shards that note what has been acknowledged, so that it can be looked for after a fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from harness.runtime import eventually

from ckptsvc.errors import StoreError
from ckptsvc.storage.testing import MiB, content_of


class Writers:
    """Threads that write one shard after the other and note what has been acknowledged."""

    SIZE = 3 * MiB + 4099

    def __init__(self, write: Callable[[str, bytes], object], threads: int = 2) -> None:
        self._write, self._stop = write, threading.Event()
        self.acknowledged: dict[str, int] = {}
        self.failures: list[Exception] = []
        self._pool = ThreadPoolExecutor(threads)
        self._futures = [self._pool.submit(self._go_on, number) for number in range(threads)]

    def _go_on(self, number: int) -> None:
        for turn in range(10_000):
            if self._stop.is_set():
                return
            seed = 100_000 * number + turn
            try:
                self._write(f"step/{number}-{turn}", content_of(self.SIZE, seed))
            except StoreError as error:
                self.failures.append(error)
                time.sleep(0.1)
            else:
                self.acknowledged[f"step/{number}-{turn}"] = seed

    def wait_for(self, more: int) -> None:
        """Until so many more are acknowledged."""
        wanted = len(self.acknowledged) + more
        eventually(lambda: len(self.acknowledged) >= wanted, f"{more} more shards", 120)

    def end(self) -> None:
        self._stop.set()
        for future in self._futures:
            future.result(120)
        self._pool.shutdown()

    def check(self, read: Callable[[str], bytes]) -> None:
        """Every shard that was acknowledged is there, to the byte."""
        assert self.acknowledged
        for key, seed in self.acknowledged.items():
            assert read(key) == content_of(self.SIZE, seed), key
