"""Nodes that fail too often, and nodes that come while the job runs: each is a `ckptsvc run` with its own agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.damage import assert_intact
from harness.job import free_port
from harness.runtime import Runtime, eventually
from harness.shell_run import Run, kill

PATIENCE = 90.0


def scraped(runtime: Runtime, node: str) -> dict[str, float]:
    """The metrics of a node's agent, as Prometheus gets them."""
    address = (runtime.sockets / f"node-{node}" / "ready").read_text().split("\n")[2]
    lines = runtime.metrics(address).splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def flags(nnodes: str, port: int, number: int) -> list[str]:
    return ["--nnodes", nnodes, "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node", f"n{number}",
        "--node-rank", str(number), "--max-restarts", "9", "--no-preflight"]  # fmt: skip


WAIT = 'while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.05; done'


@pytest.fixture
def runs(runtime: Runtime, tmp_path: Path) -> Iterator[Any]:
    """Starts `ckptsvc run` as node NUMBER of a job with ranks that are shell scripts."""
    port, started = free_port(), []

    def start(number: int, nnodes: str, *options: str, **environ: str) -> Run:
        started.append(Run(runtime, tmp_path, WAIT, *flags(nnodes, port, number), *options, **environ))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def test_a_node_that_fails_too_often_is_drained_and_its_incidents_are_counted(
    runs: Any, runtime: Runtime, tmp_path: Path
) -> None:
    stand_in, said = tmp_path / "bin" / "scontrol", tmp_path / "said"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nfor each in "$@"; do echo "$each"; done >> {said}\n')
    stand_in.chmod(0o755)
    environ = {
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "CKPTSVC_SCHEDULER_DRAIN": "true",
        "CKPTSVC_AGENT_METRICS_LISTEN": "127.0.0.1:0",
    }
    options = ["--crash-loop", "0", "--grow", "off"]
    first, second = (runs(number, "1:2", *options, **environ) for number in (0, 1))
    for attempt in (1, 2, 3):
        pid, node = first.rank(attempt, 1)
        assert node == "n1"
        first.rank(attempt, 0)
        kill(pid)
    assert first.rank(4, 0)[1] == "n0"
    eventually(said.exists, "the node to be drained")
    assert said.read_text().splitlines()[:3] == ["update", "nodename=n1", "state=drain"]
    reason = said.read_text().splitlines()[3]
    assert reason.startswith("reason=ckptsvc: incident 3-1-")
    assert reason.endswith(" of job job: rank 1 was killed by signal 9")
    eventually(lambda: "node n1 is drained: incident 3-1" in runtime.log(), "that to be logged")
    found = scraped(runtime, "n0")
    assert found['ckptsvc_restarts_total{cause="died"}'] == 3
    assert found['ckptsvc_incidents_total{kind="died"}'] == 3
    assert found['ckptsvc_incidents_total{kind="hung"}'] == 0
    assert found['ckptsvc_restarts_total{cause="node-lost"}'] == 0
    (tmp_path / "go").touch()
    assert [run.end() for run in (first, second)] == [0, 0]
    assert first.attempts() == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_a_scheduler_that_refuses_to_drain_a_node_does_not_hurt_the_job(
    runs: Any, runtime: Runtime, tmp_path: Path
) -> None:
    stand_in = tmp_path / "bin" / "scontrol"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\necho slurm_update error: Invalid user id\nexit 1\n")
    stand_in.chmod(0o755)
    environ = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "CKPTSVC_SCHEDULER_DRAIN": "true"}
    first, second = (runs(number, "1:2", "--crash-loop", "0", **environ) for number in (0, 1))
    for attempt in (1, 2, 3):
        first.rank(attempt, 0)
        kill(first.pid(attempt, 1))
    assert first.rank(4, 0)[1] == "n0"
    eventually(lambda: "node n1 is not drained: scontrol exited with status 1" in runtime.log(), "that to be logged")
    (tmp_path / "go").touch()
    assert [run.end() for run in (first, second)] == [0, 0]


TRAIN = """
import os, sys, time
import torch, torch.distributed as dist
import ckptsvc
notes, store = sys.argv[1:]
dist.init_process_group("gloo")
tensor, going = torch.zeros(1000), torch.ones(1)
run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
name = "-".join(os.environ[v] for v in ("CKPTSVC_ATTEMPT", "RANK"))
with open(f"{notes}/{name}", "w", buffering=1) as note:
    print("attached", run.steps_done, int(tensor[0].item()), dist.get_world_size(), file=note)
    while going.item():
        tensor.fill_(run.steps_done + 1)
        run.step()
        print("stepped", run.steps_done, file=note)
        time.sleep(0.05)
        going.fill_(0 if os.path.exists(f"{notes}/end") else 1)
        dist.all_reduce(going, op=dist.ReduceOp.MIN)
run.close()
"""


class Training:
    """A training that says in files what it does, as node NUMBER of a job of one or two nodes."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime, self._folder, self._port = runtime, folder, free_port()
        self.notes = folder / "notes"
        self.notes.mkdir()
        (folder / "train.py").write_text(TRAIN)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, number: int) -> None:
        command = [sys.executable, "-m", "ckptsvc.cli.main", "run", *flags("1:2", self._port, number), "--address",
            "127.0.0.1", str(self._folder / "train.py"), str(self.notes), str(self._folder / "store")]  # fmt: skip
        with (self._folder / f"run-{number}.log").open("wb") as log:
            self.started.append(subprocess.Popen(command, env=self._runtime.environ, stdout=log, stderr=log))

    def said(self, attempt: int, rank: int, steps: int) -> list[int]:
        """(step, value, world size) that a rank began with, once it has done so many steps."""
        path = self.notes / f"{attempt}-{rank}"
        logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in self._folder.glob("run-*.log"))
        eventually(
            lambda: path.exists() and path.read_text().count("stepped") >= steps, f"{path.name}: {logs}", PATIENCE
        )
        return [int(word) for word in path.read_text().splitlines()[0].split()[1:]]

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


@pytest.fixture
def training(runtime: Runtime, tmp_path: Path) -> Iterator[Training]:
    found = Training(runtime, tmp_path)
    yield found
    found.close()


@pytest.mark.slow
def test_a_job_grows_at_its_next_checkpoint_when_a_node_comes(training: Training, runtime: Runtime) -> None:
    """It saves nothing by itself: the checkpoint is asked for."""
    training.start(0)
    assert training.said(1, 0, 20) == [0, 0, 1]
    training.start(1)
    began = [training.said(2, rank, 3) for rank in (0, 1)]
    assert began[0] == began[1]
    step, value, world = began[0]
    assert (value, world) == (step, 2)
    assert step > 20
    log = runtime.log()
    assert f"node n1 can be used: the job grows from 1 to 2 nodes, at the checkpoint of step {step}" in log
    assert "restart 1 of" not in log
    (training.notes / "end").touch()
    assert [process.wait(PATIENCE) for process in training.started] == [0, 0]
    assert step in assert_intact(training.notes.parent / "store")
