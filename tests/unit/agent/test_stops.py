"""A node asks for a stop when one of its ranks has got a signal, or when the job's time is nearly over."""

import signal
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ckptsvc.agent import stops
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.stops import AGAIN, Stops
from ckptsvc.rpc.identity import Page
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


@dataclass
class Ranks:
    """Sessions of one job on this node, as far as `Stops` looks at them."""

    name: str = "n1"
    sessions: dict[str, Any] = field(default_factory=dict)
    jobs: dict[str, LocalJob] = field(default_factory=dict)
    reported: list[pb.Report] = field(default_factory=list)

    def add(self, rank: int, ends: float = 0.0) -> Page:
        page = Page(memoryview(bytearray(Page.blank())))
        reg = SimpleNamespace(job="job@1", rank=rank, attempt=1, ends=ends)
        self.sessions[f"token-{rank}"] = SimpleNamespace(reg=reg, page=page)
        self.jobs.setdefault("job@1", LocalJob("job@1", "", "memory://x"))
        return page

    def report(self, job: LocalJob, report: pb.Report) -> None:
        assert job is self.jobs["job@1"]
        self.reported.append(report)

    @property
    def reasons(self) -> list[str]:
        assert all(report.stop_requested.job == "job@1" for report in self.reported)
        return [report.stop_requested.reason for report in self.reported]


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(time.monotonic())
    monkeypatch.setattr(stops, "time", clock)
    return clock


def test_nothing_is_asked_for_without_a_cause() -> None:
    ranks = Ranks()
    ranks.add(0)
    Stops(ranks, 30.0).look()  # type: ignore[arg-type]
    assert ranks.reasons == []


def test_a_signal_to_any_rank_stops_the_job_and_is_told_again_while_it_goes_on(clock: Clock) -> None:
    ranks = Ranks()
    pages = [ranks.add(rank) for rank in range(3)]
    watched = Stops(ranks, None)  # type: ignore[arg-type]
    pages[2].put("signal", signal.SIGTERM)
    watched.look()
    pages[1].put("signal", signal.SIGUSR1)
    watched.look()
    assert ranks.reasons == ["SIGTERM to rank 2 on n1"]
    clock.now += AGAIN
    watched.look()
    assert len(ranks.reasons) == 2


def test_a_number_that_is_no_request_means_nothing() -> None:
    ranks = Ranks()
    ranks.add(0).put("signal", 12345)
    Stops(ranks, None).look()  # type: ignore[arg-type]
    assert ranks.reasons == []


def test_the_end_of_the_job_s_time(clock: Clock) -> None:
    ranks = Ranks()
    page = ranks.add(0, ends=clock.now + 1000.0)
    watched = Stops(ranks, 30.0)  # type: ignore[arg-type]
    watched.look()
    ranks.jobs["job@1"].pace.saves.append(10.0)
    page.put("step", 940)
    clock.now += 940.0  # a second a step: 4 of them, 20 s for the save and 30 to spare are 54
    watched.look()
    assert ranks.reasons == []
    page.put("step", 947)
    clock.now += 7.0
    watched.look()
    assert ranks.reasons == ["the scheduler ends the job in 53 s; a save takes up to 10.0 s"]


def test_time_is_not_watched_when_the_margin_is_off(clock: Clock) -> None:
    ranks = Ranks()
    ranks.add(0, ends=clock.now + 1.0)
    watched = Stops(ranks, None)  # type: ignore[arg-type]
    clock.now += 10.0
    watched.look()
    assert ranks.reasons == []
