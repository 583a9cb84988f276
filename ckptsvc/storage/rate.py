"""How fast bytes may go, over all threads together: whoever has moved some waits until they are paid for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ckptsvc.errors import ConfigError


class Rate:
    """A limit in bytes per second; None lets everything pass. What is not used is not saved up for later.

    Args:
        bytes_per_second: the limit.
        clock: seconds that go on (tests).
        sleep: waits for so many of them (tests).
    """

    def __init__(
        self,
        bytes_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = 0.0  # when all bytes let through so far are paid for
        self._waited = 0.0
        self.limit = bytes_per_second

    @property
    def limit(self) -> float | None:
        """The limit; a new one holds from the next `pay` on.

        Raises:
            ConfigError: it is not more than 0.
        """
        return self._limit

    @limit.setter
    def limit(self, bytes_per_second: float | None) -> None:
        if bytes_per_second is not None and bytes_per_second <= 0:
            raise ConfigError(f"bytes_per_second is {bytes_per_second}; it must be more than 0")
        self._limit = bytes_per_second

    def collect(self) -> float:
        """Seconds that all threads together have waited since the last call."""
        with self._lock:
            waited, self._waited = self._waited, 0.0
        return waited

    def pay(self, nbytes: int) -> None:
        """Wait for as long as `nbytes` take at the limit, in line behind all other threads."""
        limit = self._limit
        if limit is None:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + nbytes / limit
            wait = self._free_at - now
            self._waited += wait
        self._sleep(wait)
