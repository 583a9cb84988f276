"""Snapshots that survive the loss of nodes: who keeps what for whom, and who rebuilds what is lost.

When the snapshot of a job is complete, the nodes that hold it are divided into groups (control.groups). In each, either
every node keeps a copy of what the one before it holds; or each keeps its part of the group's parity, from which the
others can rebuild what one or two nodes held (pipeline.parity). A copy is found like any snapshot in memory. What is
rebuilt becomes such a copy: that is ordered when a job starts anew, or when its ranks ask what there is to restore.
Ranks that ask meanwhile wait for it, `patience` seconds at most. When all have begun with what was restored, that is
kept elsewhere again where the loss of one more node would be too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ckptsvc.control.effects import Decision, Send
from ckptsvc.control.groups import Groups, group
from ckptsvc.control.membership import Job
from ckptsvc.control.runs import ranks_of, runs_of
from ckptsvc.control.save import Key, Saves
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

Partner = Literal["off", "copy", "xor", "rs"]

LOSSES: dict[Partner, int] = {"off": 0, "copy": 0, "xor": 1, "rs": 2}
"""Nodes of a group that its parity makes up for."""

MIRRORED = 2
"""Nodes in a group that keep copies for each other: a loss of all its nodes is least likely in the smallest groups."""


@dataclass(frozen=True, slots=True)
class PartnerPolicy:
    """What is kept on other nodes.

    Attributes:
        partner: copies, parity against one ("xor") or two ("rs") losses, or nothing.
        group: the fewest nodes that keep parity for each other.
        every: every how many complete snapshots.
        patience: seconds that ranks wait for what is being rebuilt.
    """

    partner: Partner = "off"
    group: int = 4
    every: int = 1
    patience: float = 60.0


class Peer(NamedTuple):
    """An agent that attends: where other agents reach it, and its failure domain."""

    address: str
    domain: str


@dataclass(slots=True)
class Guard:
    """The parity of one group for one snapshot.

    Attributes:
        losses: members that may be lost.
        members: the ranks that each node of the group held, in the group's order.
        world_size, aliases: of the snapshot, which was complete: a new coordinator knows it from here alone.
        ready: members whose part of the parity is there.
    """

    losses: int
    members: dict[str, list[int]]
    world_size: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)

    def left(self, held: dict[int, list[str]]) -> list[str]:
        """Members that have all they had."""
        return [n for n in self.members if n in self.ready and all(n in held.get(r, ()) for r in self.members[n])]


@dataclass(slots=True)
class Rebuilding:
    """What is being rebuilt: since when, the answers that nodes still owe, and who is left of the groups."""

    since: float
    owed: Counter[str]  # one for each group that a node rebuilds shards of
    left: frozenset[str]


@dataclass(slots=True)
class Protection:
    """What is known of one job's copies and parity."""

    groups: Groups = field(default_factory=list)
    seen: int = 0  # complete snapshots
    newest: Key = (0, -1)  # of them
    begun: tuple[int, float, int] | None = None  # the attempt (membership.Job.begun) that has been looked at
    guards: dict[Key, list[Guard]] = field(default_factory=dict)
    rebuilding: dict[Key, Rebuilding] = field(default_factory=dict)
    failed: dict[Key, frozenset[str]] = field(default_factory=dict)  # what those that were left could not rebuild

    def complete(self, saves: Saves) -> dict[Key, int]:
        """Snapshots that are or were complete, and how many ranks each is of; of parity alone nothing can be had."""
        guarded = {key: guards[0].world_size for key, guards in self.guards.items() if key in saves.held}
        return guarded | saves.complete


