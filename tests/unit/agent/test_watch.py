"""The agent's watch over real processes, whose pages are written by the test, at times the test chooses."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.runtime import eventually

from ckptsvc.agent.identity import Registration
from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import Session
from ckptsvc.agent.watching import procfs
from ckptsvc.agent.watching.watch import LOOK_EVERY, Watch
from ckptsvc.control.stalls import ENOUGH, WARM_UP, Limits
from ckptsvc.pipeline.arena import ArenaPool
from ckptsvc.rpc.identity import PHASE_BYTES
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Metrics

LIMITS = Limits(floor=1.0, startup=50.0)


class Line:
    """The way to the coordinator: keeps what is reported."""

    def __init__(self):
        self.reports = []

    def report(self, report):
        self.reports.append(report)


class Node:
    """An agent's state with one rank for every process."""

    def __init__(self, tmp_path, processes, *, enabled=True):
        self.line, self.now = Line(), 1000.0
        self.local = Local("n0", ArenaPool(tmp_path / "arenas", 1), Metrics("test"), None, "")
        self.local._uplinks[""] = self.line
        self.job = self.local.job("job@1", "", "memory://x")
        self.watch = Watch(self.local, LIMITS, enabled=enabled, clock=lambda: self.now)
        self.sessions = []
        for rank, process in enumerate(processes):
            fields = {"op": "register", "job": "job@1", "store": "memory://x", "attempt": 2, "world_size": 9}
            session = Session.open(Registration(rank=rank, **fields), process.pid)
            self.local.sessions[session.token] = session
            self.sessions.append(session)

    def enter(self, phase="step"):
        for session in self.sessions:
            session.page.enter(phase.encode().ljust(PHASE_BYTES, b"\0"), int(self.now * 1e9))

    def train(self, steps=ENOUGH + WARM_UP + 1):
        for step in range(1, steps + 1):
            self.wait(0.25)
            for session in self.sessions:
                session.page.put("step", step)
                session.page.put("at", int(self.now * 1e9))
        self.wait(0.25)

    def wait(self, seconds):
        """Let time pass; returns the kinds of what is reported."""
        before = len(self.line.reports)
        for _ in range(round(seconds / LOOK_EVERY)):
            self.now += LOOK_EVERY
            self.watch.look(self.now)
        return [report.WhichOneof("event") for report in self.line.reports[before:]]

    def order(self, **effect):
        """Obey an order; returns what is reported within a short time."""

        async def obey():
            before = len(self.line.reports)
            self.watch.order(self.job, pb.Order(job="job@1", **effect))
            for _ in range(300):
                if len(self.line.reports) > before:
                    break
                await asyncio.sleep(0.01)
            return self.line.reports[before:]

        return asyncio.run(obey())

    def kill(self, rank, **changes):
        """Obey an order to kill."""
        self.watch._kill(self.job, pb.Kill(attempt=2, rank=rank, **changes))


@pytest.fixture
def start(tmp_path):
    """Starts a node with that many ranks."""
    with contextlib.ExitStack() as stack:

        def begin(ranks=1, **how):
            processes = []
            for _ in range(ranks):
                process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                stack.callback(process.wait)
                stack.callback(process.kill)
                processes.append(process)
            node = Node(tmp_path, processes, **how)
            for session in node.sessions:
                stack.callback(session.close)
            return node

        yield begin


class TestLooking:
    def test_a_rank_that_has_not_begun_to_beat_is_not_watched(self, start):
        assert start().wait(200) == []

    def test_a_stall_and_its_end_are_reported(self, start):
        node = start(2)
        node.enter()
        node.train()
        node.line.reports.clear()
        assert node.wait(3) == ["stalled"]
        stalled = node.line.reports[-1].stalled
        assert (stalled.job, stalled.node, stalled.attempt, stalled.phase) == ("job@1", "n0", 2, "step")
        node.train(2)
        assert node.line.reports[-1].moved.attempt == 2

    def test_of_a_stopped_process_at_once_even_without_history(self, start):
        node = start(2)
        node.enter("attach")
        os.kill(node.sessions[1].pid, signal.SIGSTOP)
        eventually(lambda: procfs.state(node.sessions[1].pid) == "T", "it to stop")
        assert node.wait(2) == ["stalled"]
        assert node.line.reports[-1].stalled.rank == 1

    def test_a_watch_that_is_switched_off_reports_nothing(self, start):
        node = start(enabled=False)
        node.enter()
        node.train()
        assert node.wait(100) == []
        assert list(node.watch.resync("")) == []

    def test_a_new_coordinator_hears_it_too(self, start):
        node = start()
        node.enter()
        node.train()
        node.wait(3)
        (report,) = node.watch.resync("")
        assert report.stalled.rank == 0
        assert list(node.watch.resync("elsewhere:1")) == []
        node.local.sessions.clear()
        node.wait(1)
        assert list(node.watch.resync("")) == []


