"""Evidence from ranks that are stuck in different ways, collected by the agent they are attached to."""

import asyncio
import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime
from harness.stored import cli

import ckptsvc
from ckptsvc.agent.incidents import IncidentLog
from ckptsvc.agent.server import Agent, Options
from ckptsvc.agent.watching import spy
from ckptsvc.agent.watching.evidence import Target, collect, examine
from ckptsvc.config import load
from ckptsvc.control.collectives import odd_ones
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

SECONDS = 4.0
"""For all evidence; half of it is waited for an answer that does not come."""

SECRET = "a value of the environment that no report may have"
WAITS, SLEEPS, SPINS, STOPPED = range(4)
"""What the ranks do in the sixth round."""

can_spy = pytest.mark.skipif(spy.find() is None, reason="py-spy is not installed")


def stuck(rank: Rank, store: str) -> None:
    """Five rounds together; in the sixth only the first rank comes to the collective."""
    rank.join()
    with ckptsvc.attach({"w": torch.zeros(8)}, store=store, every="off") as run:
        everybody = dist.new_group(group_desc="everybody")
        gradient = torch.ones(16, 4)
        for _ in range(5):
            dist.all_reduce(gradient)
            run.step()
        dist.broadcast(torch.ones(3), 0, group=everybody)
        print("\x1b[31mred\x1b[0m  epoch 1:  10%\repoch 1: 100%", flush=True)
        rank.report("ready")
        rank.until("on")
        rank.report("stuck")
        if rank.number == WAITS:
            dist.all_reduce(gradient)
        elif rank.number == SPINS:
            sum(itertools.repeat(0))  # holds the interpreter lock for ever
        else:
            oversleep()


def oversleep() -> None:
    time.sleep(600)


Scenario = Callable[[Agent, Job], Awaitable[None]]


