"""What the agent is doing, as one document for `ckptsvc status`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import ckptsvc
from ckptsvc.agent.status.job_view import job_view, launch_view
from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.restart import launched_as
from ckptsvc.control.save import outcome_word
from ckptsvc.pipeline.arena import State

if TYPE_CHECKING:
    from ckptsvc.agent.server import Agent

STATUS_VERSION = 1


def status_of(agent: Agent) -> dict[str, Any]:
    """The document; sizes in bytes, ages in seconds, times in Unix seconds."""
    return {
        "status_version": STATUS_VERSION,
        "time": time.time(),
        "version": ckptsvc.__version__,
        "node": agent.node_name,
        "pid": os.getpid(),
        "started": agent.started,
        "address": agent.address,
        "metrics": agent.metrics_address,
        "page": agent.page_address,
        "jobs": agent.orders.jobs(),
        "vacated": agent.local.standing.vacated,
        "paused": list(agent.local.standing.paused()),
        "ranks": _ranks(agent),
        "arenas": _arenas(agent),
        "arena_limit": agent.pool.limit,
        "max_write_rate": agent.workers.max_write_rate,
        "local_disk": _local_disk(agent),
        "saves": _saves(agent),
        "compression": [
            {"job": job.name, "compressed": job.compression.latest.compressed, "why": job.compression.latest.why}
            for job in agent.local.jobs.values()
            if job.compression.latest is not None
        ],
        "coordinates": _coordinated(agent),
        "launches": [
            launch_view(attempts, time.monotonic(), time.time())
            for core in agent.local.cores()
            for attempts in core.launched.values()
        ],
        "incidents": agent.recent.newest_first(),
        "elections": agent.elections.status() if agent.elections else [],
        "nics": [
            {
                "nic": reading.nic,
                "family": reading.family,
                "link": reading.link,
                "sent": reading.sent,
                "received": reading.received,
                "findings": [f.sentence for f in agent.nics.findings() if f.nic == reading.nic],
            }
            for reading in agent.nics.readings
        ],
    }


def summary_of(agent: Agent) -> str:
    """What it does, in one line (`systemctl status`)."""
    sessions, arenas = agent.local.sessions.values(), agent.pool.arenas.values()
    saving = sum(arena.state is State.STAGED for arena in arenas)
    jobs = len({session.reg.job for session in sessions})
    held = sum(arena.capacity for arena in arenas) >> 20
    return f"{len(sessions)} ranks of {jobs} jobs, {saving} snapshots being saved, {held} MiB of arenas"


def _ranks(agent: Agent) -> list[dict[str, Any]]:
    now = time.monotonic()
    found = []
    for session in agent.local.sessions.values():
        reg, at = session.reg, session.page.get("at")
        found.append(
            {
                "job": reg.job,
                "attempt": reg.attempt,
                "rank": reg.rank,
                "world_size": reg.world_size,
                "pid": session.pid,
                "store": reg.store,
                "step": session.page.get("step"),
                "phase": session.page.phase,
                "heartbeat_age": now - at / 1e9 if at else None,
                "committed": session.page.get("committed"),
            }
        )
    return sorted(found, key=lambda r: (r["job"], r["rank"]))


def _arenas(agent: Agent) -> list[dict[str, Any]]:
    return [
        {
            "job": a.job,
            "rank": a.rank,
            "state": a.state.value,
            "step": a.step,
            "bytes": a.capacity,
            "for_others": a.guest,
        }
        for a in agent.pool.arenas.values()
    ]


def _local_disk(agent: Agent) -> dict[str, Any] | None:
    """What the local disk holds, and what is to be drained from it; None where there is none."""
    tier, lowering = agent.tier, agent.lowering
    if tier is None or lowering is None:
        return None
    snapshots: dict[tuple[str, int, int], dict[str, Any]] = {}
    now = time.monotonic()
    for job, disk in tier.jobs.items():
        for held in disk.copies.values():
            one = snapshots.setdefault(
                (job, *held.key),
                {
                    "job": job,
                    "epoch": held.key[0],
                    "step": held.key[1],
                    "stage": held.stage.value,
                    "complete": held.key in disk.complete,
                    "shards": 0,
                    "durable": 0,
                    "draining": 0,
                    "bytes": 0,
                    "age": now - held.since,
                },
            )
            one["shards"] += 1
            one["durable"] += held.durable
            one["draining"] += bool(held.fill)
            one["bytes"] += held.label.nbytes
    return {
        "directory": str(tier.root),
        "problem": tier.problem,
        "snapshots": [snapshots[key] for key in sorted(snapshots)],
        "drains_allowed": lowering.backoff.allowed,
        "store_problem": lowering.problem,
    }


def _saves(agent: Agent) -> list[dict[str, Any]]:
    return [
        {
            "job": job.name,
            "epoch": o.epoch,
            "step": o.step,
            "outcome": outcome_word(o.outcome),
            "code": o.code,
            "reason": o.reason,
            "bytes": o.bytes,
            "seconds": o.seconds,
        }
        for job in agent.local.jobs.values()
        for o in job.outcomes.values()
    ]


def _coordinated(agent: Agent) -> list[dict[str, Any]]:
    return [
        {
            "job": job.name,
            "attempt": job.attempt,
            "epoch": job.epoch,
            "world_size": job.world_size,
            "live_ranks": len(job.ranks),
            "nodes": job.nodes,
            "running_saves": sorted(save.step for save in job.saves.open.values()),
            "in_memory": [step for _, step in job.saves.snapshots()],
            "on_disk": sorted(step for _, step in (core.tiers[job.name].snapshots() if job.name in core.tiers else ())),
            "restarts": attempts.restarts if (attempts := core.launched.get(launched_as(job.name))) else 0,
            "incidents": attempts.incidents if attempts else [],
            "aside": attempts.aside(time.monotonic()) if attempts else {},
            "nics": [finding.sentence for finding in core.nic_findings(job.name)],
            "goodput": _goodput(core, job.name),
            **job_view(core, job, time.monotonic(), time.time()),
        }
        for core in agent.local.cores()
        for job in core.jobs.values()
    ]


def _goodput(core: Coordinator, job: str) -> dict[str, Any] | None:
    """What the time of a job went into, in seconds by cause; None before anything is known of it."""
    account = core.ledger.accounts.get(job)
    if account is None:
        return None
    return {"share": account.books.ratio, "seconds": {share.value: s for share, s in account.books.seconds.items()}}
