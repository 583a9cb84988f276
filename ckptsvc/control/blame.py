"""Who is to blame when a job stands still: evidence about its ranks -> a verdict, with its reasons.

Each observer below looks at one independent kind of evidence and says which ranks it speaks against. The rank that the
weightiest kinds speak against is named. That all ranks stand still says nothing about who holds them up: what counts is
what sets one rank apart from those that wait for it.
"""

from __future__ import annotations

import enum
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptsvc.control.collectives import odd_ones
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

BUSY, IDLE = 0.8, 0.2
"""Shares of a core from which on, and up to which, a thread counts as working and as idle."""


NAMED = 2
"""Signals that the sentence of a verdict gives as reasons."""


class Kind(enum.Enum):
    """What a signal is about. Signals of one kind are not independent of each other."""

    PROCESS = "process"
    INTERPRETER = "interpreter"
    COLLECTIVE = "collective"
    STACK = "stack"
    WORK = "work"
    STEPS = "steps"
    NETWORK = "network"
    NODE = "node"


class Signal(NamedTuple):
    """One observation that speaks against a rank."""

    kind: Kind
    weight: float
    what: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A job that stands still, as far as it could be seen.

    Attributes:
        nodes: rank -> node, of every rank of the attempt.
        ranks: what was found out about them.
        silent: nodes that have not answered.
        nics: node -> a sentence for each of its network cards that is not well.
    """

    nodes: Mapping[int, str]
    ranks: Mapping[int, pb.RankEvidence]
    silent: Collection[str] = ()
    nics: Mapping[str, Iterable[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who it was.

    Attributes:
        rank: to blame; -1: nobody could be named.
        node: where it is; "" if nobody was named.
        sentence: for a person.
        confidence: 0 to 1.
        signals: what says so, one sentence each.
        kinds: how many independent kinds of evidence set this rank apart.
        overdue: the rank has itself been without progress for longer than its phase allows.
        broken: its process is stopped or gone, or not to be reached: it cannot go on by itself.
    """

    rank: int = -1
    node: str = ""
    sentence: str = ""
    confidence: float = 0.0
    signals: tuple[str, ...] = ()
    kinds: frozenset[Kind] = frozenset()
    overdue: bool = False
    broken: bool = False


def blame(scene: Scene) -> Verdict:
    """The verdict on a scene."""
    if _suspended(scene):
        stopped = sum(e.state == "T" for e in scene.ranks.values())
        return Verdict(sentence=f"{stopped} of {len(scene.nodes)} ranks are stopped: somebody has suspended the job")
    against: dict[int, dict[Kind, Signal]] = {}
    for observe in _OBSERVERS:
        for rank, signal in observe(scene):
            known = against.setdefault(rank, {}).setdefault(signal.kind, signal)
            if known.weight < signal.weight:
                against[rank][signal.kind] = signal
    if not against or (len(scene.silent) > 1 and {kind for found in against.values() for kind in found} == {Kind.NODE}):
        return Verdict(sentence=_nobody(scene))
    weights = {rank: sum(s.weight for s in signals.values()) for rank, signals in against.items()}
    most = max(weights.values())
    suspects = sorted(rank for rank, weight in weights.items() if weight == most)
    return _verdict(scene, suspects, against[suspects[0]])


def _verdict(scene: Scene, suspects: list[int], signals: Mapping[Kind, Signal]) -> Verdict:
    first, nodes = suspects[0], {scene.nodes[rank] for rank in suspects}
    evidence = scene.ranks.get(first)
    broken = evidence is not None and is_broken(evidence)
    overdue = evidence is not None and is_overdue(evidence)
    # What speaks against all ranks of a node names the node.
    of_node = len(nodes) == 1 and signals.keys() <= {Kind.NODE, Kind.NETWORK}
    of_node = of_node and (len(suspects) > 1 or evidence is None)  # a rank that was not seen is not known to hang
    confidence = 0.95 if broken else {1: 0.5, 2: 0.8}.get(len(signals), 0.9)
    if not broken and not of_node:
        confidence /= len(suspects)
    what = [signal.what for signal in sorted(signals.values(), key=lambda signal: -signal.weight)]
    why = "; ".join(what[:NAMED])
    if evidence is not None and evidence.threshold and not of_node:
        what.append(
            f"no progress for {evidence.stalled:.1f} s in phase {evidence.phase or 'unknown'},"
            f" where {evidence.threshold:.1f} s are allowed"
        )
    who = f"rank {first} on {scene.nodes[first]}" if not of_node else f"node {scene.nodes[first]}"
    if len(suspects) > 1 and not of_node:
        who += f" (or one of ranks {', '.join(map(str, suspects[1:9]))})"
    if evidence is not None and evidence.threshold and not overdue:
        sentence = f"{who} is what the others wait for, still within its time: {what[-1]}; {why}"
    else:
        sentence = f"{who} hung: {why} ({confidence:.0%} sure)"
    return Verdict(
        rank=-1 if of_node else first,
        node=scene.nodes[first],
        sentence=sentence,
        confidence=confidence,
        signals=tuple(what),
        kinds=frozenset(signals) if len(suspects) == 1 or broken else frozenset(),
        overdue=overdue and not of_node,
        broken=broken,
    )


