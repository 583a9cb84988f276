"""What the labels of metrics may say: each set of values is closed, so that series stay few."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """How a save ended."""

    COMMITTED = "committed"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    SKIPPED = "skipped"
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
    NO_EPOCH = "no-epoch"
    UNSUPPORTED = "unsupported"
    FAILED = "failed"


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


class Detection(StrEnum):
    """A part of finding out about a fault; the two follow one another."""

    NOTICE = "notice"
    DECIDE = "decide"


class Restart(StrEnum):
    """A part of a restart; they follow one another: ranks end, start and register, restore, do their first step."""

    STOP = "stop"
    START = "start"
    RESTORE = "restore"
    FIRST_STEP = "first-step"


class Share(StrEnum):
    """What the time of a job goes into (control.goodput); it is always one of these."""

    USEFUL = "useful"
    BLOCKED = "blocked"
    DETECTION = "detection"
    RESTART = "restart"
    REDONE = "redone"
    OTHER = "other"


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


class AgentState(StrEnum):
    """What a user's agent does, as the service of its node sees it."""

    STARTS = "starts"
    SERVES = "serves"
    AWAY = "away"
    FAILED = "failed"
