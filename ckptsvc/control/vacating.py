"""A node that is to be switched off: what each job has there goes elsewhere first.

    ranks train there       a checkpoint; then, if `ckptsvc run` has started them and there are enough other nodes,
                            the job starts anew without it, from that checkpoint
    a save is in progress   it is waited for
    on its local disk       the newest snapshot goes on to the durable store, if that has no newer one
    copies for others       those of the checkpoint are kept on other nodes (redundancy.Redundancy.leave)

What cannot be done is said, and the node stays as it is but for one thing: no job is placed there any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptsvc.control.effects import Decision
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import Attempts, Phase
from ckptsvc.control.save import Key
from ckptsvc.control.saving import Result, Saving
from ckptsvc.control.tiering import Tiers
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause


@dataclass(slots=True)
class Vacating:
    """One node, and one launched job (or one that something else has started).

    Attributes:
        led: the job's coordinator is on the node, and no other one can be elected.
        moved: the attempt that was stopped because of the node.
        drained: the snapshots on its local disk that were ordered to the durable store, and the job of each.
    """

    node: str
    launched: str
    runs: list[Job]
    attempts: Attempts | None
    tiers: Mapping[str, Tiers]
    why: str
    led: bool = False
    moved: int = 0
    saving: list[Saving] | None = None
    drained: set[tuple[str, Key]] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)

    @property
    def waits_for(self) -> str:
        """See `verbs.Work`."""
        if self.saving:
            return "; ".join(each.waits_for for each in self.saving)
        if self.moved:
            return f"job {self.launched}: it starts anew on other nodes"
        if self.attempts is not None and self.attempts.phase is Phase.GATHERING:
            return f"job {self.launched}: it has not begun"
        return f"job {self.launched}: its saves are being finished"

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """See `verbs.Work`."""
        decision = Decision()
        if self.saving is None:
            self.saving = [
                Saving(run, self.tiers.get(run.name), self.attempts)
                for run in self.runs
                if self.node in run.ranks.values()
            ]
        for each in list(self.saving):
            more, result = each.look(now)
            decision.add(more)
            if result is not None:
                self.saving.remove(each)
                self.failed += [result.what] if result.code else []
        if self.saving:
            return decision, None
        if self.failed:
            return decision, self._cannot("; ".join(self.failed))
        attempts = self.attempts
        if attempts is not None and attempts.phase is Phase.STOPPING:
            return decision, None
        if attempts is not None and attempts.phase is Phase.RUNNING and self.node in attempts.hosts:
            more, result = self._move(attempts, now)
            return decision.add(more), result
        if attempts is not None and self.node in attempts.nodes:
            lacks = self._lacks(attempts, now)
            if attempts.phase is Phase.GATHERING:  # others of a job that an earlier coordinator had may yet be heard of
                return decision, self._cannot(lacks) if lacks and not attempts.inherited else None
            if attempts.phase is Phase.RUNNING and lacks and not (attempts.stop_wanted or attempts.statuses):
                return decision, self._cannot(lacks)
        more, result = self._rest(now)
        return decision.add(more), result

    def _move(self, attempts: Attempts, now: float) -> tuple[Decision, Result | None]:
        """Have the job go on without the node."""
        if attempts.stop_wanted or attempts.statuses:
            return Decision(), None  # it is ending
        lacks = self._lacks(attempts, now, again=attempts.attempt > self.moved > 0)
        if lacks:
            return Decision(), self._cannot(lacks)
        self.moved = attempts.attempt
        why = f"node {self.node} is {self.why}"
        attempts.incidents.append(f"attempt {attempts.attempt}: {why}")
        return attempts.again(why, Cause.DRAINED, now), None

    def _lacks(self, attempts: Attempts, now: float, *, again: bool = False) -> str:
        """Why the job cannot do without the node; "" if it can. `again`: it has started there though it was told."""
        others = [n for n in attempts.nodes.values() if n.name != self.node and n.away_since is None]
        usable = [n for n in others if not attempts.exclusion.excluded(n.name, now)]
        if len(usable) >= attempts.min_nodes and not again:
            return ""
        need = f"it needs {attempts.min_nodes} nodes, and there are {len(usable)} others that it can use"
        return f"job {self.launched} cannot do without {self.node}: {need}"

    def _rest(self, now: float) -> tuple[Decision, Result | None]:
        """What keeps the node from being switched off once no launched rank is there; None: something ends soon."""
        for run in self.runs:
            ranks = sorted(rank for rank, node in run.ranks.items() if node == self.node)
            if ranks and self.attempts is None:
                what = f"job {run.name} has ranks there, and `ckptsvc run` has not started them: stop them"
                return Decision(), self._cannot(what)
            if ranks or any(self.node in save.staged.values() for save in run.saves.open.values()):
                return Decision(), None
            kept = self._on_disk(run)
            if kept is not None and (run.name, kept) not in self.drained:
                self.drained.add((run.name, kept))
                wanted = pb.DurableWanted(job=run.name, epoch=kept[0], step=kept[1])
                return self.tiers[run.name].wanted(wanted, now), None
            if kept is not None:
                what = f"job {run.name}: the snapshot of step {kept[1]} is on its local disk, and not in {run.store}"
                return Decision(), self._cannot(what)
            newest = max(run.saves.complete, default=None)
            if newest is not None and newest[1] > (run.saves.committed_step or -1):
                alone = [r for r, nodes in run.saves.held.get(newest, {}).items() if nodes == [self.node]]
                if alone and not self.moved:
                    what = f"job {run.name}: the snapshot of step {newest[1]} is in its memory, and nowhere else"
                    return Decision(), self._cannot(what)
        going = self.attempts is not None and self.attempts.phase is Phase.RUNNING
        if self.led and going and self.attempts is not None and self.attempts.hosts - {self.node}:
            how = "and ends with it, unless its agents elect one: see --coordination"
            return Decision(), self._cannot(f"job {self.launched} is coordinated by the agent of {self.node}, {how}")
        return Decision(), Result(f"job {self.launched} needs {self.node} no more")

    def _on_disk(self, run: Job) -> Key | None:
        """The newest snapshot left on local disks, if this node has a part of it and the store nothing newer."""
        tiers = self.tiers.get(run.name)
        if tiers is None or self.moved:
            return None
        failed = {key for job, key in self.drained if job == run.name}
        left = [key for key in tiers.complete if key in tiers.left_local or key in failed]
        newest = max(left, default=(0, -1))
        return newest if newest > tiers.committed and self.node in tiers.disks[newest].nodes.values() else None

    def _cannot(self, what: str) -> Result:
        return Result(what, "run-busy")
