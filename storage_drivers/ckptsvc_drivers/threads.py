"""A few threads that all transfers of a store share, and how one transfer is spread over them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ckptsvc.storage.api import Progress


class Threads:
    """Threads that transfer.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool, self._pid = self._new_pool(), os.getpid()

    def close(self) -> None:
        """End the threads."""
        if self._pid == os.getpid():
            self._pool.shutdown()

    def spread(
        self,
        work: Callable[[int, int], int],
        nbytes: int,
        step: int,
        ready: Progress | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Call `work(start, stop)` in the threads for every step of `nbytes`, and `progress` with its result.

        When this returns or raises, nothing is running or waiting any more: the memory is the caller's again.
        """
        pool = self._live_pool()
        pending: deque[Future[int]] = deque()

        def finish(*, down_to: int) -> None:
            while len(pending) > down_to or (pending and pending[0].done()):
                done = pending.popleft().result()
                if progress is not None:
                    progress(done)

        try:
            for start in range(0, nbytes, step):
                # A few steps ahead and no more, so that concurrent transfers take turns. What is through is reported
                # before `ready` is asked: it may wait until memory is free.
                finish(down_to=2 * self.count - 1)
                if ready is not None:
                    ready(min(start + step, nbytes))
                pending.append(pool.submit(work, start, min(start + step, nbytes)))
            finish(down_to=0)
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def _live_pool(self) -> ThreadPoolExecutor:
        if self._pid != os.getpid():  # a forked child has none of its parent's threads
            self._pool, self._pid = self._new_pool(), os.getpid()
        return self._pool

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count, thread_name_prefix="ckptsvc-transfer")
