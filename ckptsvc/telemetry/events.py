"""Log events and the fields that go with them: what a program may look for in a line of the log."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TypedDict, Unpack


class Event(StrEnum):
    """What a log line reports. Names are append-only: people search for them."""

    AGENT_STARTED = "agent-started"
    AGENT_STOPPED = "agent-stopped"
    SETTINGS_READ = "settings-read"
    SETTINGS_REFUSED = "settings-refused"
    COORDINATOR_CHOSEN = "coordinator-chosen"
    COORDINATOR_UNKNOWN = "coordinator-unknown"
    RANK_REGISTERED = "rank-registered"
    RANK_LEFT = "rank-left"
    RANK_DIED = "rank-died"
    RANK_HUNG = "rank-hung"
    RANK_STALLED = "rank-stalled"
    RANK_MOVED = "rank-moved"
    JOB_SLOWED = "job-slowed"
    WORKER_STARTED = "worker-started"
    WORKER_DIED = "worker-died"
    SNAPSHOT_STAGED = "snapshot-staged"
    SNAPSHOT_SKIPPED = "snapshot-skipped"
    ARENA_RECOVERED = "arena-recovered"
    COPY_RECOVERED = "copy-recovered"
    SHARD_WRITTEN = "shard-written"
    SAVE_STARTED = "save-started"
    SAVE_COMMITTED = "save-committed"
    SAVE_FAILED = "save-failed"
    SAVE_LEFT_LOCAL = "save-left-local"
    RESTORE_DONE = "restore-done"
    CHECKPOINT_REJECTED = "checkpoint-rejected"
    CHECKPOINT_DELETED = "checkpoint-deleted"
    STORE_RETRIED = "store-retried"
    STORE_DEGRADED = "store-degraded"
    JOB_STARTED = "job-started"
    JOB_RESTARTED = "job-restarted"
    JOB_RESUMED = "job-resumed"
    JOB_ENDED = "job-ended"
    NODE_DRAINED = "node-drained"
    NIC_FOUND = "nic-found"
    NIC_UNREADABLE = "nic-unreadable"
    INCIDENT_KEPT = "incident-kept"
    PARTNER_KEPT = "partner-kept"
    PARTNER_FAILED = "partner-failed"
    VERB_ASKED = "verb-asked"
    VERB_REFUSED = "verb-refused"
    AUDIT_FAILED = "audit-failed"
    CLOCK_JUMPED = "clock-jumped"


class Fields(TypedDict, total=False):
    """What a log line may be about; units: steps and epochs are counts, `reason` is a sentence."""

    job: str
    node: str
    rank: int
    attempt: int
    step: int
    epoch: int
    reason: str


def log(
    logger: logging.Logger, level: int, event: Event, message: str, *args: object, **fields: Unpack[Fields]
) -> None:
    """Write one line: `message % args` for people, `event` and `fields` for programs."""
    logger.log(level, message, *args, extra={"event": event, **fields}, stacklevel=2)
