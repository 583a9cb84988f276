"""The frozen names, the rules they follow, and what a log line looks like."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ckptsvc.telemetry import (
    ArenaState,
    Event,
    Fields,
    JsonFormatter,
    Metrics,
    NicSignal,
    Outcome,
    Phase,
    Share,
    Tier,
    labels,
    log,
    setup_logging,
)
from ckptsvc.telemetry.declaring import Declared
from ckptsvc.telemetry.logs import ABOUT, KEYS, LOST, OURS, log_apart, masked, told
from ckptsvc.telemetry.reference import markdown

METRICS = {
    ("ckptsvc_arena_bytes", "gauge", ("state",)),
    ("ckptsvc_build_info", "gauge", ("version",)),
    ("ckptsvc_calls_refused_total", "counter", ()),
    ("ckptsvc_certificate_expiry_timestamp_seconds", "gauge", ()),
    ("ckptsvc_commit_latency_seconds", "histogram", ()),
    ("ckptsvc_coordinator_changes_total", "counter", ()),
    ("ckptsvc_deleted_checkpoints_total", "counter", ()),
    ("ckptsvc_incidents_total", "counter", ("kind",)),
    ("ckptsvc_last_commit_timestamp_seconds", "gauge", ("job",)),
    ("ckptsvc_last_committed_step", "gauge", ("job",)),
    ("ckptsvc_layouts_missed_total", "counter", ("scheme",)),
    ("ckptsvc_detection_duration_seconds", "histogram", ("phase",)),
    ("ckptsvc_drain_backlog_age_seconds", "gauge", ()),
    ("ckptsvc_drain_backlog_bytes", "gauge", ()),
    ("ckptsvc_drain_parallel_shards", "gauge", ()),
    ("ckptsvc_job_goodput_ratio", "gauge", ("job",)),
    ("ckptsvc_job_time_seconds_total", "counter", ("cause", "job")),
    ("ckptsvc_local_disk_refusals_total", "counter", ()),
    ("ckptsvc_nic_events_total", "counter", ("nic", "signal")),
    ("ckptsvc_nic_findings", "gauge", ("kind",)),
    ("ckptsvc_nic_held_back_seconds_total", "counter", ("nic", "signal")),
    ("ckptsvc_nic_link_up", "gauge", ("nic",)),
    ("ckptsvc_nic_read_duration_seconds", "gauge", ()),
    ("ckptsvc_nic_read_failures_total", "counter", ()),
    ("ckptsvc_nic_received_bytes_total", "counter", ("nic",)),
    ("ckptsvc_nic_sent_bytes_total", "counter", ("nic",)),
    ("ckptsvc_orders_refused_total", "counter", ()),
    ("ckptsvc_partner_dropped_total", "counter", ()),
    ("ckptsvc_partner_failures_total", "counter", ("purpose",)),
    ("ckptsvc_partner_kept_total", "counter", ("purpose",)),
    ("ckptsvc_partner_read_bytes_total", "counter", ("purpose",)),
    ("ckptsvc_rank_heartbeat_age_seconds", "gauge", ()),
    ("ckptsvc_restart_duration_seconds", "histogram", ("phase",)),
    ("ckptsvc_restarts_total", "counter", ("cause",)),
    ("ckptsvc_save_duration_seconds", "histogram", ("phase",)),
    ("ckptsvc_saves_total", "counter", ("outcome",)),
    ("ckptsvc_sessions", "gauge", ()),
    ("ckptsvc_shard_stripe_bytes", "gauge", ("scheme",)),
    ("ckptsvc_shard_stripes", "gauge", ("scheme",)),
    ("ckptsvc_snapshot_blocked_seconds", "histogram", ()),
    ("ckptsvc_snapshots_skipped_total", "counter", ("reason",)),
    ("ckptsvc_store_errors_total", "counter", ("kind", "scheme")),
    ("ckptsvc_staged_bytes_total", "counter", ()),
    ("ckptsvc_store_retries_total", "counter", ("kind", "scheme")),
    ("ckptsvc_tier_newest_step", "gauge", ("job", "tier")),
    ("ckptsvc_tier_bytes", "gauge", ("tier",)),
    ("ckptsvc_write_held_back_seconds_total", "counter", ()),
    ("ckptsvc_written_bytes_total", "counter", ("scheme",)),
    ("ckptsvc_spared_bytes_total", "counter", ("scheme",)),
}
"""Dashboards and alerts of other people are built on these: a change needs an entry in the changelog."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


