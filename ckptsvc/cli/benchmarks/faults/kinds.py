"""The fault matrix: every kind of fault, how it is caused, what should become of the job, and who is to blame."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from ckptsvc.cli.benchmarks.faults import memory
from ckptsvc.cli.benchmarks.faults.world import POLL, VICTIM, World

HISTORY = 60
"""Steps before the fault: what is normal in a job must be known before anything in it can be abnormal."""

FROZEN = 12.0
"""Seconds for which what is only to be frozen for a while is frozen."""

CLOCK = 3600
"""Seconds by which a wrong clock is wrong."""

Cause = Callable[[World], float]
"""Does it; returns when, in seconds of the monotonic clock."""


class Need(StrEnum):
    """What not every machine has."""

    HOSTS = "several hosts (network namespaces, which need root)"
    MEMORY = "a memory limit of its own for one process (cgroups, which need root)"
    ETCD = "etcd (--etcd, or in PATH)"


class Blame(StrEnum):
    """Who is to be named."""

    RANK = "rank"
    NODE = "node"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Bars:
    """The most seconds until it is known; from there to a new process; until the next step. None: not promised."""

    seen: float | None = None
    process: float | None = None
    step: float | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: for --kinds.
        what: for people.
        cause: does it.
        restart: the job must come back in a new attempt; else it must go on in this one.
        blame: who the incident must name. NOBODY: there must be none that names a rank.
        says: where it is no incident that shows that the fault was seen: what an agent logs; "skipped": snapshots are
            skipped and counted; "": there is nothing to be seen.
        commits: checkpoints must be committed again afterwards.
        needs: what not every machine has.
        history: steps before the fault.
        evaluates: the job evaluates now and then.
        seconds: after which a run is given up; how long one that goes on is watched, if `restart` is false.
        undo: ends the fault after `FROZEN` seconds.
        wrong_clock: seconds by which the victim's wall clock is wrong from the start.
        bars: what is promised.
        peer: torchrun has an answer.
    """

    name: str
    what: str
    cause: Cause
    restart: bool = True
    blame: Blame = Blame.RANK
    says: str = ""
    commits: bool = True
    needs: Need | None = None
    history: int = HISTORY
    evaluates: bool = False
    seconds: float = 60.0
    undo: Callable[[World], None] | None = None
    wrong_clock: int = 0
    bars: Bars = Bars()
    peer: bool = False


# ---- causes


def _signal(pid: int, number: signal.Signals) -> float:
    at = time.monotonic()
    os.kill(pid, number)
    return at


def kill_rank(world: World) -> float:
    """SIGKILL."""
    return _signal(world.rank_pid(), signal.SIGKILL)


def freeze_rank(world: World) -> float:
    """SIGSTOP."""
    return _signal(world.rank_pid(), signal.SIGSTOP)


def asks(fault: str, rank: int = VICTIM) -> Cause:
    """The rank does it itself, or all of them (-1)."""
    return lambda world: world.order(fault, rank)


def out_of_memory(world: World) -> float:
    """The kernel kills the rank, which takes more than its limit."""
    limit = memory.limit(world.rank_pid())
    world.at_end(limit.remove)
    return world.order("take_memory")


def cut_link(world: World) -> float:
    """The link of the victim's host."""
    assert world.hosts is not None
    at = time.monotonic()
    world.hosts.cut(VICTIM + 1)
    return at


def kill_host(world: World) -> float:
    """All processes on it."""
    at = time.monotonic()
    world.kill_node(VICTIM)
    return at


def kill_agent(world: World) -> float:
    """The victim's, not the coordinator's."""
    return _signal(world.agent_pid(VICTIM), signal.SIGKILL)


def freeze_agent(world: World) -> float:
    """The same, for a while."""
    return _signal(world.agent_pid(VICTIM), signal.SIGSTOP)


def thaw_agent(world: World) -> None:
    """It goes on."""
    _signal(world.agent_pid(VICTIM), signal.SIGCONT)


def kill_coordinator(world: World) -> float:
    """While nothing is decided."""
    return _signal(world.agent_pid(0), signal.SIGKILL)


def kill_coordinator_in_save(world: World) -> float:
    """All shards are durable, and the commit record is about to be written."""
    point, held = world.folder / "before_record", world.folder / "before_record.held"
    point.touch()  # see pipeline.failpoint
    world.wait(held.exists, "a save to be about to commit", 30.0)
    at = _signal(world.agent_pid(0), signal.SIGKILL)
    held.unlink()
    return at


