"""What a coordinator's agent tells of saves and restarts to a collector of traces."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

from ckptsvc.control.effects import Commit, CommitDone, Resumed
from ckptsvc.control.save import outcome_word
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.telemetry.traces import About, Trace, Traces

REMEMBERED = 256
"""Saves whose end has been told: every node is told of it, the collector once."""

_PARTS = ("detection", "evidence", "stop", "start", "restore", "first-step")
"""What lies between the times of `Resumed`."""


class Tracing:
    """Spans of one coordinator, on the clock of its agent (CLOCK_MONOTONIC, seconds)."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._ended: OrderedDict[Trace, None] = OrderedDict()

    @property
    def is_on(self) -> bool:
        """Whether anybody collects them."""
        return self._traces.is_on

    def ended(self, job: str, outcome: agent_pb2.SaveOutcome, now: float) -> None:
        """A save has ended: the span that all others are part of."""
        trace = Trace.save(job, outcome.epoch, outcome.step)
        if trace in self._ended:
            return
        self._ended[trace] = None
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        word = outcome_word(outcome.outcome)
        failed = outcome.outcome not in (agent_pb2.OUTCOME_COMMITTED, agent_pb2.OUTCOME_LOCAL)
        about: About = {
            "outcome": word, "job": job, "epoch": outcome.epoch, "step": outcome.step, "bytes": outcome.bytes,
        }  # fmt: skip
        error = outcome.reason if failed else ""
        self._traces.add(trace, trace.root, now - outcome.seconds, now, error=error, about=about)

    def committed(self, effect: Commit, ended: CommitDone, began: float, answer: dict[str, Any], now: float) -> None:
        """A commit has been tried; `answer` says after how many seconds its index was written."""
        trace = Trace.save(effect.job, effect.epoch, effect.step)
        self._traces.add(trace, "commit", began, now, error=ended.why, about={"shards": len(effect.shards)})
        if "indexed" in answer:
            indexed = min(now - answer["seconds"] + answer["indexed"], now)
            self._traces.add(trace, "index", max(now - answer["seconds"], began), indexed, parent="commit")
            self._traces.add(trace, "record", indexed, now, parent="commit")

    def resumed(self, effect: Resumed) -> None:
        """A restart is over."""
        trace = Trace.restart(effect.job, effect.attempt)
        about: About = {"job": effect.job, "attempt": effect.attempt, "reason": effect.why}
        for part, (begin, end) in zip(_PARTS, pairwise(effect.times), strict=True):
            self._traces.add(trace, part, begin, end)
        self._traces.add(trace, trace.root, effect.times[0], effect.times[-1], about=about)
