"""What is no message, or says what cannot be: one line of the log now and then, or it could fill a disk.

For requests that cannot be decoded, grpc itself would log a traceback each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

log = logging.getLogger("ckptsvc.agent")

REMIND_EVERY = 60.0
"""Seconds after which it is said again that there are such messages."""

MAX_WHY = 1000
"""Characters of what is said of one."""

LOGGER = "grpc._cython.cygrpc"


class Refusals:
    """Messages that were refused.

    Args:
        what: what they were to be.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock, self._said, self._count = what, clock, -REMIND_EVERY, 0

    def count(self, why: str) -> str:
        """Count one more; the line that is due now, or ""."""
        self._count += 1
        if self._clock() - self._said < REMIND_EVERY:
            return ""
        self._said = self._clock()
        return f"{self._what} were refused: {self._count} so far; the last: {why[:MAX_WHY]}"

    def say(self, why: str) -> None:
        """Count one more, and log it if that is due."""
        if line := self.count(why):
            log.warning(line)


class Malformed(logging.Filter):
    """For the logger of grpc: one line without a traceback, now and then, for all requests that cannot be decoded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._refusals = Refusals("requests that make no sense", clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged; it may be another one then."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, DecodeError):
            return True
        line = self._refusals.count(str(error)[:200])
        if not line:
            return False
        record.msg, record.args = "%s", (line,)
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = record.exc_text = None
        return True


def keep_quiet() -> None:
    """Filter what grpc logs in this process."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(each, Malformed) for each in logger.filters):
        logger.addFilter(Malformed())
