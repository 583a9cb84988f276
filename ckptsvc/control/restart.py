r"""Attempts of a job that `ckptsvc run` launches: when its nodes start ranks, when they stop them, when the job ends.

gathering --all nodes ready--> running --a rank fails--> stopping --all nodes ready--> running ...
\--all ranks exit 0--> ended          \--no restarts left--> ended
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from ckptsvc.control.effects import Decision, Send
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL for the healthy ranks of an attempt that is being stopped."""

LAST_CALL = 5.0
"""Seconds to wait for more nodes once the least number has joined."""

JOIN_PATIENCE = 600.0
"""Seconds after the last change among its nodes in which a job that has not begun waits for the rest (as torchrun)."""

NODE_PATIENCE = 60.0
"""Seconds a job waits below its least number of nodes before it ends, and for a node whose agent is away."""

INTERRUPTED = 85
"""Exit status of ranks that stopped because they were asked to (see errors.EXIT_STATUS)."""


EXIT_PATIENCE = 1.0
"""Seconds a launcher has to say how a rank ended whose process is known to be gone."""


class Phase(enum.Enum):
    """Where the job is."""

    GATHERING = "gathering"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(slots=True)
class Node:
    """One `ckptsvc run`."""

    name: str
    rank: int
    address: str
    nproc: int
    ready: int = -1  # the attempt after which it is ready for the next
    port: int = 0
    start: agent_pb2.StartRanks | None = None  # the last order to start, to be repeated if it was lost
    away_since: float | None = None  # its agent's connection has ended


