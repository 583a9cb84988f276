"""Rules and dashboard ask for what agents say, and for nothing else; tests/integration/test_prometheus.py runs them."""

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from harness.observability import FOLDER, alerts_page, asked, dashboard, left, panels, problems
from harness.schemas import missing

from ckptsvc.telemetry.service import DECLARED as SERVICE
from tests.unit.test_telemetry import METRICS

yaml = pytest.importorskip("yaml", reason="run make install")

UNITS = {"none", "s", "bytes", "Bps", "percentunit"}
"""Ids of Grafana's units that are in use."""

RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
TESTS = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}


def declared_metrics() -> dict[str, set[str]]:
    """Name -> labels of all that Prometheus has: what agents say, what it says itself, what rules record."""
    found: dict[str, set[str]] = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "severity"}}
    found |= {each.name: {*each.labels, "instance"} for each in SERVICE}
    for name, kind, labels in METRICS:
        found[name] = {*labels, "instance", "user"}
        if kind == "histogram":
            found |= {f"{name}_{part}": {*labels, "instance", "user"} for part in ("sum", "count")}
            found[f"{name}_bucket"] = {*labels, "instance", "user", "le"}
            del found[name]
    for name, expression in RECORDED.items():
        found[name] = left(expression, found)
    return found


DECLARED = declared_metrics()


def queries() -> list[tuple[str, str, str]]:
    """Title, expression and legend of all that the dashboard asks for."""
    return [
        (panel["title"], target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]
    ]


# ---- what is asked for


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("ckptsvc_sesions", ["metric ckptsvc_sesions"]),
        ("ckptsvc_saves_total{outcom='x'}".replace("'", '"'), ["label outcom of ckptsvc_saves_total"]),
        ('sum(ckptsvc_saves_total{instance=~"$instance", kind!="a,}"})', ["label kind of ckptsvc_saves_total"]),
        ("sum by (rank) (rate(ckptsvc_written_bytes_total[5m]))", ["label rank"]),
        ("max by (job) (ckptsvc_sessions)", ["label job"]),  # that would be Prometheus's own
        ("ckptsvc_sessions > 0 unless on (node) up", ["label node"]),
        ("increased(ckptsvc_saves_total[1h])", ["function increased"]),
        ("ckptsvc_save_duration_seconds", ["metric ckptsvc_save_duration_seconds"]),
        ("job:ckptsvc_commit_age_seconds:max", ["metric job:ckptsvc_commit_age_seconds:max"]),
    ],
)
def test_what_is_not_there_is_found(expression: str, expected: list[str]) -> None:
    assert list(problems(expression, DECLARED)) == expected
    with pytest.raises(ValueError, match="no PromQL"):
        list(problems("up ;", DECLARED))


def test_an_expression_is_taken_apart() -> None:
    found = asked('sum by (a, b) (rate(x{c="}", d=~"$d"}[$__rate_interval])) / on (a) y offset 15m > 1e9')
    assert found.metrics == {"x": {"c", "d"}, "y": set()}
    assert (found.by, found.on, found.functions) == ({"a", "b"}, {"a"}, {"sum", "rate"})


def test_the_rules_ask_for_what_is_declared() -> None:
    expressions = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    assert len(expressions) > 20
    assert [problem for expression in expressions for problem in problems(expression, DECLARED)] == []


def test_the_dashboard_asks_for_what_is_declared() -> None:
    assert [(title, problem) for title, asked_for, _ in queries() for problem in problems(asked_for, DECLARED)] == []
    for title, expression, legend in queries():
        assert set(re.findall(r"{{(\w+)}}", legend)) <= left(expression, DECLARED), title
    for variable in dashboard()["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
        assert label in DECLARED[metric]
    for annotation in dashboard()["annotations"]["list"]:
        assert list(problems(annotation["expr"], DECLARED)) == []


def test_every_metric_can_be_seen() -> None:
    shown = {name for _, expression, _ in queries() for name in asked(expression).metrics}
    shown |= {name.removesuffix(part) for name in shown for part in ("_bucket", "_sum", "_count")}
    assert {name for name, _, _ in METRICS} - shown == set()


# ---- alerts


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_a_sentence_says_what_to_do_and_is_tried(name: str) -> None:
    alert = ALERTS[name]
    assert re.fullmatch(r"Ckptsvc[A-Z]\w+", name)
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "action", "docs"}
    assert alert["annotations"]["docs"] == f"docs/reference/alerts.md#{name.lower()}"
    for text in (alert["annotations"]["summary"], alert["annotations"]["action"]):
        assert text[-1] in ".?"
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= left(alert["expr"], DECLARED)
    assert name in expected_to_fire()
    assert asked(alert["expr"]).metrics.keys() - RECORDED.keys() <= all_is_well(), "in the first story it must not fire"
    assert f"| {name} |" in (FOLDER / "README.md").read_text()