@dataclass(slots=True)
class Redundancy:
    """That of all jobs of one coordinator."""

    policy: PartnerPolicy = field(default_factory=PartnerPolicy)
    peers: dict[str, Peer] = field(default_factory=dict)
    jobs: dict[str, Protection] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)  # nodes that are about to be switched off

    def attends(self, hello: pb.AgentHello) -> None:
        """An agent has come."""
        self.peers[hello.node] = Peer(hello.address, hello.domain)
        if hello.vacating:
            self.leaving.add(hello.node)

    def joined(self, event: pb.RankJoined) -> None:
        """A rank may know the domain of its node where the agent does not, because no job has started that."""
        peer = self.peers.get(event.node)
        if peer is not None and not peer.domain:
            self.peers[event.node] = peer._replace(domain=event.domain)

    def leave(self, node: str, *, leaves: bool) -> None:
        """A node is about to be switched off, or stays after all: the next snapshot is kept elsewhere."""
        if leaves:
            self.leaving.add(node)
        else:
            self.leaving.discard(node)
        for known in self.jobs.values():
            known.seen = 0

    def _reached(self, node: str) -> bool:
        return node in self.peers and bool(self.peers[node].address) and node not in self.leaving

    def agent_lost(self, node: str) -> Decision:
        """An agent is out of reach, and what it holds."""
        self.peers.pop(node, None)
        decision = Decision()
        for job in self.jobs.values():
            self._lose(job, node, list(job.guards))
            for key, work in list(job.rebuilding.items()):
                if node in work.owed or node in work.left:  # of what is left now, it may be possible all the same
                    del job.rebuilding[key]
                    decision.reasons.append(f"step {key[1]} cannot be rebuilt so: {node} is lost too")
        return decision

    def dropped(self, event: pb.Dropped) -> None:
        """A node has let its part of the parity go."""
        if event.job in self.jobs:
            self._lose(self.jobs[event.job], event.node, [(event.epoch, event.step)])

    def _lose(self, job: Protection, node: str, keys: Collection[Key]) -> None:
        for key in keys:
            for guard in job.guards.get(key, ()):
                guard.ready.discard(node)
            if not any(guard.ready for guard in job.guards.get(key, ())):
                job.guards.pop(key, None)

    def forget(self, job: str) -> None:
        """The job is over."""
        self.jobs.pop(job, None)

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def staged(self, job: Job, event: pb.Staged) -> Decision:
        """A rank's snapshot is whole; with that of the last rank, it is time to keep it elsewhere too."""
        key = (event.epoch, event.step)
        if self.policy.partner == "off" or event.copy or event.again or event.attempt != job.attempt:
            return Decision()
        known = self.jobs.setdefault(job.name, Protection())
        if key not in job.saves.complete or key <= known.newest:
            return Decision()
        known.newest, known.seen = key, known.seen + 1
        if (known.seen - 1) % self.policy.every:
            return Decision()
        return self._protect(job, known, key)

    def began(self, job: Job) -> Decision:
        """All ranks may have begun: what they have restored from memory is to survive the next loss too.

        A large job has many ranks to look at: that is done now and then, and no more once they have begun.
        """
        if self.policy.partner == "off" or not job.begun:
            return Decision()
        known = self.jobs.setdefault(job.name, Protection())
        if known.begun == job.begun[-1] or job.restored is None:
            return Decision()
        known.begun = job.begun[-1]
        key = next(iter(job.saves.snapshots()), (0, -1))
        if key[1] != job.restored or not self._is_exposed(job, key):
            return Decision()
        known.newest = max(known.newest, key)
        decision = self._protect(job, known, key)
        if decision.effects:
            decision.reasons.append(f"step {key[1]}, restored, is kept elsewhere again")
        return decision

    def _is_exposed(self, job: Job, key: Key) -> bool:
        """Whether with one more node a part of a snapshot could be lost for good."""
        held, guards = job.saves.held[key], self.jobs[job.name].guards.get(key, ())
        strong = [guard for guard in guards if len(guard.members) - len(guard.left(held)) < guard.losses]
        guarded = {rank for guard in strong for ranks in guard.members.values() for rank in ranks}
        return any(rank not in guarded and len(_read(job, nodes)) < 2 for rank, nodes in held.items())

    def _protect(self, job: Job, known: Protection, key: Key) -> Decision:
        """Order it. What was restored may be held by few nodes, and have copies already."""
        losses, ranks = LOSSES[self.policy.partner], dict[str, list[int]]()
        for rank, nodes in sorted(job.saves.held[key].items()):
            holding = _read(job, nodes) or nodes
            if losses or len(holding) == 1:
                ranks.setdefault(holding[0], []).append(rank)
        able = ranks.keys() if losses else ranks.keys() | set(job.nodes)
        reached = {node: self.peers[node].domain for node in able if self._reached(node)}
        known.groups = group(reached, self.policy.group if losses else MIRRORED, known.groups)
        decision, without = Decision(), set(ranks)
        for members in known.groups:
            holders = [self._holder(node, ranks.get(node, ())) for node in members]
            for place, node in enumerate(members):
                order = pb.Protect(attempt=job.attempt, losses=min(losses, len(members) - 1))
                order.world_size = job.saves.complete[key]
                order.aliases.update(job.saves.aliases.get(key, {}))
                order.members.extend(holders if order.losses else [holders[place - 1]])
                if len(members) > 1 and order.members[0].ranks:
                    decision.effects.append(_order(job, key, node, order))
                    without -= {holder.node for holder in order.members}
        if without and len(able) > 1:
            shown = ", ".join(sorted(without)[:8]) + (" ..." if len(without) > 8 else "")
            decision.reasons.append(f"step {key[1]}: no other node can be had to protect what these hold: {shown}")
        return decision

    def _holder(self, node: str, ranks: Iterable[int], *, lost: bool = False) -> pb.Holder:
        address = "" if lost or node not in self.peers else self.peers[node].address
        return pb.Holder(node=node, address=address, ranks=runs_of(sorted(ranks)))

    def guarded(self, event: pb.Guarded) -> None:
        """A node has its part of a parity."""
        guards = self.jobs.setdefault(event.job, Protection()).guards.setdefault((event.epoch, event.step), [])
        members = {holder.node: ranks_of(holder.ranks) for holder in event.members}
        guard = next((g for g in guards if g.members == members and g.losses == event.losses), None)
        if guard is None:
            guard = Guard(event.losses, members, event.world_size, dict(event.aliases))
            guards.append(guard)
        guard.ready.add(event.node)

    # ---- rebuilding --------------------------------------------------------------------------------------------------

    def is_rebuilding(self, job: str) -> bool:
        """Whether more can be restored soon."""
        return job in self.jobs and bool(self.jobs[job].rebuilding)

    def rebuild(self, job: Job, now: float) -> Decision:
        """Have the newest snapshot rebuilt that is not whole and can be, if no newer one is whole."""
        known = self.jobs.get(job.name)
        if known is None or known.rebuilding:
            return Decision()
        known.failed = {key: left for key, left in known.failed.items() if key in known.complete(job.saves)}
        for key in self._newer_than_whole(job):
            held = job.saves.held[key]
            left = frozenset(node for guard in known.guards.get(key, ()) for node in guard.left(held))
            if known.failed.get(key) == left or not self.is_rebuildable(job, key):
                continue  # where another node has been lost meanwhile, that may have been why it failed
            decision = self._order_rebuild(job, key)
            owed = Counter(send.node for send in decision.effects if isinstance(send, Send))
            if owed:
                known.rebuilding[key] = Rebuilding(now, owed, left)
                return decision
        return Decision()

    def _complete(self, job: Job) -> dict[Key, int]:
        return self.jobs[job.name].complete(job.saves) if job.name in self.jobs else job.saves.complete

    def _newer_than_whole(self, job: Job) -> list[Key]:
        """Complete snapshots that are not whole any more and are newer than any that is; newest first."""
        whole = next(iter(job.saves.snapshots()), (0, -1))
        return sorted((key for key in self._complete(job) if key > whole), reverse=True)

    def _missing(self, job: Job, key: Key) -> list[int]:
        """Ranks whose snapshot no node holds, or such nodes alone whose memory nobody reads."""
        held = job.saves.held[key].keys() - job.saves.out_of_reach().get(key, set())
        return sorted(set(range(self._complete(job)[key])) - held)

    def _able(self, job: Job, key: Key) -> list[tuple[Guard, list[str]]]:
        """The groups that have lost no more than their parity makes up for, and the nodes that it can be had from.

        What a node holds that nobody reads has to be rebuilt, as if that node were lost.
        """
        held, missing = job.saves.held[key], set(self._missing(job, key))
        found = []
        for guard in self.jobs[job.name].guards.get(key, ()):
            left = [node for node in guard.left(held) if missing.isdisjoint(guard.members[node])]
            if len(guard.members) - len(left) <= guard.losses:
                found.append((guard, left))
        return found

    def is_rebuildable(self, job: Job, key: Key) -> bool:
        """Whether all that is missing of a complete snapshot can be made of what is left."""
        guarded = sum(
            map(len, (ranks for g in self.jobs[job.name].guards.get(key, ()) for ranks in g.members.values()))
        )
        if guarded + len(job.saves.held[key]) < self._complete(job)[key]:
            return False  # without a look at each rank: how many there are is what a node has said
        covered = {rank for guard, _ in self._able(job, key) for ranks in guard.members.values() for rank in ranks}
        return covered >= set(self._missing(job, key))

    def _order_rebuild(self, job: Job, key: Key) -> Decision:
        """A lost shard goes to a node that has come in place of a lost one, else to one that is left of its group."""
        held, missing = job.saves.held[key], set(self._missing(job, key))
        holding = {node for nodes in held.values() for node in nodes}
        reached = [n for n in job.nodes if self._reached(n)]
        fresh = [n for n in reached if n not in holding]
        decision = Decision()
        for guard, left in self._able(job, key):
            lost = sorted(missing & {rank for ranks in guard.members.values() for rank in ranks})
            takers = fresh or [n for n in left if job.saves.is_read(n)] or reached
            shares = {node: lost[place :: len(takers)] for place, node in enumerate(takers)}
            for node, ranks in shares.items():
                if ranks:
                    order = pb.Rebuild(attempt=job.attempt, losses=guard.losses, ranks=runs_of(ranks))
                    order.world_size = self._complete(job)[key]
                    order.aliases.update(guard.aliases)
                    order.members.extend(self._holder(n, r, lost=n not in left) for n, r in guard.members.items())
                    decision.effects.append(_order(job, key, node, order))
        nodes = ", ".join(sorted({send.node for send in decision.effects if isinstance(send, Send)}))
        whose = f"step {key[1]}: the nodes with the snapshots of {_ranks(missing)} are lost"
        decision.reasons.append(f"{whose}; they are rebuilt from parity on {nodes}")
        return decision

    def rebuilt(self, event: pb.Rebuilt) -> Decision:
        """A node has rebuilt its share, or cannot."""
        known, key = self.jobs.get(event.job), (event.epoch, event.step)
        work = known.rebuilding.get(key) if known else None
        if known is None or work is None or not work.owed[event.node]:
            return Decision()
        work.owed[event.node] -= 1
        decision = Decision()
        if event.why:
            known.failed[key] = work.left
            decision.reasons.append(f"step {event.step} cannot be rebuilt from parity on {event.node}: {event.why}")
        if event.why or not work.owed.total():
            del known.rebuilding[key]
        return decision

    def tick(self, jobs: Mapping[str, Job], now: float) -> Decision:
        """Keep what was restored elsewhere again; give up what takes too long."""
        decision = Decision()
        for job in jobs.values():
            decision.add(self.began(job))
        for known in self.jobs.values():
            for key, work in list(known.rebuilding.items()):
                if now - work.since > self.policy.patience:
                    del known.rebuilding[key]
                    known.failed[key] = work.left
                    why = f"step {key[1]} was not rebuilt from parity in {self.policy.patience:g} s"
                    decision.reasons.append(f"{why}; an older one has to do")
        return decision

    def lost(self, job: Job) -> list[str]:
        """Newer snapshots than the newest that is whole, as sentences: they were complete, and cannot be had."""
        return [
            f"step {step} was complete in memory and is lost, with the nodes that had the snapshots of"
            f" {_ranks(self._missing(job, (epoch, step)))} and those that kept them"
            for epoch, step in self._newer_than_whole(job)
        ]


def _order(job: Job, key: Key, node: str, effect: pb.Protect | pb.Rebuild) -> Send:
    effect.epoch, effect.step = key
    if isinstance(effect, pb.Protect):
        return Send(node, pb.Order(job=job.name, protect=effect))
    return Send(node, pb.Order(job=job.name, rebuild=effect))


def _read(job: Job, nodes: Iterable[str]) -> list[str]:
    """Those of the nodes whose memory ranks read."""
    return [node for node in nodes if job.saves.is_read(node)]


def _ranks(ranks: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
