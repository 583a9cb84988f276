"""Jobs that take no automatic snapshots, because a person has said so.

The coordinator decides from which step on: one that no rank has reached, so that all of them leave out the same
snapshots. Ranks of a new attempt are told before their first step. Every agent keeps what it was told and tells a new
coordinator; of two that differ, the one that was said later counts (its version is a time).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ckptsvc.control.effects import Decision, Send
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import launched_as
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

FIRST = 1
"""The first step that a snapshot can be taken at."""


@dataclass(slots=True)
class Pause:
    """What was said last of one launched job."""

    version: int
    paused: bool
    until: float
    by: str
    reason: str


@dataclass(slots=True)
class Pauses:
    """That of all jobs of one coordinator.

    Attributes:
        jobs: the coordinator's jobs, by the names that their ranks register.
        known: by the name that a job was launched as.
        holding: what the ranks of a job have been told, by the name that they register.
        told: the nodes that have heard that.
    """

    jobs: dict[str, Job]
    known: dict[str, Pause] = field(default_factory=dict)
    holding: dict[str, pb.Pausing] = field(default_factory=dict)
    told: dict[str, set[str]] = field(default_factory=dict)

    def say(self, launched: str, pause: Pause, now: float) -> Decision:
        """Somebody pauses a job, or has it go on."""
        before = self.known.get(launched)
        pause.version = max(pause.version, before.version + 1 if before else 1)
        self.known[launched] = pause
        verb = "pauses" if pause.paused else "goes on with"
        why = f": {pause.reason}" if pause.reason else ""
        reason = f"job {launched} {verb} automatic snapshots{f' ({pause.by}{why})' if pause.by else why}"
        return Decision([], [reason]).add(self.tick(now))

    def placed(self, launched: str) -> int | None:
        """From which step on what was said last holds, for all ranks; None while that is not decided."""
        version = self.known[launched].version
        steps = [held.step for job in self._runs(launched) if (held := self._held(job)) and held.version == version]
        return max(steps) if steps and len(steps) == len(self._runs(launched)) else None

    def reported(self, event: pb.Pausing, now: float) -> Decision:
        """An agent tells what it was told, maybe by an earlier coordinator."""
        launched = launched_as(event.job)
        known = self.known.get(launched)
        if known is None or event.version > known.version:
            until = now + event.left if event.left > 0 else math.inf
            self.known[launched] = Pause(event.version, event.paused, until, event.by, event.reason)
        elif event.version < known.version:
            return Decision()
        held, job = self.holding.get(event.job), self.jobs.get(event.job)
        if held is not None and _order(held) >= _order(event):
            return Decision()
        self.holding[event.job], self.told[event.job] = event, set()
        return self._tell(job, now) if job is not None and self._held(job) else Decision()

    def joined(self, job: Job, event: pb.RankJoined, now: float) -> Decision:
        """A rank has registered: to be told before it hears of its epoch, and so before its first step.

        One that has an epoch runs already; where it has been told nothing, `tick` finds a step. A node whose agent was
        lost may have missed what its ranks were told.
        """
        known = self.known.get(launched_as(job.name))
        job.paused = known is not None and known.paused
        if known is None or event.attempt != job.attempt:
            return Decision()
        # A launcher that does not count its restarts: the steps that were decided on were those of other processes.
        began = len(job.ranks) == 1 and job.joined_at == now
        if not event.epoch and (began or self._held(job) is None):
            self._hold(job, known, FIRST)
            return self._tell(job, now)  # others have come before there was anything to tell
        return self._tell(job, now, event.node) if self._held(job) is not None else Decision()

    def rewound(self, job: Job, now: float) -> Decision:
        """The steps of an attempt come again: what was said last holds for those before the one decided on as well."""
        known = self.known.get(launched_as(job.name))
        if known is None or self._held(job) is None:
            return Decision()
        self._hold(job, known, FIRST)
        return self._tell(job, now)

    def unheard(self, node: str) -> None:
        """The agent of a node may not know any more what it was told."""
        for nodes in self.told.values():
            nodes.discard(node)

    def end(self, launched: str) -> None:
        """A job has ended: one that is called the same is another one."""
        self.known.pop(launched, None)
        for job in self.jobs.values():
            if launched_as(job.name) == launched:
                job.paused = False
        for name in [name for name in self.holding if launched_as(name) == launched]:
            del self.holding[name], self.told[name]

    def forget(self, job: str) -> None:
        """A job is over."""
        self.holding.pop(job, None)
        self.told.pop(job, None)
        if not self._runs(launched_as(job)):
            self.known.pop(launched_as(job), None)

    def tick(self, now: float) -> Decision:
        """End what has had its time; decide on steps as soon as that is possible."""
        decision = Decision()
        for launched, known in list(self.known.items()):
            if known.paused and now >= known.until:
                over = Pause(0, False, math.inf, "", "the time it was paused for is over")
                return decision.add(self.say(launched, over, now))
            for job in self._runs(launched):
                job.paused = known.paused
                held = self._held(job)
                if held is not None and held.version >= known.version:
                    continue
                if held is not None and held.paused == known.paused:  # only for how long, or why, is another
                    self._hold(job, known, held.step)
                    decision.add(self._tell(job, now))
                # Two steps that were decided on one after the other must be in that order for every rank.
                elif job.ahead is not None and (held is None or job.highest >= held.step):
                    self._hold(job, known, job.ahead)
                    word = "paused" if known.paused else "taken again"
                    decision.reasons.append(f"job {job.name}: automatic snapshots are {word} from step {job.ahead} on")
                    decision.add(self._tell(job, now))
        return decision

    def _runs(self, launched: str) -> list[Job]:
        return [job for job in self.jobs.values() if launched_as(job.name) == launched and job.ranks]

    def _held(self, job: Job) -> pb.Pausing | None:
        held = self.holding.get(job.name)
        return held if held is not None and held.attempt == job.attempt else None

    def _hold(self, job: Job, known: Pause, step: int) -> None:
        self.holding[job.name] = pb.Pausing(
            job=job.name, version=known.version, paused=known.paused, attempt=job.attempt, step=step, by=known.by,
            reason=known.reason,
        )  # fmt: skip
        self.told[job.name] = set()

    def _tell(self, job: Job, now: float, node: str = "") -> Decision:
        """Tell one node, or all that have not heard."""
        held, told, decision = self.holding[job.name], self.told[job.name], Decision()
        known = self.known[launched_as(job.name)]
        for each in [node] if node else job.nodes:
            if each not in told:
                told.add(each)
                order = pb.Order(job=job.name, pausing=held)
                order.pausing.left = max(known.until - now, 1.0) if known.until < math.inf else 0.0
                decision.effects.append(Send(each, order))
        return decision


def _order(held: pb.Pausing) -> tuple[int, int, int]:
    """Which of two words is the later one; of one attempt, the one that leaves out more."""
    return held.version, held.attempt, -held.step
