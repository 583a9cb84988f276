"""Orders of people: from the call of the command line to the coordinators that decide, and back.

An order is reported like anything else that a coordinator must hear, and again until it is answered, for another one
may coordinate by then. Who gave it, what came of it and what was refused is taken down (agent.orders.audit).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Iterable

from ckptsvc.agent.launches import Launches
from ckptsvc.agent.local import Local, wait_for
from ckptsvc.agent.logtail import one_line
from ckptsvc.agent.orders.audit import AuditLog, Entry
from ckptsvc.agent.orders.callers import Caller
from ckptsvc.control.effects import Audit
from ckptsvc.control.restart import Phase, launched_as
from ckptsvc.control.verbs import verb_of
from ckptsvc.errors import BY_CODE, AgentUnavailable, CkptsvcError, InvalidInput, NotFound
from ckptsvc.rpc.bounds import MAX_WHY
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

ASK_AGAIN = 3.0
"""Seconds after which a coordinator, maybe another one by now, is asked again."""

SERVICE = "ckptsvc"
"""Who has done what nobody has ordered: in the audit log, with the number -1."""

MAX_SECONDS = 10 * 366 * 86400.0
"""Seconds that something can be ordered for."""

OF_NODES = {pb.VERB_DRAIN, pb.VERB_UNDRAIN, pb.VERB_EXCLUDE, pb.VERB_INCLUDE}

_NODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")


class _Question:
    """One order to one coordinator, and what that has said of it so far."""

    def __init__(self, asked: pb.Asked, way: str) -> None:
        self.asked, self.way = asked, way
        self.heard = asyncio.Event()
        self.answer: pb.Answered | None = None

    def take(self, answer: pb.Answered) -> None:
        self.answer = answer
        self.heard.set()

    @property
    def is_over(self) -> bool:
        return self.answer is not None and not self.answer.begun


class Orders:
    """Those of one agent."""

    def __init__(self, local: Local, launches: Launches, audit: AuditLog) -> None:
        self._local, self._launches, self.audit = local, launches, audit
        self._open: dict[str, _Question] = {}

    def on_order(self, order: pb.Order) -> None:
        """What a coordinator says."""
        if order.HasField("vacate"):
            self._local.standing.vacate(order.vacate.reason if order.vacate.on else "")
            return
        question = self._open.get(order.answered.id)
        if question is not None:
            question.take(order.answered)

    async def carry_out(
        self, verb: pb.Verb, request: agent_pb2.VerbRequest, caller: Caller, timeout: float
    ) -> agent_pb2.VerbResponse:
        """Pass an order on and wait, so many seconds at most, for what comes of it.

        Raises:
            CkptsvcError: it cannot be carried out.
        """
        name = verb_of(verb)
        try:
            response = await self._carry_out(verb, request, caller, timeout)
        except CkptsvcError as error:
            await self._note(name, request, caller, "failed", str(error))
            raise
        except asyncio.CancelledError:  # it goes on
            self._local.spawn(self._note(name, request, caller, "begun", "who gave the order has stopped waiting"))
            raise
        outcome = "done" if response.done else "failed" if verb == pb.VERB_DRAIN and response.left else "begun"
        if why := await self._note(name, request, caller, outcome, "; ".join([*response.what, *response.left])):
            response.what.append(f"this is not in the audit log: {why}")
        return response

    async def _note(self, verb: str, request: agent_pb2.VerbRequest, by: Caller, outcome: str, what: str) -> str:
        """Take it down; returns why that failed, or ""."""
        log(logger, logging.INFO, Event.VERB_ASKED, "%s %s by %s: %s: %s", verb, request.node or request.job, by.name,
            outcome, what)  # fmt: skip
        return await self.audit.record(
            Entry(verb=verb, job=request.job, target=request.node, uid=by.uid, by=by.name, via=by.via, outcome=outcome,
                node=self._local.name, what=what)
        )  # fmt: skip

    def refused(self, caller: Caller | None, method: str) -> None:
        """A call was not let through."""
        who, verb = caller.name if caller else "unknown", method.rpartition("/")[2].lower()[:80]
        self._local.metrics.calls_refused.inc()
        log(logger, logging.WARNING, Event.VERB_REFUSED, "%s by %s was refused", verb, who)
        entry = Entry(verb=verb, uid=caller.uid if caller else -1, by=who, outcome="refused", node=self._local.name)
        self._local.spawn(self.audit.record(entry))

    def stranger(self, uid: int, name: str) -> None:
        """A user who may not give orders here has asked for a token."""
        log(logger, logging.WARNING, Event.VERB_REFUSED, "user %s may not give orders here", name)
        entry = Entry(verb="call", uid=uid, by=name, outcome="refused", node=self._local.name)
        self._local.spawn(self.audit.record(entry))

    def decided(self, effect: Audit) -> None:
        """A coordinator in this process has decided; where another agent was asked, that is taken down here too."""
        asked, outcome = effect.asked, effect.outcome
        if asked.node == self._local.name:
            return
        entry = Entry(
            verb=verb_of(asked.verb), job=asked.job, target=asked.target, uid=asked.by.uid, by=one_line(asked.by.name),
            via=one_line(asked.by.via), asked_on=one_line(asked.node), node=self._local.name,
            outcome="failed" if outcome.code else "done", what=outcome.what,
        )  # fmt: skip
        self._local.spawn(self.audit.record(entry))

    def deleted(self, job: str, store: str, names: list[str]) -> None:
        """Retention has deleted checkpoints."""
        for name in names:
            entry = Entry(
                verb="delete", job=job, target=f"{store.rstrip('/')}/{name}", uid=-1, by="retention",
                node=self._local.name, outcome="done", what="no rule of retention keeps it",
            )  # fmt: skip
            self._local.spawn(self.audit.record(entry))

    def own(self, verb: str, job: str, target: str, why: str, *, done: bool = True) -> None:
        """The service has done something that nobody has ordered."""
        entry = Entry(
            verb=verb, job=one_line(job), target=one_line(target), uid=-1, by=SERVICE, node=self._local.name,
            outcome="done" if done else "failed", what=one_line(why),
        )  # fmt: skip
        self._local.spawn(self.audit.record(entry))

    # ---- one order ---------------------------------------------------------------------------------------------------

    async def _carry_out(
        self, verb: pb.Verb, request: agent_pb2.VerbRequest, caller: Caller, timeout: float
    ) -> agent_pb2.VerbResponse:
        _check(request)
        node = request.node or self._local.name if verb in OF_NODES else ""
        job = self._job(request.job) if request.job or verb not in OF_NODES else ""
        request.job, request.node = job, node
        ways = self._ways()
        way = ways.get(launched_as(job), ways.get(job, ""))
        chosen = {way: job} if job else dict.fromkeys(["", *ways.values()], "")
        asked = pb.Asked(job=job, node=self._local.name, verb=verb, target=node, reason=one_line(request.reason),
            seconds=request.seconds, at=time.time(), attempt=self._attempt(job) if verb == pb.VERB_RESTART else 0,
            by=pb.Caller(uid=caller.uid, name=caller.name, node=self._local.name, via=caller.via))  # fmt: skip
        if verb == pb.VERB_DRAIN and node == self._local.name:
            self._local.standing.vacate(f"drained by {caller.name}")
        questions = []
        for way in chosen:
            question = _Question(pb.Asked(), way)
            question.asked.CopyFrom(asked)
            question.asked.id = secrets.token_hex(8)
            questions.append(question)
        await asyncio.gather(*(self._ask(question, timeout, request.no_wait) for question in questions))
        return _response(questions, verb, request.no_wait)

    async def _ask(self, question: _Question, timeout: float, no_wait: bool) -> None:
        """Until there is an answer, or the time is over."""
        until, ask_at = time.monotonic() + timeout, 0.0
        self._open[question.asked.id] = question
        try:
            while not question.is_over and not (no_wait and question.answer) and (now := time.monotonic()) < until:
                question.heard.clear()
                if now >= ask_at:
                    # the way may have been closed meanwhile: a drained job leaves nothing here that needs it
                    self._local.uplink(question.way).report(pb.Report(asked=question.asked))
                    ask_at = now + ASK_AGAIN
                await wait_for(question.heard, min(ask_at, until) - now)
        finally:
            del self._open[question.asked.id]

    def _ways(self) -> dict[str, str]:
        """The jobs that this agent knows, as launched, and the way to the coordinator of each."""
        local = self._local
        found = {launched_as(job.name): job.coordinator for job in local.jobs.values()}
        for core in local.own_cores():
            found |= dict.fromkeys([*map(launched_as, core.jobs), *core.launched], "")
        return found | self._launches.ways()

    def jobs(self) -> list[str]:
        """The names, as launched, of the jobs that are alive here."""
        found = {launched_as(s.reg.job) for s in self._local.sessions.values()} | self._launches.ways().keys()
        for core in self._local.own_cores():
            found |= {launched_as(job.name) for job in core.jobs.values() if job.ranks}
            found |= {name for name, attempts in core.launched.items() if attempts.phase is not Phase.ENDED}
        return sorted(found)

    def _job(self, wanted: str) -> str:
        """The job that is meant.

        Raises:
            NotFound: there is none of that name, or none at all.
            InvalidInput: several could be meant.
        """
        ways = self._ways()
        if wanted:
            if launched_as(wanted) in ways or wanted in ways:
                return wanted
            raise NotFound(f"this agent knows no job {wanted[:100]!r}", hint=_listed(ways))
        live = self.jobs()
        if len(live) == 1:
            return live[0]
        if not live:
            raise NotFound("this agent has no job")
        raise InvalidInput("which job?", hint=_listed(live))

    def _attempt(self, job: str) -> int:
        numbers = [s.reg.attempt for s in self._local.sessions.values() if launched_as(s.reg.job) == launched_as(job)]
        return max(numbers, default=0)


def _check(request: agent_pb2.VerbRequest) -> None:
    if len(request.job) > 256 or not request.job.isprintable() or len(request.reason) > MAX_WHY:
        raise InvalidInput(f"a job's name has at most 256 printable characters, and a reason {MAX_WHY}")
    if request.node:
        check_node(request.node)
    if not 0 <= request.seconds <= MAX_SECONDS or math.isnan(request.seconds):
        raise InvalidInput("a time is at least 0 and at most ten years")


def check_node(name: str) -> None:
    """Raise InvalidInput for what cannot be the name of a node."""
    if not _NODE.fullmatch(name):
        raise InvalidInput(f"{name[:80]!r} is not the name of a node")


def _listed(jobs: Iterable[str]) -> str:
    names = sorted(jobs)
    return "it has " + ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "it has none"


def _response(questions: list[_Question], verb: pb.Verb, no_wait: bool) -> agent_pb2.VerbResponse:
    """What is said of an order, or the error that it ended with."""
    response, unknown = agent_pb2.VerbResponse(done=True), list[str]()
    for question in questions:
        answer = question.answer
        if answer is None:
            where = f"the coordinator of job {question.asked.job}" if question.asked.job else "a coordinator"
            silent = f"{where} has not answered" + (f" at {question.way.partition('#')[0]}" if question.way else "")
            if len(questions) == 1:
                raise AgentUnavailable(silent)
            response.left.append(silent)
        elif answer.code == NotFound.code and verb == pb.VERB_DRAIN and question.asked.target != question.asked.node:
            unknown.append(answer.what)  # to this coordinator; the node may have jobs of another one
        elif answer.code and verb == pb.VERB_DRAIN:
            response.left.append(answer.what)
        elif answer.code:
            raise BY_CODE.get(answer.code, CkptsvcError)(answer.what)
        elif answer.begun:
            response.done = False
            (response.what if no_wait else response.left).append(answer.what)
        elif answer.what not in response.what:
            response.what.append(answer.what)
            response.step, response.bytes, response.seconds = answer.step, answer.bytes, answer.seconds
    if unknown and len(unknown) == len(questions):
        raise NotFound(unknown[0], hint="drain it where its agent is, or with --job through a node of its job")
    response.done = response.done and not response.left
    return response
