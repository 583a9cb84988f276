"""What is in deploy/observability, and what a PromQL expression asks for."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

ALERTS_HEAD = """# Alerts

<!-- Made by `python tests/harness/observability.py` from deploy/observability/rules.yaml. -->

What `deploy/observability/rules.yaml` has Prometheus watch. Words in *italics* are filled in.
"""

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"

AGGREGATIONS = {"sum", "min", "max", "avg", "count", "topk"}
FUNCTIONS = {
    "changes", "clamp_min", "deriv", "histogram_quantile", "increase", "max_over_time", "min_over_time", "rate",
    "scalar", "time", "timestamp",
}  # fmt: skip
CLAUSES = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = {"and", "or", "unless", "offset", "bool"}

_TOKEN = re.compile(
    r'"(?:[^"\\]|\\.)*"|\$\w+|[A-Za-z_:][A-Za-z0-9_:]*|[0-9.]+(?:e[0-9]+)?[a-z]*|=~|!~|[!=<>]=|[-+*/^%(){}\[\],=<>]|\s+'
)
_NAME = re.compile(r"[A-Za-z_:]")


def scrape(directory: Path) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """What the agent of that directory tells Prometheus: name -> sorted labels -> value."""
    address = (directory / "ready").read_text().splitlines()[2]
    request = urllib.request.Request(f"http://{address}/metrics")
    for token in (
        directory / "http-token",
        directory.parent / "http-token",
    ):  # an agent of a job has it from its user's
        with contextlib.suppress(FileNotFoundError):
            request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    return dict(json.loads((FOLDER / "dashboard.json").read_text()))


def alerts_page() -> str:
    """The page of the documentation about alerts, made from the rules."""
    import yaml

    rules = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    parts = [ALERTS_HEAD]
    for rule in (rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule):
        told = rule["annotations"]
        summary = re.sub(r"{{ \$(?:labels\.)?(\w+)[^}]*}}", r"*\1*", told["summary"])
        after = f", when it has been so for {rule['for']}" if "for" in rule else ""
        parts.append(f"## {rule['alert']}\n\n{summary}\n\n**What to do.** {told['action']}\n")
        parts.append(f"Severity: {rule['labels']['severity']}{after}.\n\n```\n{rule['expr'].strip()}\n```\n")
    return "\n".join(parts)


def panels() -> list[dict[str, Any]]:
    """Its panels that show something; rows only name them."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


@dataclass
class Asked:
    """What an expression asks for.

    Attributes:
        metrics: name -> labels that are selected by, of each.
        functions: that are called, aggregations too.
        by: labels that are left by aggregations; None if there is no aggregation.
        on: labels by which series are matched.
    """

    metrics: dict[str, set[str]] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    by: set[str] | None = None
    on: set[str] = field(default_factory=set)


def tokens(expression: str) -> list[str]:
    """The words and signs of an expression.

    Raises:
        ValueError: something is neither.
    """
    found, at = [], 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression[at:]!r} is no PromQL")
        at = match.end()
        if not match[0].isspace():
            found.append(match[0])
    return found


def asked(expression: str) -> Asked:
    """Take an expression apart; its grammar is left to promtool."""
    found, words = Asked(), tokens(expression)
    at = 0
    while at < len(words):
        word, following = words[at], words[at + 1] if at + 1 < len(words) else ""
        at += 1
        if not _NAME.match(word) or word in WORDS:
            continue
        if word in CLAUSES:
            end = words.index(")", at)
            labels = set(words[at + 1 : end]) - {","}
            if word == "by":
                found.by = (found.by or set()) | labels
            else:
                found.on |= labels
            at = end + 1
        elif word in AGGREGATIONS:
            found.functions.add(word)
            found.by = found.by or set()
        elif following == "(":
            found.functions.add(word)
        else:
            labels = found.metrics.setdefault(word, set())
            if following == "{":
                end = words.index("}", at)
                labels |= set(words[at + 1 : end : 4])  # label, sign, value, comma
                at = end + 1
    return found


def problems(expression: str, declared: dict[str, set[str]]) -> Iterator[str]:
    """What an expression asks for that is not there.

    Args:
        expression: PromQL.
        declared: name -> labels of each metric there is.
    """
    found = asked(expression)
    yield from (f"function {name}" for name in found.functions - FUNCTIONS - AGGREGATIONS)
    for name, labels in found.metrics.items():
        if name not in declared:
            yield f"metric {name}"
        else:
            yield from (f"label {label} of {name}" for label in labels - declared[name])
    known = set().union(*(declared.get(name, set()) for name in found.metrics))
    yield from (f"label {label}" for label in ((found.by or set()) | found.on) - known)


def left(expression: str, declared: dict[str, set[str]]) -> set[str]:
    """The labels that a result of the expression has."""
    found = asked(expression)
    return found.by if found.by is not None else set().union(*(declared[name] for name in found.metrics))


if __name__ == "__main__":
    print(alerts_page(), end="")
