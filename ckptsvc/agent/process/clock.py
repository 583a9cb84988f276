"""Notices that somebody has set the clock of this machine, and says so."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NoReturn

from ckptsvc.control.clocks import Clocks
from ckptsvc.pipeline.clock import passed
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

LOOK_EVERY = 5.0
"""Seconds between looks at the clock."""


async def watch_clock(node: str) -> NoReturn:
    """Compare the time of day with the time that has passed, until cancelled."""
    clocks = Clocks(time.time(), passed())
    while True:
        await asyncio.sleep(LOOK_EVERY)
        if said := clocks.look(time.time(), passed()):
            log(logger, logging.WARNING, Event.CLOCK_JUMPED, "%s", said, node=node)
