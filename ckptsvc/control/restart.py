r"""Attempts of a job that `ckptsvc run` launches: when its nodes start ranks, when they stop them, when the job ends.

gathering --all nodes ready--> running --a rank fails--> stopping --all nodes ready--> running ...
                               running --nodes have come--> stopping       (control.growth)
\--all ranks exit 0--> ended          \--no restarts left--> ended

When is a node lost? Its agent's connection ends: at once if the agent dies, after an unanswered ping if the network or
the host does (rpc.channel.KEEPALIVE). That is one sign, and not enough: agents are restarted under running jobs, and a
frozen one does not stop its ranks. So the coordinator rings at the door of the node's launcher, whose life is that of
its ranks (agent.launcher.keeper). The kernel answers for it, however busy the processes are:

    it answers             the node is there: its agent is waited for, while ranks run for as long as any does
    nobody listens         the launcher has ended, and its ranks with it: the node is lost
    nothing answers        neither does the agent, so it is the host or the network: the node is lost

A node without a doorbell, or with one that cannot be heard when it joins (a firewall), is given `NODE_PATIENCE`. A
restart waits for a node whose agent is away for `AWAY_PATIENCE` only, when there are enough others.

One attempt runs at a time. A coordinator that took over waits for nodes that it has not heard of as for nodes whose
agents are away, for any of them may run ranks: it starts nothing for `AWAY_PATIENCE` from the first word of the job,
unless all ranks of the last attempt have been heard of, or as many nodes as an attempt can have, two at least, have
stopped it: a later one would have had one of them. A node that is out of reach for longer runs on; epochs keep what it
saves apart. Nodes new to the job cannot tell that it is old: if they are heard of first, they run until others are.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptsvc.control.crashloop import Crash, CrashLoop, describe_status
from ckptsvc.control.effects import Answer, Decision, Probe, Probed, Restarted, Send
from ckptsvc.control.exclusion import DIED, FAILED, LOST, Exclusion
from ckptsvc.control.growth import Growth
from ckptsvc.control.nodes import Node, choose, too_slow
from ckptsvc.errors import EXIT_STATUS
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause

GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL for the healthy ranks of an attempt that is being stopped."""

LAST_CALL = 5.0
"""Seconds to wait for more nodes, or better ones, once the least number has joined; not at a restart."""

LIST_PATIENCE = 3.0
"""Seconds after the last node has joined in which a job waits for the list of nodes that have failed."""

JOIN_PATIENCE = 600.0
"""Seconds after the last change among its nodes in which a job that has not begun waits for the rest (as torchrun)."""

NODE_PATIENCE = 60.0
"""Seconds a job waits below its least number of nodes before it ends, and for a node whose agent is away."""

AWAY_PATIENCE = 10.0
"""Seconds a restart waits for a node whose agent is away, or not heard of yet, although there are enough others."""

RING_EVERY = 0.4
"""Seconds between looks after the launcher of a node whose agent is away."""

EXIT_PATIENCE = 1.0
"""Seconds a launcher has to say how a rank ended whose process is known to be gone."""

INTERRUPTED = EXIT_STATUS["interrupted"]
"""Exit status of ranks that stopped because they were asked to."""

SIGTERM = 15
"""Its number everywhere (signal(7)): a process that dies of it was told to by somebody."""

SHOWN = 200
"""Characters of a reason given by a node that are repeated."""


class Phase(enum.Enum):
    """Where the job is."""

    GATHERING = "gathering"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class Accused(NamedTuple):
    """A rank that hangs, in which attempt, and why it is to blame; rank -1 and node "" where nobody is named."""

    attempt: int
    rank: int
    node: str
    sentence: str


