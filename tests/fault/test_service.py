"""The agent as a system service: a job trains and saves on while it is upgraded, restarted, or short of things."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.damage import assert_intact, steps
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc

Service = Callable[[], "subprocess.Popen[bytes]"]

PATIENT = 10.0
"""Seconds of a step that are surely a wait for somebody: a step takes 20 ms."""


def train(rank: Rank, store: str) -> dict[str, Any]:
    """Steps at its own pace, and saves every fifth, until the test says to end at a step."""
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(200_000)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=5)
    longest, end = 0.0, rank.folder / "go-end"
    while True:
        began = time.monotonic()
        tensor += 1
        run.step()
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.02)
        if run.steps_done % 10 == 0:
            rank.report("stepped", step=run.steps_done, committed=run.committed_step)
            stop = torch.tensor([float(end.exists())])
            if rank.world > 1:
                torch.distributed.all_reduce(stop)
            if stop.item():
                break
    saved = run.save(wait=True, timeout=30.0)
    run.close()
    return {"attempt": rank.attempt, "longest": longest, "skipped": run.skipped, "saved": saved, "step": run.steps_done}


def committed(job: Job, store: Path, after: int) -> int:
    """Wait until a later step than that is committed, and the ranks know it."""

    def newer() -> int:
        known = [line["committed"] for line in job.reports("stepped") if line["committed"] is not None]
        return max(known, default=-1) if max(known, default=-1) > after else 0

    eventually(newer, f"a step after {after} to be committed", 60)
    return max(steps(store))


def being_saved(runtime: Runtime) -> int:
    """Stop the next shard in the middle; returns the step it is of."""
    (runtime.failpoints / "in_shard.held").unlink(missing_ok=True)  # of a worker that was killed there
    runtime.arm("in_shard")
    runtime.reached("in_shard")
    return max(arena["step"] for arena in runtime.status()["arenas"] if arena["state"] == "staged")


def is_committed(store: Path, step: int) -> None:
    """Wait for the end of a save that was running when the agent went."""
    eventually(lambda: step in steps(store), f"step {step}, whose save was running, to be committed", 60)


def ends_well(job: Job, store: Path, world: int) -> None:
    """The ranks are those of the beginning, never waited for an agent, and everything is committed."""
    job.go("end")
    for result in job.results():
        assert result["saved"]
        assert result["attempt"] == (1 if world > 1 else 0), "the job was started anew"
        assert result["longest"] < PATIENT
    assert assert_intact(store)[0] == result["step"]


@pytest.fixture
def service(runtime: Runtime) -> Iterator[Service]:
    """Starts the agent as a service manager does; it ends in good order, unless the test has ended it."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(runtime.start_agent())
        return started[-1]

    yield start
    for agent in started:
        if agent.poll() is None:
            agent.terminate()
            assert agent.wait(20) == 0


@pytest.fixture
def installed(runtime: Runtime, tmp_path: Path) -> Path:
    """Where the code of the service lies: a link, as an installation is that can be exchanged."""
    old, link = tmp_path / "old", tmp_path / "current"
    old.mkdir()
    (old / "ckptsvc").symlink_to(Path(ckptsvc.__file__).parent)
    link.symlink_to(old)
    runtime.environ |= {"PYTHONPATH": f"{link}:{runtime.environ['PYTHONPATH']}", "PYTHONSAFEPATH": "1"}
    return link


def upgrade(link: Path, version: str) -> None:
    """Install another version, at once."""
    new = link.parent / f"new-{version}"
    shutil.copytree(Path(ckptsvc.__file__).parent, new / "ckptsvc", ignore=shutil.ignore_patterns("__pycache__"))
    source = new / "ckptsvc" / "__init__.py"
    source.write_text(source.read_text().replace(f'"{ckptsvc.__version__}"', f'"{version}"'))
    fresh = link.with_name("fresh")
    fresh.symlink_to(new)
    fresh.rename(link)


def test_an_upgrade_in_place_with_a_job_that_saves(
    launch: Launch, runtime: Runtime, service: Service, tmp_path: Path, installed: Path
) -> None:
    store = tmp_path / "run"
    agent = service()
    with launch.service(2, train, str(store)) as job:
        committed(job, store, 0)
        step = being_saved(runtime)
        arenas = {path.name for path in runtime.arenas.rglob("*.arena")}
        upgrade(installed, "9.9.9")
        command = [sys.executable, "-m", "ckptsvc.cli.main", "agent", "--replace", "--dir", str(runtime.sockets)]
        done = subprocess.run(command, env=runtime.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        status = runtime.status()
        assert (status["pid"], status["version"]) == (agent.pid, "9.9.9")
        assert {path.name for path in runtime.arenas.rglob("*.arena")} == arenas
        is_committed(store, step)
        committed(job, store, step)
        assert [coordinated["world_size"] for coordinated in runtime.status()["coordinates"]] == [2]
        ends_well(job, store, 2)
    assert "lost the agent" in job.output()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_under_load(
    launch: Launch, runtime: Runtime, service: Service, tmp_path: Path, how: signal.Signals
) -> None:
    """`systemctl restart`: the old agent ends, then the new one starts. Its job may be faster, with one of its own."""
    store = tmp_path / "run"
    agent = service()
    with launch.service(2, train, str(store)) as job:
        last = committed(job, store, 0)
        for _ in range(2):
            step = being_saved(runtime)
            agent.send_signal(how)
            agent.wait(20)
            agent = service()
            assert agent.poll() is None, "it has not taken the directory over"
            is_committed(store, step)
            last = committed(job, store, last)
        ends_well(job, store, 2)


def test_an_upgrade_to_what_does_not_start_is_refused(runtime: Runtime, service: Service, installed: Path) -> None:
    agent = service()
    upgrade(installed, "9.9.9")
    (installed / "ckptsvc" / "settings.py").write_text("import nothing_of_that_name\n")
    os.kill(agent.pid, signal.SIGUSR2)
    (line,) = eventually(
        lambda: [line for line in runtime.log().splitlines() if "cannot be replaced" in line], "the refusal"
    )
    assert "the agent goes on as before" in line
    assert "nothing_of_that_name" in line
    assert runtime.status()["pid"] == agent.pid
