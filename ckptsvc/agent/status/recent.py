"""The newest incidents, a line each: those of this agent's coordinators, and at its start those that were kept."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from ckptsvc.agent.aside import aside
from ckptsvc.agent.incidents import IncidentLog, incidents_directory, name_of
from ckptsvc.agent.logtail import one_line
from ckptsvc.errors import CkptsvcError, ConfigError, InvalidInput
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import Settings

log = logging.getLogger("ckptsvc.agent")

MAX_LISTED = 50
MAX_TEXT = 400
"""Characters of a sentence."""

LOAD_TIME = 10.0
"""Seconds to read what was kept; it may be on a file system that hangs."""


class Recent:
    """The newest incidents; `kept` is where whole reports are, None where they are not kept."""

    def __init__(self) -> None:
        self.kept: IncidentLog | None = None
        self._lines: OrderedDict[str, dict[str, Any]] = OrderedDict()  # by name, which begins with the time

    def open(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Keep incidents as files from now on (`ckptsvc incidents`), where there is a place for them."""
        try:
            self.kept = IncidentLog(incidents_directory(settings, environ))
        except ConfigError as error:
            log.warning("incidents are not kept: %s", error)

    def take(self, spawn: Callable[[Coroutine[Any, Any, Any]], None], incident: pb.Incident) -> None:
        """An incident of this agent's coordinators: it is listed, and kept."""
        self.note(incident)
        if self.kept is not None:
            spawn(self.kept.record(incident))

    async def load(self) -> None:
        """Read what was kept before."""
        kept = self.kept
        if kept is None:
            return

        def newest() -> list[pb.Incident]:
            found = (each.incident for each, _ in zip(kept.newest_first(), range(MAX_LISTED), strict=False))
            return [incident for incident in found if isinstance(incident, pb.Incident)]

        try:
            for incident in reversed(await aside(newest, LOAD_TIME)):
                if name_of(incident) not in self._lines:
                    self.note(incident)
        except (OSError, CkptsvcError) as error:
            log.warning("kept incidents are not listed: %s", str(error) or "no answer")

    def note(self, incident: pb.Incident) -> None:
        """An incident, or more that is known of it."""
        try:
            name = name_of(incident)
        except InvalidInput:  # nor can it be kept, and that is logged
            return
        self._lines[name] = {
            "id": name.partition("-")[2],
            "job": incident.job,
            "attempt": incident.attempt,
            "kind": incident.kind,
            "opened": incident.opened,
            "sentence": one_line(incident.sentence)[:MAX_TEXT] or "Nobody could be named.",
            "rank": incident.rank,
            "node": incident.node,
            "confidence": incident.confidence,
            "actions": [one_line(action)[:MAX_TEXT] for action in incident.actions[-4:]],
        }
        while len(self._lines) > MAX_LISTED:
            del self._lines[min(self._lines)]

    def newest_first(self) -> list[dict[str, Any]]:
        """All of them."""
        return [self._lines[name] for name in sorted(self._lines, reverse=True)]
