"""A node that is to be switched off: what each job has there goes elsewhere first.

    ranks train there       a checkpoint; then, if `ckptsvc run` has started them and there are enough other nodes,
                            the job starts anew without it, from that checkpoint
    a save is in progress   it is waited for
    copies for others       those of the checkpoint are kept on other nodes (redundancy.Redundancy.leave)

What cannot be done is said, and the node stays as it is but for one thing: no job is placed there any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptsvc.control.effects import Decision
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import Attempts, Phase
from ckptsvc.control.saving import Result, Saving
from ckptsvc.control.tiering import Tiers
from ckptsvc.telemetry import Cause


@dataclass(slots=True)
class Vacating:
    """One node, and one launched job (or one that something else has started).

    Attributes:
        led: the job's coordinator is on the node, and no other one can be elected.
        moved: the attempt that was stopped because of the node.
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
    failed: list[str] = field(default_factory=list)

    @property
    def waits_for(self) -> str:
        """See `verbs.Work`."""
        if self.saving:
            return "; ".join(each.waits_for for each in self.saving)
        if self.moved:
            return f"job {self.launched}: it starts anew on other nodes"
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
        return decision, self._rest()

    def _move(self, attempts: Attempts, now: float) -> tuple[Decision, Result | None]:
        """Have the job go on without the node."""
        if attempts.stop_wanted or attempts.statuses:
            return Decision(), None  # it is ending
        others = [n for n in attempts.nodes.values() if n.name != self.node and n.away_since is None]
        usable = [n for n in others if not attempts.exclusion.excluded(n.name, now)]
        if len(usable) < attempts.min_nodes or attempts.attempt > self.moved > 0:
            need = f"it needs {attempts.min_nodes} nodes, and there are {len(usable)} others that it can use"
            return Decision(), self._cannot(f"job {self.launched} cannot do without {self.node}: {need}")
        self.moved = attempts.attempt
        why = f"node {self.node} is {self.why}"
        attempts.incidents.append(f"attempt {attempts.attempt}: {why}")
        return attempts.again(why, Cause.DRAINED, now), None

    def _rest(self) -> Result | None:
        """What keeps the node from being switched off once no launched rank is there; None: something ends soon."""
        for run in self.runs:
            ranks = sorted(rank for rank, node in run.ranks.items() if node == self.node)
            if ranks and self.attempts is None:
                return self._cannot(
                    f"job {run.name} has ranks there, and `ckptsvc run` has not started them: stop them"
                )
            if ranks or any(self.node in save.staged.values() for save in run.saves.open.values()):
                return None
            newest = max(run.saves.complete, default=None)
            if newest is not None and newest[1] > (run.saves.committed_step or -1):
                alone = [r for r, nodes in run.saves.held.get(newest, {}).items() if nodes == [self.node]]
                if alone and not self.moved:
                    what = f"job {run.name}: the snapshot of step {newest[1]} is in its memory, and nowhere else"
                    return self._cannot(what)
        going = self.attempts is not None and self.attempts.phase is Phase.RUNNING
        if self.led and going and self.attempts is not None and self.attempts.hosts - {self.node}:
            how = "and ends with it, unless its agents elect one: see --coordination"
            return self._cannot(f"job {self.launched} is coordinated by the agent of {self.node}, {how}")
        return Result(f"job {self.launched} needs {self.node} no more")

    def _cannot(self, what: str) -> Result:
        return Result(what, "run-busy")
