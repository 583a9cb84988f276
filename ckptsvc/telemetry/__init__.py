"""Everything the service says about itself: each metric, each log event and each log field, declared once.

    labels       the values that labels may have
    declaring    how a metric is declared: name, kind, help, labels and what bounds them
    saves, tiers, jobs, agents, nics     the declarations, by subject
    service      those of the service of a node with many users, which has no registry
    metrics      all of them, in the registry of one agent
    reference    the page of the documentation that is made from them (`python -m ckptsvc.telemetry`)
    events       log events and fields
    logs         how a line of the log is written
    traces       OpenTelemetry, where it is wanted

What is imported here costs nothing: training processes want events only, and Prometheus's client takes 770 file-system
calls and 45 ms, OpenTelemetry's more.
"""

from ckptsvc.telemetry.events import Event, Fields, log
from ckptsvc.telemetry.labels import (
    AgentState,
    ArenaState,
    Cause,
    Detection,
    IncidentKind,
    NicSignal,
    NicTrouble,
    Outcome,
    Phase,
    Purpose,
    Restart,
    Share,
    Skip,
    Tier,
)
from ckptsvc.telemetry.logs import HumanFormatter, JsonFormatter, set_log_level, setup_logging, start_logging
from ckptsvc.telemetry.metrics import Metrics

__all__ = [
    "AgentState",
    "ArenaState",
    "Cause",
    "Detection",
    "Event",
    "Fields",
    "HumanFormatter",
    "IncidentKind",
    "JsonFormatter",
    "Metrics",
    "NicSignal",
    "NicTrouble",
    "Outcome",
    "Phase",
    "Purpose",
    "Restart",
    "Share",
    "Skip",
    "Tier",
    "log",
    "set_log_level",
    "setup_logging",
    "start_logging",
]
