"""What ranks count on their pages becomes metrics once, and nonsense does not."""

from dataclasses import dataclass

import pytest

from ckptsvc.agent.watching.pages import Pages
from ckptsvc.rpc.identity import PAGE_BYTES, Page
from ckptsvc.telemetry import Metrics


@dataclass
class Reg:
    job: str = "job"
    attempt: int = 1
    rank: int = 0


@dataclass
class Session:
    page: Page
    reg: Reg
    pid: int = 100


def session(**changes):
    return Session(Page(memoryview(bytearray(Page.blank().ljust(PAGE_BYTES, b"\0")))), Reg(**changes))


@pytest.fixture
def metrics():
    return Metrics("test")


@pytest.fixture
def pages(metrics):
    return Pages(metrics)


def observed(metrics):
    value = metrics.registry.get_sample_value
    name = "ckptsvc_snapshot_blocked_seconds"
    skipped = value("ckptsvc_snapshots_skipped_total", {"reason": "no-agent"})
    return value(f"{name}_count"), pytest.approx(value(f"{name}_sum")), skipped


def test_every_snapshot_is_counted_once(pages, metrics):
    rank = session()
    pages.count([rank], 1.0)
    assert observed(metrics) == (0, 0, 0)
    rank.page.put("blocked", 200_000_000)  # the agent looks between the two words
    pages.count([rank], 1.0)
    rank.page.put("snapshots", 1)
    pages.count([rank], 1.0)
    pages.count([rank], 1.0)
    assert observed(metrics) == (1, 0.2, 0)
    rank.page.put("blocked", 800_000_000)
    rank.page.put("snapshots", 3)
    rank.page.put("missed", 2)
    pages.count([rank], 1.0)
    assert observed(metrics) == (3, 0.8, 2)


def test_a_rank_that_registers_again_is_not_counted_again_but_by_a_new_agent(pages, metrics):
    rank, again = session(), session()
    rank.page.put("blocked", 500_000_000)
    rank.page.put("snapshots", 1)
    pages.count([rank], 1.0)
    again.page.carry(rank.page)
    pages.count([again], 1.0)
    assert observed(metrics) == (1, 0.5, 0)
    other = Metrics("test")
    Pages(other).count([again], 1.0)
    assert observed(other) == (1, 0.5, 0)


def test_the_next_process_of_a_rank_begins_at_zero(pages, metrics):
    for attempt, pid in ((1, 100), (2, 101)):
        rank = session(attempt=attempt)
        rank.pid = pid
        rank.page.put("blocked", 100_000_000)
        rank.page.put("snapshots", 1)
        pages.count([rank], 1.0)
    assert observed(metrics) == (2, 0.2, 0)
    pages.forget("job")
    assert pages._told == {}


@pytest.mark.parametrize(
    ("blocked", "snapshots", "missed"),
    [(-5, 1, 0), (1 << 62, 1, 0), (0, 1 << 62, 1 << 62), (0, -1, -1), (-(1 << 63), (1 << 63) - 1, -(1 << 63))],
)
def test_what_a_rank_writes_by_mistake_is_not_counted(pages, metrics, blocked, snapshots, missed):
    rank = session()
    for word, value in (("blocked", blocked), ("snapshots", snapshots), ("missed", missed)):
        rank.page.put(word, value)
    pages.count([rank], 1.0)
    assert observed(metrics) == (0, 0, 0)


def test_the_oldest_heartbeat_is_that_of_the_rank_that_is_furthest_behind(pages, metrics):
    one, other, silent = session(rank=0), session(rank=1), session(rank=2)
    one.page.put("at", int(9e9))
    other.page.put("at", int(4e9))
    pages.count([one, other, silent], 10.0)
    assert metrics.registry.get_sample_value("ckptsvc_rank_heartbeat_age_seconds") == 6.0