def exposed(metrics: Metrics) -> set[tuple[str, str]]:
    """Name and type of what a Prometheus server reads."""
    found = set()
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        if not family.name.endswith("_created"):  # prometheus-client adds one to every counter and histogram
            found.add((f"{family.name}_total" if family.type == "counter" else family.name, family.type))
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def a_card(metrics: Metrics) -> None:
    metrics.nic_sent.labels("cxi0").inc(5)
    metrics.nic_received.labels("cxi0")
    metrics.nic_events.labels("cxi0", NicSignal.TIMEOUTS)
    metrics.nic_held.labels("cxi0", NicSignal.STALLED)
    metrics.nic_link_up.labels("cxi0")


def test_the_names_are_frozen(metrics: Metrics) -> None:
    assert {(each.name, each.kind, tuple(sorted(each.labels))) for each in metrics.declared} == METRICS
    assert exposed(metrics) == {(name, kind) for name, kind, _ in METRICS}


UNITS = ("_bytes", "_seconds", "_ratio", "_step", "_stripes", "_shards", "_sessions", "_findings", "_up", "_info")


@pytest.mark.parametrize("each", Metrics("").declared, ids=lambda each: each.name)
def test_the_names_follow_the_rules(each: Declared) -> None:
    assert re.fullmatch(r"ckptsvc(_[a-z]+)+", each.name)
    assert (each.kind == "counter") == each.name.endswith("_total")
    assert each.kind == "counter" or each.name.endswith(UNITS), "it says no unit"
    assert not re.search(r"_(ms|millis|micros|minutes|hours|days|kb|mb|gb|[kmgt]ib|percent)(_|$)", each.name)
    assert each.about.endswith(".")
    assert each.about[0].isupper()


@pytest.mark.parametrize("each", Metrics("").declared, ids=lambda each: each.name)
def test_every_label_says_what_bounds_it(each: Declared) -> None:
    assert not {"rank", "step", "path", "node", "tensor", "epoch", "attempt", "le", "instance"} & set(each.labels)
    for values in each.labels.values():
        bounded = values if isinstance(values, str) else list(values)
        assert len(bounded) > 1
    if "job" in each.labels:
        assert "removed" in str(each.labels["job"])


def test_what_has_not_happened_yet_is_zero_and_not_absent(metrics: Metrics) -> None:
    for outcome in Outcome:
        assert value(metrics, "ckptsvc_saves_total", outcome=outcome.value) == 0
    for state in ArenaState:
        assert value(metrics, "ckptsvc_arena_bytes", state=state.value) == 0
    for phase in Phase:
        assert value(metrics, "ckptsvc_save_duration_seconds_count", phase=phase.value) == 0
    assert value(metrics, "ckptsvc_build_info", version="1.2.3") == 1


def test_a_commit_is_counted_and_a_job_that_ended_is_forgotten(metrics: Metrics) -> None:
    metrics.committed("a", 500, 1000.5)
    assert value(metrics, "ckptsvc_saves_total", outcome="committed") == 1
    assert value(metrics, "ckptsvc_last_commit_timestamp_seconds", job="a") == 1000.5
    assert value(metrics, "ckptsvc_last_committed_step", job="a") == 500
    metrics.forget("a")
    metrics.forget("never seen")
    assert value(metrics, "ckptsvc_last_committed_step", job="a") is None
    assert value(metrics, "ckptsvc_saves_total", outcome="committed") == 1