def _nobody(scene: Scene) -> str:
    if scene.silent:
        return f"nobody can be named: nodes {', '.join(sorted(scene.silent))} do not answer"
    waiting = {r for r, e in scene.ranks.items() if waits(e)}
    if scene.ranks and len(waiting) == len(scene.ranks):
        one = scene.ranks[min(waiting)]
        return f"nobody can be named: all of {len(waiting)} ranks wait {_in(one)}: perhaps the network"
    return f"nobody can be named: nothing sets one of {len(scene.ranks)} ranks apart from the others"


# ---- what a rank is doing ----------------------------------------------------------------------------------------

_BROKEN = ("T", "Z", "X")
_WAITS_IN_TORCH = re.compile(
    r"\b(all_?reduce|all_?gather|reduce_scatter|broadcast|barrier|all_to_all|gather|scatter|reduce|recv|irecv|send"
    r"|synchronize|monitored_barrier)\w*"
)
_FUNCTION = re.compile(r"\s*(?:[\w<>]+\.)*([\w<>]+|\.+)")
_LONG_PATH = re.compile(r"\((?:[^()]*/)?([^()/]+/[^()/]+:\d+\))$")
_BACKWARD = "_engine_run_backward"

_STACKS = 256
"""Different stacks of which is remembered what they say: in a job of 100,000 ranks nearly all are the same."""


def is_broken(evidence: pb.RankEvidence) -> bool:
    """Whether its process is stopped or gone."""
    return evidence.state in _BROKEN


def is_overdue(evidence: pb.RankEvidence) -> bool:
    """Whether it has itself been without progress for longer than its phase allows."""
    return 0 < evidence.threshold < evidence.stalled


def waits(evidence: pb.RankEvidence) -> bool:
    """Whether the rank waits for others: by its flight recorder, by its stack, or because it is idle."""
    if is_broken(evidence):
        return False
    if evidence.groups:
        return any(group.collective for group in evidence.groups)
    if functions(evidence.stack):
        return _stack_waits(evidence)
    return evidence.state == "S" and evidence.cpu <= IDLE


@functools.lru_cache(maxsize=_STACKS)
def functions(stack: str) -> tuple[str, ...]:
    """The functions of a stack, outermost first, without their classes: not everybody who looks can tell those."""
    return tuple(match[1] for line in stack.splitlines() if (match := _FUNCTION.match(line)))


def _stack_waits(evidence: pb.RankEvidence) -> bool:
    in_torch, in_backward = _waits_where(evidence.stack)
    return in_torch or (in_backward and evidence.cpu <= IDLE)


@functools.lru_cache(maxsize=_STACKS)
def _waits_where(stack: str) -> tuple[bool, bool]:
    """Whether a stack ends in a collective, and whether in the backward pass, which may wait for one."""
    inner = functions(stack)[-4:]
    return any(map(_WAITS_IN_TORCH.match, inner)), _BACKWARD in inner


def _in(evidence: pb.RankEvidence) -> str:
    return f"in {evidence.collective} (number {evidence.enqueued})" if evidence.collective else "for others"


def _others(ranks: Collection[object], do: str) -> str:
    return f"{len(ranks)} others {do}" if len(ranks) != 1 else f"1 other {do}s"


def _suspended(scene: Scene) -> bool:
    """Most of the job is stopped: a scheduler, or a person at a terminal, has done that. It is no fault."""
    stopped = sum(e.state == "T" for e in scene.ranks.values())
    return 2 * stopped > len(scene.nodes)


# ---- observers: each yields (rank, signal) -----------------------------------------------------------------------

Found = Iterable[tuple[int, Signal]]


def _process(scene: Scene) -> Found:
    """The kernel's word about the process."""
    said = {
        "T": (4.0, "its process is stopped (state T)"),
        "Z": (4.0, "its process is a zombie (state Z)"),
        "X": (4.0, "its process is gone"),
    }
    for rank, e in scene.ranks.items():
        if e.state in said:
            yield rank, Signal(Kind.PROCESS, *said[e.state])
        elif e.state == "D":
            where = f" in {e.waits_in}" if e.waits_in else ""
            yield rank, Signal(Kind.PROCESS, 2.0, f"its process sleeps{where} and cannot be interrupted (state D)")


