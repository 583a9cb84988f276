"""Medians, ratios and bars, from samples whose answers are known."""

import io

import pytest

from ckptsvc.cli.benchmarks.report import show
from ckptsvc.cli.benchmarks.spec import Results
from ckptsvc.cli.benchmarks.table import Row, as_json, rows_of
from ckptsvc.cli.terminal import Screen

GIB = 1 << 30


def save(blocked: float = 0.1, durable: float = 1.0, cpu: float = 0.4) -> dict[str, float]:
    return {"blocked": blocked, "durable": durable, "cpu": cpu}


def seconds(*values: float) -> list[dict[str, float]]:
    return [{"seconds": value} for value in values]


def by_what(rows: list[Row]) -> dict[str, Row]:
    return {row.what: row for row in rows}


def saved(**samples: list[dict[str, float]]) -> dict[str, Row]:
    named = {name.replace("_", " ") if name == "direct_write" else name: value for name, value in samples.items()}
    return by_what(rows_of("save", [Results(nbytes=2 * GIB, samples=named)]))


def test_a_ratio_is_the_median_of_the_ratios_of_the_repetitions() -> None:
    ours = [save(0.1), save(0.2), save(0.9)]
    row = saved(ckptsvc=ours, memcpy=seconds(0.1, 0.1, 0.6), direct_write=seconds(1, 1, 1))["loop blocked"]
    assert (row.ours.median, row.ours.low, row.ours.high) == (0.2, 0.1, 0.9)
    assert (row.limit.median, row.limit.low, row.limit.high) == (0.1, 0.1, 0.6)
    assert (row.ratio.median, row.ratio.low, row.ratio.high) == pytest.approx((1.5, 1.0, 2.0))
    assert row.met is False


def test_bars_are_met_or_not() -> None:
    rows = saved(ckptsvc=[save(0.11, 1.3, 1.0)], memcpy=seconds(0.1), direct_write=seconds(1.0))
    assert rows["loop blocked"].met is True
    assert rows["until durable"].met is False
    assert rows["CPU"].ours.median == 0.5, "seconds per GiB, of 2 GiB"
    assert rows["CPU"].met is True


def test_a_limit_that_was_not_measured_leaves_no_ratio() -> None:
    row = saved(ckptsvc=[save()], memcpy=seconds(0.1))["until durable"]
    assert (row.ratio, row.limit, row.met) == (None, None, None)
    assert row.missing == "direct write was not measured"


def test_the_job_waits_for_its_slowest_rank_and_pays_for_the_cpu_of_all() -> None:
    ranks = [
        Results(nbytes=GIB, samples={"ckptsvc": [save(0.1, 1.0, 0.5)], "memcpy": seconds(0.1)}),
        Results(nbytes=GIB, samples={"ckptsvc": [save(0.3, 0.9, 0.3)], "memcpy": seconds(0.2)}),
    ]
    rows = by_what(rows_of("save", ranks))
    assert rows["loop blocked"].ours.median == 0.3
    assert rows["loop blocked"].ratio.median == pytest.approx(1.5)
    assert rows["until durable"].ours.median == 1.0
    assert rows["CPU"].ours.median == pytest.approx(0.4)


def test_small_tensors_are_held_against_dcp_and_more_is_better() -> None:
    samples = {"ckptsvc": [save(durable=1.0)], "dcp": [save(durable=11.0)], "memcpy": seconds(0.1)}
    row = by_what(rows_of("small", [Results(nbytes=GIB, samples=samples)]))["until durable"]
    assert (row.ratio.median, row.met) == (11.0, False)
    samples["dcp"] = [save(durable=13.0)]
    assert by_what(rows_of("small", [Results(nbytes=GIB, samples=samples)]))["until durable"].met is True


def test_the_fastest_of_several_raw_reads_counts() -> None:
    samples = {
        "from store": seconds(1.1),
        "from memory": seconds(0.2),
        "memcpy": seconds(0.1),
        "cold read": [{"buffered": 2.0, "O_DIRECT": 1.0}],
        "dcp": seconds(3.0),
    }
    rows = by_what(rows_of("restore", [Results(nbytes=GIB, samples=samples), Results(nbytes=0, samples={})]))
    cold, memory = rows["cold, from the store"], rows["after a kill, from memory"]
    assert (cold.ratio.median, cold.met, cold.peers["dcp"].median) == (pytest.approx(1.1), True, 3.0)
    assert (memory.ratio.median, memory.met, memory.peers) == (2.0, False, {})


def test_bytes_read_are_those_of_all_ranks() -> None:
    one = {"dim 0": [{"read": 50.0, "needed": 100.0, "seconds": 1.0}]}
    two = {"dim 0": [{"read": 54.0, "needed": 0.0, "seconds": 2.0}]}
    (row,) = rows_of("reshard", [Results(samples=one), Results(samples=two)])
    assert (row.ratio.median, row.met) == (pytest.approx(1.04), True)


def test_slowdown_is_in_percent() -> None:
    sample = {"slowdown": 0.08, "lost": 0.1, "durable": 1.0, "blocked": 0.1}
    overlapped = {"slowdown": 0.01, "lost": 0.02, "durable": 1.0, "blocked": 0.01}
    samples = {"ckptsvc": [sample], "ckptsvc, overlap": [overlapped], "memcpy": seconds(0.2)}
    rows = by_what(rows_of("overlap", [Results(nbytes=2 * GIB, samples=samples)]))
    assert (rows["slowdown of the loop"].ours.median, rows["slowdown of the loop"].met) == (8.0, False)
    assert (rows["training time lost in all"].ours.median, rows["training time lost in all"].met) == (0.05, True)
    assert (rows["overlap: loop blocked"].ratio.median, rows["overlap: loop blocked"].met) == (
        pytest.approx(0.05),
        True,
    )
    assert rows["overlap: time lost in all"].ours.median == pytest.approx(0.01)


def test_json_says_whether_a_bar_is_met() -> None:
    rows = rows_of("save", [Results(nbytes=GIB, samples={"ckptsvc": [save()], "memcpy": seconds(0.1)})])
    assert [row["met"] for row in as_json(rows)] == [True, None, True]


def test_a_person_reads_verdicts_peers_and_what_was_not_measured() -> None:
    samples = {"ckptsvc": [save(0.5)], "dcp": [save(2.0)], "memcpy": seconds(0.1), "direct write": seconds(1.0)}
    out = io.StringIO()
    rows = rows_of("save", [Results(nbytes=GIB, samples=samples)])
    warm_up = {"save": {"ckptsvc": {"blocked": 0.75}}}
    show(Screen(out), {"load": "0.1"}, rows, {"save: torchsnapshot": "is not installed"}, {"cold": "fadvise"}, warm_up)
    text = out.getvalue()
    blocked = next(line for line in text.splitlines() if "loop blocked" in line and "memcpy" in line)
    assert blocked.endswith("not met")
    assert "5.00 (5.00 - 5.00)x" in blocked
    assert "<= 1.15x" in blocked
    assert any("dcp" in line and "the others" in line for line in text.splitlines())
    assert "not measured: save: torchsnapshot: is not installed" in text
    assert "blocked 0.750 s" in text