def test_a_job_that_has_ended_leaves_no_series_whatever_was_said_of_it(metrics: Metrics) -> None:
    for job in ("stays", "goes"):
        metrics.committed(job, 5, 1.0)
        metrics.tier_step.labels(job, Tier.MEMORY).set(5)
        metrics.job_time.labels(job, Share.USEFUL).inc()
        metrics.goodput.labels(job).set(0.5)
    metrics.forget("goes")
    assert value(metrics, "ckptsvc_job_goodput_ratio", job="goes") == 0.5  # it may still be coordinated here
    metrics.forget_coordinated("goes")
    text = generate_latest(metrics.registry).decode()
    assert "goes" not in text
    assert sum('job="stays"' in line and "_created" not in line for line in text.splitlines()) == 5


def test_a_card_that_has_gone_leaves_no_series(metrics: Metrics) -> None:
    a_card(metrics)
    assert value(metrics, "ckptsvc_nic_sent_bytes_total", nic="cxi0") == 5
    metrics.forget_nic("cxi0")
    metrics.forget_nic("never seen")
    assert "cxi0" not in generate_latest(metrics.registry).decode()


def test_two_agents_in_one_process_do_not_share_metrics(metrics: Metrics) -> None:
    other = Metrics("1.2.3")
    other.committed("a", 1, 1.0)
    assert value(metrics, "ckptsvc_saves_total", outcome="committed") == 0


def test_event_names_are_words_with_dashes() -> None:
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", event) for event in Event)
    assert all(event.name.lower().replace("_", "-") == event for event in Event)


# ---- logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A stream to log to; afterwards the process's logging is as it was."""
    names = ("ckptsvc", "ckptsvc_drivers")
    root, levels = list(logging.getLogger().handlers), [logging.getLogger(name).level for name in names]
    yield io.StringIO()
    logging.getLogger().handlers[:] = root
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


LOGGER = logging.getLogger("ckptsvc.agent.coordination.runner")
ALL_FIELDS: Fields = {
    "job": "j1",
    "node": "n1",
    "rank": 0,
    "attempt": 2,
    "step": 100,
    "epoch": 3,
    "reason": "said so",
}


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_all_that_a_program_needs(stream: io.StringIO) -> None:
    setup_logging(stream, json=True)
    log(LOGGER, logging.WARNING, Event.SAVE_FAILED, "save of step %d failed", 100, **ALL_FIELDS)
    (line,) = lines(stream)
    assert datetime.fromisoformat(str(line.pop("ts"))).utcoffset() is not None
    assert line == {
        "level": "warning",
        "logger": "ckptsvc.agent.coordination.runner",
        "event": "save-failed",
        "msg": "save of step 100 failed",
        **ALL_FIELDS,
    }
    assert set(ALL_FIELDS) == set(Fields.__annotations__)


def test_a_json_line_stays_one_line_and_keeps_the_traceback(stream: io.StringIO) -> None:
    setup_logging(stream, json=True)
    try:
        raise OSError("two\nlines")
    except OSError:
        LOGGER.exception("failed: %s", "a\nb \udcff \N{SNOWMAN}")
    (line,) = lines(stream)
    assert line["msg"] == "failed: a\nb \udcff \N{SNOWMAN}"
    assert "OSError: two\nlines" in str(line["error"])
    assert line["event"] == ""


def test_a_line_for_people(stream: io.StringIO) -> None:
    setup_logging(stream, json=False)
    log(LOGGER, logging.INFO, Event.SAVE_COMMITTED, "committed", step=7, rank=0)
    log(LOGGER, logging.ERROR, Event.RANK_DIED, "rank died")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d committed  \(rank=0 step=7\)", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d error: rank died", second)


