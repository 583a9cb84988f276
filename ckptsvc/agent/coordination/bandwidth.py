"""How fast data go between the agents of two nodes: one sends some, the other sends it back.

Interpreters do it, so on a fast network it shows how fast a core is. It is not there to measure networks, but to find
the node whose link is ten times slower than those of the others (control.nodes).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from ckptsvc.errors import CkptsvcError, InvalidInput
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

CHUNK = 64 << 10
"""Bytes of one message."""

WINDOW = 4
"""Messages under way at a time: on a slow link, the agents' pings wait behind them."""

RUN = 64
"""Messages each way in one run."""

RUNS = 4
"""Runs, of which the best one counts: whoever was busy with something else in one is not slow."""

SECONDS = 2.0
"""Seconds for all of it, and until it begins."""

LONG = 1.0
"""Seconds after which a run that has not ended says something about the way, and not about the other side's end."""

AT_ONCE = 2
"""Measurements in which one agent takes part as the other side at a time; more of them wait."""


async def measure(begin: Callable[[AsyncIterator[pb.Load]], Awaitable[Any]], seconds: float = SECONDS) -> float:
    """Bytes per second that went there and back in the best run; 0.0 where that could not be found out.

    Args:
        begin: makes the call, Measure of coordinator.proto, with these requests.
        seconds: for all of it.
    """
    wanted: asyncio.Queue[bool] = asyncio.Queue()
    best, came, began = 0.0, 0, 0.0
    load = pb.Load(data=bytes(CHUNK))

    async def loads() -> AsyncIterator[pb.Load]:
        yield pb.Load()
        while await wanted.get():
            yield load

    call = None
    try:
        async with asyncio.timeout(seconds):
            call = await begin(loads())
            answers = aiter(call)
            await anext(answers)  # it is our turn
            for _ in range(RUNS):
                came, began = 0, time.monotonic()
                for number in range(RUN + WINDOW):
                    if number >= WINDOW:
                        await anext(answers)
                        came += 1
                    if number < RUN:
                        wanted.put_nowait(True)
                best = max(best, rate(came, began))
    except (TimeoutError, grpc.RpcError, CkptsvcError, StopAsyncIteration):
        # The way may be so slow that no run has ended, or that the agents' pings got lost behind it.
        if began and not best and time.monotonic() - began > LONG:
            best = rate(max(came, 1), began)
    finally:
        wanted.put_nowait(False)
        if call is not None:
            call.cancel()
    return best


def rate(messages: int, began: float) -> float:
    """Bytes per second since `began`."""
    return messages * CHUNK / max(time.monotonic() - began, 1e-6)


class Mirror:
    """The other side: sends back what comes."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def reflect(self, requests: AsyncIterator[pb.Load]) -> AsyncIterator[pb.Load]:
        """Serve one measurement.

        Raises:
            InvalidInput: more comes than belongs to one.
            TimeoutError: it takes longer than one may.
        """
        async with asyncio.timeout(2 * SECONDS), self._turn:
            left = RUNS * RUN * CHUNK
            async for load in requests:
                left -= len(load.data)
                if left < 0:
                    raise InvalidInput("this is more than a measurement takes")
                yield load
