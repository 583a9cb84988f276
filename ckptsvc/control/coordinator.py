"""The coordinator: routes reports to the jobs' state machines and collects what they decide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ckptsvc.control.crashloop import CrashLoop
from ckptsvc.control.effects import (
    CommitDone,
    Decision,
    Drain,
    EpochDone,
    KeepNodes,
    LookupDone,
    NodesKept,
    NodesRead,
    Probed,
    ReadNodes,
    Send,
)
from ckptsvc.control.exclusion import Exclusion, Strikes, Word
from ckptsvc.control.growth import Growth, Reach
from ckptsvc.control.health import Health, Policy
from ckptsvc.control.incidents import Incidents, standing
from ckptsvc.control.ledger import TURNS, Ledger
from ckptsvc.control.membership import Job
from ckptsvc.control.nic_job import JobNics
from ckptsvc.control.nics import Finding
from ckptsvc.control.pauses import Pauses
from ckptsvc.control.redundancy import PartnerPolicy, Redundancy
from ckptsvc.control.restart import Attempts, Phase, launched_as
from ckptsvc.control.save import Key, Saves
from ckptsvc.control.slow import SlowJobs
from ckptsvc.control.tiering import Draining, Tiers
from ckptsvc.control.verbs import Verbs
from ckptsvc.format.commit import parse_checkpoint_name
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

FORGET_AFTER = 3600.0
"""Seconds for which a job is remembered that has nothing left: an agent that was away may ask how a save has ended."""


@dataclass(slots=True)
class Coordinator:
    """Soft state of all jobs; rebuilt from the agents' reports after a restart.

    `save_timeout` is in seconds, from the first rank's staging; `mark` sets the incidents of this coordinator apart
    from those of an earlier one; `node` is the node that it is on, "" where another one can be elected.
    """

    save_timeout: float = 1800.0
    policy: Policy = field(default_factory=Policy)
    mark: str = ""
    node: str = ""
    draining: Draining = field(default_factory=Draining)
    partners: PartnerPolicy = field(default_factory=PartnerPolicy)
    jobs: dict[str, Job] = field(default_factory=dict)
    tiers: dict[str, Tiers] = field(default_factory=dict)
    launched: dict[str, Attempts] = field(default_factory=dict)
    nics: dict[str, JobNics] = field(default_factory=dict)
    exclusion: Exclusion = field(default_factory=Exclusion)
    ledger: Ledger = field(default_factory=Ledger)
    incidents: Incidents = field(init=False)
    health: Health = field(init=False)
    slow: SlowJobs = field(init=False)
    redundancy: Redundancy = field(init=False)
    pauses: Pauses = field(init=False)
    verbs: Verbs = field(init=False)

    def __post_init__(self) -> None:
        self.incidents = Incidents(self.jobs, self.mark)
        self.health = Health(self.jobs, self.launched, self.incidents, self.nics, self.policy)
        self.slow = SlowJobs(self.jobs, self.incidents, self.health.cases)
        self.redundancy = Redundancy(self.partners)
        self.pauses = Pauses(self.jobs)
        known = self.jobs, self.launched, self.tiers, self.exclusion, self.redundancy
        self.verbs = Verbs(*known, self.pauses, self.node)

    def handle(self, node: str, report: pb.Report, now: float) -> Decision:
        """One report from the agent of `node`."""
        kind = report.WhichOneof("event")
        if kind is None:
            return Decision()
        event = getattr(report, kind)
        decision: Decision = getattr(self, f"_on_{kind}")(event, now)
        if kind in TURNS:
            self._look(now)
        return decision.add(self._epochs(now))

    def agent_lost(self, node: str, now: float) -> Decision:
        """An agent's stream has ended. It may come back: only its memory counts as lost until then."""
        self.pauses.unheard(node)
        for job in self.jobs.values():
            job.saves.node_gone(node)
            job.agent_lost(node, now)
            if job.name in self.tiers:
                self.tiers[job.name].node_gone(node)
        decision = Decision([], [f"agent of {node} disconnected"]).add(self.redundancy.agent_lost(node))
        for attempts in self.launched.values():
            decision.add(attempts.agent_lost(node, now))
        return decision.add(self.health.agent_lost(node, now))

    def probed(self, event: Probed, now: float) -> Decision:
        """Answer to `Probe`."""
        attempts = self.launched.get(event.job)
        if attempts is None:
            return Decision()
        before = standing(attempts)
        decision = attempts.probed(event, now)
        return decision.add(self.incidents.failed(attempts, before, "node-lost", node=event.node))

    def nodes_kept(self, event: NodesKept, now: float) -> Decision:
        """Answer to `KeepNodes`."""
        self.exclusion.kept, self.exclusion.problem = max(self.exclusion.kept, event.said), event.problem
        return self.verbs.tick(now)

    def nodes_read(self, event: NodesRead, now: float) -> Decision:
        """Answer to `ReadNodes`."""
        self.exclusion.known = True
        found = {node: Strikes(score, now - age, why) for node, (score, age, why) in event.strikes.items()}
        words = {n: Word(bad, now - age, now + left, why) for n, (bad, age, left, why) in event.words.items()}
        self.exclusion.merge(found, now, words)
        known = sorted(found.keys() | words.keys())
        bad = [f"node {node} {self.exclusion.why(node, now)}" for node in known if self.exclusion.excluded(node, now)]
        decision = Decision([], bad)
        for attempts in self.launched.values():
            decision.add(attempts.tick(now))
        return decision

    def epoch_done(self, event: EpochDone, now: float) -> Decision:
        """Answer to `AllotEpoch`."""
        job = self.jobs.get(event.job)
        return job.epoch_done(event) if job else Decision()

    def commit_done(self, event: CommitDone, now: float) -> Decision:
        """Answer to `Commit`."""
        job = self.jobs.get(event.job)
        if job is None:
            return Decision()
        decision = job.saves.commit_done(event, now)
        if event.job in self.tiers:
            decision.add(self.tiers[event.job].plan(now))
        return decision.add(self._epochs(now))

    def deleted(self, job: str, names: Iterable[str]) -> None:
        """Retention has removed these checkpoints from the store."""
        if job in self.jobs:
            found = filter(None, map(parse_checkpoint_name, names))
            self.jobs[job].saves.deleted.update((epoch, step) for step, epoch in found)

    def lookup_done(self, event: LookupDone, now: float) -> Decision:
        """Answer to `Lookup`."""
        job = self.jobs.get(event.job)
        return job.saves.lookup_done(event, now).add(self._epochs(now)) if job else Decision()

    def tick(self, now: float) -> Decision:
        """Whatever time alone decides; call it a few times a second."""
        decision = Decision()
        for job in self.jobs.values():
            known = dict(job.ranks) if job.overdue(now) else {}
            decision.add(job.tick(now)).add(job.saves.tick(now)).add(job.order_saves(now))
            if job.name in self.tiers:
                decision.add(self.tiers[job.name].tick(now, over=not job.ranks))
            for rank in known.keys() - job.ranks.keys():
                self.health.missing(job, rank, known[rank])
        for attempts in self.launched.values():
            decision.add(self._tick_launched(attempts, now))
        for nics in self.nics.values():
            decision.add(nics.tick(now))
        decision.add(self.health.tick(now)).add(self.slow.tick(now)).add(self.redundancy.tick(self.jobs, now))
        self._look(now)
        decision.add(self.pauses.tick(now)).add(self.verbs.tick(now))
        for name, job in list(self.jobs.items()):
            if job.ranks or job.saves.open or job.saves.held or (name in self.tiers and self.tiers[name].disks):
                job.busy_at = now
            elif now - job.busy_at > FORGET_AFTER:
                del self.jobs[name]
                self.tiers.pop(name, None)
                self.incidents.forget(name)
                self.redundancy.forget(name)
                self.ledger.forget(name)
                self.pauses.forget(name)
                self.nics.pop(name, None)
        for name, attempts in list(self.launched.items()):
            if attempts.phase is Phase.ENDED and now - attempts.ended > FORGET_AFTER:
                del self.launched[name]
        return decision.add(self._epochs(now)).add(self._keep_nodes(now)).add(self._drain())

    def _look(self, now: float) -> None:
        for job in self.jobs.values():
            self.ledger.look(job, self.launched.get(launched_as(job.name)), self.health.cases.get(job.name), now)

    def _keep_nodes(self, now: float) -> Decision:
        if not self.exclusion.changed or not self.exclusion.known:
            return Decision()
        strikes = {n: (s.score, now - s.at, s.why) for n, s in self.exclusion.listed(now).items()}
        words = {n: (w.excluded, now - w.at, w.until - now, w.why) for n, w in self.exclusion.words.items()}
        return Decision([KeepNodes(strikes, words, self.exclusion.said)])

    def _drain(self) -> Decision:
        decision = Decision()
        for node, why in self.exclusion.fresh.items():
            about = self.incidents.about(node)
            decision.effects.append(Drain(node, f"{about}: {why}" if about else why))
            decision.reasons.append(f"node {node} has failed too often and is not used while there are others: {why}")
        self.exclusion.fresh.clear()
        return decision

    def _tick_launched(self, attempts: Attempts, now: float) -> Decision:
        before, nodes = standing(attempts), list(attempts.nodes)
        suspects = [(rank, where) for rank, (_, where) in attempts.suspects.items() if rank not in attempts.statuses]
        decision = attempts.tick(now)
        if attempts.phase is Phase.STOPPING:  # the next attempt will ask what there is to restore
            for job in self._runs_of(attempts.job):
                decision.add(self.redundancy.rebuild(job, now))
        if suspects:
            return decision.add(self.incidents.failed(attempts, before, "died", *suspects[0]))
        lost = next((node for node in nodes if node not in attempts.nodes), "")
        decision.add(self.incidents.failed(attempts, before, "node-lost", node=lost))
        return decision.add(self._grow(attempts, now))

    def _grow(self, attempts: Attempts, now: float) -> Decision:
        """Start a job anew that runs on fewer nodes than there are, when it loses little by it."""
        growth, waiting = attempts.growth, attempts.waiting(now)
        jobs = [j for j in self.jobs.values() if (launched_as(j.name), j.attempt) == (attempts.job, attempts.attempt)]
        done = max((job.highest for job in jobs if job.progress), default=None)
        committed = (
            max((s for job in jobs if (s := job.saves.committed_step) is not None), default=-1) if waiting else -1
        )
        why = growth.look(waiting, Reach(done, committed), now, told=attempts.gathered)
        if why:
            return attempts.grow(waiting, why, now)
        if growth.wants_checkpoint(now):
            for job in jobs:
                job.save_wanted = True
        return Decision()

    def _runs_of(self, launched: str) -> list[Job]:
        return [job for job in self.jobs.values() if launched_as(job.name) == launched]

    def recover(self, job: str, now: float) -> Decision:
        """The ranks of a job want to know what is in memory: have what is lost rebuilt, where it can be."""
        return self.redundancy.rebuild(self.jobs[job], now) if job in self.jobs else Decision()

    def lost(self, job: str) -> list[str]:
        """Snapshots that were newer than any that is still whole, a sentence each."""
        return self.redundancy.lost(self.jobs[job]) if job in self.jobs else []

    def committed(self, job: str) -> Key:
        """The newest checkpoint of a job that is known to be in the store; (0, 0) where none is."""
        saves = self.jobs[job].saves if job in self.jobs else None
        return saves.committed if saves and saves.committed and saves.committed not in saves.deleted else (0, 0)

    def snapshots(self, job: str) -> list[agent_pb2.Snapshot]:
        """Complete snapshots of a job in memory or on local disks, newest first; each agent fills in `local`."""
        known = self.jobs.get(job)
        if known is None:
            return []
        disks = self.tiers[job].snapshots() if job in self.tiers else {}
        found = [
            agent_pb2.Snapshot(
                epoch=epoch,
                step=step,
                world_size=known.saves.complete[epoch, step],
                aliases=known.saves.aliases.get((epoch, step), {}),
                on_disk=(epoch, step) in disks,
            )
            for epoch, step in known.saves.snapshots()
        ]
        in_memory = {(each.epoch, each.step) for each in found}
        found += [
            agent_pb2.Snapshot(
                epoch=key[0], step=key[1], world_size=d.world_size, aliases=d.aliases, on_disk=True, not_in_memory=True
            )
            for key, d in disks.items()
            if key not in in_memory
        ]
        return sorted(found, key=lambda each: (each.epoch, each.step), reverse=True)

    def nic_findings(self, job: str) -> list[Finding]:
        """The network cards of a job that are in trouble now, worst first."""
        known, nics = self.jobs.get(job), self.nics.get(job)
        return nics.findings() if known and nics and nics.attempt >= known.attempt else []

    def _epochs(self, now: float) -> Decision:
        decision = Decision()
        for job in self.jobs.values():
            if job.epoch or not job.ranks:
                continue
            busy = any(o.store == job.store and o is not job and o.saves.open for o in self.jobs.values())
            decision.add(job.want_epoch(busy, now))
        return decision

    def _job(self, name: str, store: str, now: float) -> Job:
        if name not in self.jobs:
            self.jobs[name] = Job(name, store, Saves(name, self.save_timeout), busy_at=now)
        return self.jobs[name]

    def _on_rank_joined(self, event: pb.RankJoined, now: float) -> Decision:
        for other in self.jobs.values():
            if other.name != event.job and other.store == event.store and other.ranks:
                where = ", ".join(other.nodes)
                why = f"job {other.name} with {len(other.ranks)} live ranks on {where} writes to this run"
                refused = pb.JobRefused(attempt=event.attempt, code="run-busy", why=why)
                return Decision([Send(event.node, pb.Order(job=event.job, job_refused=refused))], [why])
        self.redundancy.joined(event)
        job = self._job(event.job, event.store, now)
        joined = job.join(event, now)
        decision = self.pauses.joined(job, event, now).add(joined)
        attempts = self.launched.get(launched_as(event.job))
        if attempts is not None and attempts.stop_wanted:
            job.want_stop(attempts.stop_wanted)  # asked before there were ranks
        return decision

    def _on_rank_left(self, event: pb.RankLeft, now: float) -> Decision:
        job = self.jobs.get(event.job)
        decision = job.leave(event, now) if job else Decision()
        attempts = self.launched.get(launched_as(event.job))
        self.ledger.left(event, now)
        if attempts is None and not event.died and job is not None and not job.ranks:
            self.pauses.end(launched_as(event.job))
        if event.died and attempts is not None:
            attempts.suspect(event.attempt, event.rank, event.node, now)
        elif event.died and job is not None and event.attempt == job.attempt:
            decision.add(self.incidents.died(event.job, event.attempt, event.rank, event.node, event.detail))
        return decision

    def _on_announced(self, event: pb.Announced, now: float) -> Decision:
        job = self.jobs.get(event.job)
        return job.announce(event) if job else Decision()

    def _on_rewound(self, event: pb.Rewound, now: float) -> Decision:
        job = self.jobs.get(event.job)
        before = job.rewinds if job else 0
        decision = job.rewound(event) if job else Decision()
        return decision.add(self.pauses.rewound(job, now)) if job and job.rewinds != before else decision

    def _on_progressed(self, event: pb.Progressed, now: float) -> Decision:
        job = self.jobs.get(event.job)
        if job is None:
            return Decision()
        job.progressed(event, now)
        return self.ledger.progressed(job, event, now)

    def _on_agent_hello(self, event: pb.AgentHello, now: float) -> Decision:
        self.redundancy.attends(event)
        return Decision()

    def _on_guarded(self, event: pb.Guarded, now: float) -> Decision:
        self._job(event.job, event.store, now)  # a new coordinator may hear of this first
        self.redundancy.guarded(event)
        return Decision()

    def _on_rebuilt(self, event: pb.Rebuilt, now: float) -> Decision:
        return self.redundancy.rebuilt(event)

    def _on_staged(self, event: pb.Staged, now: float) -> Decision:
        job = self._job(event.job, event.store, now)
        decision = job.saves.staged(event, now)
        return decision.add(self.redundancy.staged(job, event))

    def _on_durable(self, event: pb.Durable, now: float) -> Decision:
        job = self.jobs.get(event.job)
        return job.saves.durable(event, now) if job else Decision()

    def _on_shard_failed(self, event: pb.ShardFailed, now: float) -> Decision:
        job = self.jobs.get(event.job)
        return job.saves.shard_failed(event, now) if job else Decision()

    def _on_skipped(self, event: pb.Skipped, now: float) -> Decision:
        job = self.jobs.get(event.job)
        if job is None:
            return Decision()
        if event.attempt == job.attempt:
            job.missed(event.step)
        return job.saves.skipped(event, now)

    def _on_dropped(self, event: pb.Dropped, now: float) -> Decision:
        job = self.jobs.get(event.job)
        if event.rank < 0:
            self.redundancy.dropped(event)
        elif job:
            job.saves.dropped(event)
        return Decision()

    def _on_local_kept(self, event: pb.LocalKept, now: float) -> Decision:
        return self._tiers_of(self._job(event.job, event.store, now)).kept(event, now)

    def _on_local_dropped(self, event: pb.LocalDropped, now: float) -> Decision:
        if event.job in self.tiers:
            self.tiers[event.job].dropped(event)
        return Decision()

    def _on_durable_wanted(self, event: pb.DurableWanted, now: float) -> Decision:
        job = self.jobs.get(event.job)
        return self._tiers_of(job).wanted(event, now) if job else Decision()

    def _tiers_of(self, job: Job) -> Tiers:
        return self.tiers.setdefault(job.name, Tiers(job.saves, self.draining))

    def _on_node_joined(self, event: pb.NodeJoined, now: float) -> Decision:
        attempts = self.launched.get(event.job)
        decision = Decision()
        # A launcher that was there before a job of this name ended belongs to that one, and has missed its end.
        later = attempts and attempts.phase is Phase.ENDED and now - event.uptime >= attempts.ended
        if attempts is None or (later and not event.attempt):
            before = attempts.outcome if attempts else None
            if before is not None:
                self.pauses.end(event.job)
            attempts = Attempts(
                event.job,
                event.min_nodes,
                event.max_nodes,
                event.max_restarts,
                CrashLoop(event.crash_loop),
                self.exclusion,
                lambda: self._reached(event.job),
                Growth(event.grow if event.grow >= 0 else None),
                heard_at=now,
                since=now,
                predecessor=before,
            )
            self.launched[event.job] = attempts
            if event.max_nodes > 1:
                self.exclusion.known = False
                decision.effects.append(ReadNodes())
        return decision.add(attempts.joined(event, now))

    def _reached(self, launched: str) -> tuple[int, int | None]:
        """How far a launched job is: the newest step that could be restored, and the steps done if anybody told."""
        jobs = [job for job in self.jobs.values() if launched_as(job.name) == launched]
        told = [job.highest for job in jobs if job.progress]
        whole = [step for job in jobs if job.name in self.tiers for _, step in self.tiers[job.name].complete]
        return max([job.saves.newest for job in jobs] + whole, default=-1), max(told, default=None)

    def _on_node_ready(self, event: pb.NodeReady, now: float) -> Decision:
        attempts = self.launched.get(event.job)
        if attempts is None:
            return Decision()
        before = standing(attempts)
        return attempts.ready(event, now).add(self.incidents.failed(attempts, before, "node-lost", node=event.node))

    def _on_rank_exited(self, event: pb.RankExited, now: float) -> Decision:
        attempts = self.launched.get(event.job)
        if attempts is None:
            return Decision()
        attempts.saved = self._saved(event.job)
        before = standing(attempts)
        decision = attempts.rank_exited(event.attempt, event.rank, event.node, event.status, now, event.detail)
        return decision.add(self.incidents.failed(attempts, before, "died", event.rank, event.node))

    def _on_node_left(self, event: pb.NodeLeft, now: float) -> Decision:
        attempts = self.launched.get(event.job)
        if attempts is None:
            return Decision()
        before = standing(attempts)
        return attempts.node_left(event.node, event.detail, now).add(
            self.incidents.failed(attempts, before, "node-lost", node=event.node)
        )

    def _on_stalled(self, event: pb.Stalled, now: float) -> Decision:
        return self.health.stalled(event, now)

    def _on_moved(self, event: pb.Moved, now: float) -> Decision:
        return self.health.moved(event, now)

    def _on_examined(self, event: pb.Examined, now: float) -> Decision:
        return self.health.examined(event, now).add(self.slow.examined(event, now))

    def _on_slowed(self, event: pb.Slowed, now: float) -> Decision:
        return self.slow.slowed(event, now)

    def _on_stop_requested(self, event: pb.StopRequested, now: float) -> Decision:
        for job in self.jobs.values():
            if event.job in (job.name, launched_as(job.name)):
                job.want_stop(event.reason)
        attempts = self.launched.get(launched_as(event.job))
        if attempts is not None:
            attempts.stop_wanted = attempts.stop_wanted or event.reason
        return Decision()

    def _on_asked(self, event: pb.Asked, now: float) -> Decision:
        return self.verbs.asked(event, now)

    def _on_pausing(self, event: pb.Pausing, now: float) -> Decision:
        return self.pauses.reported(event, now)

    def _saved(self, launched: str) -> str:
        """What is committed of a launched job's runs, as words."""
        words = [f"step {s} is committed in {j.store}" for j in self.jobs.values() if launched_as(j.name) == launched
            and (s := j.saves.committed_step) is not None]  # fmt: skip
        return ", ".join(words)

    def _on_nic_summary(self, event: pb.NicSummary, now: float) -> Decision:
        job = self.jobs.get(event.job)
        if job is None or event.attempt < job.attempt:
            return Decision()
        return self.nics.setdefault(event.job, JobNics(event.job)).take(event, now)
