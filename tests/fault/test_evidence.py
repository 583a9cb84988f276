"""Evidence from ranks that are stuck in different ways, collected by the agent they are attached to."""

import asyncio
import itertools
import os
import signal
import sys
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

import ckptsvc
from ckptsvc.agent import spy
from ckptsvc.agent.evidence import Target, collect, examine
from ckptsvc.agent.server import Agent, Options
from ckptsvc.config import load
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

SECONDS = 6.0
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
            job.go("on")
            os.kill(job.reports(rank=STOPPED)[-1]["pid"], signal.SIGSTOP)
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


def test_x(attached: Any) -> None:
    async def scenario(agent: Agent, job: Job) -> None:
        t = time.time()
        for each in await collect(targets(agent, job), SECONDS):
            print(each)
        print(time.time() - t)

    attached(scenario)
    assert 0
