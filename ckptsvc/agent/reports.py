"""What a node reports to a coordinator, made from what it knows."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ckptsvc.agent.identity import Registration
from ckptsvc.agent.sessions import Session
from ckptsvc.control.room import Stage
from ckptsvc.control.runs import runs_of
from ckptsvc.control.stalls import STEP
from ckptsvc.pipeline.arena import Label, Parity
from ckptsvc.rpc.identity import Page
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

_ENDED_AS = {Stage.LOCAL: agent_pb2.OUTCOME_LOCAL, Stage.COMMITTED: agent_pb2.OUTCOME_COMMITTED}


_FURTHEST = (1 << 32) - 1
"""Steps that a rank can be said to be behind."""


def joined(node: str, reg: Registration, epoch: int) -> pb.Report:
    """A rank has registered; `epoch` is 0 while none is known."""
    event = pb.RankJoined(
        job=reg.job,
        node=node,
        store=reg.store,
        attempt=reg.attempt,
        rank=reg.rank,
        world_size=reg.world_size,
        epoch=epoch,
        every_steps=reg.every_steps,
        every_seconds=reg.every_seconds,
        keep=reg.keep,
        retention=pb.Retention(**{k: v for k, v in msgspec.to_builtins(reg.retention).items() if k != "last"}),
        domain=reg.domain,
    )
    return pb.Report(rank_joined=event)


def progressed(node: str, job: str, attempt: int, pages: Sequence[Page]) -> pb.Report:
    """How far the ranks of an attempt are, and what they do, by their pages in the order of the ranks."""
    steps, phases = [page.told("step") for page in pages], [page.phase for page in pages]
    highest = max(steps)
    event = pb.Progressed(job=job, attempt=attempt, node=node, lowest=min(steps), highest=highest)
    event.blocked = max(page.told("blocked") + page.told("waited") for page in pages) / 1e9
    if event.lowest != highest:
        event.behind.extend(min(highest - step, _FURTHEST) for step in steps)
    if set(phases) != {STEP}:
        event.phases.extend(phases if len(set(phases)) > 1 else phases[:1])
    if all(page.get("began") >= 0 for page in pages):
        event.began = min(page.told("began") for page in pages)
    return pb.Report(progressed=event)


def left(node: str, reg: Registration, died: bool, detail: str) -> pb.Report:
    """A rank has ended."""
    event = pb.RankLeft(job=reg.job, node=node, attempt=reg.attempt, rank=reg.rank, died=died, detail=detail)
    return pb.Report(rank_left=event)


def announced(session: Session) -> pb.Report:
    """A rank has told which plain tensors it holds."""
    reg = session.reg
    generation, digest = session.announced or (0, "")
    event = pb.Announced(job=reg.job, attempt=reg.attempt, rank=reg.rank, digest=digest, generation=generation)
    return pb.Report(announced=event)


def rewound(reg: Registration, count: int) -> pb.Report:
    """The attempt has gone back to an earlier checkpoint for the count-th time."""
    return pb.Report(rewound=pb.Rewound(job=reg.job, attempt=reg.attempt, count=count))


def staged(node: str, label: Label, *, ended: bool = False, again: bool = False) -> pb.Report:
    """A whole snapshot is in an arena; `ended` if its save has ended, `again` if this may have been said before.

    If it is a part of a parity, that is what is reported.
    """
    if label.parity is not None:
        return _guarded(node, label, label.parity)
    event = pb.Staged(
        job=label.job,
        node=node,
        epoch=label.epoch,
        step=label.step,
        attempt=label.attempt,
        rank=label.rank,
        world_size=label.world_size,
        nbytes=label.nbytes,
        aliases=label.aliases,
        metrics=label.metrics,
        store=label.store,
        ended=ended,
        again=again,
        copy=label.guest,
    )
    return pb.Report(staged=event)


def local_kept(node: str, label: Label, stage: Stage, *, again: bool = False) -> pb.Report:
    """A shard is on the local disk of the node; `stage` says how far its snapshot has come, `again` as for `staged`."""
    event = pb.LocalKept(
        job=label.job,
        node=node,
        epoch=label.epoch,
        step=label.step,
        attempt=label.attempt,
        rank=label.rank,
        world_size=label.world_size,
        nbytes=label.nbytes,
        aliases=label.aliases,
        metrics=label.metrics,
        store=label.store,
        ended=stage is not Stage.PENDING,
        again=again,
        outcome=_ENDED_AS.get(stage),
    )
    return pb.Report(local_kept=event)


def _guarded(node: str, label: Label, parity: Parity) -> pb.Report:
    members = [pb.Holder(node=name, ranks=runs_of([shard.rank for shard in held])) for name, held in parity.members]
    event = pb.Guarded(
        job=label.job,
        node=node,
        epoch=label.epoch,
        step=label.step,
        losses=parity.losses,
        members=members,
        world_size=label.world_size,
        aliases=label.aliases,
        store=label.store,
    )
    return pb.Report(guarded=event)


def dropped(node: str, label: Label) -> pb.Report:
    """A snapshot, or a part of a parity, has left an arena."""
    event = pb.Dropped(job=label.job, node=node, epoch=label.epoch, step=label.step, rank=label.rank)
    return pb.Report(dropped=event)


def skipped(reg: Registration, epoch: int, step: int, why: str) -> pb.Report:
    """A rank cannot take a snapshot."""
    event = pb.Skipped(job=reg.job, attempt=reg.attempt, epoch=epoch, step=step, rank=reg.rank, why=why)
    return pb.Report(skipped=event)


def shard_failed(label: Label, code: str, what: str) -> pb.Report:
    """A shard could not be written."""
    event = pb.ShardFailed(job=label.job, epoch=label.epoch, step=label.step, rank=label.rank, code=code, what=what)
    return pb.Report(shard_failed=event)