def test_ours_from_the_level_up_and_others_only_when_they_warn(stream: io.StringIO) -> None:
    setup_logging(stream, json=True, level="debug")
    LOGGER.debug("ours")
    logging.getLogger("ckptsvc_drivers.posix").debug("a driver's")
    logging.getLogger("grpc").info("chatter")
    logging.getLogger("grpc").warning("trouble")
    assert [line["msg"] for line in lines(stream)] == ["ours", "a driver's", "trouble"]


def test_setting_up_twice_does_not_write_twice(stream: io.StringIO) -> None:
    others = list(logging.getLogger().handlers)
    setup_logging(io.StringIO(), json=False)
    setup_logging(stream, json=True)
    LOGGER.info("once")
    assert [line["msg"] for line in lines(stream)] == ["once"]
    assert [handler for handler in logging.getLogger().handlers if handler in others] == others


def test_a_line_for_people_is_one_line_that_no_terminal_obeys(stream: io.StringIO) -> None:
    setup_logging(stream, json=False)
    logging.getLogger("ckptsvc.agent").info("job %s", "a\n12:00:00 \x1b[2Jall is well \u202e\ud800 é")
    assert stream.getvalue().endswith(r" job a\n12:00:00 \x1b[2Jall is well \u202e\ud800 é" + "\n")


def test_lines_that_could_not_be_written_are_counted_and_told() -> None:
    class Full(io.StringIO):
        room = True

        def write(self, text: str) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            return super().write(text)

    root, level = list(logging.getLogger().handlers), logging.getLogger("ckptsvc").level
    try:
        full = Full()
        setup_logging(full, json=True)
        LOGGER.info("before")
        full.room = False
        for _ in range(3):
            LOGGER.info("lost")
        full.room = True
        LOGGER.error("after")
        LOGGER.info("and on")
        told = [(line["level"], line["msg"]) for line in lines(full)]
    finally:
        logging.getLogger().handlers[:] = root
        logging.getLogger("ckptsvc").setLevel(level)
    assert told == [("info", "before"), ("error", "after"), ("warning", LOST % 3), ("info", "and on")]


def test_the_line_is_attributed_to_the_caller(stream: io.StringIO) -> None:
    seen: list[logging.LogRecord] = []
    setup_logging(stream, json=True)
    LOGGER.addFilter(seen.append)  # type: ignore[arg-type]
    try:
        log(LOGGER, logging.INFO, Event.AGENT_STARTED, "started")
    finally:
        LOGGER.removeFilter(seen.append)  # type: ignore[arg-type]
    assert seen[0].filename == "test_telemetry.py"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("PUT https://key:hunter22@store/x failed", "PUT https://***@store/x failed"),
        ("s3://AKIA:hunter22@bucket", "s3://***@bucket"),
        ("GET /?token=hunter22&x=1", "GET /?token=***&x=1"),
        ("Authorization: Bearer hunter22abc", "Authorization: Bearer ***"),
        ("{'secret_access_key': 'hunter22', 'region': 'eu'}", "{'secret_access_key': '***', 'region': 'eu'}"),
        ("X-Amz-Signature=hunter22&X", "X-Amz-Signature=***&X"),
        ("password=hunter22; next", "password=***; next"),
        ("-----BEGIN EC PRIVATE KEY-----\nhunter22\n-----END EC PRIVATE KEY-----", "***"),
        ("etcd.password_file: /etc/pw is not private", "etcd.password_file: /etc/pw is not private"),
        ("set CKPTSVC_ETCD_PASSWORD_FILE=/etc/pw", "set CKPTSVC_ETCD_PASSWORD_FILE=/etc/pw"),
        ("file:///run with 3 tokens", "file:///run with 3 tokens"),
    ],
)
def test_secrets_are_in_no_line(stream: io.StringIO, text: str, shown: str) -> None:
    for json_lines in (True, False):
        setup_logging(stream, json=json_lines)
        try:
            raise OSError(text)
        except OSError:
            LOGGER.exception("%s", text, extra={"reason": text})
    written = stream.getvalue()
    first = json.loads(written.splitlines()[0])
    assert (first["msg"], first["reason"]) == (shown, shown)
    assert "hunter22" not in written


