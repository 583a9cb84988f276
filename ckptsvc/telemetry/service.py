"""Metrics of the system service of a node with many users, as text: what runs as root has no client of Prometheus's."""

from __future__ import annotations

from collections.abc import Mapping

from ckptsvc.telemetry.declaring import Declared
from ckptsvc.telemetry.labels import AgentState

AGENTS, RANKS = "ckptsvc_service_agents", "ckptsvc_service_ranks"
STARTS, FAILURES = "ckptsvc_service_agent_starts_total", "ckptsvc_service_agent_failures_total"

DECLARED = (
    Declared(AGENTS, "gauge", "Agents of users, by what they do.", {"state": AgentState}),
    Declared(RANKS, "gauge", "Training processes registered with them.", {}),
    Declared(STARTS, "counter", "Agents that the service has started, since it began itself.", {}),
    Declared(FAILURES, "counter", "Agents that died at work, or did not start.", {}),
)


def exposition(values: Mapping[str, int | Mapping[str, int]]) -> str:
    """All of them in Prometheus's text format, version 0.0.4."""
    lines = []
    for each in DECLARED:
        lines += [f"# HELP {each.name} {each.about}", f"# TYPE {each.name} {each.kind}"]
        value = values[each.name]
        if isinstance(value, int):
            lines.append(f"{each.name} {value}")
        else:
            (label,) = each.labels
            lines += [f'{each.name}{{{label}="{name}"}} {number}' for name, number in value.items()]
    return "\n".join(lines) + "\n"