@dataclass(slots=True)
class Attempts:
    """The launched job."""

    job: str
    min_nodes: int
    max_nodes: int
    max_restarts: int
    loop: CrashLoop = field(default_factory=lambda: CrashLoop(0))
    exclusion: Exclusion = field(default_factory=Exclusion)
    reached: Callable[[], tuple[int, int | None]] = lambda: (-1, None)  # newest step to restore, steps done
    growth: Growth = field(default_factory=Growth)
    phase: Phase = Phase.GATHERING
    attempt: int = 0
    restarts: int = 0
    heard_at: float = 0.0  # the first word of this job
    since: float = 0.0
    began: float = 0.0  # the attempt
    gathered: bool = False  # this coordinator has started an attempt itself
    inherited: bool = False  # another coordinator may have had the job
    arrivals: int = 0
    nodes: dict[str, Node] = field(default_factory=dict)
    running: dict[int, str] = field(default_factory=dict)  # rank -> node
    hosts: set[str] = field(default_factory=set)  # nodes with ranks of the attempt
    unready: set[str] = field(default_factory=set)  # those of them that are there, and have not stopped their ranks
    places: dict[str, float] = field(default_factory=dict)  # where they stand, smaller is further in front
    world: int = 0  # ranks of the attempt; 0: not known
    statuses: dict[int, int] = field(default_factory=dict)
    suspects: dict[int, tuple[float, str]] = field(default_factory=dict)  # rank -> since when, node
    outcome: tuple[int, str] = (0, "")  # status and reason, once ENDED
    ended: float = 0.0  # when
    predecessor: tuple[int, str] | None = None  # outcome of the last job of this name
    last_failure: str = ""
    stop_wanted: str = ""  # why the job was asked to stop
    saved: str = ""  # what is known of its newest checkpoint
    accused: Accused | None = None  # the rank that is being killed because it hangs
    incidents: list[str] = field(default_factory=list)

    def joined(self, event: pb.NodeJoined, now: float) -> Decision:
        """A launcher has connected, for the first time or again: what it says counts, orders may have been lost."""
        if self.phase is Phase.ENDED:
            return self._end_node(event.node, *self.outcome)
        decision = Decision()
        node = self.nodes.get(event.node)
        if node is None and event.unfit and not event.attempt:
            unfit = f"node {event.node} is not taken in: {event.unfit[:SHOWN]}"
            return self._end_node(event.node, EXIT_STATUS["node-unfit"], unfit)
        if node is None:
            node = Node(event.node, event.node_rank, self.arrivals, event.address, event.nproc)
            node.bandwidth = event.bandwidth
            self.nodes[event.node] = node
            self.arrivals += 1
            self.since = now
            self.inherited = self.inherited or event.again
            spare = " as a spare" if len(self.nodes) > self.max_nodes else ""
            joined = f"node {event.node} joined{spare} ({len(self.nodes)}/{self.min_nodes})"
            decision.reasons.append(f"job {self.job}: {joined}")
        node.address, node.nproc, node.away_since, node.ring_at = event.address, event.nproc, None, math.inf
        if node.doorbell != event.doorbell:
            node.doorbell, node.rung = event.doorbell, False
            decision.add(self._ring(node))  # to find out whether it can be heard from here
        self._count(node)
        if not event.attempt and event.bandwidth:
            decision.add(self._turn_away())
        return decision.add(self._adopt(event, now)) if event.attempt else decision

    def _turn_away(self) -> Decision:
        """Send nodes home whose network is too slow. Of the first ones, that shows only when there are others."""
        decision = Decision()
        for name, why in too_slow(self.nodes.values()).items():
            if name not in self.hosts:
                del self.nodes[name]
                decision.add(self._end_node(name, EXIT_STATUS["node-unfit"], f"node {name} is not taken in: {why}"))
        return decision

    def _adopt(self, event: pb.NodeJoined, now: float) -> Decision:
        """Ranks run on that node: those this coordinator or an earlier one has started, or such that should be gone."""
        here = dict.fromkeys(range(event.first_rank, event.first_rank + event.nproc), event.node)
        if event.attempt < self.attempt:
            return self._stop(event.attempt, "a later attempt has begun", [event.node])
        if event.attempt > self.attempt:
            stale = self._stop(self.attempt, "a later attempt has begun", self.hosts)
            self.attempt, self.phase = event.attempt, Phase.RUNNING
            self.restarts = max(self.restarts, event.attempt - 1)
            self.running, self.hosts, self.statuses, self.suspects = here, {event.node}, {}, {}
            self.places, self.world, self.began = {event.node: event.first_rank}, event.world_size, now
            self._count_all()
            return stale
        stranger = self.gathered and self.phase is Phase.RUNNING and event.node not in self.hosts
        self.running.update(here)
        self.hosts.add(event.node)
        self.places[event.node] = event.first_rank
        self._count(self.nodes[event.node])
        if stranger:  # spares were heard of before the nodes that ran, and were started beside them
            why = f"node {event.node} runs attempt {event.attempt} of an earlier coordinator"
            return self._fail(why, now)
        if self.phase is Phase.RUNNING:
            return Decision()
        # The order to stop did not reach this node; or nobody here has heard of it yet, but another node has obeyed it.
        self.phase = Phase.STOPPING
        return self._stop(self.attempt, self.last_failure or "the attempt has failed", [event.node])

    def ready(self, event: pb.NodeReady, now: float) -> Decision:
        """No rank of an earlier attempt is left on this node."""
        node = self.nodes.get(event.node)
        if node is None or self.phase is Phase.ENDED:
            return Decision()
        if event.attempt and self.predecessor and not self.attempt:
            del self.nodes[event.node]  # of a job of this name that has ended; the order to end was lost
            return self._end_node(event.node, *self.predecessor)
        before, node.ready, node.port = node.ready, event.attempt, event.port
        self._count(node)
        if self.phase is Phase.RUNNING:
            if event.node not in self.hosts and event.attempt == self.attempt:
                return self._fail(f"node {event.node} has stopped attempt {self.attempt} already", now)
            if event.node not in self.hosts:
                return Decision()  # joined while the attempt ran: for the next one
            if event.attempt == before and node.start is not None:  # the order to start was lost
                return Decision([Send(event.node, pb.Order(job=self.job, start=node.start))])
            return self._fail(f"node {event.node} has no rank of attempt {self.attempt} any more", now)
        if event.attempt < self.attempt:
            self.hosts.discard(event.node)  # the order to start never reached it, so there is nothing to stop
            self._count(node)
        elif event.attempt > self.attempt:  # an earlier coordinator has got that far
            self.attempt, self.restarts, self.world = event.attempt, max(self.restarts, event.attempt), 0
            self._count_all()
        return self._start_if_ready(now)

    def _count(self, node: Node) -> None:
        """Whether the node holds up the next attempt: all nodes are asked after each of ten thousand has answered."""
        if node.name in self.hosts and node.ready != self.attempt:
            self.unready.add(node.name)
        else:
            self.unready.discard(node.name)

    def _count_all(self) -> None:
        self.unready = {n.name for n in self.nodes.values() if n.name in self.hosts and n.ready != self.attempt}

    def agent_lost(self, name: str, now: float) -> Decision:
        """The connection to a node's agent has ended: see whether the node is still there."""
        node = self.nodes.get(name)
        if node is None or self.phase is Phase.ENDED:
            return Decision()
        node.away_since = now
        return self._ring(node)

    def _ring(self, node: Node) -> Decision:
        node.ring_at = math.inf
        if not node.doorbell:
            return Decision()
        return Decision([Probe(self.job, node.name, node.address, node.doorbell)])

    def probed(self, event: Probed, now: float) -> Decision:
        """What the doorbell of a node has said."""
        node = self.nodes.get(event.node)
        if node is None:
            return Decision()
        first, node.rung = not node.rung, True
        if node.away_since is None:
            if not first or event.answer is Answer.UP:
                return Decision()  # an answer from when it was away
            node.doorbell = 0
            why = f"if its agent is lost it is waited for, {NODE_PATIENCE:g} s long, for its launcher cannot be reached"
            return Decision([], [f"job {self.job}: node {node.name}: {why} ({event.answer.value})"])
        if event.answer is Answer.UP:
            node.ring_at = now + RING_EVERY
            return Decision()
        why = "its launcher has ended" if event.answer is Answer.GONE else "neither its agent nor its host answers"
        return self.node_left(node.name, why, now)

    def rank_exited(
        self, attempt: int, rank: int, node: str, status: int | None, now: float, detail: str = ""
    ) -> Decision:
        """A rank has ended; `status` is None when only its death is known so far, `detail` what is known of why."""
        if attempt != self.attempt or self.phase is not Phase.RUNNING or rank not in self.running:
            return Decision()
        if status in (0, INTERRUPTED):
            self.statuses[rank] = status or 0
            if len(self.statuses) < len(self.running) or self._is_partial:
                return Decision()
            return self._finish(now)
        if self.accused and self.accused.attempt == attempt:  # the others may end before the rank that held them up
            return self._condemn(self.accused, now)
        how = "died" if status is None else describe_status(status)
        failed = f"rank {rank} on {node} {how}" + (f": {detail[:SHOWN]}" if detail else "")
        if any(self.nodes[n].away_since is not None for n in self.hosts & self.nodes.keys() if n != node):
            return self._fail(failed, now)  # it may well be that node's fault: its agent is out of reach
        by_itself = status is not None and (status > 0 or status == -SIGTERM)
        self._strike(node, FAILED if by_itself else DIED, f"rank {rank} {how}", now)
        return self._fail(failed, now, self._crash(rank, node, how, now))

    def _strike(self, node: str, weight: float, why: str, now: float) -> None:
        if self.max_nodes > 1:  # else there is no choice, and most failures are of programs that are being written
            self.exclusion.strike(node, weight, why, now)

    def _crash(self, rank: int, node: str, how: str, now: float) -> Crash:
        return Crash(self.attempt, rank, node, how, self.reached()[1], now - self.began)

    def accuse(self, accused: Accused) -> None:
        """A rank is about to be killed: whichever ends first, the attempt fails because of this one."""
        self.accused = accused

    def acquit(self) -> None:
        """It was let live."""
        self.accused = None

    def give_up(self, now: float) -> Decision:
        """The rank that was accused is still there: stop the whole attempt."""
        accused = self.accused
        if accused is None or accused.attempt != self.attempt or self.phase is not Phase.RUNNING:
            return Decision()
        return self._condemn(accused, now)

    def _condemn(self, accused: Accused, now: float) -> Decision:
        if accused.node:
            self._strike(accused.node, DIED, f"rank {accused.rank} hung", now)
        return self._fail(accused.sentence, now, self._crash(accused.rank, accused.node, "hung", now))

    def suspect(self, attempt: int, rank: int, node: str, now: float) -> None:
        """A rank's process has ended; its launcher is about to say how."""
        if attempt == self.attempt and self.phase is Phase.RUNNING and rank in self.running:
            self.suspects.setdefault(rank, (now, node))

    def node_left(self, name: str, detail: str, now: float) -> Decision:
        """A launcher is gone."""
        if self.nodes.pop(name, None) is None or self.phase is Phase.ENDED:
            return Decision()
        self.unready.discard(name)
        gone = f"node {name} is gone ({detail[:SHOWN]})"
        if name in self.hosts and any(rank not in self.statuses for rank, n in self.running.items() if n == name):
            self._strike(name, LOST, detail[:SHOWN], now)
            if self.phase is Phase.RUNNING:
                return self._fail(gone, now)
        self.since = now
        return Decision([], [f"job {self.job}: {gone}"]).add(self._start_if_ready(now))

    def tick(self, now: float) -> Decision:
        """Start after the last call; give up nodes that do not come back, and the job when there are not enough."""
        decision = Decision()
        for rank, (since, where) in list(self.suspects.items()):
            if rank in self.statuses or now - since > EXIT_PATIENCE:
                del self.suspects[rank]
                if rank not in self.statuses:
                    decision.add(self.rank_exited(self.attempt, rank, where, None, now))
        for node in list(self.nodes.values()):
            if node.away_since is None:
                continue
            if now >= node.ring_at:
                decision.add(self._ring(node))
            if self._in_vain(node, now - node.away_since):
                decision.add(self.node_left(node.name, f"its agent is away for {now - node.away_since:.0f} s", now))
        if self.phase is Phase.RUNNING and self._is_partial and now - self.since > NODE_PATIENCE:
            finished = len(self.statuses) == len(self.running)
            decision.add(self._finish(now) if finished else self._fail("not all nodes have come back", now))
        elif self.phase is Phase.GATHERING or self.phase is Phase.STOPPING:
            there = f"only {len(self.nodes)} of {self.min_nodes} nodes"
            why, patience = f"{there} have come", JOIN_PATIENCE
            if self.attempt:
                why, patience = f"{there} are left: {self.last_failure}", NODE_PATIENCE
            if len(self.nodes) < self.min_nodes and now - self.since > patience:
                return decision.add(self._end(1, why, now))
            decision.add(self._start_if_ready(now))
        return decision

    def _in_vain(self, node: Node, away: float) -> bool:
        """Whether a node is given up whose agent has been away for so many seconds."""
        if self.phase is Phase.RUNNING:
            others = (rank for rank, where in self.running.items() if where != node.name)
            runs = node.doorbell and node.name in self.hosts and any(rank not in self.statuses for rank in others)
            return away > NODE_PATIENCE and not runs
        return away > (AWAY_PATIENCE if len(self.nodes) > self.min_nodes else NODE_PATIENCE)

    @property
    def _is_partial(self) -> bool:
        """After a change of coordinator: not all nodes have told yet which ranks of the attempt they run."""
        return len(self.running) < self.world if self.world else len(self.hosts) < self.min_nodes

    def _others_may_run(self, now: float) -> bool:
        """After a change of coordinator: whether nodes that have not been heard of may run an attempt."""
        if self.gathered or not (self.inherited or self.attempt) or now - self.heard_at >= AWAY_PATIENCE:
            return False
        stopped = sum(node.ready == self.attempt > 0 for node in self.nodes.values())
        return stopped < max(self.max_nodes, 2) and not 0 < self.world <= len(self.running)

    def _start_if_ready(self, now: float) -> Decision:
        if self.phase not in (Phase.GATHERING, Phase.STOPPING) or len(self.nodes) < self.min_nodes or self.unready:
            return Decision()
        waited = now - self.since
        if self._others_may_run(now) or (not self.gathered and waited < LAST_CALL and len(self.nodes) < self.max_nodes):
            return Decision()
        if not self.exclusion.known and waited < LIST_PATIENCE:
            return Decision()
        bad = {node for node in self.nodes if self.exclusion.excluded(node, now)}
        chosen = choose(self.nodes.values(), self.min_nodes, self.max_nodes, bad.__contains__, self.places)
        if not self.gathered and waited < LAST_CALL and any(node.name in bad for node in chosen):
            return Decision()  # a better one may come
        # A node without ranks of the last attempt has nothing to stop, and may be ready for nothing yet.
        if any(node.ready < 0 or node.away_since is not None for node in chosen):
            return Decision()
        return self._start(chosen, now)

    def _start(self, chosen: list[Node], now: float) -> Decision:
        world = sum(n.nproc for n in chosen)
        self.attempt += 1
        self.phase, self.since, self.began, self.gathered = Phase.RUNNING, now, now, True
        self.running, self.hosts, self.statuses, self.suspects = {}, {n.name for n in chosen}, {}, {}
        self.world, self.places = world, {n.name: float(place) for place, n in enumerate(chosen)}
        self._count_all()
        spares = ", ".join(sorted(self.nodes.keys() - self.hosts))
        where = f"{len(chosen)} nodes" + (f"; without {spares}" if spares else "")
        decision = Decision([], [f"job {self.job}: attempt {self.attempt} starts: {world} ranks on {where}"])
        first = 0
        for node_rank, node in enumerate(chosen):
            start = agent_pb2.StartRanks(
                attempt=self.attempt,
                world_size=world,
                first_rank=first,
                node_rank=node_rank,
                nodes=len(chosen),
                master_addr=chosen[0].address,
                master_port=chosen[0].port,
            )
            node.start = start
            decision.effects.append(Send(node.name, pb.Order(job=self.job, start=start)))
            self.running.update(dict.fromkeys(range(first, first + node.nproc), node.name))
            first += node.nproc
        return decision

    def aside(self, now: float) -> dict[str, str]:
        """Nodes that run no rank, or cannot be reached, and why, for a person."""
        found = {}
        for node in self.nodes.values():
            if node.away_since is not None:
                found[node.name] = "its agent is away"
            elif node.name not in self.hosts:
                bad = self.exclusion.excluded(node.name, now)
                found[node.name] = self.exclusion.why(node.name, now) if bad else "a spare"
        return found

    def waiting(self, now: float) -> list[str]:
        """Nodes that the attempt could have and has not; none where anything else is about to happen to it."""
        accused = self.accused is not None and self.accused.attempt == self.attempt
        busy = self._is_partial or self.stop_wanted or self.statuses or self.suspects or accused
        if self.phase is not Phase.RUNNING or len(self.hosts) >= min(self.max_nodes, len(self.nodes)) or busy:
            return []
        here = [n for n in self.nodes.values() if n.away_since is None and (n.ready >= 0 or n.name in self.hosts)]
        if not self.hosts <= {node.name for node in here}:
            return []
        chosen = choose(here, self.min_nodes, self.max_nodes, lambda n: self.exclusion.excluded(n, now), self.places)
        return [n.name for n in chosen if n.name not in self.hosts] if len(chosen) > len(self.hosts) else []

    def grow(self, nodes: list[str], why: str, now: float) -> Decision:
        """Start anew with these nodes as well."""
        grows = f"the job grows from {len(self.hosts)} to {len(self.hosts) + len(nodes)} nodes, {why}"
        return self.again(f"node{'s'[: len(nodes) - 1]} {', '.join(nodes)} can be used: {grows}", Cause.GROWN, now)

    def again(self, why: str, cause: Cause, now: float) -> Decision:
        """Start a new attempt though nothing has failed. That takes none of the restarts."""
        self.last_failure, self.since, self.phase = why, now, Phase.STOPPING
        stop = self._stop(self.attempt, why, self.nodes)
        return Decision([Restarted(self.job, cause, why)], [f"job {self.job}: {why}"]).add(stop)

    def _finish(self, now: float) -> Decision:
        worst = max(self.statuses.values())
        return self._end(worst, self._stopped() if worst else "all ranks have ended", now)

    def _stopped(self) -> str:
        asked = f" ({self.stop_wanted})" if self.stop_wanted else ""
        return f"stopped on request{asked}; {self.saved or 'nothing was saved'}"

    def _fail(self, why: str, now: float, crash: Crash | None = None) -> Decision:
        """The attempt has failed; `crash` says how, if the program did and not a node."""
        self.last_failure = why
        self.incidents.append(f"attempt {self.attempt}: {why}")
        self.since = now
        if self.stop_wanted:  # there is no time for another attempt
            return self._end(INTERRUPTED, f"{self._stopped()}; before the last save, {why}", now)
        looping = self.loop.crashed(crash, self.reached()[0]) if crash else ""
        if looping:
            return self._end(EXIT_STATUS["crash-loop"], f"{why}; {looping}", now)
        if self.restarts >= self.max_restarts:
            return self._end(1, f"{why}; no restarts left of {self.max_restarts}", now)
        self.restarts += 1
        self.phase = Phase.STOPPING
        reason = f"job {self.job}: {why}; restart {self.restarts} of {self.max_restarts}"
        return Decision([], [reason]).add(self._stop(self.attempt, why, self.nodes))

    def _stop(self, attempt: int, why: str, nodes: Iterable[str]) -> Decision:
        stop = agent_pb2.StopRanks(attempt=attempt, grace=GRACE, reason=why)
        return Decision([Send(node, pb.Order(job=self.job, stop=stop)) for node in sorted(nodes)])

    def _end(self, status: int, why: str, now: float) -> Decision:
        self.phase, self.outcome, self.ended = Phase.ENDED, (status, why), now
        end = agent_pb2.JobEnd(status=status, reason=why)
        effects = [Send(n, pb.Order(job=self.job, end=end)) for n in sorted(self.nodes)]
        return Decision(list(effects), [f"job {self.job} ends with {status}: {why}"])

    def _end_node(self, node: str, status: int, why: str) -> Decision:
        end = agent_pb2.JobEnd(status=status, reason=why)
        return Decision([Send(node, pb.Order(job=self.job, end=end))], [why])


def launched_as(job: str) -> str:
    """The launcher's name of a job that ranks registered as "<name>@<digest of the run>"."""
    return job.rpartition("@")[0] or job
