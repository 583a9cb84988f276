"""Saves of one job across its ranks: who has staged, whose shard is durable, what may be committed.

A save is named by (epoch, step). It opens with the first rank that stages, is committed when the shard of every rank is
durable, and ends exactly once. What was staged stays known as the memory tier until the agents drop it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from ckptsvc.control.effects import Commit, CommitDone, Decision, Effect, Lookup, LookupDone, Send
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

Key = tuple[int, int]
"""(epoch, step): ordered by which is newer."""

QUIET_BEFORE_LOOKUP = 5.0
"""Seconds without news after which an incomplete save of before our time is looked up in the store: an earlier
coordinator may have committed it and died before telling every agent."""

LOOKUP_PATIENCE = 60.0
"""Seconds to wait for a store that cannot say whether a save is committed that cannot be completed any more."""

LATE_NEWS = 60.0
"""Seconds after the begin of a new attempt in which agents that were away may still report what an older one staged."""

REMEMBERED = 64
"""Ended saves whose outcome is kept, to answer an agent that reports them again."""

_FINAL = ("fenced", "layout", "config", "damaged", "incompatible-version", "save-failed")
"""Codes of errors of a commit after which a save is given up though it is whole on local disks: it will never be one.
Others lie with the store, and may pass."""

Failure = tuple[agent_pb2.Outcome, str, str]
"""How a save fails: outcome, error code, reason."""


@dataclass(slots=True)
class Save:
    """One save in progress.

    Attributes:
        opened: when its first rank was reported to have staged.
        changed: when there last were news, or a look-up.
        fresh: some rank has staged in our time, so that no earlier coordinator can have committed it.
        failure: how it fails, unless it turns out to be committed; and since when.
        local: ranks whose shard is on a local disk (control.tiering), from where it is drained when that is decided.
        must: it is to be drained whatever the policy says.
        decided: whether the policy has been asked.
        draining: the agents have been told to drain it.
        lost_at: since when one of its shards is on a disk that is out of reach.
        timed_out: it has taken too long.
    """

    epoch: int
    step: int
    attempt: int
    world_size: int
    store: str
    opened: float
    changed: float
    committing: bool = False
    fresh: bool = False
    failure: Failure | None = None
    failed_at: float = 0.0
    staged: dict[int, str] = field(default_factory=dict)
    durable: dict[int, pb.Durable] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    local: set[int] = field(default_factory=set)
    decided: bool = False
    must: bool = False
    draining: bool = False
    lost_at: float | None = None
    timed_out: bool = False

    @property
    def settled(self) -> bool:
        """No shard is in memory alone, and not all are durable yet."""
        return bool(self.local) and all(r in self.local or r in self.durable for r in range(self.world_size))

    @property
    def missing(self) -> list[int]:
        """Ranks that have not staged."""
        return [r for r in range(self.world_size) if r not in self.staged]


@dataclass(slots=True)
class Saves:
    """All saves of one job."""

    job: str
    timeout: float
    keep: int = 0
    retention: pb.Retention = field(default_factory=pb.Retention)
    attempt: int = 0
    attempt_began: float = 0.0
    nodes: set[str] = field(default_factory=set)
    latest: dict[int, Key] = field(default_factory=dict)  # rank of the attempt -> its newest snapshot
    gone: set[int] = field(default_factory=set)  # ranks of the attempt that will stage nothing more
    open: dict[Key, Save] = field(default_factory=dict)
    held: dict[Key, dict[int, list[str]]] = field(default_factory=dict)  # rank -> nodes; copies come last
    places: dict[str, set[tuple[Key, int]]] = field(default_factory=dict)  # the same by node
    over: dict[Key, set[int]] = field(default_factory=dict)  # ranks whose node knows that the save has ended
    readers: frozenset[str] | None = None  # nodes with ranks, which read these alone; None: not all ranks have come
    unread: set[str] = field(default_factory=set)  # nodes that hold something and are none of them
    complete: dict[Key, int] = field(default_factory=dict)
    aliases: dict[Key, dict[str, str]] = field(default_factory=dict)
    ended: OrderedDict[Key, agent_pb2.SaveOutcome] = field(default_factory=OrderedDict)
    ended_at: dict[Key, float] = field(default_factory=dict)  # of those that ended in our time
    deleted: set[Key] = field(default_factory=set)  # of those that were committed: retention has removed them

    @property
    def newest(self) -> int:
        """The newest step that could be restored, from memory or from the store; -1 if there is none."""
        committed = (step for (_, step), o in self.ended.items() if o.outcome == agent_pb2.OUTCOME_COMMITTED)
        return max((max((step for _, step in self.complete), default=-1), max(committed, default=-1)))

    def begin(self, attempt: int, now: float) -> None:
        """Ranks of a new attempt have come; those of older ones are gone."""
        self.attempt, self.attempt_began, self.gone, self.latest = attempt, now, set(), {}
        self.read_by(None)

    def staged(self, event: pb.Staged, now: float) -> Decision:
        """A rank's snapshot is whole in its arena."""
        key = (event.epoch, event.step)
        self.nodes.add(event.node)
        self._hold(key, event.rank, event.node, copy=event.copy)
        decision = self._complete(event)
        if not event.again and not event.copy:
            decision.add(self._overtaken(event, now))
            if event.attempt == self.attempt:
                self.latest[event.rank] = max(key, self.latest.get(event.rank, key))
        if event.ended:
            if not event.copy:  # a node that keeps a copy has not been told how the save goes
                self.over.setdefault(key, set()).add(event.rank)
            return decision  # reported again by an agent that reconnected: memory tier only
        if key in self.ended:
            decision.effects.append(self._tell(event.node, save_ended=pb.SaveEnded(outcome=self.ended[key])))
            return decision
        save = self.open.get(key)
        opened = save is None
        if save is None:
            save = Save(event.epoch, event.step, event.attempt, event.world_size, event.store, now, now)
            self.open[key] = save
        save.staged[event.rank] = event.node
        save.changed = now
        save.fresh = save.fresh or not event.again
        save.aliases.update(event.aliases)
        save.metrics.update(event.metrics)
        if save.attempt == self.attempt:
            lost = [rank for rank in self.gone if not self._has_staged(key, rank)]
            if lost:
                return decision.add(self._lost_rank(key, min(lost), "was gone", now))
            ahead = [r for r, new in self.latest.items() if new > key and r not in self.held[key]] if opened else []
            if ahead:  # this rank had to wait for an arena meanwhile
                how = f"had gone on to step {self.latest[min(ahead)][1]}"
                return decision.add(self._lost_rank(key, min(ahead), how, now))
        return decision.add(self._commit(save))

    def _complete(self, event: pb.Staged) -> Decision:
        key = (event.epoch, event.step)
        self.aliases.setdefault(key, {}).update(event.aliases)
        if len(self.held[key]) < event.world_size:
            return Decision()
        order = pb.SnapshotComplete(
            epoch=event.epoch, step=event.step, world_size=event.world_size, aliases=self.aliases[key]
        )
        if key in self.complete:  # an agent that has reconnected
            return Decision([self._tell(event.node, snapshot_complete=order)])
        self.complete[key] = event.world_size
        reason = f"step {event.step}: all {event.world_size} ranks have staged; the snapshot is complete in memory"
        return Decision([self._tell(node, snapshot_complete=order) for node in sorted(self.nodes)], [reason])

    def durable(self, event: pb.Durable, now: float) -> Decision:
        """A rank's shard is in the store, synced."""
        key = (event.epoch, event.step)
        save = self.open.get(key)
        if save is None or event.rank not in range(save.world_size):
            return Decision()
        save.durable[event.rank] = event
        save.changed = now
        return self._commit(save)

    def _commit(self, save: Save) -> Decision:
        """Order the commit once every rank's shard is durable."""
        if save.committing or save.failure or len(save.durable) < save.world_size or save.missing:
            return Decision()
        save.committing = True
        shards = tuple(save.durable[r] for r in range(save.world_size))
        effect = Commit(
            self.job,
            save.epoch,
            save.step,
            save.attempt,
            save.world_size,
            save.store,
            self.keep,
            save.aliases,
            shards,
            self.retention,
            save.metrics,
        )
        return Decision([effect], [f"step {save.step}: all {save.world_size} shards are durable; committing"])

    def shard_failed(self, event: pb.ShardFailed, now: float) -> Decision:
        """A shard could not be written, for good."""
        save = self.open.get((event.epoch, event.step))
        if save is not None and event.rank in save.durable:
            return Decision()  # an agent that was restarted wrote it once more than was needed
        outcome = agent_pb2.OUTCOME_FENCED if event.code == "fenced" else agent_pb2.OUTCOME_FAILED
        failure = (outcome, event.code, f"rank {event.rank}: {event.what}")
        return self._fail((event.epoch, event.step), failure, now)

    def skipped(self, event: pb.Skipped, now: float) -> Decision:
        """A rank could not take this snapshot, so nobody's is of use."""
        key = (event.epoch, event.step)
        if self._has_staged(key, event.rank):
            return Decision()  # nothing was skipped
        if key not in self.open and key not in self.ended:
            # The others may stage later: remember the outcome so that they hear it at once.
            self.open[key] = Save(event.epoch, event.step, event.attempt, 0, "", now, now)
        return self._end(key, agent_pb2.OUTCOME_SKIPPED, "arena-exhausted", f"rank {event.rank}: {event.why}", now)

    def dropped(self, event: pb.Dropped) -> None:
        """A shard has left the memory of a node."""
        self._forget((event.epoch, event.step), event.rank, event.node)

    def rank_gone(self, rank: int, how: str, now: float) -> Decision:
        """A rank will stage nothing more: saves that wait for it cannot complete."""
        self.gone.add(rank)
        decision = Decision()
        for key, save in list(self.open.items()):
            if save.attempt == self.attempt and not self._has_staged(key, rank):
                decision.add(self._lost_rank(key, rank, how, now))
        return decision

    def rank_back(self, rank: int) -> None:
        """A rank that was thought gone has registered again."""
        self.gone.discard(rank)

    def _has_staged(self, key: Key, rank: int) -> bool:
        """Whether a rank is known to have staged, before or after an end of the save that we know nothing of."""
        save = self.open.get(key)
        return (save is not None and rank in save.staged) or rank in self.held.get(key, ())

    def _overtaken(self, event: pb.Staged, now: float) -> Decision:
        """A rank stages in order: saves before this one that still wait for it (it had no agent then) wait in vain."""
        decision = Decision()
        for key, save in list(self.open.items()):
            passed = key < (event.epoch, event.step) and save.attempt == event.attempt
            if passed and not self._has_staged(key, event.rank):
                decision.add(self._lost_rank(key, event.rank, f"went on to step {event.step}", now))
        return decision

    def _lost_rank(self, key: Key, rank: int, how: str, now: float) -> Decision:
        why = f"rank {rank} {how} before it staged"
        return self._fail(key, (agent_pb2.OUTCOME_FAILED, "save-failed", why), now)

    def _fail(self, key: Key, failure: Failure, now: float) -> Decision:
        """End a save without a commit; one of before our time only when the store has no record of it."""
        save = self.open.get(key)
        if save is None or save.committing or save.failure:
            return Decision()
        if save.fresh:
            return self._end(key, *failure, now)
        save.failure, save.failed_at = failure, now
        return Decision([self._look_up(save, now)])

    def lookup_done(self, event: LookupDone, now: float) -> Decision:
        """The store has, or has not, a commit record."""
        key = (event.epoch, event.step)
        save = self.open.get(key)
        if save is None or save.committing:
            return Decision()
        if event.committed:
            return self._end(key, agent_pb2.OUTCOME_COMMITTED, "", "committed", now)
        return self._end(key, *save.failure, now) if save.failure else Decision()

    def node_gone(self, node: str) -> None:
        """A node's memory is out of reach; what it wrote to the store still counts."""
        for key, rank in list(self.places.get(node, ())):
            self._forget(key, rank, node)
        self.nodes.discard(node)

    def commit_done(self, event: CommitDone, now: float) -> Decision:
        """The commit record is there, or could not be written."""
        key = (event.epoch, event.step)
        if not event.code:
            return self._end(key, agent_pb2.OUTCOME_COMMITTED, "", "committed", now)
        save = self.open.get(key)
        if save is not None and save.settled and event.code not in _FINAL:
            save.committing, save.changed = False, now
            return Decision([], [f"step {save.step}: not committed yet, will be tried again: {event.why}"])
        outcome = agent_pb2.OUTCOME_FENCED if event.code == "fenced" else agent_pb2.OUTCOME_FAILED
        return self._end(key, outcome, event.code, event.why, now)

    def commit_again(self, save: Save) -> Decision:
        """Try a commit again that the store did not take."""
        return self._commit(save)

    def leave_local(self, key: Key, why: str, now: float) -> Decision:
        """End a save as it is on the local disks."""
        return self._end(key, agent_pb2.OUTCOME_LOCAL, "", why, now)

    def tick(self, now: float) -> Decision:
        """Give up saves that take too long; look up those that may have been committed before our time."""
        decision = Decision()
        for key, save in list(self.open.items()):
            quiet = now - save.changed > QUIET_BEFORE_LOOKUP
            if save.committing:
                if now - save.changed > self.timeout:
                    # The store hangs. Whether the record is there, the next attempt will see.
                    why = f"the commit has not returned for {self.timeout:g} s"
                    if save.settled:
                        decision.add(self.leave_local(key, why, now))
                        continue
                    save.timed_out = True
                    decision.add(self._end(key, agent_pb2.OUTCOME_FAILED, "store-unavailable", why, now))
                continue
            if save.failure:
                if now - save.failed_at > LOOKUP_PATIENCE:
                    outcome, _, why = save.failure
                    why += "; the store does not say whether it was committed before"
                    decision.add(self._end(key, outcome, "store-unavailable", why, now))
                elif quiet:
                    decision.effects.append(self._look_up(save, now))
            elif now - save.opened > self.timeout and not save.settled:
                save.timed_out = True
                decision.add(self._fail(key, (agent_pb2.OUTCOME_FAILED, "save-failed", self._overdue(save)), now))
            elif save.attempt < self.attempt and now - self.attempt_began > LATE_NEWS and save.missing:
                decision.add(self._lost_rank(key, save.missing[0], "was gone", now))
            elif quiet and not save.fresh and save.missing:
                if not self.over.get(key, set()).isdisjoint(save.missing):
                    # They know that it has ended, but not, or no longer, how.
                    why = "it had ended without a commit before"
                    decision.add(self._fail(key, (agent_pb2.OUTCOME_FAILED, "save-failed", why), now))
                else:
                    decision.effects.append(self._look_up(save, now))
        return decision

    def _look_up(self, save: Save, now: float) -> Lookup:
        save.changed = now
        return Lookup(self.job, save.epoch, save.step, save.store)

    def _overdue(self, save: Save) -> str:
        waiting = save.missing or [r for r in range(save.world_size) if r not in save.durable]
        shown = ", ".join(map(str, waiting[:8])) + (" ..." if len(waiting) > 8 else "")
        did = "staged" if save.missing else "written their shards"
        return f"after {self.timeout:g} s these ranks have not {did}: {shown}"

    @property
    def committed(self) -> Key | None:
        """The newest checkpoint of this job that is remembered as committed."""
        done = [key for key, outcome in self.ended.items() if outcome.outcome == agent_pb2.OUTCOME_COMMITTED]
        return max(done, default=None)

    @property
    def committed_step(self) -> int | None:
        """Its step."""
        return self.committed[1] if self.committed else None

    def snapshots(self) -> list[Key]:
        """Complete snapshots that are still whole in memory that ranks read, newest first."""
        unread = self.out_of_reach()
        whole = [k for k, world in self.complete.items() if len(self.held.get(k, ())) == world and k not in unread]
        return sorted(whole, reverse=True)

    def read_by(self, nodes: frozenset[str] | None) -> None:
        """Ranks are on these nodes now, and on no others; None: not all of them have come."""
        self.readers = nodes
        self.unread = set() if nodes is None else {node for node in self.places if node not in nodes}

    def is_read(self, node: str) -> bool:
        """Whether ranks may read what this node has."""
        return self.readers is None or node in self.readers

    def out_of_reach(self) -> dict[Key, set[int]]:
        """Ranks of which a snapshot is in the memory of such nodes alone that no rank is on any more."""
        found: dict[Key, set[int]] = {}
        for node in self.unread:
            for key, rank in self.places[node]:
                if self.unread.issuperset(self.held[key][rank]):
                    found.setdefault(key, set()).add(rank)
        return found

    def _hold(self, key: Key, rank: int, node: str, *, copy: bool) -> None:
        nodes = self.held.setdefault(key, {}).setdefault(rank, [])
        if node not in nodes:
            nodes.insert(len(nodes) if copy else 0, node)
        self.places.setdefault(node, set()).add((key, rank))
        if not self.is_read(node):
            self.unread.add(node)

    def _forget(self, key: Key, rank: int, node: str) -> None:
        ranks = self.held.get(key, {})
        nodes = ranks.get(rank, [])
        if node in nodes:
            nodes.remove(node)
            self.places[node].discard((key, rank))
            if not self.places[node]:
                del self.places[node]
                self.unread.discard(node)
        if not nodes:
            ranks.pop(rank, None)
        if not ranks:
            self.held.pop(key, None)
            self.over.pop(key, None)
            self.complete.pop(key, None)
            self.aliases.pop(key, None)

    def _end(self, key: Key, outcome: agent_pb2.Outcome, code: str, why: str, now: float) -> Decision:
        save = self.open.pop(key, None)
        if save is None:
            return Decision()
        record = agent_pb2.SaveOutcome(
            epoch=save.epoch,
            step=save.step,
            outcome=outcome,
            code=code,
            reason=why,
            bytes=sum(d.nbytes for d in save.durable.values()),
            seconds=now - save.opened,
            timed_out=save.timed_out and outcome == agent_pb2.OUTCOME_FAILED,
        )
        self.ended[key], self.ended_at[key] = record, now
        while len(self.ended) > REMEMBERED:
            self.ended.popitem(last=False)
        self.ended_at = {key: at for key, at in self.ended_at.items() if key in self.ended}
        self.deleted &= self.ended.keys()
        effects: list[Effect] = [self._tell(n, save_ended=pb.SaveEnded(outcome=record)) for n in sorted(self.nodes)]
        word = outcome_word(outcome)
        return Decision(effects, [f"step {save.step}: {word}: {why}" if code else f"step {save.step}: {word}"])

    def _tell(
        self,
        node: str,
        *,
        save_ended: pb.SaveEnded | None = None,
        snapshot_complete: pb.SnapshotComplete | None = None,
    ) -> Send:
        return Send(node, pb.Order(job=self.job, save_ended=save_ended, snapshot_complete=snapshot_complete))


def outcome_word(outcome: agent_pb2.Outcome) -> str:
    """An outcome as people and programs read it: "committed", "failed" ..."""
    return agent_pb2.Outcome.Name(outcome).removeprefix("OUTCOME_").lower()
