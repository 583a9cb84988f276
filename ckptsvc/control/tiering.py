"""Which snapshots go on from the nodes' local disks to the durable store, and in which order: one decision for a job.

A save whose shards are all on local disks (or durable already) is settled. It is then either to be drained, or ended
as it is (OUTCOME_LOCAL). One step is drained at a time, the oldest first; the agents do it when they are told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptsvc.control.effects import Decision, Effect, LookupDone, Send
from ckptsvc.control.save import REMEMBERED, Key, Save, Saves
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

COMMIT_AGAIN = 5.0
"""Seconds after which a commit that the store did not take is tried again."""

SETTLE_PATIENCE = 60.0
"""Seconds that a save may take to settle while a newer one that was faster waits for it."""

LOST_PATIENCE = 60.0
"""Seconds that a drain, or who waits for one, waits for a node that is away with its disk."""


class Draining(NamedTuple):
    """The policy.

    Attributes:
        every: the first of so many snapshots is drained, the others stay local.
        backlog: so many may wait to be drained; of more, only the newest is.
    """

    every: int = 1
    backlog: int = 2


class Waiting(NamedTuple):
    """A settled save that is to be drained; `must`: somebody waits for it, or it is whole nowhere else."""

    key: Key
    must: bool


def choose(waiting: Iterable[Waiting], committed: Key, backlog: int) -> tuple[Key | None, list[Key]]:
    """What to drain next, and what has been overtaken and is not to be drained any more.

    Args:
        waiting: what is to be drained; nothing that is being drained.
        committed: the newest that is committed, or being drained.
        backlog: see `Draining`.
    """
    left = sorted(waiting)
    passed = [w.key for w in left if w.key < committed and not w.must]
    left = [w for w in left if w.key not in passed]
    if len(left) > backlog:
        passed += [w.key for w in left[:-1] if not w.must]
        left = [w for w in left if w.key not in passed]
    return (left[0].key if left else None), passed


@dataclass(slots=True)
class Disks:
    """One snapshot on local disks: where each rank's shard is, and what is needed to save it."""

    world_size: int
    attempt: int
    store: str
    aliases: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)  # rank -> node


