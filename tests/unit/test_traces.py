"""Spans: their ids, which of them are sent, and that nobody waits for a collector."""

import logging
import subprocess
import sys
import time

import pytest
from harness.collector import Collector
from harness.job import free_port
from harness.runtime import eventually

from ckptsvc.errors import ConfigError
from ckptsvc.settings import TraceSettings
from ckptsvc.telemetry import traces as module
from ckptsvc.telemetry.traces import Trace, start_traces


@pytest.fixture(autouse=True)
def quiet():
    level = logging.getLogger("opentelemetry").level
    yield
    logging.getLogger("opentelemetry").setLevel(level)


def started(endpoint, **changes):
    return start_traces(TraceSettings(endpoint=endpoint, **changes), "n1", "1.2.3")


def test_all_nodes_find_the_same_ids_and_no_others_do():
    one = Trace.save("job", 1, 20)
    assert one.id == Trace.save("job", 1, 20).id
    others = [Trace.save("job", 1, 21), Trace.save("job", 2, 20), Trace.save("jo", 1, 20), Trace.restart("job", 1)]
    assert len({one.id, *(other.id for other in others)}) == 5
    spans = {one.span_id(name, rank) for name in ("save", "shard", "stage") for rank in (None, 0, 1, 10)}
    assert len(spans) == 12
    assert all(0 < span < 1 << 64 for span in spans)


def test_without_an_endpoint_nothing_is_imported_or_sent():
    traces = started("")
    assert not traces.is_on
    traces.add(Trace.save("job", 1, 2), "save", 0.0, 1.0)
    traces.close()
    code = "import sys, ckptsvc.agent.server; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_span_arrives_with_its_parent_its_time_and_what_it_is_about():
    with Collector() as collector:
        traces = started(collector.endpoint)
        now, wall = time.monotonic(), time.time_ns()
        trace = Trace.save("job", 1, 20)
        traces.add(trace, "save", now - 2, now, about={"job": "job", "bytes": 7})
        traces.add(trace, "shard", now - 2, now - 1, rank=3)
        traces.add(trace, "write", now - 1.5, now - 1, parent="shard", rank=3, error="s3://me:hunter22@store is full")
        traces.close()
        save, shard, write = sorted(collector.spans, key=lambda span: ("save", "shard", "write").index(span.name))
    assert {span.trace_id for span in (save, shard, write)} == {trace.id.to_bytes(16)}
    assert [span.parent_span_id for span in (save, shard, write)] == [b"", save.span_id, shard.span_id]
    assert save.end_time_unix_nano == pytest.approx(wall, abs=5e8)
    assert save.end_time_unix_nano - save.start_time_unix_nano == pytest.approx(2e9, abs=1e7)
    assert {each.key for each in save.attributes} == {"ckptsvc.job", "ckptsvc.bytes"}
    assert (write.status.code, write.status.message) == (2, "s3://***@store is full")
    assert collector.resources[0]["service.name"] == "ckptsvc"
    assert collector.resources[0]["host.name"] == "n1"


def test_of_a_share_of_the_traces_all_nodes_send_the_same_and_whole():
    with Collector() as collector:
        for node in (0, 1):
            traces = started(collector.endpoint, ratio=0.5)
            for step in range(200):
                traces.add(Trace.save("job", 1, step), "shard", 0.0, 1.0, rank=node)
            traces.close()
        found = [{s.trace_id for s in collector.spans if s.attributes[0].value.int_value == node} for node in (0, 1)]
    assert found[0] == found[1]
    assert 60 < len(found[0]) < 140
    with Collector() as collector:
        traces = started(collector.endpoint, ratio=0.0)
        traces.add(Trace.save("job", 1, 1), "save", 0.0, 1.0)
        traces.close()
        assert collector.spans == []


def test_a_collector_that_is_not_there_costs_one_line_and_no_time(monkeypatch, caplog):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    monkeypatch.setattr(module, "EVERY", 0.05)
    monkeypatch.setattr(module, "QUEUE", 16)
    traces = started(f"http://127.0.0.1:{free_port()}")
    for step in range(200):
        traces.add(Trace.save("job", 1, step), "save", 0.0, 1.0)
    eventually(lambda: caplog.records, "the line", 60)
    for step in range(200):
        traces.add(Trace.save("job", 1, step), "save", 0.0, 1.0)
    traces.close()
    assert [record.name for record in caplog.records] == ["ckptsvc.agent"]
    assert "takes no traces" in caplog.text


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector:4317", "http://"])
def test_what_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(ConfigError, match=r"traces\.endpoint"):
        started(endpoint)


def test_a_missing_certificate_or_package_is_said_in_one_line(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"traces\.ca_file"):
        started("https://127.0.0.1:1", ca_file=str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match="not installed"):
        started("http://127.0.0.1:1")
