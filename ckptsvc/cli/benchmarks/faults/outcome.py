"""What became of a fault: the job's own log, the incidents and the time of the fault -> one outcome."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ckptsvc.cli.benchmarks.faults.kinds import Blame, Kind
from ckptsvc.cli.benchmarks.faults.world import VICTIM, Sighting

ENOUGH = 5
"""Steps after which a job steps again."""


@dataclass(slots=True)
class Outcome:
    """Of one run; times in seconds from the fault on.

    Attributes:
        seen: until somebody has said so: an incident that names who it was, or what `Kind.says`.
        named: the right rank and node (for a host: the node) are named, or nobody where nobody is to blame.
        process: until the first process of the next attempt was started.
        step: until the next step; in a job that goes on, the longest time without one.
        lost: steps that were done and had to be done again.
        source: where the next attempt had its state from: "memory" or "store".
        sentence: of the incident.
        problem: what should not have been; "" if all is well.
    """

    seen: float | None = None
    named: bool | None = None
    process: float | None = None
    step: float | None = None
    lost: int | None = None
    source: str = ""
    sentence: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known of a run: when the fault was, and what has been written until now.

    Attributes:
        at, now: seconds of the monotonic clock; `at` is when the fault was.
        events: lines of the job's log.
        sightings: incidents by file name.
        said: when an agent was seen to have said what `Kind.says`; None: not yet.
    """

    at: float
    now: float
    events: Sequence[Mapping[str, Any]]
    sightings: Mapping[str, Sighting]
    said: float | None = None


def judge(kind: Kind, scene: Scene) -> Outcome:
    """The outcome so far; `problem` says what is still missing."""
    outcome = Outcome()
    _see(kind, scene, outcome)
    # Not by the number of the attempt: torchrun counts some restarts only.
    again = {e["pid"] for e in scene.events if e["event"] == "begun" and e["monotonic"] > scene.at}
    if again:
        _follow(scene, again, outcome)
    else:
        outcome.step = _longest_gap(scene)
    outcome.problem = _problem(kind, scene, again, outcome)
    return outcome


def _see(kind: Kind, scene: Scene, outcome: Outcome) -> None:
    found = sorted((s for s in scene.sightings.values() if s.at > scene.at), key=lambda s: s.at)
    named = [s for s in found if s.incident.node]
    if kind.blame is Blame.NOBODY:
        outcome.named = not any(s.incident.rank >= 0 for s in named)
    elif named:
        incident = named[0].incident
        right_rank = kind.blame is Blame.NODE or incident.rank == VICTIM
        outcome.named = right_rank and incident.node == f"n{VICTIM}"
        outcome.seen = named[0].at - scene.at
    if found:
        outcome.sentence = (named or found)[0].incident.sentence
    if kind.blame is Blame.NOBODY and scene.said is not None:
        outcome.seen = max(scene.said - scene.at, 0.0)


def _follow(scene: Scene, again: Collection[int], outcome: Outcome) -> None:
    """`again` are the processes that were started since."""
    later = [e for e in scene.events if e["pid"] in again]
    done = [e["step"] for e in scene.events if e["event"] == "step" and e["pid"] not in again]
    starts = [e for e in later if e["event"] == "start"]
    steps = [e["monotonic"] for e in later if e["event"] == "step"]
    outcome.process = min(e["born"] for e in later if e["event"] == "begun") - scene.at
    outcome.step = min(steps) - scene.at if steps else None
    if starts:
        outcome.lost = max(done, default=0) - starts[0]["steps_done"]
        outcome.source = starts[0]["source"] or "nowhere"


def _longest_gap(scene: Scene) -> float:
    """The longest time without a step of any rank, from the fault on."""
    times: list[float] = [e["monotonic"] for e in scene.events if e["event"] == "step" and e["monotonic"] > scene.at]
    return max(later - sooner for sooner, later in itertools.pairwise([scene.at, *times, scene.now]))


def _problem(kind: Kind, scene: Scene, again: Collection[int], outcome: Outcome) -> str:
    since = [e for e in scene.events if e["event"] == "step" and e["monotonic"] > scene.at]
    if kind.restart:
        since = [e for e in since if e["pid"] in again]
    elif again:
        return "a healthy job was restarted"
    if len(since) < ENOUGH:
        return "no steps"
    if (kind.says and scene.said is None) or (kind.blame is not Blame.NOBODY and outcome.seen is None):
        return "not seen"
    if outcome.named is False:
        return "the wrong one was named" if kind.blame is not Blame.NOBODY else "a rank was blamed"
    if kind.commits:
        done = max(e["step"] for e in scene.events if e["event"] == "step" and e["monotonic"] <= scene.at)
        if max((e["committed"] for e in since if e["committed"] is not None), default=-1) <= done:
            return "nothing was committed since"
    return ""


@dataclass(frozen=True, slots=True)
class Row:
    """All runs of one kind.

    Attributes:
        missing: why it was not run; "" if it was.
        outcomes: of the runs.
        peer: of those under torchrun.
    """

    kind: Kind
    missing: str = ""
    outcomes: tuple[Outcome, ...] = ()
    peer: tuple[Outcome, ...] = ()

    @property
    def good(self) -> list[Outcome]:
        """Runs in which all was as it should be."""
        return [o for o in self.outcomes if not o.problem]

    def met(self) -> bool | None:
        """Whether every run keeps what is promised; None: nothing is."""
        bars = self.kind.bars
        if not self.outcomes or (bars.seen, bars.process, bars.step) == (None, None, None):
            return None
        return len(self.good) == len(self.outcomes) and all(_within(self.kind, o) for o in self.good)

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "kind": self.kind.name,
            "what": self.kind.what,
            "missing": self.missing,
            "bars": asdict(self.kind.bars),
            "met": self.met(),
            "runs": [asdict(o) for o in self.outcomes],
            "torchrun": [asdict(o) for o in self.peer],
        }


def median(outcomes: Sequence[Outcome], name: str) -> float | None:
    """The median of a value over those that have it."""
    values = [value for o in outcomes if (value := getattr(o, name)) is not None]
    return statistics.median(values) if values else None


def _within(kind: Kind, outcome: Outcome) -> bool:
    bars = kind.bars
    process = outcome.process - outcome.seen if outcome.process is not None and outcome.seen is not None else None
    pairs = ((outcome.seen, bars.seen), (process, bars.process), (outcome.step, bars.step))
    return all(bar is None or (value is not None and value <= bar) for value, bar in pairs)
