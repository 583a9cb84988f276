"""The reference of all metrics, made from their declarations."""

from __future__ import annotations

from collections.abc import Sequence

from ckptsvc.telemetry.agents import AgentMetrics
from ckptsvc.telemetry.declaring import Declarations, Declared, Values
from ckptsvc.telemetry.events import Event
from ckptsvc.telemetry.jobs import JobMetrics
from ckptsvc.telemetry.logs import KEYS
from ckptsvc.telemetry.nics import NicMetrics
from ckptsvc.telemetry.saves import SaveMetrics
from ckptsvc.telemetry.service import DECLARED as SERVICE
from ckptsvc.telemetry.tiers import TierMetrics

SUBJECTS = {
    "Saves and stores": SaveMetrics,
    "Tiers": TierMetrics,
    "Jobs": JobMetrics,
    "Network cards": NicMetrics,
    "Agents": AgentMetrics,
}

HEAD = """# Metrics and logs

<!-- Made by `python -m ckptsvc.telemetry`: change the declarations in ckptsvc/telemetry, and make it again. -->

Every agent serves these at `/metrics` of `agent.metrics_listen`; `deploy/observability` has rules, alerts and a
dashboard for them. Units are seconds and bytes. A histogram NAME is three metrics: `NAME_bucket` (with the label `le`),
`NAME_sum` and `NAME_count`.
"""

OF_SERVICE = """In a file, `/run/ckptsvc/metrics/ckptsvc.prom`: [Many users](../operating/users.md#watch-all-agents)."""

LOGS = """## Logs

With `log.format = "json"` (or `ckptsvc agent --json-log`) every line that agents, their workers, launchers and sessions
write is one JSON object with these keys; a key of which nothing is known is left out, but for the first five.

| key | |
|---|---|
"""

EVENTS = """
`event` is one of these, or `decision` (what a coordinator has decided, and why), or empty. Names are never changed: {}.
"""


def markdown() -> str:
    """The page."""
    lines = [HEAD]
    for title, subject in SUBJECTS.items():
        declared = Declarations()
        subject(declared)
        lines += _table(title, "", declared.all)
    lines += _table("The service of a node with many users", OF_SERVICE, SERVICE)
    rows = [f"| `{key}` | {about} |" for key, about in KEYS.items()]
    events = ", ".join(f"`{event}`" for event in Event)
    text = "\n".join(lines) + LOGS + "\n".join(rows) + "\n" + EVENTS.format(events)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _table(title: str, about: str, metrics: Sequence[Declared]) -> list[str]:
    bounds = {label: values for each in metrics for label, values in each.labels.items()}
    return [
        *(f"## {title}", "", about, "", "| metric | type | labels | |", "|---|---|---|---|"),
        *map(_row, metrics),
        *("", *(f"- `{label}`: {values}" for label, values in bounds.items() if isinstance(values, str)), ""),
    ]


def _row(each: Declared) -> str:
    labels = "; ".join(_values(label, values) for label, values in each.labels.items())
    return f"| `{each.name}` | {each.kind} | {labels} | {each.about} |"


def _values(label: str, values: Values) -> str:
    if isinstance(values, str):
        return f"`{label}`"
    return f"`{label}`: " + ", ".join(str(value) for value in values)
