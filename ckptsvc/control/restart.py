"""Attempts of a job that `ckptsvc run` launches: when its nodes start ranks, when they stop them, when the job ends.

gathering --all nodes ready--> running --a rank fails--> stopping --all nodes ready--> running ...
\\--all ranks exit 0--> ended          \\--no restarts left--> ended
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ckptsvc.control.effects import Decision, Send
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL for the healthy ranks of an attempt that is being stopped."""

LAST_CALL = 5.0
"""Seconds to wait for more nodes once the least number has joined."""

NODE_PATIENCE = 60.0
"""Seconds a job waits below its least number of nodes before it ends."""

INTERRUPTED = 85
"""Exit status of ranks that stopped because they were asked to (see errors.EXIT_STATUS)."""


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
    statuses: dict[int, int] = field(default_factory=dict)
    last_failure: str = ""
    incidents: list[str] = field(default_factory=list)

    def joined(self, event: pb.NodeJoined, now: float) -> Decision:
        """A launcher has connected (again)."""
        node = self.nodes.get(event.node)
        if node is None:
            if len(self.nodes) >= self.max_nodes:
                return self._end_node(event.node, 1, f"job {self.job} has its {self.max_nodes} nodes already")
            rank = event.node_rank if event.node_rank >= 0 else len(self.nodes)
            self.nodes[event.node] = Node(event.node, rank, event.address, event.nproc)
            self.since = now
            if event.attempt:
                self._adopt(event)
            return Decision([], [f"job {self.job}: node {event.node} joined ({len(self.nodes)}/{self.min_nodes})"])
        return Decision()

    def _adopt(self, event: pb.NodeJoined) -> None:
        """Ranks run on that node already: an earlier coordinator started them."""
        if event.attempt >= self.attempt:
            self.attempt, self.phase = event.attempt, Phase.RUNNING
            self.restarts = event.attempt - 1
            self.running.update(dict.fromkeys(range(event.first_rank, event.first_rank + event.nproc), event.node))

    def ready(self, event: pb.NodeReady, now: float) -> Decision:
        """No rank of an earlier attempt is left on this node."""
        node = self.nodes.get(event.node)
        if node is None or self.phase is Phase.ENDED:
            return Decision()
        node.ready, node.port = event.attempt, event.port
        return self._start_if_ready(now)

    def rank_exited(self, attempt: int, rank: int, node: str, status: int | None, now: float) -> Decision:
        """A rank has ended; `status` is None when only its death is known so far."""
        if attempt != self.attempt or self.phase is not Phase.RUNNING or rank not in self.running:
            return Decision()
        if status in (0, INTERRUPTED):
            self.statuses[rank] = status or 0
            if len(self.statuses) < len(self.running):
                return Decision()
            worst = max(self.statuses.values())
            why = "stopped on request, saved" if worst else "all ranks have ended"
            return self._end(worst, why)
        how = "died" if status is None else describe_status(status)
        return self._fail(f"rank {rank} on {node} {how}", now)

    def node_left(self, name: str, detail: str, now: float) -> Decision:
        """A launcher is gone."""
        if name not in self.nodes or self.phase is Phase.ENDED:
            return Decision()
        del self.nodes[name]
        if self.phase is Phase.RUNNING:
            return self._fail(f"node {name} is gone ({detail})", now)
        return Decision([], [f"job {self.job}: node {name} is gone ({detail})"])

    def tick(self, now: float) -> Decision:
        """Start after the last call; give up when the nodes do not come."""
        if self.phase is Phase.GATHERING or self.phase is Phase.STOPPING:
            if len(self.nodes) < self.min_nodes and self.restarts and now - self.since > NODE_PATIENCE:
                return self._end(1, f"only {len(self.nodes)} of {self.min_nodes} nodes are left: {self.last_failure}")
            return self._start_if_ready(now)
        return Decision()

    def _start_if_ready(self, now: float) -> Decision:
        if self.phase not in (Phase.GATHERING, Phase.STOPPING) or len(self.nodes) < self.min_nodes:
            return Decision()
        if len(self.nodes) < self.max_nodes and now - self.since < LAST_CALL:
            return Decision()
        if any(n.ready != self.attempt for n in self.nodes.values()):
            return Decision()
        ordered = sorted(self.nodes.values(), key=lambda n: (n.rank, n.name))
        world = sum(n.nproc for n in ordered)
        self.attempt += 1
        self.phase, self.since = Phase.RUNNING, now
        self.running, self.statuses = {}, {}
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
            decision.effects.append(Send(node.name, pb.Order(job=self.job, start=start)))
            self.running.update(dict.fromkeys(range(first, first + node.nproc), node.name))
            first += node.nproc
        return decision

    def _fail(self, why: str, now: float) -> Decision:
        self.last_failure = why
        self.incidents.append(f"attempt {self.attempt}: {why}")
        self.since = now
        if self.restarts >= self.max_restarts:
            return self._end(1, f"{why}; no restarts left of {self.max_restarts}")
        self.restarts += 1
        self.phase = Phase.STOPPING
        stop = agent_pb2.StopRanks(attempt=self.attempt, grace=GRACE, reason=why)
        effects = [Send(n, pb.Order(job=self.job, stop=stop)) for n in sorted(self.nodes)]
        reason = f"job {self.job}: {why}; restart {self.restarts} of {self.max_restarts}"
        return Decision(list(effects), [reason])

    def _end(self, status: int, why: str) -> Decision:
        self.phase = Phase.ENDED
        end = agent_pb2.JobEnd(status=status, reason=why)
        effects = [Send(n, pb.Order(job=self.job, end=end)) for n in sorted(self.nodes)]
        return Decision(list(effects), [f"job {self.job} ends with {status}: {why}"])

    def _end_node(self, node: str, status: int, why: str) -> Decision:
        end = agent_pb2.JobEnd(status=status, reason=why)
        return Decision([Send(node, pb.Order(job=self.job, end=end))], [why])


def describe_status(status: int) -> str:
    """A wait status as words: "exited with status 3" or "was killed by signal 9"."""
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
