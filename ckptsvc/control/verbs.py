"""What people order: a checkpoint now, no snapshots, a restart, nodes that are not to be used.

An order comes as the event Asked. What takes time is a piece of work that is looked at with every tick until it has a
result. What it waits for and the result are answered to the agent that was asked; the result is taken down (Audit).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ckptsvc.control.effects import Audit, Decision, Send
from ckptsvc.control.exclusion import Exclusion, Word
from ckptsvc.control.membership import Job
from ckptsvc.control.pauses import Pause, Pauses
from ckptsvc.control.redundancy import Redundancy
from ckptsvc.control.restart import Attempts, Phase, launched_as
from ckptsvc.control.saving import Result, Saving
from ckptsvc.control.tiering import Tiers
from ckptsvc.control.vacating import Vacating
from ckptsvc.errors import CkptsvcError, InvalidInput, NotFound
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause

MOST = 256
"""Orders that are carried out at a time, and results that are remembered for an agent that asks again."""

LONGEST = 7200.0
"""Seconds after which an order is given up; whoever gave it does not wait for so long."""


class Work(Protocol):
    """An order that takes time."""

    @property
    def waits_for(self) -> str:
        """What it waits for now."""

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """Do what can be done now; a result ends it."""


@dataclass(slots=True)
class Verbs:
    """The orders of people to one coordinator.

    Attributes:
        jobs, launched, tiers: the coordinator's.
        exclusion, redundancy, pauses: the same.
        node: name of the node that the coordinator is on, if the job cannot go on without it; else "".
    """

    jobs: Mapping[str, Job]
    launched: Mapping[str, Attempts]
    tiers: Mapping[str, Tiers]
    exclusion: Exclusion
    redundancy: Redundancy
    pauses: Pauses
    node: str = ""
    working: dict[str, tuple[pb.Asked, Work, float]] = field(default_factory=dict)
    answered: OrderedDict[str, pb.Order] = field(default_factory=OrderedDict)

    def asked(self, event: pb.Asked, now: float) -> Decision:
        """Somebody orders something, maybe for the second time."""
        if event.id in self.answered:
            return Decision([Send(event.node, self.answered[event.id])])
        if event.id in self.working:
            return Decision([self._begun(event, self.working[event.id][1])])
        decision = Decision([], [f"{event.by.name or 'somebody'} on {event.by.node} asks: {spoken(event)}"])
        try:
            if len(self.working) >= MOST:
                raise InvalidInput("too many orders are being carried out")
            begun = self._begin(event, now, decision)
        except CkptsvcError as error:
            begun = Result(error.what, error.code)
        if isinstance(begun, Result):
            return decision.add(self._end(event, begun))
        self.working[event.id] = event, begun, now
        decision.add(self._look(event.id, now))
        if event.id in self.working:
            decision.effects.append(self._begun(event, begun))
        return decision

    def tick(self, now: float) -> Decision:
        """Go on with what takes time."""
        decision = Decision()
        for each in list(self.working):
            decision.add(self._look(each, now))
        return decision

    def _look(self, each: str, now: float) -> Decision:
        event, work, since = self.working[each]
        decision, result = work.look(now)
        if result is None and now - since > LONGEST:
            result = Result(f"given up after {LONGEST:g} s: {work.waits_for}", "save-failed")
        if result is not None:
            del self.working[each]
            decision.add(self._end(event, result))
        return decision

    def _begun(self, event: pb.Asked, work: Work) -> Send:
        answer = pb.Answered(id=event.id, what=work.waits_for, begun=True)
        return Send(event.node, pb.Order(job=event.job, answered=answer))

    def _end(self, event: pb.Asked, result: Result) -> Decision:
        answer = pb.Answered(id=event.id, code=result.code, what=result.what)
        answer.step, answer.bytes, answer.seconds = result.step, result.nbytes, result.seconds
        order = self.answered[event.id] = pb.Order(job=event.job, answered=answer)
        while len(self.answered) > MOST:
            self.answered.popitem(last=False)
        how = "not done" if result.code else "done"
        return Decision([Send(event.node, order), Audit(event, answer)], [f"{spoken(event)}: {how}: {result.what}"])

    # ---- one by one --------------------------------------------------------------------------------------------------

    def _begin(self, event: pb.Asked, now: float, decision: Decision) -> Work | Result:
        if event.verb == pb.VERB_CHECKPOINT:
            return self._checkpoint(event)
        if event.verb in (pb.VERB_PAUSE, pb.VERB_RESUME):
            return self._pause(event, now, decision)
        if event.verb == pb.VERB_RESTART:
            return self._restart(event, now, decision)
        if event.verb in (pb.VERB_DRAIN, pb.VERB_UNDRAIN):
            return self._drain(event, now, decision)
        if event.verb in (pb.VERB_EXCLUDE, pb.VERB_INCLUDE):
            return _Listing(self.exclusion, self._exclude(event, now), self.exclusion.said)
        raise InvalidInput("the coordinator does not know this order: it is of an earlier version")

    def _runs(self, name: str) -> list[Job]:
        return [job for job in self.jobs.values() if name and name in (job.name, launched_as(job.name))]

    def _checkpoint(self, event: pb.Asked) -> Work:
        runs = [job for job in self._runs(event.job) if job.ranks]
        if not runs:
            raise NotFound(f"job {event.job} has no ranks that train now")
        attempts = self.launched.get(launched_as(event.job))
        return _All([Saving(job, self.tiers.get(job.name), attempts) for job in runs])

    def _pause(self, event: pb.Asked, now: float, decision: Decision) -> Work | Result:
        launched, pause = launched_as(event.job), event.verb == pb.VERB_PAUSE
        if not self._runs(event.job) and launched not in self.launched:
            raise NotFound(f"job {event.job} is not known here")
        known = self.pauses.known.get(launched)
        if not pause and (known is None or not known.paused):
            return Result(f"job {launched} was not paused")
        until = now + event.seconds if pause and event.seconds else math.inf
        word = Pause(int(event.at * 1000), pause, until, event.by.name, event.reason)
        decision.add(self.pauses.say(launched, word, now))
        return _Pausing(launched, self.pauses, self.jobs, word.version, pause)

    def _restart(self, event: pb.Asked, now: float, decision: Decision) -> Work | Result:
        attempts = self.launched.get(launched_as(event.job))
        if attempts is None:
            raise InvalidInput(f"`ckptsvc run` has not started job {event.job}: whatever has must start it again")
        if event.attempt and attempts.attempt > event.attempt:
            return Result(f"job {attempts.job}: attempt {attempts.attempt} has begun already")
        if attempts.phase is not Phase.RUNNING or attempts.stop_wanted:
            state = "is about to stop" if attempts.stop_wanted else f"is {attempts.phase.value}"
            raise InvalidInput(f"job {attempts.job} {state}: there is nothing to start anew")
        why = f"restarted by {event.by.name}" + (f": {event.reason}" if event.reason else "")
        attempts.incidents.append(f"attempt {attempts.attempt}: {why}")
        before = attempts.attempt
        decision.add(attempts.again(why, Cause.ASKED, now))
        return _Restarting(attempts, before)

    def _exclude(self, event: pb.Asked, now: float) -> Result:
        excluded, node = event.verb == pb.VERB_EXCLUDE, event.target
        before = self.exclusion.excluded(node, now)
        until = now + event.seconds if event.seconds else math.inf
        by = f"{event.reason} ({event.by.name})" if event.reason else f"by {event.by.name}"
        self.exclusion.say(node, Word(excluded, now, until, by))
        if not excluded:
            return Result(f"node {node} may be used again" if before else f"node {node} was not excluded")
        using = sorted(a.job for a in self.launched.values() if a.phase is Phase.RUNNING and node in a.hosts)
        runs = f"; it goes on running {', '.join(using)} until they start anew" if using else ""
        return Result(f"node {node} is excluded{runs}")

    def _drain(self, event: pb.Asked, now: float, decision: Decision) -> Work | Result:
        node, on = event.target, event.verb == pb.VERB_DRAIN
        if on and node not in self.redundancy.peers:  # nobody there would hear of it
            raise NotFound(f"no agent of node {node} is connected with this coordinator")
        why = f"drained by {event.by.name}" + (f": {event.reason}" if event.reason else "")
        self.exclusion.say(node, Word(on, now, math.inf, why))
        decision.effects.append(Send(node, pb.Order(vacate=pb.Vacate(on=on, reason=why))))
        self.redundancy.leave(node, leaves=on)
        if not on:
            return Result(f"node {node} may be used again")
        work = []
        for launched in sorted({*map(launched_as, self.jobs), *self.launched}):
            if event.job and launched != launched_as(event.job):
                continue
            attempts, runs = self.launched.get(launched), self._runs(launched)
            if attempts is not None and attempts.phase is Phase.ENDED:
                attempts = None
            work.append(Vacating(node, launched, runs, attempts, self.tiers, why, led=self.node == node))
        return _All(work) if work else Result(f"node {node} takes no new jobs")


@dataclass(slots=True)
class _All:
    """Several pieces of work; their results in one."""

    parts: Sequence[Work]
    results: list[Result] = field(default_factory=list)

    @property
    def waits_for(self) -> str:
        """See `Work`."""
        return "; ".join(part.waits_for for part in self.parts)

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """See `Work`."""
        decision, left = Decision(), []
        for part in self.parts:
            more, result = part.look(now)
            decision.add(more)
            if result is None:
                left.append(part)
            else:
                self.results.append(result)
        self.parts = left
        if left:
            return decision, None
        bad = [result for result in self.results if result.code]
        if bad:
            return decision, Result("; ".join(result.what for result in bad), bad[0].code)
        newest = max(self.results, key=lambda result: result.step)
        what = "; ".join(result.what for result in self.results)
        return decision, Result(what, "", newest.step, newest.nbytes, newest.seconds)


@dataclass(slots=True)
class _Pausing:
    """Until it is decided from which step on."""

    launched: str
    pauses: Pauses
    jobs: Mapping[str, Job]
    version: int
    paused: bool

    @property
    def waits_for(self) -> str:
        """See `Work`."""
        return f"job {self.launched}: its ranks have not begun to train"

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """See `Work`."""
        known = self.pauses.known.get(self.launched)
        if known is None or known.version != self.version:
            return Decision(), Result(
                f"job {self.launched}: somebody else has said otherwise meanwhile", "invalid-input"
            )
        word = "takes no automatic snapshots" if self.paused else "takes automatic snapshots again"
        if not any(launched_as(job.name) == self.launched and job.ranks for job in self.jobs.values()):
            return Decision(), Result(f"job {self.launched} {word} from its next attempt on")
        step = self.pauses.placed(self.launched)
        return Decision(), None if step is None else Result(
            f"job {self.launched} {word} from step {step} on", step=step
        )


@dataclass(slots=True)
class _Restarting:
    """Until the next attempt runs."""

    attempts: Attempts
    before: int

    @property
    def waits_for(self) -> str:
        """See `Work`."""
        return f"job {self.attempts.job}: attempt {self.before} is being stopped"

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """See `Work`."""
        attempts = self.attempts
        if attempts.phase is Phase.ENDED:
            return Decision(), Result(f"job {attempts.job} has ended: {attempts.outcome[1]}", "interrupted")
        if attempts.attempt <= self.before or attempts.phase is not Phase.RUNNING:
            return Decision(), None
        where = f"{attempts.world} ranks on {', '.join(sorted(attempts.hosts))}"
        return Decision(), Result(f"job {attempts.job}: attempt {attempts.attempt} has begun, {where}")


@dataclass(slots=True)
class _Listing:
    """Until what somebody has said of a node is on the list that outlives this coordinator."""

    exclusion: Exclusion
    result: Result
    said: int

    @property
    def waits_for(self) -> str:
        """See `Work`."""
        return "the list of nodes is being written"

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """See `Work`."""
        if self.exclusion.kept < self.said:
            return Decision(), None
        if not self.exclusion.problem:
            return Decision(), self.result
        why = f"{self.result.what}, for as long as this coordinator lives: the list could not be written"
        return Decision(), Result(f"{why}: {self.exclusion.problem}", "store")


def verb_of(number: int) -> str:
    """The word for an order; one of a later version has none here."""
    known = number in pb.Verb.values()
    return pb.Verb.Name(pb.Verb.ValueType(number)).removeprefix("VERB_").lower() if known else f"order {number}"


def spoken(event: pb.Asked) -> str:
    """An order in words."""
    words = [verb_of(event.verb), event.target, f"job {event.job}" if event.job else ""]
    return " ".join(filter(None, words)) + (f" ({event.reason})" if event.reason else "")
