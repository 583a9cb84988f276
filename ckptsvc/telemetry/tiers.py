"""Metrics of the places between the ranks and the durable store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

from ckptsvc.telemetry.declaring import Declarations
from ckptsvc.telemetry.labels import ArenaState, Purpose, Tier
from ckptsvc.telemetry.saves import JOB


class TierMetrics:
    """See `Declarations` for what each call says."""

    def __init__(self, declare: Declarations) -> None:
        self._held: dict[tuple[str, Tier], int] = {}
        self.arena_bytes = declare.gauge("ckptsvc_arena_bytes", "Shared memory held for snapshots.", state=ArenaState)
        self.tier_bytes = declare.gauge("ckptsvc_tier_bytes", "Snapshots held on this node.", tier=Tier)
        self.tier_step = declare.gauge(
            "ckptsvc_tier_newest_step", "Newest step of which this node holds something.", job=JOB, tier=Tier
        )
        self.local_refused = declare.counter("ckptsvc_local_disk_refusals_total", "Shards the local disk did not take.")
        self.drain_backlog = declare.gauge(
            "ckptsvc_drain_backlog_bytes", "Shards on the local disk that are to be made durable."
        )
        self.drain_age = declare.gauge("ckptsvc_drain_backlog_age_seconds", "Age of the oldest snapshot among them.")
        self.drains_allowed = declare.gauge("ckptsvc_drain_parallel_shards", "Shards that may be drained at a time.")
        self.partner_kept = declare.counter(
            "ckptsvc_partner_kept_total", "Copies and parts of parity made, and shards rebuilt.", purpose=Purpose
        )
        self.partner_failures = declare.counter(
            "ckptsvc_partner_failures_total", "Those that could not be.", purpose=Purpose
        )
        self.partner_bytes = declare.counter(
            "ckptsvc_partner_read_bytes_total", "Bytes that were read from other nodes for them.", purpose=Purpose
        )
        self.guests_dropped = declare.counter(
            "ckptsvc_partner_dropped_total", "Those that had to go for the memory of local ranks."
        )

    def let_go(self, job: str) -> None:
        """A job has left the node, and its series are gone."""
        for key in [key for key in self._held if key[0] == job]:
            del self._held[key]

    def hold(self, newest: Mapping[tuple[str, Tier], int], tiers: Collection[Tier]) -> None:
        """Note the newest step of each job in each of these tiers; what is not in there any more has no series."""
        for key in [key for key in self._held if key[1] in tiers and key not in newest]:
            del self._held[key]
            with suppress(KeyError):  # forgotten with its job
                self.tier_step.remove(*key)
        for key, step in newest.items():
            if self._held.get(key) != step:
                self._held[key] = step
                self.tier_step.labels(*key).set(step)