def test_a_long_line_is_looked_through_in_one_go() -> None:
    for part in ("secret", "0", "_-", "a=", "://", "-----BEGIN ", "bearer "):
        text = part * (1_000_000 // len(part))
        assert len(masked(text)) <= len(text) + 1_000_000  # it would not end


def test_a_line_that_cannot_be_made_is_written_all_the_same() -> None:
    class Bad:
        def __str__(self) -> str:
            raise ValueError

    for text, argument, why in (("about %s", Bad(), "ValueError"), ("%d of %d", 1, "TypeError")):
        record = logging.LogRecord("x", logging.INFO, "", 0, text, (argument,), None)
        assert json.loads(JsonFormatter().format(record))["msg"] == f"{text!r} with 1 arguments: {why}"


UNCAUGHT = """
import logging, sys, threading, warnings
from ckptsvc.telemetry import start_logging
start_logging("json", job="j1", node="n1")
logging.getLogger("stamina").warning("a library's")
warnings.warn("look here")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
class Late:
    def __del__(self):
        raise OSError("too late")
Late()
import asyncio
async def fails():
    asyncio.get_running_loop().call_soon(lambda: [][1])
    await asyncio.sleep(0)
asyncio.run(fails())
raise RuntimeError("https://me:hunter22@store\\nsecond line")
"""


def test_all_that_a_process_of_ours_writes_is_json_whoever_says_it() -> None:
    done = subprocess.run([sys.executable, "-c", UNCAUGHT], capture_output=True, text=True, check=False, timeout=60)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in found] == ["stamina", "py.warnings", *["ckptsvc"] * 2, "asyncio", "ckptsvc"]
    assert all(line["job"] == "j1" and line["node"] == "n1" for line in found)
    errors = [str(line.get("error", "")).rstrip().splitlines()[-1:] for line in found[2:]]
    assert [each[0].partition(":")[0] for each in errors[:3]] == ["ZeroDivisionError", "OSError", "IndexError"]
    assert "RuntimeError: https://***@store" in found[-1]["error"]
    assert "hunter22" not in done.stderr
    assert done.returncode == 1


def test_what_a_process_is_told_about_itself_may_be_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "{", "[1]", '"x"', "null", '{"rank": [1], "unknown": 1}'):
        monkeypatch.setenv(ABOUT, text)
        assert told() == {}
    monkeypatch.setenv(ABOUT, '{"job": "j", "rank": 3}')
    assert told() == {"job": "j", "rank": 3}


def test_a_rank_writes_json_and_leaves_the_programs_own_log_alone(stream: io.StringIO) -> None:
    theirs = io.StringIO()
    handler = logging.StreamHandler(theirs)
    logging.getLogger().addHandler(handler)
    try:
        log_apart(stream, lambda: Fields(rank=3, step=7))
        LOGGER.warning("skipped")
        logging.getLogger("train").warning("loss is high")
    finally:
        logging.getLogger().removeHandler(handler)
        for ours in map(logging.getLogger, OURS):
            ours.handlers[:], ours.propagate = [], True
    (line,) = lines(stream)
    assert (line["msg"], line["rank"], line["step"]) == ("skipped", 3, 7)
    assert theirs.getvalue() == "loss is high\n"


def test_the_keys_of_a_line_are_those_that_are_documented() -> None:
    assert set(KEYS) == {"ts", "level", "logger", "event", "msg", "error", *Fields.__annotations__}


def test_the_reference_is_what_the_declarations_say() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
    assert page.read_text() == markdown(), "make it again: python -m ckptsvc.telemetry > docs/reference/metrics.md"
    assert all(f"`{each.name}`" in markdown() for each in Metrics("").declared)


def test_labels_are_words_with_dashes() -> None:
    enums = [values for values in vars(labels).values() if isinstance(values, type) and issubclass(values, StrEnum)]
    assert len(enums) > 12
    for enum in enums:
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", label) for label in enum), enum
