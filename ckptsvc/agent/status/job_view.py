"""What a coordinator knows of its jobs, for the status document: ranks, attempts, checkpoints, what is drained."""

from __future__ import annotations

from typing import Any

from ckptsvc.agent.logtail import one_line
from ckptsvc.agent.status.grid import grid
from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import Attempts, Phase, launched_as
from ckptsvc.control.save import Key, outcome_word
from ckptsvc.rpc.v1 import agent_pb2

MAX_CHECKPOINTS = 64
MAX_TEXT = 400
"""Characters of a sentence."""


def job_view(core: Coordinator, job: Job, now: float, wall: float) -> dict[str, Any]:
    """One job; `now` is the core's clock, `wall` the same moment in Unix seconds."""
    attempts, case = core.launched.get(launched_as(job.name)), core.health.cases.get(job.name)
    stalled = set(case.stalled) if case else set()
    if case and case.told and case.verdict.rank >= 0:
        stalled.add(case.verdict.rank)
    return {
        "store": job.store,
        "step": job.highest,
        "steps_per_second": job.steps_per_second,
        "every_seconds": job.every_seconds,
        "phase": attempts.phase.value if attempts else "running" if job.ranks else "ended",
        "attempts": [{"attempt": n, "began": wall - (now - at), "ranks": ranks} for n, at, ranks in job.begun],
        "grid": grid(job, stalled, attempts.running if attempts else None),
        "checkpoints": _checkpoints(core, job, now, wall),
        "drains": [
            {"epoch": save.epoch, "step": save.step, "draining": save.draining, "age": now - save.opened}
            for save in job.saves.open.values()
            if save.settled
        ],
    }


def launch_view(attempts: Attempts, now: float, wall: float) -> dict[str, Any]:
    """One job that `ckptsvc run` launches: there before its ranks are, and for a while after them."""
    ended = attempts.phase is Phase.ENDED
    return {
        "job": attempts.job,
        "phase": attempts.phase.value,
        "attempt": attempts.attempt,
        "nodes": len(attempts.nodes),
        "min_nodes": attempts.min_nodes,
        "max_nodes": attempts.max_nodes,
        "restarts": attempts.restarts,
        "max_restarts": attempts.max_restarts,
        "stop_wanted": attempts.stop_wanted[:MAX_TEXT],
        "ended": wall - (now - attempts.ended) if ended else None,
        "status": attempts.outcome[0] if ended else None,
        "reason": one_line(attempts.outcome[1])[:MAX_TEXT] if ended else "",
    }


def _checkpoints(core: Coordinator, job: Job, now: float, wall: float) -> list[dict[str, Any]]:
    """The newest, newest first: what is saved or was, and what memory and local disks hold."""
    saves, disks = job.saves, core.tiers[job.name].snapshots() if job.name in core.tiers else {}
    memory = set(saves.snapshots())
    keys = sorted({*saves.open, *saves.ended, *memory, *disks}, reverse=True)[:MAX_CHECKPOINTS]
    return [
        {
            "epoch": key[0],
            "step": key[1],
            "tiers": [
                tier
                for tier, there in (("memory", key in memory), ("disk", key in disks), ("store", _is_stored(job, key)))
                if there
            ],
        }
        | (_running(job, key, now, wall) if key in saves.open else _ended(job, key, now, wall))
        for key in keys
    ]


def _is_stored(job: Job, key: Key) -> bool:
    ended = job.saves.ended.get(key)
    return ended is not None and ended.outcome == agent_pb2.OUTCOME_COMMITTED and key not in job.saves.deleted


def _running(job: Job, key: Key, now: float, wall: float) -> dict[str, Any]:
    save = job.saves.open[key]
    return {
        "outcome": "running",
        "reason": "",
        "bytes": sum(shard.nbytes for shard in save.durable.values()),
        "began": wall - (now - save.opened),
        "seconds": now - save.opened,
        "ended": None,
        "ranks": save.world_size,
        "staged": len(save.staged),
        "durable": len(save.durable),
    }


def _ended(job: Job, key: Key, now: float, wall: float) -> dict[str, Any]:
    """Of one that is known only because memory or a disk holds it, the outcome is ""."""
    outcome, at = job.saves.ended.get(key, agent_pb2.SaveOutcome()), job.saves.ended_at.get(key)
    name = outcome_word(outcome.outcome)
    deleted = outcome.outcome == agent_pb2.OUTCOME_COMMITTED and key in job.saves.deleted
    return {
        "outcome": "deleted" if deleted else "" if name == "unspecified" else name,
        "reason": "" if name == "committed" else one_line(outcome.reason)[:MAX_TEXT],
        "bytes": outcome.bytes,
        "began": None if at is None else wall - (now - at) - outcome.seconds,
        "seconds": outcome.seconds,
        "ended": None if at is None else wall - (now - at),
    }
