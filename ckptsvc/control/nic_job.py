"""The network cards of one job: what its nodes have told of them last, and which are in trouble.

From a packet that is lost to the name of the card: 1.07 s until it times out, at most 1 s to the next reading, 0.5 s
(`CONFIRM`) in which the others may tell that they have the same, 0.2 s to the coordinator's next tick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import repeat

from ckptsvc.control.effects import Decision
from ckptsvc.control.nics import SEVERITIES, Finding, Medians, has_signs, is_plausible, judge
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

AT_ONCE = 500
"""Nodes that one tick looks at again, so that trouble everywhere does not keep a coordinator from its other work."""

_Key = tuple[str, Trouble]  # card, kind


@dataclass(slots=True)
class JobNics:
    """Soft state of one job's cards, of one attempt.

    Attributes:
        job: its name.
        attempt: what is told of an earlier one is refused.
    """

    job: str
    attempt: int = 0
    _told: dict[str, tuple[float, pb.NicSummary]] = field(default_factory=dict)  # by node: when, what
    _suspected: dict[str, dict[_Key, float]] = field(default_factory=dict)  # by node: since when there are signs
    _open: dict[str, dict[_Key, Finding]] = field(default_factory=dict)  # by node
    _seen: dict[tuple[str, _Key], float] = field(default_factory=dict)  # when there last were signs of what is open
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
            for state in (self._told, self._suspected, self._open, self._seen):
                state.clear()
        self._told[event.node] = (now, event)
        return self._judge(event, now)

    def tick(self, now: float) -> Decision:
        """Name those whose signs have lasted; look again at those that are named; forget what is over."""
        again = [node for node, signs in self._suspected.items() if any(map(_is_ripe, signs.items(), repeat(now)))]
        if now - self._ticked >= 1.0:
            self._ticked = now
            for node in [node for node, (at, _) in self._told.items() if now - at > STALE]:
                del self._told[node]
                self._suspected.pop(node, None)
            again += self._open
        decision = Decision()
        for node in list(dict.fromkeys(again))[:AT_ONCE]:
            if node in self._told:
                decision.add(self._judge(self._told[node][1], now))
        for (node, key), seen in list(self._seen.items()):
            if now - seen > HOLD:
                over = self._open[node].pop(key)
                del self._seen[node, key]
                decision.reasons.append(f"job {self.job}: {over.nic} on {node} is well again ({over.kind})")
        self._open = {node: open_ for node, open_ in self._open.items() if open_}
        return decision

    def findings(self) -> list[Finding]:
        """The cards in trouble, worst first."""
        kinds, rank = list(Trouble), SEVERITIES.index
        found = [finding for open_ in self._open.values() for finding in open_.values()]
        return sorted(found, key=lambda f: (-rank(f.severity), kinds.index(f.kind), f.node, f.nic))

    def _judge(self, event: pb.NicSummary, now: float) -> Decision:
        decision = Decision()
        before = self._suspected.pop(event.node, {})
        open_ = self._open.get(event.node, {})
        for nic in filter(has_signs, event.nics):
            known = [kind for name, kind in open_ if name == nic.nic]
            for finding in judge(event.node, nic, self._normal(now), known):
                key = (nic.nic, finding.kind)
                since = open_[key].since if key in open_ else before.get(key, now)
                if key not in open_ and not _is_ripe((key, since), now):
                    self._suspected.setdefault(event.node, {})[key] = since
                    continue
                if key not in open_:
                    decision.reasons.append(f"job {self.job}: {finding.sentence}")
                self._open.setdefault(event.node, open_)[key] = replace(finding, since=since)
                self._seen[event.node, key] = now
        return decision

    def _normal(self, now: float) -> Medians:
        at, count = self._medians_of
        if now - at >= MEDIANS_FOR or count != len(self._told):
            nodes = list(self._told.values())
            sample = nodes[:: max(1, len(nodes) // SAMPLE)]
            self._medians = Medians([nic for _, event in sample for nic in event.nics])
            self._medians_of = (now, len(nodes))
        return self._medians


def _is_ripe(suspicion: tuple[_Key, float], now: float) -> bool:
    (_, kind), since = suspicion
    return now - since >= CONFIRM.get(kind, CONFIRM_OTHERS)
