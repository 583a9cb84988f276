"""Metrics of saves: from the training loop to the commit record, and of the stores they go to."""

from __future__ import annotations

from ckptsvc.telemetry.declaring import BLOCKED, LATENCIES, Declarations
from ckptsvc.telemetry.labels import Outcome, Phase, Skip

JOB = "jobs with ranks or memory on this node; removed with the last of them"
SCHEME = "schemes of the stores of this node's jobs: file, s3 ..."
CODE = "codes of `ckptsvc.errors`"


class SaveMetrics:
    """See `Declarations` for what each call says."""

    def __init__(self, declare: Declarations) -> None:
        self.saves = declare.counter(
            "ckptsvc_saves_total", "Saves that ended, on each node with ranks of the job.", outcome=Outcome
        )
        self.save_duration = declare.histogram(
            "ckptsvc_save_duration_seconds",
            "Duration of one phase of a save: stage and write of a shard; commit: from the first snapshot on.",
            LATENCIES,
            phase=Phase,
        )
        self.blocked = declare.histogram(
            "ckptsvc_snapshot_blocked_seconds",
            "Time for which a snapshot held up the training loop of one rank, as the rank measured it.",
            BLOCKED,
        )
        self.commit_latency = declare.histogram(
            "ckptsvc_commit_latency_seconds",
            "From the first snapshot of a step to its commit record, of the jobs coordinated here.",
            LATENCIES,
        )
        self.staged_bytes = declare.counter("ckptsvc_staged_bytes_total", "Bytes of snapshots taken by local ranks.")
        self.written_bytes = declare.counter(
            "ckptsvc_written_bytes_total", "Bytes made durable in a store.", scheme=SCHEME
        )
        self.spared_bytes = declare.counter(
            "ckptsvc_spared_bytes_total",
            "Bytes of shards that were not written: unchanged, or compressed.",
            scheme=SCHEME,
        )
        self.write_held_back = declare.counter(
            "ckptsvc_write_held_back_seconds_total", "Time writes waited for store.max_write_rate."
        )
        self.last_commit = declare.gauge("ckptsvc_last_commit_timestamp_seconds", "When a job last committed.", job=JOB)
        self.last_step = declare.gauge("ckptsvc_last_committed_step", "Step of a job's newest checkpoint.", job=JOB)
        self.paused = declare.gauge(
            "ckptsvc_job_paused", "Whether somebody has told a job to take no automatic snapshots.", job=JOB
        )
        self.snapshots_skipped = declare.counter(
            "ckptsvc_snapshots_skipped_total", "Snapshots due but not taken.", reason=Skip
        )
        self.deleted_checkpoints = declare.counter(
            "ckptsvc_deleted_checkpoints_total", "Checkpoints that retention has deleted."
        )
        self._stores(declare)

    def _stores(self, declare: Declarations) -> None:
        self.store_errors = declare.counter(
            "ckptsvc_store_errors_total",
            "Shards and commits that a store did not take, retries and all; kind is an error code.",
            scheme=SCHEME,
            kind=CODE,
        )
        self.store_retries = declare.counter(
            "ckptsvc_store_retries_total",
            "Requests to a store that failed and were tried again; kind is an error code.",
            scheme=SCHEME,
            kind=CODE,
        )
        self.shard_stripes = declare.gauge(
            "ckptsvc_shard_stripes", "Targets over which the last shard is spread.", scheme=SCHEME
        )
        self.shard_stripe_bytes = declare.gauge(
            "ckptsvc_shard_stripe_bytes", "Stripe size of the last shard.", scheme=SCHEME
        )
        self.layouts_missed = declare.counter(
            "ckptsvc_layouts_missed_total", "Shards the store did not lay out as it was asked to.", scheme=SCHEME
        )

    def committed(self, job: str, step: int, now: float) -> None:
        """Count a commit of `job` at `step`; `now` is in unix seconds."""
        self.saves.labels(Outcome.COMMITTED).inc()
        self.last_commit.labels(job).set(now)
        self.last_step.labels(job).set(step)

    def retried(self, scheme: str, code: str) -> None:
        """Count a request to a store that is tried again."""
        self.store_retries.labels(scheme, code).inc()

    def laid_out(self, scheme: str, stripes: int, stripe_bytes: int, *, as_asked: bool) -> None:
        """Take down how a store says that a shard lies there."""
        self.shard_stripes.labels(scheme).set(stripes)
        self.shard_stripe_bytes.labels(scheme).set(stripe_bytes)
        self.layouts_missed.labels(scheme).inc(not as_asked)