@dataclass(slots=True)
class Attempts:
    """The launched job."""

    job: str
    min_nodes: int
    max_nodes: int
    max_restarts: int
    phase: Phase = Phase.GATHERING
    attempt: int = 0
    restarts: int = 0
    since: float = 0.0
    nodes: dict[str, Node] = field(default_factory=dict)
    running: dict[int, str] = field(default_factory=dict)  # rank -> node
    hosts: set[str] = field(default_factory=set)  # nodes with ranks of the attempt
    statuses: dict[int, int] = field(default_factory=dict)
    suspects: dict[int, tuple[float, str]] = field(default_factory=dict)  # rank -> since when, node
    outcome: tuple[int, str] = (0, "")  # status and reason, once ENDED
    predecessor: tuple[int, str] | None = None  # outcome of the last job of this name
    last_failure: str = ""
    stop_wanted: str = ""  # why the job was asked to stop
    saved: str = ""  # what is known of its newest checkpoint
    incidents: list[str] = field(default_factory=list)

    def joined(self, event: pb.NodeJoined, now: float) -> Decision:
        """A launcher has connected, for the first time or again: what it says counts, orders may have been lost."""
        node = self.nodes.get(event.node)
        if self.phase is Phase.ENDED:
            return self._end_node(event.node, *self.outcome)
        decision = Decision()
        if node is None:
            if len(self.nodes) >= self.max_nodes:
                why = f"job {self.job} has its {self.max_nodes} nodes already"
                return self._end_node(event.node, 1, why)
            rank = event.node_rank if event.node_rank >= 0 else len(self.nodes)
            node = self.nodes[event.node] = Node(event.node, rank, event.address, event.nproc)
            self.since = now
            joined = f"job {self.job}: node {event.node} joined ({len(self.nodes)}/{self.min_nodes})"
            decision.reasons.append(joined)
        node.address, node.nproc, node.away_since = event.address, event.nproc, None
        return decision.add(self._adopt(event)) if event.attempt else decision

    def _adopt(self, event: pb.NodeJoined) -> Decision:
        """Ranks run on that node: those this coordinator or an earlier one has started, or such that should be gone."""
        here = dict.fromkeys(range(event.first_rank, event.first_rank + event.nproc), event.node)
        if event.attempt < self.attempt:
            return self._stop(event.attempt, "a later attempt has begun", [event.node])
        if event.attempt > self.attempt:
            stale = self._stop(self.attempt, "a later attempt has begun", self.hosts)
            self.attempt, self.phase = event.attempt, Phase.RUNNING
            self.restarts = max(self.restarts, event.attempt - 1)
            self.running, self.hosts, self.statuses, self.suspects = here, {event.node}, {}, {}
            return stale
        self.running.update(here)
        self.hosts.add(event.node)
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
        if self.phase is Phase.RUNNING:
            if event.node not in self.hosts:
                return Decision()  # joined while the attempt ran: for the next one
            if event.attempt == before and node.start is not None:  # the order to start was lost
                return Decision([Send(event.node, pb.Order(job=self.job, start=node.start))])
            return self._fail(f"node {event.node} has no rank of attempt {self.attempt} any more", now)
        if event.attempt < self.attempt:
            self.hosts.discard(event.node)  # the order to start never reached it, so there is nothing to stop
        elif event.attempt > self.attempt:  # an earlier coordinator has got that far
            self.attempt, self.restarts = event.attempt, max(self.restarts, event.attempt)
        return self._start_if_ready(now)

    def agent_lost(self, name: str, now: float) -> None:
        """The connection to a node's agent has ended; it is given `NODE_PATIENCE` to come back."""
        if name in self.nodes:
            self.nodes[name].away_since = now

    def rank_exited(self, attempt: int, rank: int, node: str, status: int | None, now: float) -> Decision:
        """A rank has ended; `status` is None when only its death is known so far."""
        if attempt != self.attempt or self.phase is not Phase.RUNNING or rank not in self.running:
            return Decision()
        if status in (0, INTERRUPTED):
            self.statuses[rank] = status or 0
            if len(self.statuses) < len(self.running) or self._is_partial:
                return Decision()
            return self._finish()
        how = "died" if status is None else describe_status(status)
        return self._fail(f"rank {rank} on {node} {how}", now)

    def suspect(self, attempt: int, rank: int, node: str, now: float) -> None:
        """A rank's process has ended; its launcher is about to say how."""
        if attempt == self.attempt and self.phase is Phase.RUNNING and rank in self.running:
            self.suspects.setdefault(rank, (now, node))

    def node_left(self, name: str, detail: str, now: float) -> Decision:
        """A launcher is gone."""
        if self.nodes.pop(name, None) is None or self.phase is Phase.ENDED:
            return Decision()
        if self.phase is Phase.RUNNING and name in self.hosts:
            return self._fail(f"node {name} is gone ({detail})", now)
        self.since = now
        return Decision([], [f"job {self.job}: node {name} is gone ({detail})"])

    def tick(self, now: float) -> Decision:
        """Start after the last call; give up nodes that do not come back, and the job when there are not enough."""
        decision = Decision()
        for rank, (since, where) in list(self.suspects.items()):
            if rank in self.statuses or now - since > EXIT_PATIENCE:
                del self.suspects[rank]
                if rank not in self.statuses:
                    decision.add(self.rank_exited(self.attempt, rank, where, None, now))
        for node in list(self.nodes.values()):
            if node.away_since is not None and now - node.away_since > NODE_PATIENCE:
                decision.add(self.node_left(node.name, f"its agent is away for {NODE_PATIENCE:g} s", now))
        if self.phase is Phase.RUNNING and self._is_partial and now - self.since > NODE_PATIENCE:
            finished = len(self.statuses) == len(self.running)
            decision.add(self._finish() if finished else self._fail("not all nodes have come back", now))
        elif self.phase is Phase.GATHERING or self.phase is Phase.STOPPING:
            there = f"only {len(self.nodes)} of {self.min_nodes} nodes"
            why, patience = f"{there} have come", JOIN_PATIENCE
            if self.restarts:
                why, patience = f"{there} are left: {self.last_failure}", NODE_PATIENCE
            if len(self.nodes) < self.min_nodes and now - self.since > patience:
                return decision.add(self._end(1, why))
            decision.add(self._start_if_ready(now))
        return decision

    @property
    def _is_partial(self) -> bool:
        """After a change of coordinator: not all nodes have told yet which ranks of the attempt they run."""
        return len(self.hosts) < self.min_nodes

    def _start_if_ready(self, now: float) -> Decision:
        if self.phase not in (Phase.GATHERING, Phase.STOPPING) or len(self.nodes) < self.min_nodes:
            return Decision()
        if len(self.nodes) < self.max_nodes and now - self.since < LAST_CALL:
            return Decision()
        for node in self.nodes.values():
            # A node that joined while an attempt ran has no rank of it, and nothing to stop.
            if node.ready != self.attempt and (node.ready < 0 or node.name in self.hosts):
                return Decision()
        ordered = sorted(self.nodes.values(), key=lambda n: (n.rank, n.name))
        world = sum(n.nproc for n in ordered)
        self.attempt += 1
        self.phase, self.since = Phase.RUNNING, now
        self.running, self.hosts, self.statuses, self.suspects = {}, set(self.nodes), {}, {}
        decision = Decision(
            [], [f"job {self.job}: attempt {self.attempt} starts: {world} ranks on {len(ordered)} nodes"]
        )
        first = 0
        for node_rank, node in enumerate(ordered):
            start = agent_pb2.StartRanks(
                attempt=self.attempt,
                world_size=world,
                first_rank=first,
                node_rank=node_rank,
                nodes=len(ordered),
                master_addr=ordered[0].address,
                master_port=ordered[0].port,
            )
            node.start = start
            decision.effects.append(Send(node.name, pb.Order(job=self.job, start=start)))
            self.running.update(dict.fromkeys(range(first, first + node.nproc), node.name))
            first += node.nproc
        return decision

    def _finish(self) -> Decision:
        worst = max(self.statuses.values())
        return self._end(worst, self._stopped() if worst else "all ranks have ended")

    def _stopped(self) -> str:
        asked = f" ({self.stop_wanted})" if self.stop_wanted else ""
        return f"stopped on request{asked}; {self.saved or 'nothing was saved'}"

    def _fail(self, why: str, now: float) -> Decision:
        self.last_failure = why
        self.incidents.append(f"attempt {self.attempt}: {why}")
        self.since = now
        if self.stop_wanted:  # there is no time for another attempt
            return self._end(INTERRUPTED, f"{self._stopped()}; before the last save, {why}")
        if self.restarts >= self.max_restarts:
            return self._end(1, f"{why}; no restarts left of {self.max_restarts}")
        self.restarts += 1
        self.phase = Phase.STOPPING
        reason = f"job {self.job}: {why}; restart {self.restarts} of {self.max_restarts}"
        return Decision([], [reason]).add(self._stop(self.attempt, why, self.nodes))

    def _stop(self, attempt: int, why: str, nodes: Iterable[str]) -> Decision:
        stop = agent_pb2.StopRanks(attempt=attempt, grace=GRACE, reason=why)
        return Decision([Send(node, pb.Order(job=self.job, stop=stop)) for node in sorted(nodes)])

    def _end(self, status: int, why: str) -> Decision:
        self.phase, self.outcome = Phase.ENDED, (status, why)
        end = agent_pb2.JobEnd(status=status, reason=why)
        effects = [Send(n, pb.Order(job=self.job, end=end)) for n in sorted(self.nodes)]
        return Decision(list(effects), [f"job {self.job} ends with {status}: {why}"])

    def _end_node(self, node: str, status: int, why: str) -> Decision:
        end = agent_pb2.JobEnd(status=status, reason=why)
        return Decision([Send(node, pb.Order(job=self.job, end=end))], [why])


def launched_as(job: str) -> str:
    """The launcher's name of a job that ranks registered as "<name>@<digest of the run>"."""
    return job.rpartition("@")[0] or job


def describe_status(status: int) -> str:
    """A wait status as words: "exited with status 3" or "was killed by signal 9"."""
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