def test_the_page_of_alerts_is_what_the_rules_say() -> None:
    page = FOLDER.parents[1] / "docs" / "reference" / "alerts.md"
    assert page.read_text() == alerts_page(), "python tests/harness/observability.py > docs/reference/alerts.md"
    assert all(f"## {name}\n" in page.read_text() for name in ALERTS)


def expected_to_fire() -> set[str]:
    found = set()
    for story in TESTS["tests"]:
        for asking in story.get("promql_expr_test", []):
            for sample in asking.get("exp_samples", []):
                found |= set(re.findall(r'alertname="(\w+)"', sample["labels"]))
        found |= {asking["alertname"] for asking in story.get("alert_rule_test", []) if asking.get("exp_alerts")}
    return found


def all_is_well() -> set[str]:
    first = TESTS["tests"][0]
    assert not any("ALERTS" in asking["expr"] and asking.get("exp_samples") for asking in first["promql_expr_test"])
    return {series["series"].split("{")[0] for series in first["input_series"]}


# ---- the dashboard's form


def faults(found: dict[str, Any]) -> Iterator[str]:
    """What Grafana would refuse, or show as something else than it is meant to be.

    The fields are those of Grafana's schema, kinds/dashboard/dashboard_kind.cue in its repository.
    """
    if not isinstance(found.get("schemaVersion"), int) or found.get("id"):
        yield "schemaVersion is a number, and the id is Grafana's to give"
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", found.get("uid", "")):
        yield "uid"
    every = found["panels"]
    if len({panel["id"] for panel in every}) < len(every):
        yield "two panels have one id"
    for panel in every:
        yield from (f"{panel['title']}: {fault}" for fault in faults_of(panel))
    for one, other in combinations(every, 2):
        if overlap(one["gridPos"], other["gridPos"]):
            yield f"{one['title']} lies over {other['title']}"


def faults_of(panel: dict[str, Any]) -> Iterator[str]:
    place = panel["gridPos"]
    if place.keys() != {"x", "y", "w", "h"} or min(place.values()) < 0 or place["h"] < 1 or place["w"] < 1:
        yield "gridPos"
    elif place["x"] + place["w"] > 24:
        yield "wider than the page"
    if panel["type"] == "row":
        return
    if panel["type"] not in ("stat", "timeseries", "table"):
        yield f"type {panel['type']}"
    references = [target["refId"] for target in panel["targets"]]
    if not references or len(set(references)) < len(references):
        yield "refId"
    for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
        if source != {"type": "prometheus", "uid": "${datasource}"}:
            yield "the datasource is not the variable"
    yield from faults_of_unit(panel)
    if not panel["description"].endswith("."):
        yield "says nothing"


def faults_of_unit(panel: dict[str, Any]) -> Iterator[str]:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if unit not in UNITS:
        yield f"unit {unit}"
    for target in panel["targets"]:
        names = asked(target["expr"]).metrics
        rated = "rate(" in target["expr"] and "_sum" not in target["expr"]
        rated = rated or any("_bytes_per_second" in name for name in names)
        if any("_bytes" in name for name in names) and unit != ("Bps" if rated else "bytes"):
            yield f"unit {unit} for bytes"
        if any(name.endswith(("_seconds", "_seconds_sum", "_seconds_bucket")) for name in names) and unit != "s":
            yield f"unit {unit} for seconds"


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_the_dashboard_has_the_form_that_grafana_wants() -> None:
    assert list(faults(dashboard())) == []
    assert dashboard()["templating"]["list"][0] | {"current": {}} == dashboard()["templating"]["list"][0]
    assert dashboard()["templating"]["list"][0]["type"] == "datasource"
    assert len(panels()) > 30


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("schemaVersion", "38", "schemaVersion"),
        ("uid", "", "uid"),
        ("panels.1.id", 1, "one id"),
        ("panels.1.gridPos.x", 3, "lies over"),
        ("panels.1.gridPos.w", 30, "wider"),
        ("panels.1.datasource", {"type": "prometheus", "uid": "P1"}, "datasource"),
        ("panels.1.type", "graph", "type graph"),
        ("panels.2.fieldConfig.defaults.unit", "bytes", "for seconds"),
        ("panels.2.fieldConfig.defaults.unit", "seconds", "unit seconds"),
        ("panels.2.targets", [], "refId"),
    ],
)
def test_another_form_is_found(path: str, value: object, fault: str) -> None:
    changed: Any = copy.deepcopy(dashboard())
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = changed
    for part in way:
        place = place[part]
    place[last] = value
    assert any(fault in found for found in faults(changed))


