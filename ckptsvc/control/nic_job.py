"""The network cards of one job: what its nodes have told of them last, and which are in trouble."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ckptsvc.control.effects import Decision
from ckptsvc.control.nics import SEVERITIES, Finding, Medians, is_plausible, judge
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import NicTrouble as Trouble

TELL_EVERY = 10.0
"""Seconds between two summaries of a node with nothing new to tell."""

STALE = 60.0
"""Seconds after which a node that tells nothing any more no longer counts."""

HOLD = 5.0
"""Seconds for which a finding stays after its signs have gone."""

MAX_NICS = 64
"""Cards of one node."""

MEDIANS_FOR = 0.2
"""Seconds for which medians are used once they are made."""

SAMPLE = 128
"""Nodes that the medians are taken from: evenly spread over all, for which a sample of so many is as good."""

CONFIRM = {Trouble.TIMEOUTS: 0.5, Trouble.FAILURES: 0.5}
CONFIRM_OTHERS = 2.5
"""Seconds for which a card must be in trouble before it is named: by then the others have told whether they are too.

Agents read their cards at each full second of the wall clock, so what happens to all is told by all at once; the longer
time is for clocks that are not set.
"""

_Key = tuple[str, str, Trouble]  # node, card, kind


@dataclass(slots=True)
class JobNics:
    """Soft state of one job's cards, of one attempt.

    Attributes:
        job: its name.
        attempt: what is told of an earlier one is refused.
    """

    job: str
    attempt: int = 0
    _told: dict[str, tuple[float, pb.NicSummary]] = field(default_factory=dict)
    _open: dict[_Key, Finding] = field(default_factory=dict)
    _seen: dict[_Key, float] = field(default_factory=dict)  # when there last were signs of each that is open
    _suspected: dict[_Key, float] = field(default_factory=dict)  # since when there have been signs
    _medians: Medians = field(default_factory=lambda: Medians(()))
    _medians_of: tuple[float, int] = (-math.inf, 0)  # made when, of how many nodes
    _ticked: float = -math.inf

    def take(self, event: pb.NicSummary, now: float) -> Decision:
        """A node tells of its cards."""
        plausible = len(event.nics) <= MAX_NICS and all(map(is_plausible, event.nics))
        if event.attempt < self.attempt or not plausible:
            return Decision()
        if event.attempt > self.attempt:
            self.attempt = event.attempt
            for state in (self._told, self._open, self._seen, self._suspected):
                state.clear()
        self._told[event.node] = (now, event)
        return self._judge(event, now)

    def tick(self, now: float) -> Decision:
        """Name those whose signs have lasted; look again at those that are named; forget what is over."""
        decision = Decision()
        again = {key[0] for key, since in self._suspected.items() if now - since >= _patience(key)}
        if now - self._ticked >= 1.0:
            self._ticked = now
            for node, (at, _) in list(self._told.items()):
                if now - at > STALE:
                    del self._told[node]
                    self._suspected = {key: since for key, since in self._suspected.items() if key[0] != node}
            again |= {key[0] for key in self._open}
        for node in sorted(again & self._told.keys()):
            decision.add(self._judge(self._told[node][1], now))
        for key in [key for key, seen in self._seen.items() if now - seen > HOLD]:
            over = self._open.pop(key)
            del self._seen[key]
            decision.reasons.append(f"job {self.job}: {over.nic} on {over.node} is well again ({over.kind})")
        return decision

    def findings(self) -> list[Finding]:
        """The cards in trouble, worst first."""
        kinds = list(Trouble)
        rank = SEVERITIES.index
        return sorted(self._open.values(), key=lambda f: (-rank(f.severity), kinds.index(f.kind), f.node, f.nic))

    def _judge(self, event: pb.NicSummary, now: float) -> Decision:
        decision = Decision()
        medians = self._normal(now)
        for nic in event.nics:
            keys = {kind: (event.node, nic.nic, kind) for kind in Trouble}
            found = {f.kind: f for f in judge(event.node, nic, medians, [k for k in Trouble if keys[k] in self._open])}
            for kind, key in keys.items():
                if kind not in found:
                    self._suspected.pop(key, None)
                elif key in self._open:
                    self._open[key] = replace(found[kind], since=self._open[key].since)
                    self._seen[key] = now
                elif now - self._suspected.setdefault(key, now) >= _patience(key):
                    self._open[key] = replace(found[kind], since=self._suspected.pop(key))
                    self._seen[key] = now
                    decision.reasons.append(f"job {self.job}: {found[kind].sentence}")
        return decision

    def _normal(self, now: float) -> Medians:
        at, count = self._medians_of
        if now - at >= MEDIANS_FOR or count != len(self._told):
            nodes = list(self._told.values())
            sample = nodes[:: max(1, len(nodes) // SAMPLE)]
            self._medians = Medians([nic for _, event in sample for nic in event.nics])
            self._medians_of = (now, len(nodes))
        return self._medians


def _patience(key: _Key) -> float:
    return CONFIRM.get(key[2], CONFIRM_OTHERS)
