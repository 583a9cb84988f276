"""What has to run as long as the agent does.

An agent of which a part has failed is half dead and looks alive: better it ends, and is started again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

log = logging.getLogger("ckptsvc.agent")


async def until_told(stopping: asyncio.Event, tasks: Iterable[asyncio.Task[None]]) -> BaseException | None:
    """Wait until told to stop, or until one of the tasks fails; returns why it has failed."""
    told = asyncio.ensure_future(stopping.wait())
    waiting: set[asyncio.Task[Any]] = {told, *tasks}
    try:
        while not told.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {told}:
                if (failure := task.exception()) is not None:
                    return failure
    finally:
        told.cancel()
    return None


async def dispensable(what: str, work: Coroutine[Any, Any, None]) -> None:
    """Something that the agent goes on without; `what` says what there is none of then."""
    try:
        await work
    except Exception:
        log.exception(what)
