"""Everything the service says about itself: each metric, each log event and each log field, declared once.

Metrics follow prometheus.io/docs/practices/naming: prefix, base units, `_total` for counters, labels whose
values are few and whose sum means something. Never a step, a path or a rank as a label: those belong into
logs.

Logs are lines for people, or JSON objects with the keys ts, level, logger, event, msg, the fields of
`Fields` that are known, and error (a traceback).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from json import dumps
from typing import TYPE_CHECKING, TextIO, TypedDict, Unpack

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Gauge


class Outcome(StrEnum):
    """How a save ended."""

    COMMITTED = "committed"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    FENCED = "fenced"
    LOCAL = "local"


class Phase(StrEnum):
    """A part of a save; the three follow one another."""

    STAGE = "stage"
    WRITE = "write"
    COMMIT = "commit"


class Skip(StrEnum):
    """Why a snapshot that was due was not taken."""

    NO_ARENA = "no-arena"
    NO_AGENT = "no-agent"
    UNSUPPORTED = "unsupported"


class ArenaState(StrEnum):
    """What an arena is used for; their sum is all the memory the service has taken."""

    FREE = "free"
    STAGING = "staging"
    WRITING = "writing"
    KEPT = "kept"


class Tier(StrEnum):
    """Where snapshots are, or what they can be rebuilt from, below the durable store."""

    MEMORY = "memory"
    COPY = "copy"
    PARITY = "parity"
    LOCAL = "local"


class Purpose(StrEnum):
    """Why a node reads what others hold."""

    COPY = "copy"
    PARITY = "parity"
    REBUILD = "rebuild"


class IncidentKind(StrEnum):
    """What has happened to a job; a rank that goes on by itself after all is slow."""

    DIED = "died"
    HUNG = "hung"
    SLOW = "slow"
    NODE_LOST = "node-lost"


class Cause(StrEnum):
    """Why a job was restarted."""

    DIED = "died"
    HUNG = "hung"
    NODE_LOST = "node-lost"
    GROWN = "grown"
    ASKED = "asked"
    DRAINED = "drained"


class NicSignal(StrEnum):
    """What the counters of a network card add up to; the names of the fields of NicReading, with dashes."""

    SENT = "sent"
    RECEIVED = "received"
    TIMEOUTS = "timeouts"
    PEER_TIMEOUTS = "peer-timeouts"
    RETRIES = "retries"
    FAILURES = "failures"
    EXHAUSTED = "exhausted"
    UNCORRECTED = "uncorrected"
    REPLAYS = "replays"
    FLAPS = "flaps"
    PAUSED_TX = "paused-tx"
    PAUSED_RX = "paused-rx"
    STALLED = "stalled"
    WAITS = "waits"
    MARKS = "marks"


class NicTrouble(StrEnum):
    """What is wrong with a network card; what names a culprit best comes first."""

    TIMEOUTS = "timeouts"
    FAILURES = "failures"
    CONGESTED = "congested"
    BAD_LINK = "bad-link"
    FLAPPING = "flapping"
    LINK_DOWN = "link-down"
    NO_HANDLER = "no-handler"
    NO_ANSWER = "no-answer"
    SILENT = "silent"


class Event(StrEnum):
    """What a log line reports. Names are append-only: people search for them."""

    AGENT_STARTED = "agent-started"
    AGENT_STOPPED = "agent-stopped"
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


class Metrics:
    """The metrics of one agent, in a registry of its own (`registry`), at zero until something happens."""

    def __init__(self, version: str) -> None:
        # Imported here: it costs 770 file-system calls and 45 ms, and training processes want events only.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

        self.registry = registry = CollectorRegistry()
        self.saves = Counter("ckptsvc_saves_total", "Saves that ended.", ["outcome"], registry=registry)
        self.save_duration = Histogram(
            "ckptsvc_save_duration_seconds",
            "Duration of one phase of a save.",
            ["phase"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
            registry=registry,
        )
        self.written_bytes = Counter(
            "ckptsvc_written_bytes_total", "Bytes made durable in a store.", ["scheme"], registry=registry
        )
        self.spared_bytes = Counter(
            "ckptsvc_spared_bytes_total",
            "Bytes of shards that were not written: unchanged, or compressed.",
            ["scheme"],
            registry=registry,
        )
        self.write_held_back = Counter(
            "ckptsvc_write_held_back_seconds_total", "Time writes waited for store.max_write_rate.", registry=registry
        )
        self.last_commit = Gauge(
            "ckptsvc_last_commit_timestamp_seconds", "When a job last committed.", ["job"], registry=registry
        )
        self.last_step = Gauge(
            "ckptsvc_last_committed_step", "Step of a job's newest checkpoint.", ["job"], registry=registry
        )
        self.arena_bytes = Gauge(
            "ckptsvc_arena_bytes", "Shared memory held for snapshots.", ["state"], registry=registry
        )
        self.snapshots_skipped = Counter(
            "ckptsvc_snapshots_skipped_total", "Snapshots due but not taken.", ["reason"], registry=registry
        )
        self.sessions = Gauge("ckptsvc_sessions", "Training processes registered here.", registry=registry)
        self.heartbeat_age = Gauge(
            "ckptsvc_rank_heartbeat_age_seconds", "Age of the oldest local heartbeat.", registry=registry
        )
        self.store_errors = Counter(
            "ckptsvc_store_errors_total",
            "Failed requests to a store, retried ones too; kind is an error code.",
            ["scheme", "kind"],
            registry=registry,
        )
        self._layouts(registry)
        self.deleted_checkpoints = Counter(
            "ckptsvc_deleted_checkpoints_total", "Checkpoints that retention has deleted.", registry=registry
        )
        self._tiers(registry)
        self._coordination(registry)
        self._nics(registry)
        self._partners(registry)
        Info("ckptsvc_build", "What is running.", registry=registry).info({"version": version})
        self._start_at_zero()

    def _layouts(self, registry: CollectorRegistry) -> None:
        """Those of stores that spread a shard over several targets."""
        from prometheus_client import Counter, Gauge

        self.shard_stripes = Gauge(
            "ckptsvc_shard_stripes", "Targets over which the last shard is spread.", ["scheme"], registry=registry
        )
        self.shard_stripe_bytes = Gauge(
            "ckptsvc_shard_stripe_bytes", "Stripe size of the last shard.", ["scheme"], registry=registry
        )
        self.layouts_missed = Counter(
            "ckptsvc_layouts_missed_total",
            "Shards the store did not lay out as it was asked to.",
            ["scheme"],
            registry=registry,
        )

    def laid_out(self, scheme: str, stripes: int, stripe_bytes: int, *, as_asked: bool) -> None:
        """Take down how a store says that a shard lies there."""
        self.shard_stripes.labels(scheme).set(stripes)
        self.shard_stripe_bytes.labels(scheme).set(stripe_bytes)
        self.layouts_missed.labels(scheme).inc(not as_asked)

    def _tiers(self, registry: CollectorRegistry) -> None:
        """Those of the places between the ranks and the durable store."""
        from prometheus_client import Counter, Gauge

        self.tier_bytes = Gauge("ckptsvc_tier_bytes", "Snapshots held on this node.", ["tier"], registry=registry)
        self.local_refused = Counter(
            "ckptsvc_local_disk_refusals_total", "Shards the local disk did not take.", registry=registry
        )
        self.drain_backlog = Gauge(
            "ckptsvc_drain_backlog_bytes", "Shards on the local disk that are to be made durable.", registry=registry
        )
        self.drain_age = Gauge(
            "ckptsvc_drain_backlog_age_seconds", "Age of the oldest snapshot among them.", registry=registry
        )
        self.drains_allowed = Gauge(
            "ckptsvc_drain_parallel_shards", "Shards that may be drained at a time.", registry=registry
        )

    def _coordination(self, registry: CollectorRegistry) -> None:
        """Those of the agent that leads jobs, and of those that follow."""
        from prometheus_client import Counter, Gauge

        self.restarts = Counter(
            "ckptsvc_restarts_total", "Restarts of the jobs coordinated here.", ["cause"], registry=registry
        )
        self.incidents = Counter(
            "ckptsvc_incidents_total",
            "Incidents of the jobs coordinated here, by what each was first taken for.",
            ["kind"],
            registry=registry,
        )
        self.coordinator_changes = Counter(
            "ckptsvc_coordinator_changes_total", "Elected coordinators this agent has taken note of.", registry=registry
        )
        self.orders_refused = Counter(
            "ckptsvc_orders_refused_total", "Orders of a term or an attempt that is over.", registry=registry
        )
        self.certificate_expiry = Gauge(
            "ckptsvc_certificate_expiry_timestamp_seconds",
            "Until when the agent's certificate is valid; 0 where it has none.",
            registry=registry,
        )
        self.calls_refused = Counter(
            "ckptsvc_calls_refused_total",
            "Calls by who is no agent of this user.",
            registry=registry,
        )

    def _partners(self, registry: CollectorRegistry) -> None:
        """Those of what nodes keep for each other."""
        from prometheus_client import Counter

        self.partner_kept = Counter(
            "ckptsvc_partner_kept_total", "Copies and parts of parity made, and shards rebuilt.", ["purpose"],
            registry=registry,
        )  # fmt: skip
        self.partner_failures = Counter(
            "ckptsvc_partner_failures_total", "Those that could not be.", ["purpose"], registry=registry
        )
        self.partner_bytes = Counter(
            "ckptsvc_partner_read_bytes_total", "Bytes that were read from other nodes for them.", ["purpose"],
            registry=registry,
        )  # fmt: skip
        self.guests_dropped = Counter(
            "ckptsvc_partner_dropped_total", "Those that had to go for the memory of local ranks.", registry=registry
        )

    def _nics(self, registry: CollectorRegistry) -> None:
        """Those of the network cards; `nic` is a card of this node, of which there are a handful."""
        from prometheus_client import Counter, Gauge

        self.nic_sent = Counter("ckptsvc_nic_sent_bytes_total", "Bytes sent.", ["nic"], registry=registry)
        self.nic_received = Counter("ckptsvc_nic_received_bytes_total", "Bytes received.", ["nic"], registry=registry)
        self.nic_events = Counter(
            "ckptsvc_nic_events_total", "Signs of trouble a card has counted.", ["nic", "signal"], registry=registry
        )
        self.nic_held = Counter(
            "ckptsvc_nic_held_back_seconds_total", "Time a card had to wait.", ["nic", "signal"], registry=registry
        )
        self.nic_link_up = Gauge("ckptsvc_nic_link_up", "Whether the link is up.", ["nic"], registry=registry)
        self.nic_findings = Gauge(
            "ckptsvc_nic_findings", "Cards in trouble, in the jobs coordinated here.", ["kind"], registry=registry
        )
        self.nic_read_failures = Counter(
            "ckptsvc_nic_read_failures_total", "Counters that could not be read or understood.", registry=registry
        )
        self.nic_read_seconds = Gauge(
            "ckptsvc_nic_read_duration_seconds", "Time the last reading of all cards took.", registry=registry
        )

    def _start_at_zero(self) -> None:
        """Make the series whose labels are known, so that a rate over a first event is not lost."""
        for outcome in Outcome:
            self.saves.labels(outcome)
        for phase in Phase:
            self.save_duration.labels(phase)
        for state in ArenaState:
            self.arena_bytes.labels(state)
        for tier in Tier:
            self.tier_bytes.labels(tier)
        for reason in Skip:
            self.snapshots_skipped.labels(reason)
        for cause in Cause:
            self.restarts.labels(cause)
        for incident in IncidentKind:
            self.incidents.labels(incident)
        for kind in NicTrouble:
            self.nic_findings.labels(kind)
        for purpose in Purpose:
            for counter in (self.partner_kept, self.partner_failures, self.partner_bytes):
                counter.labels(purpose)

    def committed(self, job: str, step: int, now: float) -> None:
        """Count a commit of `job` at `step`; `now` is in unix seconds."""
        self.saves.labels(Outcome.COMMITTED).inc()
        self.last_commit.labels(job).set(now)
        self.last_step.labels(job).set(step)

    def forget(self, job: str) -> None:
        """Drop the series of a job that has ended, so that an agent's metrics do not grow with every job."""
        per_job: tuple[Gauge, ...] = (self.last_commit, self.last_step)
        for gauge in per_job:
            with suppress(KeyError):  # prometheus-client 0.20: a job without a commit has no series
                gauge.remove(job)

    def forget_nic(self, nic: str) -> None:
        """Drop the series of a card that is not on the node any more."""
        for metric in (self.nic_sent, self.nic_received, self.nic_link_up):
            with suppress(KeyError):
                metric.remove(nic)
        for metric in (self.nic_events, self.nic_held):
            for signal in NicSignal:
                with suppress(KeyError):
                    metric.remove(nic, signal)


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


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", ""),
            "msg": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return dumps(line, default=str)


class HumanFormatter(logging.Formatter):
    """A line for a person: time, level unless it is INFO, message, what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        about = " ".join(f"{name}={value}" for name, value in _fields_of(record).items())
        line = f"{time} {level}{record.getMessage()}" + (f"  ({about})" if about else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    present = vars(record)
    return {name: present[name] for name in Fields.__annotations__ if present.get(name) is not None}


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second `setup_logging` replaces it and leaves others alone."""


def setup_logging(stream: TextIO, *, json: bool, level: int = logging.INFO) -> None:
    """Send the log of this process to `stream`: ours from `level` up, other libraries' from WARNING up."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter() if json else HumanFormatter())
    root.addHandler(handler)
    for name in ("ckptsvc", "ckptsvc_drivers"):
        logging.getLogger(name).setLevel(level)
