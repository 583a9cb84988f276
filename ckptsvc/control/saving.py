"""A checkpoint that a person has ordered: from the order until it is committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptsvc.control.effects import Decision
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import Attempts, Phase
from ckptsvc.control.save import Key
from ckptsvc.control.tiering import Tiers
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, slots=True)
class Result:
    """What has become of an order: a sentence, an error code where it cannot be carried out; of a checkpoint more."""

    what: str
    code: str = ""
    step: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Saving:
    """One job's.

    Attributes:
        since: only a snapshot that is newer counts.
        placed: the attempt, and its epoch by number, in which one was asked for.
        said: why the last one came to nothing.
    """

    job: Job
    tiers: Tiers | None
    attempts: Attempts | None
    since: Key = (0, -1)
    placed: tuple[int, int] | None = None
    said: str = ""
    urged: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.since = (self.job.epoch, self.job.highest)

    @property
    def waits_for(self) -> str:
        """See `verbs.Work`."""
        job = self.job
        if not job.epoch:
            return f"job {job.name}: its run gives no epoch, so that nothing can be saved now"
        if job.ahead is None:
            return f"job {job.name}: its ranks have not all begun to train"
        if self.said:
            return f"job {job.name}: {self.said}; the next snapshot is ordered"
        running = sorted(step for epoch, step in job.saves.open if (epoch, step) > self.since)
        return f"job {job.name}: " + (f"step {running[-1]} is being saved" if running else "a snapshot is ordered")

    def look(self, now: float) -> tuple[Decision, Result | None]:
        """See `verbs.Work`."""
        job, decision = self.job, Decision()
        if not job.ranks and (self.attempts is None or self.attempts.phase is Phase.ENDED):
            return decision, Result(f"job {job.name} has ended", "save-failed")
        if self.placed != (job.attempt, job.rewinds):  # ranks that have come since do not know of it
            self.placed, job.save_wanted = (job.attempt, job.rewinds), True
        for key, ended in list(job.saves.ended.items()):
            if key <= self.since:
                continue
            if ended.outcome == agent_pb2.OUTCOME_COMMITTED:
                what = f"job {job.name}: step {ended.step} is committed in {job.store}"
                return decision, Result(what, "", ended.step, ended.bytes, ended.seconds)
            if ended.outcome == agent_pb2.OUTCOME_SKIPPED:
                self.said, self.since = f"step {ended.step} was skipped ({ended.reason})", key
                job.save_wanted = True
            elif ended.outcome == agent_pb2.OUTCOME_LOCAL:
                decision.add(self._urge(key, now))
            else:
                what = f"job {job.name}: step {ended.step} was not saved: {ended.reason}"
                return decision, Result(what, ended.code or "save-failed")
        for key in [key for key in job.saves.open if key > self.since]:
            decision.add(self._urge(key, now))
        return decision, None

    def _urge(self, key: Key, now: float) -> Decision:
        """Have it written to the durable store, not to local disks alone."""
        if self.tiers is None or key in self.urged:
            return Decision()
        self.urged.add(key)
        return self.tiers.wanted(pb.DurableWanted(job=self.job.name, epoch=key[0], step=key[1]), now)
