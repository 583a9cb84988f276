"""A job's network cards and its coordinator under a virtual clock: what the nodes read, tell, and what is found.

world = NicWorld(nodes=60, cards=4)
world.run(20, training)                 # every second, for each card: training(node, card, second)
world.card(7, 1).count("pct_spt_timeouts", 64)

Nodes read at each full second of the virtual clock, as agents do; the coordinator ticks five times a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from harness.fake_nics import Cassini

from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.nic_card import Card
from ckptsvc.control.nics import Finding, is_news
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

TICK = 0.2
JOB = "job"
BOOTED = 1_743_569_213.0
"""Unix time of the virtual second 0."""


@dataclass(frozen=True)
class Found:
    """A finding, and when it was first there."""

    at: float
    node: str
    nic: str
    kind: str
    severity: str


class NicWorld:
    """Nodes with cards, one coordinator.

    Attributes:
        now: virtual seconds; the coordinator's monotonic clock.
        found: every finding that was ever open, in order.
        messages: summaries that were sent.
    """

    def __init__(self, nodes: int = 4, cards: int = 4, version: int = 1, start: int = 0, attempt: int = 1) -> None:
        self.now = 0.0
        self.core = Coordinator()
        self.found: list[Found] = []
        self.messages = 0
        self.attempt = attempt
        self.nodes = [f"nid{number:06d}" for number in range(nodes)]
        self._fakes = {(n, c): Cassini(f"cxi{c}", version, start) for n in range(nodes) for c in range(cards)}
        self._cards = {key: Card(fake.name, "cxi") for key, fake in self._fakes.items()}
        self._told: dict[int, dict[str, pb.NicReading]] = {n: {} for n in range(nodes)}
        self.silent_nodes: set[int] = set()  # whose agents do not report any more
        self.join(attempt)

    def card(self, node: int, card: int) -> Cassini:
        """One card."""
        return self._fakes[node, card]

    def join(self, attempt: int) -> None:
        """The ranks of an attempt register, one a node."""
        self.attempt = attempt
        for rank, node in enumerate(self.nodes):
            joined = pb.RankJoined(
                job=JOB, node=node, store="file:///run", attempt=attempt, rank=rank, world_size=len(self.nodes)
            )
            self.core.handle(node, pb.Report(rank_joined=joined), self.now)
        for told in self._told.values():
            told.clear()
        for card in self._cards.values():
            card.begin()

    def run(self, seconds: int, step: Callable[[int, int, int], None]) -> None:
        """So many seconds: `step(node, card, second)` moves each card's counters through the one that has passed."""
        for _ in range(seconds):
            second = round(self.now) + 1
            for node, card in self._fakes:
                step(node, card, second)
            while self.now < second - TICK / 2:
                self.now = round(self.now + TICK, 6)
                if self.now < second:
                    self._tick()
            for node in range(len(self.nodes)):
                if node not in self.silent_nodes:
                    self._read(node)
            self._tick()

    def findings(self) -> list[Finding]:
        """What is open now."""
        return self.core.nic_findings(JOB)

    def named(self) -> set[tuple[str, str, str]]:
        """(node, card, kind) of everything that was ever found."""
        return {(found.node, found.nic, found.kind) for found in self.found}

    def _read(self, node: int) -> None:
        readings = []
        for (other, _), card in self._cards.items():
            if other == node:
                fake = self._fakes[other, int(card.nic[3:])]
                card.add(fake.values(BOOTED + self.now), self.now)
                card.see_link(fake.link)
                readings.append(card.reading(self.now))
        told = self._told[node]
        turn = (round(self.now) + node) % 10 == 0
        if turn or any(is_news(told.get(reading.nic), reading) for reading in readings):
            summary = pb.NicSummary(job=JOB, node=self.nodes[node], attempt=self.attempt, nics=readings)
            wire = pb.Report.FromString(pb.Report(nic_summary=summary).SerializeToString())
            self.core.handle(self.nodes[node], wire, self.now)
            self.messages += 1
            self._told[node] = {reading.nic: reading for reading in readings}
        self._note()

    def _tick(self) -> None:
        self.core.tick(self.now)
        self._note()

    def _note(self) -> None:
        known = {(f.node, f.nic, f.kind, f.severity) for f in self.found}
        for finding in self.findings():
            if (finding.node, finding.nic, finding.kind, finding.severity) not in known:
                self.found.append(Found(self.now, finding.node, finding.nic, finding.kind, finding.severity))


def pairs(nodes: int, cards: int) -> list[tuple[int, int]]:
    """Every (node, card)."""
    return list(itertools.product(range(nodes), range(cards)))