def test_every_field_is_one_of_grafanas_schema() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="run make install")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")

    def unknown(found: dict[str, Any]) -> list[str]:
        text = encoder.JSONEncoder().encode(models.Dashboard.from_json(copy.deepcopy(found)))
        return list(missing(found, json.loads(text), ""))

    assert unknown(dashboard()) == []
    wrong = dashboard()
    wrong["panels"][1]["gridpos"] = wrong["panels"][1].pop("gridPos")
    assert unknown(wrong) == [".panels[1].gridpos"]


# ---- agents of users


def test_an_agent_of_a_user_says_what_agents_say_and_nothing_in_the_name_of_the_service_or_of_rules() -> None:
    (scrape,) = yaml.safe_load((FOLDER / "prometheus-users.yaml").read_text())["scrape_configs"]
    assert scrape["follow_redirects"] is False
    rules = [rule for rule in scrape["metric_relabel_configs"] if rule.get("source_labels") == ["__name__"]]

    def passes(name: str) -> bool:
        return all((re.fullmatch(rule["regex"], name) is not None) == (rule["action"] == "keep") for rule in rules)

    recorded = re.findall(r"record: (\S+)", (FOLDER / "rules.yaml").read_text())
    assert len(recorded) > 5
    assert [name for name in (*recorded, *(each.name for each in SERVICE), "up", "ALERTS") if passes(name)] == []
    counted = {each.name for each in SERVICE}
    assert [name for name, *_ in METRICS if name not in counted and not passes(name)] == []


# ---- targets


def targets(output: Path, *folders: Path, users: Sequence[str] = ()) -> list[dict[str, Any]]:
    named = [word for user in users for word in ("-u", user)]
    subprocess.run([FOLDER / "targets.sh", *named, output, *folders], check=True, timeout=30)
    return list(json.loads(output.read_text()))


def say(folder: Path, address: str, page: str = "", pid: int | None = None) -> Path:
    """What an agent writes down in its directory."""
    folder.mkdir(parents=True)
    ready = folder / "ready"
    ready.write_text(f"{os.getpid() if pid is None else pid}\n127.0.0.1:7070\n{address}\n{page}\n")
    return ready


def test_the_agents_of_a_node_are_listed(tmp_path: Path) -> None:
    agents, node = tmp_path / "agents", os.uname().nodename
    one = say(agents / "one", "127.0.0.1:9400")
    say(agents / "two/run-7", "[::1]:9401", "http://[::1]:9401")
    say(agents / "with certificates", f"{node}:9402", f"https://{node}:9402")
    say(agents / "without metrics", "")
    say(agents / "hostile", 'x"}],"labels":{"a":"b:1')
    say(agents / "long", f"{'1' * 9}:{'2' * 9}")
    (agents / "being written").mkdir()
    (agents / "being written" / "ready").write_text("4\n")
    (agents / "linked").mkdir()
    (agents / "linked" / "ready").symlink_to(one)
    found = targets(tmp_path / "agents.json", agents, tmp_path / "not there yet")
    assert [target["targets"] for target in found] == [["127.0.0.1:9400"], ["[::1]:9401"], [f"{node}:9402"]]
    assert [target["labels"]["instance"].rpartition(":")[2] for target in found] == ["9400", "9401", "9402"]
    assert [target["labels"].get("__scheme__") for target in found] == [None, None, "https"]
    assert targets(tmp_path / "agents.json", tmp_path / "not there yet") == []


def test_no_agent_leads_prometheus_and_its_token_to_another_host(tmp_path: Path) -> None:
    led = ("10.0.0.7:80", "elsewhere.example.org:80", "127.0.0.1.example.org:80", "[2001:db8::1]:80", "localhost:80")
    for number, address in enumerate(led):
        say(tmp_path / "agents" / str(number), address)
    assert targets(tmp_path / "agents.json", tmp_path / "agents") == []


def test_an_agent_that_was_killed_is_a_target_where_nobody_can_listen(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    say(tmp_path / "agents" / "one", "127.0.0.1:9400", "https://127.0.0.1:9400", pid=ended.pid)
    (found,) = targets(tmp_path / "agents.json", tmp_path / "agents")
    assert found == {"targets": ["127.0.0.1:0"], "labels": {"instance": f"{os.uname().nodename}:9400"}}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_others_have_put_there_is_no_agent_unless_they_are_named(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"], user=1, group=1)
    try:
        for folder in ("ckptsvc-1", "ckptsvc-x"):
            ready = say(tmp_path / folder, "127.0.0.1:9400", pid=process.pid)
            os.chown(ready.parent, 1, 1)
            os.chown(ready, 1 if folder == "ckptsvc-1" else 0, 1)
        folders = [tmp_path / "ckptsvc-1", tmp_path / "ckptsvc-x"]
        assert targets(tmp_path / "agents.json", *folders) == []
        found = targets(tmp_path / "agents.json", *folders, users=("daemon",))
        assert [target["targets"] for target in found] == [["127.0.0.1:9400"]]
    finally:
        process.kill()
        process.wait()
