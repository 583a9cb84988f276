"""Joining the job: where this process stands, which agent is its own, who coordinates."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ckptsvc.client.group import Group
from ckptsvc.config import agents_directory, private_directory
from ckptsvc.errors import ConfigError
from ckptsvc.launch import LOCAL_JOB, Placement, detect
from ckptsvc.launch.domain import domain_of
from ckptsvc.pipeline.retention import policy_of
from ckptsvc.rpc.dial import agents_home, is_alive
from ckptsvc.rpc.service import service_of
from ckptsvc.settings import Settings
from ckptsvc.telemetry import Fields
from ckptsvc.telemetry.logs import log_apart


def placement_of(group: Group) -> Placement:
    """Where this process stands; a job that nobody named gets a name that no other has. All ranks call this."""
    place = detect(os.environ, socket.gethostname())
    if place.job == LOCAL_JOB:
        name = group.broadcast(f"local-{os.getpid()}-{secrets.token_hex(4)}".encode()).decode()
        place = dataclasses.replace(place, job=name)
    return place


def coordinator_of(group: Group, place: Placement, settings: Settings) -> str:
    """Address of the job's coordinator, or where it is elected; "" if this node's agent is it. All ranks call this.

    Raises:
        ConfigError: the ranks are on several nodes, and nobody said whose agent coordinates.
    """
    given = os.environ.get("CKPTSVC_COORDINATOR")
    nodes = sorted({n.decode() for n in group.all_gather(place.node.encode())})
    if given is None and len(nodes) > 1 and settings.agent.coordination:
        return settings.agent.coordination
    if given is None and len(nodes) > 1:
        raise ConfigError(
            f"the ranks are on {len(nodes)} nodes ({', '.join(nodes[:3])} ...), and none of their agents coordinates",
            hint="start the job with `ckptsvc run`, or set CKPTSVC_COORDINATOR to the address of one agent",
        )
    return given or ""


def agent_directory(place: Placement, settings: Settings) -> tuple[Path, bool]:
    """(directory of the agent to use, whether it is to be started when needed: by this job, or by the service)."""
    given = os.environ.get("CKPTSVC_SOCKET")
    if given:
        return private_directory(Path(given)), False
    shared = agents_home(agents_directory(settings, os.environ), settings)
    if service_of(shared) is not None:
        return shared, True
    if is_alive(shared):
        return shared, False
    return shared / f"job-{xxhash.xxh3_64_hexdigest(place.job.encode())}", True


def registration(group: Group, place: Placement, settings: Settings, url: str, coordinator: str) -> dict[str, Any]:
    """What this rank says of itself to its agent (see rpc.identity)."""
    every = settings.save.every
    return {
        "op": "register",
        # A scheduler's job may train several runs, one after the other or at once: each is a job of its own here.
        "job": f"{place.job}@{xxhash.xxh3_64_hexdigest(url.encode())[:8]}",
        "store": url,
        "attempt": place.attempt,
        "rank": group.rank,
        "world_size": group.size,
        "epoch": 0,
        "every_steps": every.steps if every else 0,
        "every_seconds": every.seconds if every else 0.0,
        "keep": settings.save.keep,
        "retention": msgspec.to_builtins(policy_of(settings)),
        "extent": settings.save.extent,
        "coordinator": coordinator,
        "ends": _ends(place),
        "domain": domain_of(settings.tiers.domain, os.environ, place.node),
    }


def log_as_set(settings: Settings, registered: dict[str, Any], step: Callable[[], int]) -> None:
    """Where lines of the log are to be JSON, write those of this rank so; `step` says at which it is."""
    if settings.log.format != "json":
        return
    about = Fields(job=registered["job"], rank=registered["rank"], attempt=registered["attempt"])
    node = settings.agent.name or os.environ.get("CKPTSVC_NODE") or socket.gethostname()
    log_apart(sys.stderr, lambda: Fields(**about, node=node, step=step()))


def _ends(place: Placement) -> float:
    """When the job's time is over, in seconds of CLOCK_MONOTONIC; 0 if nobody knows, or if it is over already."""
    left = 0.0 if place.deadline is None else place.deadline - time.time()
    return time.monotonic() + left if left > 0 else 0.0  # asked once: a clock that is set later stops no job
