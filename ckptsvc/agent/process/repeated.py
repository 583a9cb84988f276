"""Errors of which there may be thousands: grpc and asyncio log a traceback for each, and could fill a disk so.

They are requests that are no messages, which whoever likes may send, and what there is no memory for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

REMIND_EVERY = 60.0
"""Seconds after which it is said again that there are such errors."""

LOGGERS = ("grpc._cython.cygrpc", "asyncio")

_SENTENCES: dict[type[BaseException], str] = {
    DecodeError: "requests that make no sense were refused: %d so far; the last: %s",
    MemoryError: "the agent gets no memory: %d things were left undone so far; the last: %s",
}
_MOST_TOLD = 200


class Repeated(logging.Filter):
    """For the loggers of grpc and asyncio: one line without a traceback, now and then, for all errors of a kind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said = dict.fromkeys(_SENTENCES, -REMIND_EVERY)
        self._count = dict.fromkeys(_SENTENCES, 0)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged; it may be another one then."""
        error = record.exc_info[1] if record.exc_info else None
        kind = next((kind for kind in _SENTENCES if isinstance(error, kind)), None)
        if kind is None:
            return True
        self._count[kind] += 1
        if self._clock() - self._said[kind] < REMIND_EVERY:
            return False
        last = str(error) or record.getMessage().partition("\n")[0]
        record.msg, record.args = _SENTENCES[kind], (self._count[kind], last[:_MOST_TOLD])
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = record.exc_text = None
        self._said[kind] = self._clock()
        return True


def keep_quiet() -> None:
    """Filter what grpc and asyncio log in this process."""
    shared = Repeated()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, Repeated) for each in logger.filters):
            logger.addFilter(shared)