def kill_coordinator_in_restart(world: World) -> float:
    """A rank was killed, that is written down, and the others are being stopped."""
    at = kill_rank(world)
    log = world.launcher_log(0)
    while not (world.incidents and "stopping attempt" in log.read_text(errors="replace")):
        if time.monotonic() > at + 10.0:
            break
        time.sleep(POLL / 10)
        world.look()
    _signal(world.agent_pid(0), signal.SIGKILL)
    return at


def freeze_worker(world: World) -> float:
    """What a file server that does not answer does to the process that writes: nothing comes back from it."""
    return _signal(world.worker_pid(VICTIM), signal.SIGSTOP)


def thaw_worker(world: World) -> None:
    """It answers again."""
    _signal(world.worker_pid(VICTIM), signal.SIGCONT)


def kill_etcd_leader(world: World) -> float:
    """One member of three."""
    assert world.etcd is not None
    at = time.monotonic()
    world.etcd.kill_leader()
    return at


# ---- the matrix

_HUNG = Bars(seen=5.0)
_LOST = Bars(seen=3.0, step=10.0)

KINDS: tuple[Kind, ...] = (
    Kind("rank-killed", "rank: SIGKILL", kill_rank, bars=Bars(seen=1.0, process=1.0), peer=True),
    Kind("rank-frozen", "rank: SIGSTOP", freeze_rank, bars=Bars(seen=5.0, step=8.0), peer=True),
    Kind("loop-gil", "rank: endless loop with the GIL", asks("loop_with_the_interpreter_lock"), bars=_HUNG),
    Kind("loop-native", "rank: endless loop without the GIL", asks("loop_without_it"), bars=_HUNG),
    Kind("data-loader", "rank: stuck data loader", asks("stuck_loader"), bars=_HUNG),
    Kind("missed", "rank: missed collective", asks("missed_collective"), bars=_HUNG),
    Kind("mismatched", "rank: mismatched collective", asks("mismatched_collective"), bars=_HUNG),
    Kind("slow", "rank: 10 times slower", asks("slow"), restart=False, seconds=30.0),
    Kind("nested", "rank: hang in an evaluation in a step", asks("hang_in_an_evaluation"), evaluates=True,
        history=200, bars=_HUNG),
    Kind("memory-error", "rank: out of memory, MemoryError", asks("out_of_address_space")),
    Kind("oom-killed", "rank: out of memory, killed", out_of_memory, needs=Need.MEMORY, bars=Bars(seen=1.0)),
    Kind("link-cut", "host: link cut", cut_link, blame=Blame.NODE, needs=Need.HOSTS, bars=_LOST, peer=True),
    Kind("host-killed", "host: killed", kill_host, blame=Blame.NODE, bars=_LOST, peer=True),
    Kind("agent-killed", "agent: SIGKILL", kill_agent, restart=False, blame=Blame.NOBODY, seconds=20.0,
        says="agent of n1 disconnected"),
    Kind("agent-frozen", "agent: SIGSTOP for 12 s", freeze_agent, restart=False, blame=Blame.NOBODY, seconds=25.0,
        says="agent of n1 disconnected", undo=thaw_agent),
    Kind("coordinator-idle", "coordinator: SIGKILL, idle", kill_coordinator, restart=False, blame=Blame.NOBODY,
        seconds=20.0),
    Kind("coordinator-save", "coordinator: SIGKILL in mid-save", kill_coordinator_in_save, restart=False,
        blame=Blame.NOBODY, seconds=20.0),
    Kind("coordinator-restart", "coordinator: SIGKILL in mid-restart", kill_coordinator_in_restart),
    Kind("etcd-leader", "etcd: leader of three killed", kill_etcd_leader, restart=False, blame=Blame.NOBODY,
        needs=Need.ETCD, seconds=20.0),
    Kind("arena-full", "arena: full", asks("grow", -1), restart=False, blame=Blame.NOBODY, says="skipped",
        commits=False, seconds=15.0),
    Kind("store-hangs", "store: hangs for 12 s", freeze_worker, restart=False, blame=Blame.NOBODY, says="skipped",
        seconds=30.0, undo=thaw_worker),
    Kind("wrong-clock", "clock: one node's is an hour ahead, rank: SIGKILL", kill_rank, wrong_clock=CLOCK,
        says="the clock of node n1 is"),
)  # fmt: skip
"""In the order of the table."""