def _interpreter(scene: Scene) -> Found:
    """Its threads do not get the interpreter lock, not even the one that only answers questions."""
    for rank, e in scene.ranks.items():
        if e.asked and not e.answers and e.state in ("R", "S"):
            how = "computes" if e.cpu >= BUSY else "sleeps" if e.cpu <= IDLE else "goes on"
            yield rank, Signal(Kind.INTERPRETER, 2.0, f"it {how} without ever letting go of the interpreter lock")


def _collectives(scene: Scene) -> Found:
    """It has not started the collective that the others wait in, or has started another."""
    odd = odd_ones(scene.ranks.values())
    for one in odd:
        if one.lacks == odd[0].lacks:
            yield one.rank, Signal(Kind.COLLECTIVE, 2.0, one.reason)
    known = [e for e in scene.ranks.values() if e.groups]
    waiting = [e for e in known if waits(e)]
    if odd or not waiting or len(waiting) < len(known):
        return
    unknown = [e for e in scene.ranks.values() if not e.groups and e.state and not waits(e)]
    if len(unknown) <= len(waiting):
        where = f"{_others(waiting, 'wait')} {_in(waiting[0])}"
        for e in unknown:
            yield e.rank, Signal(Kind.COLLECTIVE, 1.0, f"{where}, and whether it has started that is not known")


def _stacks(scene: Scene) -> Found:
    """Most wait in a collective, and this one is somewhere else."""
    known = {r: stack for r, e in scene.ranks.items() if (stack := functions(e.stack))}
    waiting: list[int] = []
    elsewhere: list[int] = []
    for rank in known:
        (waiting if _stack_waits(scene.ranks[rank]) else elsewhere).append(rank)
    if waiting and 0 < len(elsewhere) <= len(waiting):
        for rank in elsewhere:
            here = _innermost(scene.ranks[rank])
            what = f"it is in {here}, while {_others(waiting, 'wait')} in {known[waiting[0]][-1]}"
            yield rank, Signal(Kind.STACK, 2.0, what)
        return
    groups = Counter(known.values())
    if len(groups) < 2:
        return
    usual, count = groups.most_common(1)[0]
    if 2 * count > len(known):
        for rank, stack in known.items():
            if stack != usual:
                here = _innermost(scene.ranks[rank])
                yield rank, Signal(Kind.STACK, 1.0, f"it is in {here}, while {count} others are in {usual[-1]}")


def _innermost(evidence: pb.RankEvidence) -> str:
    """Function and place; of a long path, the end: all of it stands in the report."""
    here = evidence.stack.split("\n")[-1].strip() or functions(evidence.stack)[-1]
    return _LONG_PATH.sub(r"(\1", here)


def _work(scene: Scene) -> Found:
    """Where neither recorders nor stacks tell who waits: all others sleep, and this one does not."""
    if any(waits(e) for e in scene.ranks.values() if e.groups or e.stack):
        return
    seen = {r: e for r, e in scene.ranks.items() if e.state}
    asleep = [r for r, e in seen.items() if e.state == "S" and e.cpu <= IDLE]
    awake = [r for r in seen if r not in asleep]
    if 0 < len(awake) <= len(asleep):
        for rank in awake:
            what = "it computes" if seen[rank].state == "R" else "it is not one of those that wait"
            yield rank, Signal(Kind.WORK, 1.0, f"{what}, while {_others(asleep, 'sleep')}")


def _steps(scene: Scene) -> Found:
    """It has done fewer steps."""
    steps = {r: e.step for r, e in scene.ranks.items()}
    if not steps:
        return
    lowest = min(steps.values())
    behind = [rank for rank, step in steps.items() if step == lowest]
    ahead = [step for step in steps.values() if step > lowest]
    if 0 < len(behind) <= len(ahead):
        usual = Counter(ahead).most_common(1)[0][0]
        for rank in behind:
            yield rank, Signal(Kind.STEPS, 1.0, f"it has done {lowest} steps, the others {usual}")


def _network(scene: Scene) -> Found:
    """A network card of its node is not well."""
    for rank, node in scene.nodes.items():
        for sentence in scene.nics.get(node, ()):
            yield rank, Signal(Kind.NETWORK, 1.5, sentence)


def _node(scene: Scene) -> Found:
    """Nothing is heard of its node."""
    for rank, node in scene.nodes.items():
        if node in scene.silent:
            yield rank, Signal(Kind.NODE, 1.0, f"node {node} does not answer")


_OBSERVERS: tuple[Callable[[Scene], Found], ...] = (
    _process,
    _interpreter,
    _collectives,
    _stacks,
    _work,
    _steps,
    _network,
    _node,
)
