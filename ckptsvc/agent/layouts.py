"""How shards lie on the targets of a store: as a metric, and once in the log where it is not what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ckptsvc.pipeline.arena import Label
from ckptsvc.storage import Layout
from ckptsvc.telemetry import Event, Metrics, log

logger = logging.getLogger("ckptsvc.agent")

_REMEMBERED = 1000
"""Problems after which all are told again."""


class Layouts:
    """What the workers of one agent tell of the layout of the shards they have written."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: set[tuple[str, str]] = set()

    def note(self, scheme: str, label: Label, told: Sequence[Any] | None) -> None:
        """Take down a layout as it comes from a worker, None where its store has none."""
        if told is None:
            return
        layout = Layout(*told)
        self._metrics.laid_out(scheme, layout.stripes, layout.stripe_size, as_asked=not layout.problem)
        log(logger, logging.DEBUG, Event.SHARD_WRITTEN, "shard in %d stripes of %d bytes on targets %s", layout.stripes,
            layout.stripe_size, list(layout.targets), job=label.job, rank=label.rank, step=label.step)  # fmt: skip
        if layout.problem and (label.job, layout.problem) not in self._told:
            if len(self._told) >= _REMEMBERED:
                self._told.clear()
            self._told.add((label.job, layout.problem))
            log(logger, logging.WARNING, Event.STORE_DEGRADED, "shards are not striped as asked: %s", layout.problem,
                job=label.job)  # fmt: skip