class TestExamining:
    def test_the_answer_has_what_the_pages_say_and_how_long_that_is_so(self, start):
        node = start(2)
        node.enter()
        node.train()
        node.wait(3)
        node.line.reports.clear()
        (report,) = node.order(examine=pb.Examine(attempt=2, incident="2-1", round=3, seconds=1.0))
        found = report.examined
        assert (found.job, found.attempt, found.incident, found.round, found.node) == ("job@1", 2, "2-1", 3, "n0")
        assert [(e.rank, e.pid, e.phase) for e in found.ranks] == [
            (r, s.pid, "step") for r, s in enumerate(node.sessions)
        ]
        for evidence in found.ranks:
            assert evidence.state in ("R", "S")
            assert evidence.step == ENOUGH + WARM_UP + 1
            assert evidence.stalled == pytest.approx(3.0, abs=0.5)
            assert evidence.threshold == pytest.approx(1.0)
            assert evidence.io_bytes > 0

    def test_of_another_attempt_there_is_nothing_to_tell(self, start):
        node = start()
        (report,) = node.order(examine=pb.Examine(attempt=1, incident="1-1", round=1, seconds=0.2))
        assert list(report.examined.ranks) == []


class TestKilling:
    @pytest.fixture
    def stalled(self, start):
        node = start(2)
        node.enter()
        node.train()
        node.wait(3)
        return node

    def ended(self, node, rank):
        return procfs.has_ended(node.sessions[rank].pidfd, 0.3)

    def test_a_rank_that_hangs(self, stalled):
        stalled.kill(1)
        assert procfs.has_ended(stalled.sessions[1].pidfd, 10)
        assert not self.ended(stalled, 0)

    def test_not_one_that_has_gone_on_meanwhile(self, stalled):
        stalled.sessions[1].page.put("at", int(stalled.now * 1e9))
        stalled.kill(1)
        assert not self.ended(stalled, 1)

    def test_not_one_that_was_judged_by_a_state_it_is_no_longer_in(self, stalled):
        stalled.kill(1, state="T")
        assert not self.ended(stalled, 1)
        os.kill(stalled.sessions[1].pid, signal.SIGSTOP)
        eventually(lambda: procfs.state(stalled.sessions[1].pid) == "T", "it to stop")
        stalled.kill(1, state="T")
        assert procfs.has_ended(stalled.sessions[1].pidfd, 10)

    def test_not_one_of_another_attempt_nor_one_that_is_not_here(self, stalled):
        stalled.watch._kill(stalled.job, pb.Kill(attempt=1, rank=1))
        stalled.kill(7)
        assert not self.ended(stalled, 0)
        assert not self.ended(stalled, 1)

    def test_one_that_has_ended_or_is_out_of_reach_is_no_error(self, stalled):
        os.kill(stalled.sessions[1].pid, signal.SIGKILL)
        assert procfs.has_ended(stalled.sessions[1].pidfd, 10)
        stalled.kill(1)
        session = stalled.sessions[0]
        os.close(session.pidfd)
        session.pidfd = -1
        stalled.kill(0)
        assert procfs.state(session.pid) in ("R", "S")


def test_a_log_that_somebody_keeps_is_part_of_the_evidence(start, tmp_path):
    node = start()
    log = Path(tmp_path / "rank_0.log")
    log.write_text("step 7: loss is nan\n")
    node.watch.log_of = lambda session: log
    node.enter()
    (report,) = node.order(examine=pb.Examine(attempt=2, incident="2-1", round=1, seconds=1.0))
    assert "loss is nan" in report.examined.ranks[0].log_tail
