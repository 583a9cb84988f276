"""Orders that come over a stream, without those that a process finds there when it has stood still for long.

While a process is frozen (SIGSTOP, a debugger, a machine that sleeps) what is sent to it lies in its sockets, also when
the sender has given it up meanwhile and decided otherwise. It reads that first, and then that the stream has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable
from typing import TypeVar

log = logging.getLogger("ckptsvc.agent")

LOOK_EVERY = 0.3
"""Seconds between looks at the clock."""

PAUSE = 1.5
"""Seconds between two looks from which on others may have given this process up: a ping is answered within so long
(rpc.channel.KEEPALIVE)."""

DOUBT = 2.5
"""Seconds after a pause in which a stream that has ended at its other end is seen to have ended: at once where that end
could say so, else by a ping of our own."""

T = TypeVar("T")


class Pauses:
    """Notices when this process has stood still."""

    def __init__(self) -> None:
        self._looked = self._clock()
        self._ended = float("-inf")

    @staticmethod
    def _clock() -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps

    def doubt(self) -> float:
        """Seconds for which it is still in doubt whether what comes is meant for now."""
        now = self._clock()
        if now - self._looked > PAUSE:
            self._ended = now
        self._looked = now
        return max(self._ended + DOUBT - now, 0.0)

    async def run(self) -> None:
        """Look, until cancelled."""
        while True:
            self.doubt()
            await asyncio.sleep(LOOK_EVERY)


async def fresh(stream: AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """The messages of a stream, in order. Those that come soon after a pause are kept back for a while, and dropped if
    the stream ends in it: who sends them then says all that counts anew, on the next stream.

    Close it (contextlib.aclosing). It ends as the stream does.
    """
    pauses, messages = Pauses(), asyncio.Queue[T | None]()
    watching, reading = asyncio.ensure_future(pauses.run()), asyncio.ensure_future(_read(stream, messages))
    try:
        while (message := await messages.get()) is not None:
            while (doubt := pauses.doubt()) and not reading.done():
                await asyncio.wait((reading,), timeout=doubt)
            if doubt:
                log.warning("this process stood still: %d orders from before are not obeyed", messages.qsize())
                break
            yield message
        await reading
    finally:
        for task in (watching, reading):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _read(stream: AsyncIterable[T], messages: asyncio.Queue[T | None]) -> None:
    try:
        async for message in stream:
            messages.put_nowait(message)
    finally:
        messages.put_nowait(None)
