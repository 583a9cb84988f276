"""Nodes that are not taken any more: those that fail again and again, and those that a person has excluded.

Strikes fade, for most failures are nobody's fault. What a person has said of a node last counts until its time is over;
who includes a node forgives it its strikes.

The list outlives the job: the coordinator's shell keeps it (agent.nodelist) and reads it before the next one begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HALF_LIFE = 1800.0
"""Seconds in which a strike loses half of its weight."""

LIMIT = 2.5
"""A node with more than this is excluded: three failures within ten minutes, and for the next half hour or so."""

FORGOTTEN = 0.05
"""A node with less than this is as good as new (three failures ten hours ago, or one three hours ago)."""

LOST, DIED, FAILED = 1.0, 1.0, 0.5
"""Weight of a node that is gone, of a rank killed by a signal, and of one that ends with an error or is told to end."""


@dataclass(frozen=True, slots=True)
class Strikes:
    """What a node has against it: the weight it had at `at` (in the caller's clock), and the last reason."""

    score: float
    at: float
    why: str

    def now(self, now: float) -> float:
        """What is left of the weight."""
        return float(self.score * 0.5 ** (max(now - self.at, 0.0) / HALF_LIFE))


@dataclass(frozen=True, slots=True)
class Word:
    """What a person has said of a node: that it is excluded, or is not any more; when, and until when."""

    excluded: bool
    at: float
    until: float
    why: str


@dataclass(slots=True)
class Exclusion:
    """What is known of all nodes, over all jobs of a coordinator.

    Attributes:
        known: whether the list of earlier jobs has been read, or cannot be.
        changed: whether there is something to be kept that has not been.
        fresh: nodes that have been excluded by a strike since somebody last took note of it, and the reason.
        said: how many words people have said here; the first `kept` of them are on the list that outlives the job,
            or cannot be for that `problem`.
    """

    strikes: dict[str, Strikes] = field(default_factory=dict)
    known: bool = True
    changed: bool = False
    fresh: dict[str, str] = field(default_factory=dict)
    words: dict[str, Word] = field(default_factory=dict)
    said: int = 0
    kept: int = 0
    problem: str = ""

    def say(self, node: str, word: Word) -> None:
        """A person excludes a node, or includes it."""
        self.said += 1
        known = self.words.get(node)
        if known is not None and known.at > word.at:
            return
        self.words[node] = word
        struck = self.strikes.get(node)
        if not word.excluded and struck is not None and struck.at <= word.at:
            del self.strikes[node]
        self.changed = True

    def strike(self, node: str, weight: float, why: str, now: float) -> None:
        """A node has failed."""
        before = self.excluded(node, now)
        self.strikes[node] = Strikes(self.score(node, now) + weight, now, why)
        self.changed = True
        if self.excluded(node, now) and not before:
            self.fresh[node] = why

    def score(self, node: str, now: float) -> float:
        """What a node has against it now."""
        found = self.strikes.get(node)
        return found.now(now) if found else 0.0

    def excluded(self, node: str, now: float) -> bool:
        """Whether a node should not be taken."""
        return self.is_unwanted(node, now) or self.score(node, now) > LIMIT

    def is_unwanted(self, node: str, now: float) -> bool:
        """Whether a person has excluded it."""
        word = self.words.get(node)
        return word is not None and word.excluded and now < word.until

    def why(self, node: str, now: float) -> str:
        """Why an excluded node is, as the end of a sentence about it."""
        if self.is_unwanted(node, now):
            return f"is excluded: {self.words[node].why}"
        return f"has failed too often: {self.strikes[node].why}"

    def merge(self, others: dict[str, Strikes], now: float, words: dict[str, Word] | None = None) -> None:
        """Take in a list from elsewhere: the heavier of two entries for a node counts, and the later of two words."""
        for node, word in (words or {}).items():
            if node not in self.words or self.words[node].at < word.at:
                self.words[node] = word
        for node, found in others.items():
            if found.now(now) > self.score(node, now):
                self.strikes[node] = found

    def listed(self, now: float) -> dict[str, Strikes]:
        """What is worth keeping; it counts as kept from now on."""
        self.changed = False
        self.strikes = {node: found for node, found in self.strikes.items() if found.now(now) > FORGOTTEN}
        return dict(self.strikes)
