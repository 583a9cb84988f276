"""Hangs: a rank is reported as stalled -> evidence from all nodes -> a verdict -> SIGKILL, or another look.

open --all nodes answer, or the deadline--> verdict --sure--> killed
                                            verdict --not sure--> (a pause) --> open
any --every stalled rank moves--> closed: it went on by itself

Two more ends for an attempt: a rank has not come back to its agent, so that nobody can examine it, while others stand
still; or all ranks have stood still for `give_up` seconds, and nobody can be named.

A rank is killed only when it is itself overdue and two independent signals say that it is the one:
- its process is stopped or gone: at once;
- it runs, or sleeps, elsewhere than where the others wait for it: when it has been seen to stand still for `confirm`
  seconds, in the same functions, reading and writing nothing. Long work that nobody has declared as a phase (one rank
  writes a file) looks the same at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptsvc.control.blame import Kind, Scene, Verdict, blame, functions, is_broken, is_overdue
from ckptsvc.control.effects import Decision, Send
from ckptsvc.control.incidents import Incidents, record, standing
from ckptsvc.control.membership import AGENT_PATIENCE, Job
from ckptsvc.control.nic_job import JobNics
from ckptsvc.control.nics import INFO
from ckptsvc.control.pace import BRIEF_FROM
from ckptsvc.control.restart import Accused, Attempts, Phase, launched_as
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

EXAMINE_SECONDS = 1.0
"""Seconds a node has to look at its ranks."""

ANSWER_PATIENCE = 3.0
"""Seconds after which a node that has not answered counts as silent."""

LOOK_AGAIN = 1.0
LOOK_AGAIN_MOST = 15.0
"""Seconds between two examinations of one incident: doubled from the first to the last."""

ROUNDS = 3
"""Examinations in a row that must name the same rank, if it is not stopped or gone."""

UNSEEN = 5.0
"""Times `confirm` for a rank whose stack nobody can see: whether it stands still is not known."""

KILL_PATIENCE = 3.0
"""Seconds in which a rank that was to be killed must have ended; then it is examined again."""

PAUSE = 2.0
"""Seconds between two ticks from which on the coordinator itself was away: answers may wait unread."""

MOVES_BYTES = 256 << 10
MOVES_CPU = 0.1
"""Bytes a second, and share of a core of its children, of a rank that works unseen: it writes a file, its data loaders
compute. Loggers and monitors beside it use less."""

SAMPLE = 64
SAMPLES = 2
"""Nodes, beside those that have reported, that are examined first where there are many times more, and how often: that
a rank is stopped and the job is not can be seen in a moment, the evidence of 100,000 ranks takes seconds."""

SAMPLES_FROM = 4
"""Times `SAMPLE` nodes from which on there are many."""

KEPT_RANKS = 32
"""Ranks whose evidence is kept in an incident."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done about a rank that hangs.

    Attributes:
        automatic: "launched": it is killed if `ckptsvc run` will start it again; "always"; "never": only reported.
        confirm: seconds for which a rank that runs must have stood still.
        give_up: seconds for which all ranks must have stood still until the attempt is ended, whoever is to blame.
    """

    automatic: str = "launched"
    confirm: float = 120.0
    give_up: float = 1800.0


@dataclass(slots=True)
class Track:
    """One rank, over the examinations of an incident."""

    last: pb.RankEvidence | None = None
    moved_at: float = 0.0  # how long it had been without progress when it was last seen to do something

    @property
    def stood(self) -> float:
        """Seconds for which it has stood still: in the same functions, reading and writing nothing."""
        return self.last.stalled - self.moved_at if self.last is not None else 0.0

    def look(self, seen: pb.RankEvidence) -> None:
        """Whether it has done something since it was last examined, if only where no step shows it."""
        last, self.last = self.last, seen
        if last is None:
            return
        seconds = max(seen.stalled - last.stalled, 1.0)
        moves = seen.io_bytes - last.io_bytes > seconds * MOVES_BYTES
        moves = moves or seen.children_cpu - last.children_cpu > seconds * MOVES_CPU
        before, now = functions(last.stack), functions(seen.stack)
        if moves or (before and now and before != now) or seen.stalled < last.stalled:
            self.moved_at = seen.stalled


@dataclass(slots=True)
class Case:
    """One incident that is not closed."""

    job: str
    incident: pb.Incident
    opened: float
    stalled: dict[int, pb.Stalled] = field(default_factory=dict)
    round: int = 0
    samples: int = 0  # rounds so far in which not all nodes were asked
    asked: set[str] = field(default_factory=set)
    awaited: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    answers: dict[str, pb.Examined] = field(default_factory=dict)
    well: int = 0  # ranks in them whose process is neither stopped nor gone
    broken: bool = False  # and whether there is another, overdue
    until: float = 0.0  # open: the deadline for answers; else: when to look again
    open: bool = True
    verdict: Verdict = field(default_factory=Verdict)
    named: int = 0  # verdicts in a row that have named the same rank
    tracks: dict[int, Track] = field(default_factory=dict)
    killed_at: float | None = None  # a rank, or the attempt, is being ended
    tried: bool = False  # to kill the rank
    told: bool = False  # the incident is kept


@dataclass(slots=True)
class Health:
    """The hangs of all jobs; `jobs` and `launched` are the coordinator's own."""

    jobs: Mapping[str, Job]
    launched: Mapping[str, Attempts]
    incidents: Incidents
    nics: Mapping[str, JobNics] = field(default_factory=dict)
    policy: Policy = Policy()
    cases: dict[str, Case] = field(default_factory=dict)
    _harmless: dict[str, tuple[int, float]] = field(default_factory=dict)  # job -> attempt, longest stand that ended
    _missing: dict[str, tuple[int, dict[int, str]]] = field(default_factory=dict)  # job -> attempt, rank -> node
    _ticked: float | None = None

    def missing(self, job: Job, rank: int, node: str) -> None:
        """The agent of a rank was lost, and the rank has not come back to it, nor to a new one."""
        attempt, ranks = self._missing.get(job.name, (job.attempt, {}))
        self._missing[job.name] = (job.attempt, {**(ranks if attempt == job.attempt else {}), rank: node})

    def stalled(self, event: pb.Stalled, now: float) -> Decision:
        """A rank has been without progress for longer than is normal in its job."""
        job = self.jobs.get(event.job)
        if job is None or event.attempt != job.attempt or event.rank not in job.ranks:
            return Decision()
        case = self.cases.get(event.job)
        if case is not None and case.incident.attempt == event.attempt:
            news = event.stopped and event.rank not in case.stalled
            case.stalled[event.rank] = event
            return self._look_there(case, job, event.node, now) if news else Decision()
        incident = self.incidents.begin(event.job, event.attempt, "hung")
        incident.step = max(event.step, job.highest)
        case = self.cases[event.job] = Case(event.job, incident, now, {event.rank: event})
        reason = (
            f"job {event.job}: rank {event.rank} on {event.node} has made no progress for {event.seconds:.1f} s"
            f" in phase {event.phase or 'unknown'} ({event.threshold:.1f} s are allowed)"
        )
        return Decision([], [reason]).add(self._examine(case, job, now))

    def moved(self, event: pb.Moved, now: float) -> Decision:
        """A stalled rank makes progress again."""
        case = self.cases.get(event.job)
        if case is None or case.incident.attempt != event.attempt or event.rank not in case.stalled:
            return Decision()
        stalled = case.stalled.pop(event.rank)
        if case.stalled or case.killed_at is not None:
            return Decision()
        seconds = stalled.seconds + now - case.opened
        self._harmless[case.job] = (event.attempt, max(self._longest(case), self._strayed(case)))
        case.incident.kind = "slow"
        return self._close(case, f"went on by itself after {seconds:.1f} s")

    def examined(self, event: pb.Examined, now: float) -> Decision:
        """A node has looked at its ranks."""
        case, job = self.cases.get(event.job), self.jobs.get(event.job)
        if case is None or job is None or (event.incident, event.round) != (case.incident.id, case.round):
            return Decision()
        if event.node not in case.awaited:
            return Decision()
        case.awaited.discard(event.node)
        case.answers[event.node] = event
        if not case.awaited or self._is_found(case, job, event):
            return self._conclude(case, job, now)
        return Decision()

    def agent_lost(self, node: str, now: float) -> Decision:
        """An agent is gone. What it has reported counts no more: it will say it again when it is back."""
        decision = Decision()
        for case in list(self.cases.values()):
            for rank in [rank for rank, event in case.stalled.items() if event.node == node]:
                del case.stalled[rank]
            if not case.stalled and case.killed_at is None:
                decision.add(self._close(case, f"the agent of {node} is gone, which had reported it"))
        return decision

    def tick(self, now: float) -> Decision:
        """Deadlines, and what has become void."""
        away = now - self._ticked if self._ticked is not None else 0.0
        self._ticked = now
        decision = Decision()
        for case in list(self.cases.values()):
            job = self.jobs.get(case.job)
            if job is None or job.attempt != case.incident.attempt or not job.ranks:
                decision.add(self._close(case, "" if case.killed_at is not None else "the attempt has ended"))
            elif case.killed_at is not None:
                decision.add(self._follow_up(case, job, now))
            elif away > PAUSE:
                case.until += away
            elif now >= case.until:
                case.silent |= case.awaited
                decision.add(self._conclude(case, job, now) if case.open else self._examine(case, job, now))
        for known in (self._harmless, self._missing):
            for name in [name for name in known if name not in self.jobs]:
                del known[name]
        return decision

    # ---- examining ---------------------------------------------------------------------------------------------------

    def _examine(self, case: Case, job: Job, now: float) -> Decision:
        case.round += 1
        case.open, case.until, case.answers = True, now + ANSWER_PATIENCE, {}
        case.well, case.broken = 0, False
        nodes = job.nodes
        case.asked = self._sample(case, nodes) or set(nodes)
        case.samples += len(case.asked) < len(nodes)
        case.silent = job.unreachable & case.asked
        case.awaited = case.asked - case.silent
        return self._ask(case, sorted(case.awaited))

    def _ask(self, case: Case, nodes: list[str]) -> Decision:
        order = pb.Examine(
            attempt=case.incident.attempt, incident=case.incident.id, seconds=EXAMINE_SECONDS, round=case.round,
            brief=len(case.awaited) >= BRIEF_FROM,
        )  # fmt: skip
        return Decision([Send(n, pb.Order(job=case.job, examine=order)) for n in nodes])

    def _look_there(self, case: Case, job: Job, node: str, now: float) -> Decision:
        """A process there is stopped, as its agent sees: that node is asked now, whoever else has been."""
        if case.killed_at is not None or node in case.asked or node in job.unreachable:
            return Decision()
        if not case.open:
            case.until = now
            return Decision()
        case.asked.add(node)
        case.awaited.add(node)
        return self._ask(case, [node])

    def _is_found(self, case: Case, job: Job, answer: pb.Examined) -> bool:
        """Whether a sample that is not complete has shown what it was for.

        A process is stopped or gone, and too many others are not for somebody to have suspended the job.
        """
        for seen in answer.ranks:
            case.well += not is_broken(seen)
            case.broken |= is_broken(seen) and is_overdue(seen)
        if not case.broken or 2 * len(case.answers) <= len(case.asked) or len(case.asked) == len(job.nodes):
            return False
        return 2 * case.well >= sum(node in case.asked for node in job.ranks.values())

    def _sample(self, case: Case, nodes: list[str]) -> set[str]:
        """The nodes to ask, if not all."""
        every = len(nodes) // SAMPLE
        if every < SAMPLES_FROM or case.samples >= SAMPLES:
            return set()
        reported = [event.node for event in case.stalled.values()][: 2 * SAMPLE]
        return {*nodes[::every], *reported} & set(nodes)

    def _conclude(self, case: Case, job: Job, now: float) -> Decision:
        ranks = {e.rank: e for a in case.answers.values() for e in a.ranks if job.ranks.get(e.rank) == a.node}
        nics = self._nics(case, job)
        asked = {rank: node for rank, node in job.ranks.items() if node in case.asked}
        verdict = self._verdict_on_missing(case, job) or blame(Scene(asked, ranks, case.silent, nics))
        case.open, case.awaited = False, set()
        if len(asked) < len(job.ranks) and not (verdict.broken and verdict.overdue):
            case.until = now  # a sample accuses nobody whose process is well: ask all
            return Decision()
        news = self._take_in(case, verdict, ranks, now)
        case.incident.nics[:] = [sentence for sentences in nics.values() for sentence in sentences]
        attempts = self._attempts(case)
        if self._is_sure(case):
            if not case.tried and case.verdict.rank in job.ranks:
                return self._kill(case, ranks, now)
            if attempts is not None:
                return self._give_up(case, attempts, now)
        if attempts is not None and self._is_dead(case, job, ranks):
            return self._give_up(case, attempts, now)
        pause = min(LOOK_AGAIN * 2 ** min(case.round - case.samples - 1, 8), LOOK_AGAIN_MOST)
        if strayed := self._strayed(case):
            pause = min(pause, max(self._patience(case) - strayed, LOOK_AGAIN))
        case.until = now + pause
        return record(case.incident) if news and case.told else Decision()

    def _take_in(self, case: Case, verdict: Verdict, ranks: Mapping[int, pb.RankEvidence], now: float) -> bool:
        """Note a verdict; returns whether it says something new."""
        incident, before = case.incident, case.verdict
        news = (verdict.rank, verdict.node, verdict.overdue) != (before.rank, before.node, before.overdue)
        case.named = case.named + 1 if verdict.rank == before.rank else 1
        case.verdict = verdict
        for rank, seen in ranks.items():
            case.tracks.setdefault(rank, Track()).look(seen)
        if verdict.node or not incident.node:  # that nobody can be named now does not clear whoever was named before
            incident.rank, incident.node, incident.sentence = verdict.rank, verdict.node, verdict.sentence
            incident.confidence = verdict.confidence
            incident.signals[:] = verdict.signals
        chosen = sorted(ranks, key=lambda r: (r != incident.rank, r not in case.stalled, r))[:KEPT_RANKS]
        del incident.ranks[:]
        incident.ranks.extend(ranks[r] for r in sorted(chosen))
        if not incident.detected:
            first = max((event.seconds for event in case.stalled.values()), default=0.0)
            incident.detected = first + now - case.opened
        # Where nobody can be named at once, it may be over before anybody wants to hear of it.
        before_told, case.told = case.told, case.told or bool(verdict.node) or case.round - case.samples >= ROUNDS
        return news or not before_told

    def _nics(self, case: Case, job: Job) -> dict[str, list[str]]:
        """What is wrong with the nodes' network cards: compared with the whole job's, and as each node sees it."""
        found: dict[str, list[str]] = {}
        if job.name in self.nics:
            for finding in self.nics[job.name].findings():
                if finding.severity != INFO:
                    found.setdefault(finding.node, []).append(finding.sentence)
        for node, answer in case.answers.items():
            if node not in found and answer.nics:
                found[node] = list(answer.nics)
        return found

    def _verdict_on_missing(self, case: Case, job: Job) -> Verdict | None:
        attempts = self._attempts(case)
        attempt, ranks = self._missing.get(case.job, (0, {}))
        if attempts is None or attempt != case.incident.attempt:
            return None
        for rank, node in ranks.items():
            launcher = attempts.nodes.get(node)
            there = launcher is not None and launcher.away_since is None
            if there and rank not in job.ranks and rank in attempts.running and rank not in attempts.statuses:
                what = f"it has not come back to its agent for {AGENT_PATIENCE:g} s"
                sentence = f"rank {rank} on {node} hung: {what}, and {len(case.stalled)} of the others stand still"
                return Verdict(rank, node, sentence, 0.8, (what,), frozenset({Kind.NODE}), overdue=True, broken=True)
        return None

    # ---- acting ------------------------------------------------------------------------------------------------------

    def _is_sure(self, case: Case) -> bool:
        """Whether the rank may be killed: it is overdue, and two signals that are independent say so."""
        if not case.verdict.overdue or not self._may_kill(case):
            return False
        return case.verdict.broken or (case.named >= ROUNDS and self._strayed(case) >= self._patience(case))

    def _is_dead(self, case: Case, job: Job, ranks: Mapping[int, pb.RankEvidence]) -> bool:
        """Whether nothing at all has happened for so long that the attempt is given up, though nobody is named."""
        if self.policy.automatic == "never" or ranks.keys() != job.ranks.keys():
            return False
        overdue = all(is_overdue(e) and e.state not in ("T", "t") for e in ranks.values())
        return overdue and min(case.tracks[rank].stood for rank in ranks) > self.policy.give_up

    def _strayed(self, case: Case) -> float:
        """Seconds for which the suspect has stood still where it should not; 0 as long as there is one signal only."""
        track = case.tracks.get(case.verdict.rank)
        return track.stood if track and case.verdict.overdue and len(case.verdict.kinds) > 1 else 0.0

    def _patience(self, case: Case) -> float:
        """Seconds for which the suspect must stand still: longer than any did in this attempt that went on."""
        track = case.tracks.get(case.verdict.rank, Track())
        unseen = track.last is None or not functions(track.last.stack)
        return max(self.policy.confirm, 2 * self._longest(case)) * (UNSEEN if unseen else 1.0)

    def _longest(self, case: Case) -> float:
        attempt, longest = self._harmless.get(case.job, (0, 0.0))
        return longest if attempt == case.incident.attempt else 0.0

    def _may_kill(self, case: Case) -> bool:
        if self.policy.automatic == "always":
            return True
        attempts = self._attempts(case)
        return self.policy.automatic == "launched" and attempts is not None

    def _attempts(self, case: Case) -> Attempts | None:
        """The launched job, if it is this very attempt that runs."""
        attempts = self.launched.get(launched_as(case.job))
        if attempts is None or (attempts.attempt, attempts.phase) != (case.incident.attempt, Phase.RUNNING):
            return None
        return attempts

    def _kill(self, case: Case, ranks: Mapping[int, pb.RankEvidence], now: float) -> Decision:
        verdict = case.verdict
        case.killed_at, case.tried = now, True
        case.incident.actions.append(f"SIGKILL to rank {verdict.rank} on {verdict.node}")
        self._accuse(case)
        kill = pb.Kill(attempt=case.incident.attempt, rank=verdict.rank, reason=verdict.sentence)
        kill.state = ranks[verdict.rank].state if verdict.broken else ""
        return Decision([Send(verdict.node, pb.Order(job=case.job, kill=kill))]).add(record(case.incident))

    def _accuse(self, case: Case) -> None:
        """Whatever rank ends first from now on, this is why."""
        attempts = self._attempts(case)
        if attempts is not None:
            verdict = case.verdict
            attempts.accuse(Accused(case.incident.attempt, verdict.rank, verdict.node, verdict.sentence))
        self.incidents.fatal(case.incident)

    def _follow_up(self, case: Case, job: Job, now: float) -> Decision:
        """The rank should be gone by now. If it was on its way again, its agent has let it live."""
        if case.killed_at is None or now - case.killed_at < KILL_PATIENCE or case.verdict.rank not in job.ranks:
            return Decision()
        case.killed_at = None
        self.incidents.pardon(case.job)
        attempts = self._attempts(case)
        if attempts is not None:
            attempts.acquit()
        if not case.stalled:
            return self._close(case, "it had gone on by itself, and lives")
        case.incident.actions.append("it has not ended")
        return self._examine(case, job, now)

    def _give_up(self, case: Case, attempts: Attempts, now: float) -> Decision:
        """Stop the whole attempt: the rank that is to blame cannot be killed, or there is none."""
        case.killed_at = now
        self._accuse(case)
        before = standing(attempts)
        decision = attempts.give_up(now)
        return decision.add(self.incidents.failed(attempts, before, "hung"))

    def _close(self, case: Case, how: str) -> Decision:
        """Nothing more will be found out; what nobody has heard of yet was no incident."""
        del self.cases[case.job]
        if not how:
            return Decision()
        if not case.told:
            return Decision([], [f"job {case.job}: {how}"])
        case.incident.actions.append(how)
        return record(case.incident)
