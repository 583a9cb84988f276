"""Settings read again by a running agent (SIGHUP): what can change at once does, and one line says what cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptsvc.agent.aside import aside
from ckptsvc.agent.watching.watch import limits_of
from ckptsvc.config import limit_on
from ckptsvc.errors import CkptsvcError
from ckptsvc.settings import Settings
from ckptsvc.telemetry import Event, log, set_log_level

if TYPE_CHECKING:
    from ckptsvc.agent.server import Agent

logger = logging.getLogger("ckptsvc.agent")

READ_PATIENCE = 30.0
"""Seconds for reading the files, which may be on a file system that hangs."""

READ_BY_JOBS = ("save", "retention", "launch", "store")
"""Sections that ranks, launchers and I/O workers read when they start."""


def _arena_limit(agent: Agent, settings: Settings) -> None:
    # Below what is taken, no arena goes that holds something: there are just no new ones.
    agent.pool.limit = limit_on(settings.arena.limit, agent.pool.root, "arena.dir")


def _limits(agent: Agent, settings: Settings) -> None:
    agent.watch.change(limits_of(settings.health), enabled=settings.health.enabled)


def _slots(agent: Agent, settings: Settings) -> None:
    agent.node.arenas.slots = settings.arena.slots


def _margin(agent: Agent, settings: Settings) -> None:
    agent.node.stops.margin = settings.scheduler.margin


CHANGES: dict[str, Callable[[Agent, Settings], None]] = {
    "log.level": lambda agent, settings: set_log_level(settings.log.level),
    "arena.limit": _arena_limit,
    "arena.slots": _slots,
    "store.max_write_rate": lambda agent, settings: None,  # Workers.use
    "scheduler.margin": _margin,
    "health.enabled": _limits,
    "health.floor": _limits,
    "health.factor": _limits,
    "health.startup": _limits,
}
"""What an agent takes over while it runs."""


async def reload(agent: Agent, read: Callable[[], Settings], before: Settings) -> Settings:
    """Read the settings again and take over what can be; returns those that hold now.

    A mistake in them changes nothing.
    """
    try:
        after = await aside(read, READ_PATIENCE)
    except (CkptsvcError, OSError) as error:  # TimeoutError is an OSError
        log(logger, logging.ERROR, Event.SETTINGS_REFUSED, "settings not read again, the old ones hold: %s",
            str(error) or "no answer from their file system", node=agent.node_name)  # fmt: skip
        return before
    keys = changed(before, after)
    agent.workers.use(after)
    for key in keys:
        if key in CHANGES:
            CHANGES[key](agent, after)
    if agent.tenancy is not None:
        memory = agent.pool.limit if "arena.limit" in keys else None
        agent.tenancy.settings_changed(memory, agent.workers.max_write_rate)
    log(logger, logging.INFO, Event.SETTINGS_READ, "settings read again: %s", sentence(keys), node=agent.node_name)
    return after


def changed(before: Settings, after: Settings) -> list[str]:
    """The keys whose values differ."""
    return [key for key in after.origin if _value(before, key) != _value(after, key)]


def sentence(keys: list[str]) -> str:
    """What becomes of keys that have changed."""
    now = [key for key in keys if key in CHANGES]
    jobs = [key for key in keys if key not in CHANGES and key.partition(".")[0] in READ_BY_JOBS]
    later = [key for key in keys if key not in now and key not in jobs]
    parts = (
        (now, "changed"),
        (jobs, "for what jobs start from now on"),
        (later, "not before `ckptsvc agent --replace`"),
    )
    return "; ".join(f"{', '.join(some)}: {what}" for some, what in parts if some) or "nothing has changed"


def _value(settings: Settings, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(settings, section), name)
