"""What there may be thousands of: one line of the log now and then, or it could fill a disk.

Messages that say what cannot be; and errors for which grpc and asyncio would log a traceback each: requests that are no
messages, which whoever likes may send, and what there is no memory for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

log = logging.getLogger("ckptsvc.agent")

REMIND_EVERY = 60.0
"""Seconds after which it is said again that there are such things."""

MOST_TOLD = 1000
"""Characters of what is said of one."""

LOGGERS = ("grpc._cython.cygrpc", "asyncio")


class Repeated:
    """Things of one kind.

    Args:
        what: the beginning of the line, with %d for how many there were so far; the last of them is its end.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock, self._said, self._count = what, clock, -REMIND_EVERY, 0

    def count(self, last: str) -> str:
        """Count one more; the line that is due now, or ""."""
        self._count += 1
        if self._clock() - self._said < REMIND_EVERY:
            return ""
        self._said = self._clock()
        return f"{self._what % self._count} so far; the last: {last[:MOST_TOLD]}"

    def say(self, last: str) -> None:
        """Count one more, and log the line if that is due."""
        if line := self.count(last):
            log.warning(line)


class Refusals(Repeated):
    """Messages that were refused; `what` is what they were to be."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(f"{what} were refused: %d", clock)


class WithoutTracebacks(logging.Filter):
    """For the loggers of grpc and asyncio: one line, now and then, for all errors of a kind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._kinds: dict[type[BaseException], Repeated] = {
            DecodeError: Refusals("requests that make no sense", clock),
            MemoryError: Repeated("the agent gets no memory: %d things were left undone", clock),
        }

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged; it may be another one then."""
        error = record.exc_info[1] if record.exc_info else None
        repeated = next((each for kind, each in self._kinds.items() if isinstance(error, kind)), None)
        if repeated is None:
            return True
        last = str(error) or record.getMessage().partition("\n")[0]
        record.msg, record.args = "%s", (repeated.count(last[:200]),)
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = record.exc_text = None
        return record.args != ("",)


def keep_quiet() -> None:
    """Filter what grpc and asyncio log in this process."""
    shared = WithoutTracebacks()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, WithoutTracebacks) for each in logger.filters):
            logger.addFilter(shared)