@pytest.fixture
def attached(runtime: Runtime, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a scenario beside an agent of this very process and the stuck job."""
    directory = runtime.sockets / "here"
    for name, value in runtime.environ.items():
        monkeypatch.setenv(name, value)

    async def run(scenario: Scenario) -> None:
        agent = Agent(Options(directory, load(os.environ)))
        serving = asyncio.ensure_future(agent.run())
        while not (directory / "ready").exists():
            assert not serving.done(), serving
            await asyncio.sleep(0.02)
        environ = {"CKPTSVC_SOCKET": str(directory), "MY_SECRET": SECRET}
        job = await asyncio.to_thread(launch.plain, 4, stuck, str(tmp_path / "run"), **environ)
        try:
            for rank in range(4):
                await asyncio.to_thread(job.wait_for, "ready", rank)
            os.kill(job.reports(rank=STOPPED)[-1]["pid"], signal.SIGSTOP)
            job.go("on")
            for rank in (WAITS, SLEEPS, SPINS):
                await asyncio.to_thread(job.wait_for, "stuck", rank)
            await scenario(agent, job)
        finally:
            await asyncio.to_thread(job.__exit__)
            agent._stopping.set()
            await serving

    return lambda scenario: asyncio.run(run(scenario))


def targets(agent: Agent, job: Job) -> list[Target]:
    sessions = sorted(agent.local.sessions.values(), key=lambda session: session.reg.rank)
    return [Target.of(s, log=job._folder / f"rank-{s.reg.rank}.log", phase="step") for s in sessions]


async def evidence(agent: Agent, job: Job) -> list[pb.RankEvidence]:
    """Once the ranks are where they get stuck: the one that waits has begun its sixth collective."""
    while True:
        found = await collect(targets(agent, job), SECONDS)
        if found[WAITS].collective and not found[SPINS].answers and "oversleep" in found[SLEEPS].stack:
            return found


def lines(found: pb.RankEvidence) -> set[str]:
    """The functions on a rank's main stack."""
    return {line.partition(" ")[0] for line in found.stack.splitlines()}


def test_what_each_rank_is_stuck_in_is_seen_from_outside_and_reported(attached: Any, tmp_path: Path) -> None:
    async def scenario(agent: Agent, job: Job) -> None:
        found = await evidence(agent, job)
        assert [each.rank for each in found] == [0, 1, 2, 3]
        for each in found:
            assert (each.step, each.phase, each.log_tail) == (5, "step", "epoch 1: 100%")
            assert each.stalled > 0
            assert each.threads > 1
            assert each.resident > 50 << 20
            assert SECRET not in str(each)
        waits, sleeps, spins, stopped = found

        assert (waits.state, waits.answers, waits.enqueued, waits.completed) == ("S", True, 6, 5)
        assert waits.collective == "all_reduce of [16, 4] float32 in group default (gloo)"
        assert waits.stack.splitlines()[-1].startswith("all_reduce (torch/distributed/distributed_c10d.py:")
        assert "all_reduce" in lines(waits)
        groups = {group.group: (group.enqueued, group.completed, group.collective) for group in waits.groups}
        assert groups["default (gloo)"] == (6, 5, waits.collective)
        assert (1, 1, "") in groups.values()  # everybody: one broadcast, completed

        assert (sleeps.state, sleeps.answers, sleeps.collective) == ("S", True, "")
        assert ("default (gloo)", 5, 5) in [(g.group, g.enqueued, g.completed) for g in sleeps.groups]
        assert [(odd.rank, odd.lacks) for odd in odd_ones(found)] == [(SLEEPS, 1)]
        assert sleeps.stack.splitlines()[-1].startswith("oversleep (")
        assert sleeps.waits_in
        assert sleeps.cpu < 0.5

        assert (spins.state, spins.asked, spins.answers, spins.enqueued) == ("R", True, False, -1)
        assert spins.cpu > 0
        assert "no thread of the process answered within 2 s" in spins.notes

        assert (stopped.state, stopped.asked, stopped.answers, stopped.cpu) == ("T", False, False, 0)
        assert "stop" in stopped.waits_in

        incident = pb.Incident(
            id="1-1", job="job", attempt=1, kind="hung", opened="2026-01-01T00:00:00Z", rank=SLEEPS, node="n",
            sentence="Rank 1 on node n is to blame.", ranks=found,
        )  # fmt: skip
        assert await IncidentLog(tmp_path / "incidents").record(incident)
        _, report, _ = cli("incidents", "last", "--dir", tmp_path / "incidents")
        assert report.startswith("Rank 1 on node n is to blame.\n")
        assert "rank 1 (to blame)" in report
        assert "rank 0 in all_reduce of [16, 4] float32 in group default (gloo)" in report

    attached(scenario)


def test_a_rank_that_has_died_is_said_to_be_gone(attached: Any) -> None:
    async def scenario(agent: Agent, job: Job) -> None:
        before = targets(agent, job)[SLEEPS]
        pidfd = os.dup(before.pidfd)  # the agent closes its own when it sees the end
        job.kill(SLEEPS)
        await asyncio.to_thread(job.processes[SLEEPS].wait)
        found = await collect(
            [dataclasses.replace(before, pidfd=pidfd), Target.gone(SLEEPS, before.pid, log=before.log)], SECONDS
        )
        os.close(pidfd)
        for gone in found:
            assert (gone.rank, gone.pid, gone.state) == (SLEEPS, before.pid, "X")
            assert (gone.answers, gone.stack, gone.enqueued) == (False, "", -1)
            assert gone.log_tail == "epoch 1: 100%"

    attached(scenario)


@can_spy
def test_a_rank_that_cannot_answer_is_seen_by_py_spy(attached: Any) -> None:
    async def scenario(agent: Agent, job: Job) -> None:
        _, _, spins, stopped = await evidence(agent, job)
        assert lines(spins) >= {"main", "stuck"}
        assert "thread MainThread holds the interpreter lock" in spins.notes
        assert "libc.so" in spins.native_stack
        assert lines(stopped) >= {"main", "stuck"}
        assert stopped.native_stack == ""
        pid = job.reports(rank=SPINS)[-1]["pid"]
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"  # it was let go again

    attached(scenario)


def test_an_order_is_carried_out_in_time_whatever_hangs_and_without_py_spy(
    attached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spy, "find", lambda: None)

    async def scenario(agent: Agent, job: Job) -> None:
        def cards() -> list[str]:
            time.sleep(5)
            return []

        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        ranks = [dataclasses.replace(target, log=pipe) for target in targets(agent, job)]
        order = pb.Examine(attempt=1, incident="1-1", ranks=[SLEEPS, SPINS, STOPPED, 77], seconds=2.0)
        ticks = asyncio.ensure_future(count_ticks())
        began = time.monotonic()
        found = await examine(order, "job", "node", ranks, cards)
        assert time.monotonic() - began < 20
        ticks.cancel()
        assert await ticks > 10  # the agent went on with its own affairs
        assert (found.job, found.attempt, found.incident, found.node) == ("job", 1, "1-1", "node")
        sleeps, spins, stopped, unknown = found.ranks
        assert [each.rank for each in found.ranks] == list(order.ranks)
        assert [each.state for each in found.ranks] == ["S", "R", "T", ""]
        assert lines(sleeps) >= {"main", "stuck"}  # it speaks for itself
        for silent in (spins, stopped):
            assert silent.stack == ""
            assert {"py-spy is not installed on this node", f"the log: {pipe} is not a file"} <= set(silent.notes)
        assert unknown.notes == ["this node knows no such rank"]
        assert found.nics == ["the network cards did not say how they are within 2 s"]
        for seconds in (0.0, -1.0, float("nan"), 1e300):
            order = pb.Examine(attempt=1, incident="1-1", ranks=[STOPPED], seconds=seconds)
            (again,) = (await examine(order, "job", "node", ranks, lambda: ["cxi0 is down\x1b[0m"])).ranks
            assert again.state == "T"

    attached(scenario)


async def count_ticks() -> int:
    count = 0
    try:
        while True:
            await asyncio.sleep(0.02)
            count += 1
    except asyncio.CancelledError:
        return count
