"""Requests that are no messages: grpc logs a traceback for each, and whoever sends them could fill a disk so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

REMIND_EVERY = 60.0
"""Seconds after which it is said again that there are such requests."""

LOGGER = "grpc._cython.cygrpc"


class Malformed(logging.Filter):
    """For the logger of grpc: one line without a traceback, now and then, for all requests that cannot be decoded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._said, self._count = clock, -REMIND_EVERY, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged; it may be another one then."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, DecodeError):
            return True
        self._count += 1
        if self._clock() - self._said < REMIND_EVERY:
            return False
        record.msg = "requests that make no sense were refused: %d so far; the last: %s"
        record.args = (self._count, str(error)[:200])
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = record.exc_text = None
        self._said = self._clock()
        return True


def keep_quiet() -> None:
    """Filter what grpc logs in this process."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(each, Malformed) for each in logger.filters):
        logger.addFilter(Malformed())
