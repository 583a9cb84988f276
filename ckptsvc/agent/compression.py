"""Whether the shards of a job are compressed: said when that changes, and kept for `ckptsvc status`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptsvc.pipeline.arena import Label
from ckptsvc.pipeline.packing import Verdict
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

QUIET = 60.0
"""Seconds between two lines about one job, where its ranks do not agree."""


@dataclass(slots=True)
class Compression:
    """What was decided about the shards of one job on this node.

    Attributes:
        latest: the last verdict; None where it was never a question.
    """

    latest: Verdict | None = None
    _told: bool | None = None
    _told_at: float = -math.inf

    def note(self, label: Label, told: Sequence[Any] | None, now: float) -> None:
        """Take down a verdict as it comes from a worker, None where there was no question; `now` in seconds."""
        if told is None:
            return
        self.latest = Verdict(*told)
        changed = self.latest.compressed != self._told and now - self._told_at >= QUIET
        if changed:
            self._told, self._told_at = self.latest.compressed, now
        level = logging.INFO if changed else logging.DEBUG
        log(logger, level, Event.SHARD_WRITTEN, "shards are %scompressed: %s",
            "" if self.latest.compressed else "not ", self.latest.why,
            job=label.job, rank=label.rank, step=label.step)  # fmt: skip
