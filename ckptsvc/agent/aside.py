"""Calls that may never return, beside the event loop: a file on a dead server, /proc of a stuck process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

MAX_THREADS = 64
"""Calls at once, those that hang for good among them."""

_NAME = "ckptsvc-aside"


async def aside(function: Callable[[], T], seconds: float) -> T:
    """Call a function in a thread of its own; one that hangs is left alone.

    Not the loop's own executor: that has few threads, and the end of the process would wait for them.

    Raises:
        TimeoutError: it has not returned within so many seconds, or too many others hang.
        Exception: what the function raised.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except Exception as error:  # noqa: BLE001  it is raised again in the loop
            deliver(future.set_exception, error)
        else:
            deliver(future.set_result, result)

    def deliver(put: Callable[..., None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if future.done() else put(value))

    if sum(thread.name == _NAME for thread in threading.enumerate()) >= MAX_THREADS:
        raise TimeoutError(f"{MAX_THREADS} calls are waiting already")
    threading.Thread(target=run, name=_NAME, daemon=True).start()
    async with asyncio.timeout(seconds):
        return await future
