"""A real Prometheus with our rules beside a real agent with a real job; what the dashboard asks, it answers."""

import contextlib
import copy
import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.job import Launch, free_port
from harness.observability import FOLDER, dashboard, panels
from harness.programs import adam, network, train_step
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc

yaml = pytest.importorskip("yaml", reason="run make install")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="there is no Prometheus here: make test-observability installs Debian's",
    ),
]

NOTHING_HERE = {
    # one agent on one disk, without certificates, in which nothing goes wrong
    "Certificate ends in",
    "Store errors",
    "Detection, 95 %",
    "Restarts, 95 %",
    # a plain file system says nothing of targets
    "Targets per shard",
    "Stripe size",
    "Layouts missed",
    # a machine of the tests may have no network card of which the agent knows the counters
    "Links down",
    "Signs of trouble",
    "Cards held back",
    "Traffic",
    # what alerts there are is for the test of the rules
    "Alerts",
}
"""Panels that may be empty in this run; all others have something to show."""


def train(rank: Rank, store: str) -> int:
    model = network()
    optimizer = adam(model)
    run = ckptsvc.attach({"model": model, "optimizer": optimizer}, store=store, every=5)
    while not (rank.folder / "go-end").exists():
        train_step(model, optimizer, run.steps_done)
        run.step()
        time.sleep(0.1)  # a save every half second: Prometheus looks once a second
    run.wait()
    run.close()
    return run.steps_done


class Prometheus:
    """A server on loopback, with our configuration, only that it looks every second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        shutil.copy(FOLDER / "rules.yaml", folder)
        (folder / "http-token").write_text("there is no agent yet")
        settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "1s"
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))

    def start(self) -> subprocess.Popen[bytes]:
        command = ["prometheus", f"--config.file={self.folder}/prometheus.yaml", "--log.level=warn"]
        command += [f"--storage.tsdb.path={self.folder}/data", f"--web.listen-address=127.0.0.1:{self.port}"]
        with (self.folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(lambda: server.poll() is not None or self.answers(), "Prometheus to start", 60)
        assert server.poll() is None, (self.folder / "log").read_text()
        return server

    def answers(self) -> bool:
        try:
            return bool(self.ask("query", query="1"))
        except OSError:
            return False

    def ask(self, what: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=20) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query, without what is no number."""
        for variable, value in {"$__rate_interval": "10s", "$instance": ".*", "$job": ".*"}.items():
            expression = expression.replace(variable, value)
        return [each for each in self.ask("query", query=expression)["result"] if each["value"][1] != "NaN"]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    found = Prometheus(tmp_path / "prometheus")
    server = found.start()
    yield found
    server.terminate()
    server.wait(30)


@pytest.fixture
def agent(runtime: Runtime) -> Iterator[subprocess.Popen[bytes]]:
    """The node's agent, with its metrics at a free port."""
    found = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
    yield found
    found.terminate()
    found.wait(30)


def list_agents(runtime: Runtime, prometheus: Prometheus) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(runtime.sockets / "http-token", prometheus.folder)
    subprocess.run([FOLDER / "targets.sh", prometheus.folder / "agents.json", runtime.sockets], check=True, timeout=30)


@pytest.mark.usefixtures("agent")
def test_the_dashboard_shows_a_run(runtime: Runtime, launch: Launch, prometheus: Prometheus, tmp_path: Path) -> None:
    list_agents(runtime, prometheus)
    eventually(lambda: prometheus.query('up{job="ckptsvc"} == 1'), "the agent to be scraped", 60)
    with launch.plain(1, train, str(tmp_path / "store")) as job:
        eventually(lambda: prometheus.query("max(ckptsvc_last_committed_step) >= 10"), "step 10 to be committed", 60)
        (newest,) = prometheus.query("ckptsvc_last_committed_step")
        assert "exported_job" not in newest["metric"]
        assert f"(job={newest['metric']['job']} step=" in runtime.log()

        def empty() -> set[str]:
            every = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
            return {title for title, expression in every if not prometheus.query(expression)} - NOTHING_HERE

        with contextlib.suppress(AssertionError):  # the next one says which
            eventually(lambda: not empty(), "all panels to show something", 60)
        assert empty() == set()
        phases = {each["metric"]["phase"] for each in prometheus.query("ckptsvc_save_duration_seconds_count > 0")}
        assert phases == {"stage", "write", "commit"}
        for variable in dashboard()["templating"]["list"][1:]:
            metric, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").split(", ")
            assert prometheus.ask(f"label/{label}/values", **{"match[]": metric})

        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert {rule["name"]: rule["health"] for rule in rules} == {rule["name"]: "ok" for rule in rules}
        assert len(rules) > 20
        assert prometheus.ask("alerts")["alerts"] == []
        job.go("end")
        assert job.results()[0] >= 10

    eventually(lambda: not list(runtime.arenas.rglob("*.arena")), "the agent to be done with the job")
    runtime.kill_agents()
    list_agents(runtime, prometheus)  # what was killed is a target still
    (alert,) = eventually(lambda: prometheus.ask("alerts")["alerts"], "the alert to begin", 60)
    assert alert["labels"]["alertname"] == "CkptsvcAgentDown"


# ---- what promtool says


def promtool(folder: Path, *arguments: str) -> int:
    return subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, timeout=120, check=False
    ).returncode


def test_promtool_accepts_the_rules_and_their_tests(tmp_path: Path) -> None:
    for name in ("rules.yaml", "rules_test.yaml", "prometheus.yaml", "prometheus-users.yaml"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "agents.json").write_text("[]")
    (tmp_path / "http-token").write_text("secret")
    assert promtool(tmp_path, "check", "rules", "rules.yaml") == 0
    for name in ("prometheus.yaml", "prometheus-users.yaml"):
        assert promtool(tmp_path, "check", "config", name) == 0
    assert promtool(tmp_path, "test", "rules", "rules_test.yaml") == 0


def test_the_stories_find_an_alert_that_never_fires_and_one_that_always_does(tmp_path: Path) -> None:
    rules = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    shutil.copy(FOLDER / "rules_test.yaml", tmp_path)
    unnoticed = []
    for group, number in [(g, n) for g, each in enumerate(rules["groups"]) for n in range(len(each["rules"]))]:
        for expression in ("vector(0) > 1", "vector(1)"):
            changed = copy.deepcopy(rules)
            rule = changed["groups"][group]["rules"][number]
            rule["expr"] = expression
            (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed))
            if promtool(tmp_path, "test", "rules", "rules_test.yaml") == 0:
                unnoticed.append((rule.get("alert") or rule["record"], expression))
    assert unnoticed == []
