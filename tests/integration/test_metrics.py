"""What a real job shows in numbers: one that saves, loses a rank, comes back and goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.collector import Collector
from harness.job import Launch
from harness.observability import scrape
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc
from ckptsvc.errors import SaveFailed, UnsupportedObject
from ckptsvc.telemetry.logs import KEYS

SLACK = 5_000_000
"""Nanoseconds by which two looks at the clock may differ."""

CAUSES = {"useful", "blocked", "detection", "restart", "redone", "other"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as found:
        yield found


def train(rank: Rank, store: str) -> int:
    """Twenty steps a second and a snapshot every ten of them, until the test says to end."""
    rank.join()
    tensor, end = torch.zeros(100_000), torch.zeros(1)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=10)
    while not end.item():
        torch.distributed.all_reduce(tensor)
        tensor.fill_(run.steps_done + 1)
        time.sleep(0.05)
        run.step()
        rank.report("stepped", step=run.steps_done)
        end.fill_((rank.folder / "go-end").exists())
        torch.distributed.all_reduce(end)
    steps = run.steps_done
    run.close()
    return steps


def test_a_job_that_loses_a_rank(runtime: Runtime, launch: Launch, collector: Collector, tmp_path: Path) -> None:
    environ = {"CKPTSVC_AGENT_METRICS_LISTEN": "127.0.0.1:0", "CKPTSVC_LOG_FORMAT": "json"}
    environ["CKPTSVC_TRACES_ENDPOINT"] = collector.endpoint
    with launch.service(2, train, str(tmp_path / "run"), **environ) as job:
        job.wait_for("stepped", step=28)
        job.kill(1)  # the newest snapshot is of step 20
        job.wait_for("stepped", attempt=2, step=40)
        directory = runtime.agent_directory()

        def found(name: str, **labels: str) -> float:
            return scrape(directory).get(name, {}).get(tuple(sorted(labels.items())), 0.0)

        eventually(lambda: found("ckptsvc_commit_latency_seconds_count") >= 3, "three commits")
        eventually(lambda: found("ckptsvc_snapshot_blocked_seconds_count") >= 6, "the pages to be read")
        seen = scrape(directory)
        (name,) = {dict(labels)["job"] for labels in seen["ckptsvc_job_goodput_ratio"]}
        share = {dict(labels)["cause"]: value for labels, value in seen["ckptsvc_job_time_seconds_total"].items()}
        (told,) = [each for each in runtime.status(directory)["coordinates"] if each["job"] == name]
        job.go("end")
        steps = job.results()[0]
        agent, terminal = lines(runtime.log()), job.output()
    check_log(agent, terminal, name)
    check_traces(collector, name)

    saved = seen["ckptsvc_saves_total"][("outcome", "committed"),]
    assert saved >= 3
    # Both ranks have measured every snapshot; those of the attempt that was killed are not forgotten.
    assert seen["ckptsvc_snapshot_blocked_seconds_count"][()] >= 2 * (saved - 1)
    assert 0 < seen["ckptsvc_snapshot_blocked_seconds_sum"][()] < sum(share.values())
    assert seen["ckptsvc_staged_bytes_total"][()] >= 2 * saved * 100_000 * 4 / 2
    assert (
        seen["ckptsvc_last_committed_step"][("job", name),]
        == seen["ckptsvc_tier_newest_step"][("job", name), ("tier", "memory")]
    )
    assert seen["ckptsvc_commit_latency_seconds_sum"][()] > 0

    phases = {("phase", part) for part in ("stop", "start", "restore", "first-step")}
    assert {labels[0] for labels in seen["ckptsvc_restart_duration_seconds_count"]} == phases
    assert set(seen["ckptsvc_restart_duration_seconds_count"].values()) == {1.0}
    assert set(seen["ckptsvc_detection_duration_seconds_count"].values()) == {1.0}
    assert sum(seen["ckptsvc_restart_duration_seconds_sum"].values()) == pytest.approx(share["restart"], abs=1.0)
    assert seen["ckptsvc_restarts_total"][("cause", "died"),] == 1

    assert share.keys() == CAUSES
    assert min(share["useful"], share["redone"], share["restart"], share["other"], share["blocked"]) > 0
    assert share["useful"] > 0.05 * 30
    assert steps >= 40
    assert told["goodput"]["seconds"].keys() == CAUSES
    assert told["goodput"]["share"] == pytest.approx(share["useful"] / sum(share.values()), abs=0.1)


def lines(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert list(line) == [key for key in KEYS if key in line]
        assert {"ts", "level", "logger", "event", "msg"} <= line.keys()
    return found


def check_log(agent: list[dict[str, Any]], terminal: str, name: str) -> None:
    """Every line is JSON and says what it is about; those of the ranks have their number before them."""
    assert len(agent) > 20
    assert all(line["node"] for line in agent)
    events = {line["event"]: line for line in reversed(agent)}
    assert events["save-committed"].items() >= {"job": name, "epoch": events["save-committed"]["epoch"]}.items()
    assert events["rank-died"].items() >= {"job": name, "rank": 1, "attempt": 1}.items()
    assert events["job-resumed"].items() >= {"job": name, "attempt": 2}.items()
    assert {line.get("job") for line in agent if "committing" in line["msg"]} == {name}
    own, ranks = [], []
    for text in terminal.splitlines():
        (ranks if text.startswith("[") else own).append(text.partition("] ")[2] if text.startswith("[") else text)
    said = lines("\n".join(own))
    assert {line["logger"] for line in said} == {"ckptsvc.run"}
    assert {line["job"] for line in said} == {name.partition("@")[0]}
    assert any("attempt 2" in line["msg"] and line["attempt"] == 2 for line in said)
    restored = [line for line in lines("\n".join(t for t in ranks if t.startswith("{"))) if "restored" in line["msg"]]
    assert {(line["rank"], line["attempt"], line["job"]) for line in restored} == {(0, 2, name), (1, 2, name)}
    assert all(line["step"] >= 10 and line["node"] == agent[0]["node"] for line in restored)


SAVE = ["commit", "index", "record", "save", *["shard"] * 2, *["stage"] * 2, *["write"] * 2]
RESTART = ["detection", "evidence", "first-step", "restart", "restore", "start", "stop"]


def trees(collector: Collector) -> list[list[str]]:
    """The names of the spans of each trace."""
    found: dict[bytes, list[str]] = {}
    for span in list(collector.spans):
        found.setdefault(span.trace_id, []).append(span.name)
    return [sorted(names) for names in found.values()]


def check_traces(collector: Collector, name: str) -> None:
    """One trace for each save and restart, whose spans lie within those around them."""
    eventually(lambda: trees(collector).count(SAVE) >= 3 and RESTART in trees(collector), "the traces")
    by_id = {span.span_id: span for span in list(collector.spans)}
    for span in by_id.values():
        around = by_id.get(span.parent_span_id)
        if around is not None and around.name != "save":  # which begins when the first rank has copied
            assert around.trace_id == span.trace_id
            assert around.start_time_unix_nano - SLACK <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= around.end_time_unix_nano + SLACK
    assert trees(collector).count(RESTART) == 1
    (root,) = [span for span in collector.spans if span.name == "restart"]
    said = {each.key: each.value.string_value or each.value.int_value for each in root.attributes}
    assert (said["ckptsvc.job"], said["ckptsvc.attempt"]) == (name, 2)
    assert "rank 1" in said["ckptsvc.reason"]
    ranks = {each.value.int_value for s in by_id.values() for each in s.attributes if each.key == "ckptsvc.rank"}
    assert ranks == {0, 1}


def test_what_goes_wrong_is_counted_by_why(runtime: Runtime, launch: Launch, tmp_path: Path) -> None:
    agent = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
    with launch.plain(1, fails, str(tmp_path / "run")) as job:
        job.wait_for("unsupported")

        def reasons() -> dict[str, float]:
            counted: dict[Any, float] = scrape(runtime.sockets)["ckptsvc_snapshots_skipped_total"]
            return {labels[0][1]: value for labels, value in counted.items() if value}

        assert reasons() == {"unsupported": 1.0}
        seen = scrape(runtime.sockets)
        scheme = ("scheme", "faulty+file")
        assert seen["ckptsvc_store_retries_total"] == {(("kind", "store-unavailable"), scheme): 2.0}
        assert seen["ckptsvc_store_errors_total"] == {(("kind", "store-full"), scheme): 1.0}
        assert seen["ckptsvc_saves_total"][("outcome", "failed"),] == 1.0
        assert seen["ckptsvc_saves_total"][("outcome", "skipped"),] == 1.0
        agent.terminate()
        agent.wait(30)
        job.go("without")
        job.wait_for("missed")
        agent = runtime.start_agent("--metrics-listen", "127.0.0.1:0")
        eventually(lambda: reasons() == {"no-agent": 1.0}, "the new agent to have heard of it")
        job.go("end")
        job.results()
    agent.terminate()
    agent.wait(30)


def fails(rank: Rank, path: str) -> None:
    def plan(*faults: dict[str, Any]) -> None:
        """See harness/faulty_store."""
        Path(f"{path}.new").write_text(json.dumps(faults))
        Path(f"{path}.new").rename(f"{path}.plan")

    plan()
    state: dict[str, Any] = {"tensor": torch.zeros(1000), "plain": 0}
    run = ckptsvc.attach(state, store=f"faulty+file://{path}", every="off")
    run.step()
    plan({"op": "write", "error": "store-unavailable", "times": 2})
    assert run.save(wait=True)
    run.step()
    plan({"op": "write", "error": "store-full"})
    with pytest.raises(SaveFailed):
        run.save(wait=True)
    plan()
    state["plain"] = object()
    run.step()
    with pytest.raises(UnsupportedObject):
        run.save()
    rank.report("unsupported")
    state["plain"] = 0
    rank.until("without")
    run.step()
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert not run.save()
    rank.report("missed")
    rank.until("end")
    run.close()