@dataclass(slots=True)
class Tiers:
    """The local disks of one job. `saves` are the job's: a save stays open until it is drained or ended as local."""

    saves: Saves
    policy: Draining = field(default_factory=Draining)
    disks: dict[Key, Disks] = field(default_factory=dict)
    complete: set[Key] = field(default_factory=set)
    asked: int = 0  # saves about which the policy was asked
    in_vain: dict[Key, float] = field(default_factory=dict)  # since when somebody waits for what cannot be drained

    def kept(self, event: pb.LocalKept, now: float) -> Decision:
        """A shard is on its node's local disk; the arena it was in is free."""
        key = (event.epoch, event.step)
        self.saves.nodes.add(event.node)
        disks = self.disks.setdefault(key, Disks(event.world_size, event.attempt, event.store))
        disks.aliases.update(event.aliases)
        disks.metrics.update(event.metrics)
        disks.nodes[event.rank] = event.node
        decision = self._complete(key, event.node).add(self._ended_before(event, now))
        ended = self.saves.ended.get(key)
        if ended is not None:
            if ended.outcome == event.outcome:
                return decision  # it knows
            return decision.add(Decision([self._tell(event.node, save_ended=pb.SaveEnded(outcome=ended))]))
        save = self.saves.open.get(key)
        if save is None:
            if event.ended:
                return decision  # for a restore only
            save = self._open(key, now)
        save.staged[event.rank] = event.node
        save.local.add(event.rank)
        save.aliases.update(event.aliases)
        save.metrics.update(event.metrics)
        save.fresh = save.fresh or not event.again
        save.changed = now
        if save.draining and not save.committing:  # the node was away, or its agent has been restarted
            decision.effects.append(self._drain(event.node, key))
        return decision.add(self.plan(now))

    def _ended_before(self, event: pb.LocalKept, now: float) -> Decision:
        """Learn from a node how an earlier coordinator ended a save, where that is not known here."""
        key = (event.epoch, event.step)
        is_open, ended = key in self.saves.open, self.saves.ended.get(key)
        if event.outcome == agent_pb2.OUTCOME_LOCAL and not is_open and ended is None:
            self.saves.ended[key] = agent_pb2.SaveOutcome(epoch=event.epoch, step=event.step, outcome=event.outcome)
            while len(self.saves.ended) > REMEMBERED:
                self.saves.ended.popitem(last=False)
        left = ended is not None and ended.outcome == agent_pb2.OUTCOME_LOCAL
        if event.outcome != agent_pb2.OUTCOME_COMMITTED or not (is_open or left):
            return Decision()
        if left:  # by that coordinator's word to this node: others have not heard that it was drained later
            del self.saves.ended[key]
            self._open(key, now)
        return self.saves.lookup_done(LookupDone(self.saves.job, event.epoch, event.step, committed=True), now)

    def dropped(self, event: pb.LocalDropped) -> None:
        """A shard is not on the local disk any more."""
        self._forget((event.epoch, event.step), event.rank)

    def node_gone(self, node: str) -> None:
        """A node's disk is out of reach, for a while at least."""
        for key, disks in list(self.disks.items()):
            for rank in [rank for rank, where in disks.nodes.items() if where == node]:
                self._forget(key, rank)

    def wanted(self, event: pb.DurableWanted, now: float) -> Decision:
        """Somebody waits until this step is committed."""
        key = (event.epoch, event.step)
        save = self.saves.open.get(key) or self._reopen(key, now)
        if save is not None:
            save.must = True
            self.in_vain.pop(key, None)
            return self.plan(now)
        ended = self.saves.ended.get(key)
        if ended is None and not event.left_local:
            return Decision()  # it is yet to be staged
        told = agent_pb2.SaveOutcome(epoch=key[0], step=key[1])
        if ended is not None:
            told.CopyFrom(ended)
        if ended is None or ended.outcome == agent_pb2.OUTCOME_LOCAL:
            # Which it stays: a node that is away, or has not found its new coordinator yet, may bring it back.
            if now - self.in_vain.setdefault(key, now) < LOST_PATIENCE:
                return Decision()
            del self.in_vain[key]
            why = "it was not drained, and is not whole on the local disks that can be reached"
            told.outcome, told.code, told.reason = agent_pb2.OUTCOME_FAILED, "save-failed", why
        return Decision([self._tell(event.node, save_ended=pb.SaveEnded(outcome=told))])

    def tick(self, now: float, *, over: bool) -> Decision:
        """Whatever time decides; `over`: the job has no ranks (any more): its last snapshot must not stay local."""
        decision = Decision()
        if over:
            newest = max(self.complete, default=(0, -1))
            if newest > self.committed:
                save = self._reopen(newest, now)
                if save is not None:
                    save.must = True
        for key, save in list(self.saves.open.items()):
            if not save.draining or save.committing:
                continue
            missing = [r for r in range(save.world_size) if r not in save.durable and r not in self._nodes(key)]
            save.lost_at = (save.lost_at or now) if missing else None
            if save.lost_at is not None and now - save.lost_at > LOST_PATIENCE:
                why = f"rank {missing[0]}'s shard is on a local disk that is out of reach"
                decision.add(self.saves.leave_local(key, why, now))
            elif not missing and now - save.changed > COMMIT_AGAIN:
                decision.add(self.saves.commit_again(save))
        return decision.add(self.plan(now))

    def plan(self, now: float) -> Decision:
        """Decide about the saves that are settled, and order the next drain unless one is in progress."""
        decision = Decision()
        settled = self._settled(now)
        waiting = []
        for key in settled:
            save = self.saves.open[key]
            must = save.must or len(save.local) < save.world_size
            due = save.decided or self._is_due()
            save.decided = True
            if not (due or must):
                decision.add(self.saves.leave_local(key, "it stays on the local disks", now))
            elif not save.draining:
                waiting.append(Waiting(key, must))
        busy = [key for key, save in self.saves.open.items() if save.draining]
        chosen, passed = choose(waiting, max([self.committed, *busy]), self.policy.backlog)
        for late in passed:
            decision.add(self.saves.leave_local(late, "a newer one was ready to be drained", now))
        if chosen is not None and not busy:
            save = self.saves.open[chosen]
            save.draining, save.changed = True, now
            nodes = sorted({node for rank, node in self._nodes(chosen).items() if rank not in save.durable})
            decision.effects += [self._drain(node, chosen) for node in nodes]
            decision.reasons.append(f"step {save.step}: is drained from the local disks of {len(nodes)} nodes")
        return decision

    def snapshots(self) -> dict[Key, Disks]:
        """Snapshots that are whole in memory and on disks that ranks read, and are not known to have failed."""
        saves, unread = self.saves, self.saves.out_of_reach()
        bad = (agent_pb2.OUTCOME_FAILED, agent_pb2.OUTCOME_SKIPPED, agent_pb2.OUTCOME_FENCED)
        return {
            key: disks
            for key, disks in self.disks.items()
            if len(
                {rank for rank, node in disks.nodes.items() if saves.is_read(node)}
                | (saves.held.get(key, {}).keys() - unread.get(key, set()))
            )
            == disks.world_size
            and not (key in self.saves.ended and self.saves.ended[key].outcome in bad)
        }

    def _settled(self, now: float) -> list[Key]:
        """The saves that can be drained, oldest first, but none before an older one that is on its way to the disks."""
        keys = []
        for key, save in sorted(self.saves.open.items()):
            if not save.settled and now - save.opened < SETTLE_PATIENCE:
                break
            if save.settled and not save.committing:
                keys.append(key)
        return keys

    def _is_due(self) -> bool:
        """Whether the policy wants the next one drained."""
        due = self.asked % self.policy.every == 0
        self.asked += 1
        return due

    @property
    def committed(self) -> Key:
        """The newest that is known to be committed."""
        return max(self._ended(agent_pb2.OUTCOME_COMMITTED), default=(0, -1))

    @property
    def left_local(self) -> set[Key]:
        """Those that have ended as they were, on local disks."""
        return self._ended(agent_pb2.OUTCOME_LOCAL)

    def _ended(self, outcome: agent_pb2.Outcome) -> set[Key]:
        return {key for key, ended in self.saves.ended.items() if ended.outcome == outcome}

    def _complete(self, key: Key, node: str) -> Decision:
        """Tell the nodes of a snapshot that is whole on disks, or (again) the one that has just reported."""
        disks = self.disks[key]
        if len(disks.nodes) < disks.world_size:
            return Decision()
        order = pb.LocalComplete(epoch=key[0], step=key[1])
        if key in self.complete:
            return Decision([self._tell(node, local_complete=order)])
        self.complete.add(key)
        return Decision(
            [self._tell(each, local_complete=order) for each in sorted(self.saves.nodes)],
            [f"step {key[1]}: all {disks.world_size} shards are on local disks"],
        )

    def _open(self, key: Key, now: float) -> Save:
        disks = self.disks[key]
        save = Save(*key, disks.attempt, disks.world_size, disks.store, now, now)
        save.aliases, save.metrics = dict(disks.aliases), dict(disks.metrics)
        self.saves.open[key] = save
        return save

    def _reopen(self, key: Key, now: float) -> Save | None:
        """Take a save up again that was ended as local, if it still is whole on the disks."""
        ended, disks = self.saves.ended.get(key), self.disks.get(key)
        if ended is None or ended.outcome != agent_pb2.OUTCOME_LOCAL or disks is None:
            return None
        if len(disks.nodes) < disks.world_size:
            return None
        del self.saves.ended[key]
        save = self._open(key, now)
        save.staged, save.local, save.decided = dict(disks.nodes), set(disks.nodes), True
        return save

    def _nodes(self, key: Key) -> dict[int, str]:
        disks = self.disks.get(key)
        return disks.nodes if disks else {}

    def _forget(self, key: Key, rank: int) -> None:
        disks = self.disks.get(key)
        if disks is None:
            return
        disks.nodes.pop(rank, None)
        self.complete.discard(key)
        if not disks.nodes:
            del self.disks[key]

    def _drain(self, node: str, key: Key) -> Effect:
        return Send(node, pb.Order(job=self.saves.job, drain_shards=pb.DrainShards(epoch=key[0], step=key[1])))

    def _tell(
        self, node: str, *, save_ended: pb.SaveEnded | None = None, local_complete: pb.LocalComplete | None = None
    ) -> Effect:
        return Send(node, pb.Order(job=self.saves.job, save_ended=save_ended, local_complete=local_complete))
