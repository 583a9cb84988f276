"""The frozen names, the rules they follow, and what a log line looks like."""

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ckptsvc import telemetry
from ckptsvc.telemetry import ArenaState, Event, Fields, Metrics, NicSignal, Outcome, Phase, log, setup_logging

METRICS = {
    ("ckptsvc_arena_bytes", "gauge", ("state",)),
    ("ckptsvc_build_info", "gauge", ("version",)),
    ("ckptsvc_calls_refused_total", "counter", ()),
    ("ckptsvc_certificate_expiry_timestamp_seconds", "gauge", ()),
    ("ckptsvc_coordinator_changes_total", "counter", ()),
    ("ckptsvc_deleted_checkpoints_total", "counter", ()),
    ("ckptsvc_incidents_total", "counter", ("kind",)),
    ("ckptsvc_last_commit_timestamp_seconds", "gauge", ("job",)),
    ("ckptsvc_last_committed_step", "gauge", ("job",)),
    ("ckptsvc_layouts_missed_total", "counter", ("scheme",)),
    ("ckptsvc_drain_backlog_age_seconds", "gauge", ()),
    ("ckptsvc_drain_backlog_bytes", "gauge", ()),
    ("ckptsvc_drain_parallel_shards", "gauge", ()),
    ("ckptsvc_incidents_total", "counter", ("kind",)),
    ("ckptsvc_last_commit_timestamp_seconds", "gauge", ("job",)),
    ("ckptsvc_last_committed_step", "gauge", ("job",)),
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
    ("ckptsvc_restarts_total", "counter", ("cause",)),
    ("ckptsvc_save_duration_seconds", "histogram", ("phase",)),
    ("ckptsvc_saves_total", "counter", ("outcome",)),
    ("ckptsvc_sessions", "gauge", ()),
    ("ckptsvc_shard_stripe_bytes", "gauge", ("scheme",)),
    ("ckptsvc_shard_stripes", "gauge", ("scheme",)),
    ("ckptsvc_snapshots_skipped_total", "counter", ("reason",)),
    ("ckptsvc_store_errors_total", "counter", ("kind", "scheme")),
    ("ckptsvc_tier_bytes", "gauge", ("tier",)),
    ("ckptsvc_write_held_back_seconds_total", "counter", ()),
    ("ckptsvc_written_bytes_total", "counter", ("scheme",)),
    ("ckptsvc_spared_bytes_total", "counter", ("scheme",)),
}
"""Dashboards and alerts of other people are built on these: a change needs an entry in the changelog."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


def exposed(metrics: Metrics) -> set[tuple[str, str, tuple[str, ...]]]:
    """Name, type and labels of what a Prometheus server reads."""
    found = set()
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        if family.name.endswith("_created"):
            continue  # prometheus-client adds one to every counter and histogram
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found.add((name, family.type, tuple(sorted(labels))))
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
    metrics.committed("job", 1, 1.0)
    metrics.written_bytes.labels("file")
    metrics.laid_out("file", 1, 1 << 20, as_asked=True)
    metrics.spared_bytes.labels("file")
    metrics.store_errors.labels("file", "store-full")
    a_card(metrics)
    assert exposed(metrics) == METRICS


def test_the_names_follow_the_rules(metrics: Metrics) -> None:
    units = ("_bytes", "_seconds", "_step", "_stripes", "_shards", "_sessions", "_findings", "_up")
    for name, kind, labels in METRICS:
        assert re.fullmatch(r"ckptsvc_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert kind == "counter" or name.endswith((*units, "_info")), f"{name} says no unit"
        assert not {"rank", "step", "path", "node", "tensor"} & set(labels), f"{name} has unbounded labels"
    assert all(family.documentation.endswith(".") for family in metrics.registry.collect())


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


LOGGER = logging.getLogger("ckptsvc.agent.runner")
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
        "logger": "ckptsvc.agent.runner",
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


def test_lines_that_could_not_be_written_are_counted_and_told(capfd: pytest.CaptureFixture[str]) -> None:
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
        LOGGER.info("%d", "a mistake of ours")
    finally:
        logging.getLogger().handlers[:] = root
        logging.getLogger("ckptsvc").setLevel(level)
    assert told == [("info", "before"), ("error", "after"), ("warning", telemetry.LOST % 3), ("info", "and on")]
    assert "TypeError" in capfd.readouterr().err, "that is shown"


def test_the_line_is_attributed_to_the_caller(stream: io.StringIO) -> None:
    seen: list[logging.LogRecord] = []
    setup_logging(stream, json=True)
    LOGGER.addFilter(seen.append)  # type: ignore[arg-type]
    try:
        log(LOGGER, logging.INFO, Event.AGENT_STARTED, "started")
    finally:
        LOGGER.removeFilter(seen.append)  # type: ignore[arg-type]
    assert seen[0].filename == "test_telemetry.py"


def test_labels_are_enumerated() -> None:
    enums = (
        telemetry.Outcome,
        telemetry.Phase,
        telemetry.Skip,
        telemetry.ArenaState,
        telemetry.Cause,
        telemetry.IncidentKind,
    )
    enums += (telemetry.NicSignal, telemetry.NicTrouble)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", label) for enum in enums for label in enum)
