"""Who belongs to a job's current attempt: ranks, the epoch that fences it, what the ranks agreed on, the steps at which
they save and stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ckptsvc.control.effects import AllotEpoch, Decision, EpochDone, Send
from ckptsvc.control.runs import runs_of
from ckptsvc.control.save import Saves
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

LEAD_SECONDS = 1.0
"""How far ahead, in time, a save is ordered: the order must reach every rank before the step does."""

EPOCH_RETRY = 10.0
"""Seconds between attempts to take an epoch while the store refuses."""

AGENT_PATIENCE = 60.0
"""Seconds after the loss of an agent in which its ranks must register again; then they count as gone."""

PATIENCE_WITH_PREDECESSOR = 60.0
"""Seconds a new job waits for the running saves of a dead job of the same run, so that it can restore them."""


BEGUN = 64
"""Attempts of which it is remembered when they began."""

SAID = 20
"""Ranks that leave an attempt of which the log speaks one by one."""


@dataclass(slots=True)
class Job:
    """One job and its current attempt."""

    name: str
    store: str
    saves: Saves
    attempt: int = 0
    world_size: int = 0
    epoch: int = 0
    joined_at: float = 0.0
    asked_epoch_at: float = -math.inf
    ranks: dict[int, str] = field(default_factory=dict)  # live ranks -> node
    heard: set[str] = field(default_factory=set)  # nodes whose agent has been told of the epoch
    agreeing: set[str] = field(default_factory=set)  # nodes whose agent has been told of `agreed`
    left: int = 0  # ranks that have left the attempt
    ended: dict[int, tuple[str, bool]] = field(default_factory=dict)  # they: on which node, whether out of order
    begun: list[tuple[int, float, int]] = field(default_factory=list)  # (attempt, when, world size), oldest first
    seen: dict[int, float] = field(default_factory=dict)  # when each of them last registered
    away: dict[str, float] = field(default_factory=dict)  # node -> when its agent was lost
    announced: dict[int, dict[int, str]] = field(default_factory=dict)  # generation -> rank -> digest
    agreed: pb.Order | None = None  # the last answer to them: copying it costs more than anything else here
    every_seconds: float = 0.0
    last_ordered: float = 0.0
    save_wanted: bool = False  # a snapshot soon, whatever the interval
    wanted_at: int = -1  # the step at which that was ordered
    progress: dict[str, int] = field(default_factory=dict)  # node -> step of its fastest rank
    highest: int = 0  # of them all
    doing: dict[str, pb.Progressed] = field(default_factory=dict)  # node -> the last it has told of its ranks
    pace: tuple[float, int] | None = None  # when, highest step: the last sample
    steps_per_second: float | None = None  # None until there are two samples
    stop_wanted: str = ""
    stop_ordered: tuple[int, str] = (-1, "")  # at which step, why
    rewinds: int = 0
    paused: bool = False  # no automatic snapshots (control.pauses)
    busy_at: float = 0.0  # when there last were ranks, saves or snapshots

    @property
    def nodes(self) -> list[str]:
        """Nodes with live ranks."""
        return sorted(set(self.ranks.values()))

    @property
    def unreachable(self) -> set[str]:
        """Nodes whose agent was lost and has not come back."""
        back = {node for rank, node in self.ranks.items() if self.seen[rank] >= self.away.get(node, math.inf)}
        return self.away.keys() - back

    def join(self, event: pb.RankJoined, now: float) -> Decision:
        """A rank has registered at its agent, for the first time or again."""
        decision = Decision()
        if event.attempt < self.attempt:
            why = f"attempt {event.attempt} of job {self.name} is over; attempt {self.attempt} runs"
            return Decision([self._refuse(event, "fenced", why)], [why])
        # A rank that is known and brings no epoch is another process: a launcher that does not count its restarts. Not
        # so where the agent was lost meanwhile: it may have gone before the rank had heard of the epoch.
        anew = event.rank in self.ranks and self.epoch and not event.epoch and event.node not in self.away
        if event.attempt > self.attempt or event.world_size != self.world_size or not self.ranks or anew:
            self._begin(event, now)
            decision.reasons.append(f"job {self.name}: attempt {event.attempt} with {event.world_size} ranks")
        moved = self.ranks.get(event.rank) != event.node
        self.ranks[event.rank], self.seen[event.rank] = event.node, now
        self.ended.pop(event.rank, None)
        if moved and len(self.ranks) == self.world_size:
            self.saves.read_by(frozenset(self.ranks.values()))
        self.saves.rank_back(event.rank)
        self.saves.nodes.add(event.node)
        self.saves.keep, self.saves.retention = event.keep, event.retention
        self.every_seconds = event.every_seconds
        if event.epoch > self.epoch:
            self.epoch, self.heard = event.epoch, set()
        if self.epoch and event.node not in self.heard:
            self.heard.add(event.node)
            allotted = pb.EpochAllotted(attempt=self.attempt, epoch=self.epoch, rewinds=self.rewinds)
            decision.effects.append(Send(event.node, pb.Order(job=self.name, epoch_allotted=allotted)))
        return decision

    def _begin(self, event: pb.RankJoined, now: float) -> None:
        self.attempt, self.world_size, self.store = event.attempt, event.world_size, event.store
        self.epoch, self.joined_at, self.asked_epoch_at = event.epoch, now, -math.inf
        self.last_ordered, self.save_wanted, self.wanted_at = now, False, -1
        self.saves.begin(event.attempt, now)
        self.ranks, self.seen, self.away = {}, {}, {}
        self.announced, self.agreed, self.progress, self.highest = {}, None, {}, 0
        self.heard, self.agreeing, self.left, self.ended, self.doing = set(), set(), 0, {}, {}
        self.begun = [*self.begun[-BEGUN + 1 :], (event.attempt, now, event.world_size)]
        self.pace, self.steps_per_second, self.stop_wanted, self.stop_ordered = None, None, "", (-1, "")
        self.rewinds = 0

    def leave(self, event: pb.RankLeft, now: float) -> Decision:
        """A rank has ended, in good order or not."""
        if event.attempt != self.attempt or event.rank not in self.ranks:
            return Decision()
        del self.ranks[event.rank]
        self.ended[event.rank] = event.node, event.died
        self.saves.read_by(None)
        self._unheard(event.node)  # when the last one leaves, its agent forgets the attempt
        self.left += 1
        how = "died" if event.died else "left"
        detail = f" ({event.detail})" if event.detail else ""
        more = ", and more do" if self.left == SAID else ""
        said = [f"job {self.name}: rank {event.rank} on {event.node} {how}{detail}{more}"]
        decision = Decision([], said if self.left <= SAID else [])
        return decision.add(self.saves.rank_gone(event.rank, how, now))

    def agent_lost(self, node: str, now: float) -> None:
        """The agent of a node is out of reach; it may come back, and its ranks go on meanwhile."""
        self.away[node] = now
        self._unheard(node)

    def _unheard(self, node: str) -> None:
        """The agent of a node may not know any more what it has been told."""
        self.heard.discard(node)
        self.agreeing.discard(node)

    def overdue(self, now: float) -> dict[str, float]:
        """Nodes whose agent has been lost for so long that their ranks count as gone, and since when."""
        return {node: since for node, since in self.away.items() if now - since > AGENT_PATIENCE}

    def tick(self, now: float) -> Decision:
        """Give up ranks that have not registered again since their agent was lost."""
        overdue = self.overdue(now)
        if not overdue:
            return Decision()
        decision = Decision()
        for rank, node in list(self.ranks.items()):
            if node in overdue and self.seen[rank] < overdue[node]:
                detail = f"its agent was lost {AGENT_PATIENCE:g} s ago"
                left = pb.RankLeft(attempt=self.attempt, rank=rank, node=node, died=True, detail=detail)
                decision.add(self.leave(left, now))
        for node in overdue:
            del self.away[node]
        return decision

    def want_epoch(self, busy: bool, now: float) -> Decision:
        """Take an epoch once the job is there and no predecessor is still finishing a save (`busy`)."""
        waited = now - self.joined_at
        if self.epoch or not self.ranks or now - self.asked_epoch_at < EPOCH_RETRY:
            return Decision()
        if busy and waited < PATIENCE_WITH_PREDECESSOR:
            return Decision()
        self.asked_epoch_at = now
        return Decision([AllotEpoch(self.name, self.attempt, self.rewinds, self.store)], [])

    def rewound(self, event: pb.Rewound) -> Decision:
        """The attempt has gone back to an earlier checkpoint: steps it may have saved already come again."""
        if event.attempt != self.attempt or event.count <= self.rewinds:
            return Decision()
        self.rewinds, self.epoch, self.asked_epoch_at = event.count, 0, -math.inf
        self.heard = set()
        return Decision([], [f"job {self.name}: went back to an earlier checkpoint; a new epoch begins"])

    def epoch_done(self, event: EpochDone) -> Decision:
        """The store has given an epoch, or refused."""
        if event.attempt != self.attempt or event.rewinds != self.rewinds or self.epoch:
            return Decision()
        self.epoch = event.epoch
        allotted = pb.EpochAllotted(
            attempt=self.attempt, epoch=event.epoch, code=event.code, why=event.why, rewinds=self.rewinds
        )
        nodes = self.nodes
        self.heard = set(nodes) - self.unreachable if event.epoch else set()
        reason = f"job {self.name}: epoch {event.epoch}" if event.epoch else f"job {self.name}: no epoch: {event.why}"
        return Decision([Send(n, pb.Order(job=self.name, epoch_allotted=allotted)) for n in nodes], [reason])

    def announce(self, event: pb.Announced) -> Decision:
        """A rank has told which set of plain tensors it holds; when all have, tell everybody who holds the same.

        A generation is one structure of the state: 0 at attach, later the step at which it changed.
        """
        if event.attempt != self.attempt:
            return Decision()
        announced = self.announced.setdefault(event.generation, {})
        agreed = self.agreed
        if agreed and agreed.holders.generation == event.generation and announced.get(event.rank) == event.digest:
            # Said again by an agent that has reconnected: only its node may not have heard the answer.
            node = self.ranks.get(event.rank)
            if node is None or node in self.agreeing:
                return Decision()
            self.agreeing.add(node)
            return Decision([Send(node, agreed)])
        announced[event.rank] = event.digest
        if len(announced) < self.world_size:
            return Decision()
        for older in [g for g in self.announced if g < event.generation]:
            del self.announced[older]
        groups: dict[str, list[int]] = {}
        for rank in sorted(announced):
            groups.setdefault(announced[rank], []).append(rank)
        holders = pb.Holders(
            attempt=self.attempt,
            generation=event.generation,
            groups=[pb.HolderGroup(runs=runs_of(g)) for g in groups.values()],
        )
        self.agreed = pb.Order(job=self.name, holders=holders)
        nodes = self.nodes
        self.agreeing = set(nodes) - self.unreachable
        return Decision([Send(node, self.agreed) for node in nodes])

    def progressed(self, event: pb.Progressed, now: float) -> None:
        """How far a node's ranks are."""
        if event.attempt != self.attempt:
            return
        previous = self.progress.get(event.node, 0)
        self.progress[event.node] = event.highest
        self.doing[event.node] = event
        if event.highest >= self.highest:
            self.highest = event.highest
        elif previous == self.highest:  # the one in front has gone back to a checkpoint
            self.highest = max(self.progress.values())
        then, before = self.pace = self.pace or (now, self.highest)
        if now - then >= LEAD_SECONDS:
            self.steps_per_second = max(0.0, (self.highest - before) / (now - then))
            self.pace = (now, self.highest)

    @property
    def restored(self) -> int | None:
        """The step that all ranks have begun with, 0 for none; None while some have not, or not with the same."""
        if len(self.ranks) < self.world_size or not self.ranks:
            return None
        told = [self.doing.get(node) for node in self.nodes]
        found = {each.began if each is not None and each.HasField("began") else None for each in told}
        return found.pop() if len(found) == 1 else None

    @property
    def ahead(self) -> int | None:
        """A step nobody has reached, so far off that all can be told what to do there.

        None before the pace is known: an order would come too late for some ranks and not for others.
        """
        if len(self.ranks) < self.world_size or not self.progress or self.steps_per_second is None:
            return None
        return self.highest + 2 + math.ceil(self.steps_per_second * LEAD_SECONDS)

    def order_saves(self, now: float) -> Decision:
        """Order the next snapshot by time, and the stop that somebody asked for."""
        ahead = self.ahead
        if ahead is None:
            return Decision()
        decision = Decision()
        due = self.every_seconds and not self.paused and now - self.last_ordered >= self.every_seconds
        if self.epoch and (due or self.save_wanted):
            self.wanted_at = ahead if self.save_wanted else self.wanted_at
            self.last_ordered, self.save_wanted = now, False
            order = pb.Order(job=self.name, save_at=pb.SaveAt(attempt=self.attempt, step=ahead))
            decision.add(Decision([Send(n, order) for n in self.nodes], [f"job {self.name}: save at step {ahead}"]))
        if self.stop_wanted:
            stop = pb.StopAt(attempt=self.attempt, step=ahead, reason=self.stop_wanted)
            reason = f"job {self.name}: stop at step {ahead}: {self.stop_wanted}"
            decision.add(Decision([Send(n, pb.Order(job=self.name, stop_at=stop)) for n in self.nodes], [reason]))
            self.stop_wanted, self.stop_ordered = "", (ahead, self.stop_wanted)
        return decision

    def want_stop(self, why: str) -> None:
        """Somebody asks the job to stop; whoever asks after a stop has been ordered adds nothing."""
        if self.stop_ordered[0] < 0:
            self.stop_wanted = self.stop_wanted or why

    def missed(self, step: int) -> None:
        """A rank has skipped the snapshot of this step. If it was the last one, or wanted, another one will follow."""
        if step == self.wanted_at:
            self.save_wanted, self.wanted_at = True, -1
        ordered, why = self.stop_ordered
        if step == ordered:
            self.stop_wanted, self.stop_ordered = why, (-1, "")

    def _refuse(self, event: pb.RankJoined, code: str, why: str) -> Send:
        refused = pb.JobRefused(attempt=event.attempt, code=code, why=why)
        return Send(event.node, pb.Order(job=event.job, job_refused=refused))
