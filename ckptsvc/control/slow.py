"""Jobs that have become slower: who holds them up. It is told, and nothing is done about it.

A node reports that its steps are slow -> evidence from all nodes, again and again -> a rank that stands out in most of
them is named. One look says little: the ranks take turns in waiting for each other, and only one of them hardly ever
waits. A job whose steps have become longer for all alike is no incident.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from ckptsvc.control.blame import NAMED, Scene, Verdict, blame
from ckptsvc.control.effects import Decision, Send
from ckptsvc.control.health import ANSWER_PATIENCE, EXAMINE_SECONDS, KEPT_RANKS
from ckptsvc.control.incidents import Incidents, record
from ckptsvc.control.membership import Job
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

LOOKS, LOOKS_MOST = 4, 12
"""Examinations before somebody is named, and after which nobody will be."""

SHARE = 0.75
"""Part of them that must name the same rank."""

REST = 60.0
"""Seconds after a search in which no other begins in the same attempt."""

PAUSE, FOR_EACH = 0.3, 0.001
"""Seconds between two, and more for each rank: nothing is urgent about a job that goes on."""


@dataclass(slots=True)
class Search:
    """For the rank that holds one job up."""

    event: pb.Slowed
    incident: pb.Incident
    began: float
    round: int = 0
    open: bool = False  # answers are waited for
    until: float = 0.0  # for how long; else: when to look again
    awaited: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    answers: list[pb.Examined] = field(default_factory=list)
    named: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class SlowJobs:
    """All of them; `jobs` are the coordinator's, `hanging` those whose hang is being looked into."""

    jobs: Mapping[str, Job]
    incidents: Incidents
    hanging: Container[str] = ()
    searches: dict[str, Search] = field(default_factory=dict)
    _ended: dict[str, tuple[int, float]] = field(default_factory=dict)  # job -> attempt, when the last search ended

    def slowed(self, event: pb.Slowed, now: float) -> Decision:
        """The steps of a node's ranks take several times as long as they did."""
        job = self.jobs.get(event.job)
        if job is None or event.attempt != job.attempt or event.job in self.hanging or event.usual <= 0:
            return Decision()
        if event.job in self.searches:
            self.searches[event.job].event = event  # now it is known better how slow it is
            return Decision()
        attempt, ended = self._ended.get(event.job, (0, 0.0))
        if attempt == event.attempt and now - ended < REST:
            return Decision()
        incident = self.incidents.begin(event.job, event.attempt, "slow")
        incident.step = event.step
        search = self.searches[event.job] = Search(event, incident, now)
        reason = f"job {event.job}: steps take {event.seconds:.2g} s on {event.node}, and took {event.usual:.2g} s"
        return Decision([], [reason]).add(self._examine(search, job, now))

    def examined(self, event: pb.Examined, now: float) -> Decision:
        """A node has looked at its ranks."""
        search, job = self.searches.get(event.job), self.jobs.get(event.job)
        if search is None or job is None or (event.incident, event.round) != (search.incident.id, search.round):
            return Decision()
        if event.node not in search.awaited:
            return Decision()
        search.awaited.discard(event.node)
        search.answers.append(event)
        return self._conclude(search, job, now) if not search.awaited else Decision()

    def tick(self, now: float) -> Decision:
        """Deadlines, and what has become void."""
        decision = Decision()
        for name in self._ended.keys() - self.jobs.keys():
            del self._ended[name]
        for name, search in list(self.searches.items()):
            job = self.jobs.get(name)
            if job is None or job.attempt != search.event.attempt or not job.ranks or name in self.hanging:
                del self.searches[name]
            elif now >= search.until:
                search.silent |= search.awaited
                decision.add(self._conclude(search, job, now) if search.open else self._examine(search, job, now))
        return decision

    def _examine(self, search: Search, job: Job, now: float) -> Decision:
        search.round += 1
        search.open, search.until, search.answers = True, now + ANSWER_PATIENCE, []
        search.silent = job.unreachable
        search.awaited = set(job.nodes) - search.silent
        order = pb.Examine(
            attempt=job.attempt, incident=search.incident.id, seconds=EXAMINE_SECONDS, round=search.round
        )
        return Decision([Send(n, pb.Order(job=job.name, examine=order)) for n in sorted(search.awaited)])

    def _conclude(self, search: Search, job: Job, now: float) -> Decision:
        search.open, search.awaited, search.until = False, set(), now + PAUSE + FOR_EACH * len(job.ranks)
        ranks = {e.rank: e for a in search.answers for e in a.ranks if job.ranks.get(e.rank) == a.node}
        verdict = blame(Scene(job.ranks, ranks, search.silent))
        search.named[verdict.rank] += verdict.rank >= 0
        often = search.named[verdict.rank] >= SHARE * search.round
        if verdict.rank >= 0 and search.round >= LOOKS and often:
            return self._tell(search, verdict, ranks, now)
        if search.round < LOOKS_MOST:
            return Decision()
        self._end(search, now)
        return Decision([], [f"job {job.name}: it has become slower, and no rank stands out"])

    def _end(self, search: Search, now: float) -> None:
        del self.searches[search.event.job]
        self._ended[search.event.job] = search.event.attempt, now

    def _tell(self, search: Search, verdict: Verdict, ranks: Mapping[int, pb.RankEvidence], now: float) -> Decision:
        self._end(search, now)
        event, incident = search.event, search.incident
        why = verdict.signals[: min(NAMED, len(verdict.kinds) or 1)]
        incident.rank, incident.node, incident.confidence = verdict.rank, verdict.node, verdict.confidence
        incident.sentence = (
            f"rank {verdict.rank} on {verdict.node} holds the job up: a step takes {event.seconds:.2g} s,"
            f" {event.seconds / event.usual:.0f} times as long as before; {'; '.join(why)}"
            f" ({verdict.confidence:.0%} sure)"
        )
        incident.signals.extend(why)
        incident.detected = now - search.began
        chosen = sorted(ranks, key=lambda r: (r != verdict.rank, r))[:KEPT_RANKS]
        incident.ranks.extend(ranks[rank] for rank in sorted(chosen))
        incident.actions.append(f"named in {search.named[verdict.rank]} of {search.round} looks; nothing was done")
        return record(incident)
