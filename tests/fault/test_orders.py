"""What people order, with real agents and ranks: a checkpoint, no snapshots, a restart, a node that is switched off.

All is ordered by the command line; what comes of it is in its answer, in the job, and in the audit log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from harness.damage import steps
from harness.job import Job, Launch, free_port
from harness.observability import scrape
from harness.rank import Rank
from harness.runtime import Runtime, eventually
from harness.shell_run import Run

import ckptsvc

PACE = 0.02
"""Seconds of a step: fast enough to wait for, slow enough that a step can be agreed on."""

Order = Any
"""Gives an order with these arguments; returns what its JSON says."""


def train(rank: Rank, store: str, every: int) -> None:
    """Steps until the job is told to stop."""
    if rank.world > 1:
        rank.join()
    tensor = torch.zeros(100)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=every)
    rank.report("attached", step=run.steps_done, value=tensor[0].item())
    going = torch.ones(1)
    while going.item():
        tensor += 1
        going.fill_(0 if (rank.folder / "go-end").exists() else 1)
        if rank.world > 1:
            torch.distributed.all_reduce(going, op=torch.distributed.ReduceOp.MIN)
        time.sleep(PACE)
        run.step()
        if run.steps_done % 10 == 0:
            rank.report("stepped", step=run.steps_done)


@pytest.fixture
def order(runtime: Runtime) -> Order:
    def give(*arguments: str, status: int = 0, **environ: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "ckptsvc.cli.main", *arguments, "--json"]
        ended = subprocess.run(
            command, env=runtime.environ | environ, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == status, f"{ended.returncode}: {ended.stdout}\n{ended.stderr}\n{runtime.log()}"
        found: dict[str, Any] = json.loads(ended.stdout)
        return found

    return give


def last_step(job: Job) -> int:
    return int(max((line["step"] for line in job.reports("stepped", 0)), default=0))


def goes_on(job: Job, by: int) -> None:
    """Wait until the job is so many steps further."""
    before = last_step(job)
    eventually(lambda: last_step(job) >= before + by, f"{by} further steps")


def registered(runtime: Runtime) -> int:
    """Ranks that the agent knows; none while it does not answer."""
    try:
        return len(runtime.status()["ranks"])
    except grpc.RpcError:
        return 0


def audited(order: Order) -> list[tuple[str, str]]:
    return [(entry["verb"], entry["outcome"]) for entry in order("audit")["entries"]]


def test_a_checkpoint_is_taken_also_while_a_job_is_paused_and_that_survives_its_agent(
    launch: Launch, runtime: Runtime, order: Order, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with launch.plain(2, train, str(store), 20, CKPTSVC_AGENT_METRICS_LISTEN="127.0.0.1:0") as job:

        def told_as_paused() -> list[float]:
            return list(scrape(runtime.agent_directory())["ckptsvc_job_paused"].values())

        for rank in range(2):
            job.wait_for("stepped", rank)
        assert told_as_paused() == [0]
        paused = order("pause", "--reason", "the file system is slow")
        assert paused["done"]
        since = paused["step"]
        eventually(lambda: last_step(job) > since, "the step from which on it holds")
        (agent,) = runtime.agents()
        os.kill(agent.pid, signal.SIGKILL)
        eventually(lambda: agent not in runtime.agents() and registered(runtime) == 2, "the ranks to start another")
        goes_on(job, 50)
        before = steps(store)
        assert max(before, default=0) <= since
        saved = order("checkpoint")
        assert saved["done"]
        assert saved["step"] in steps(store)
        assert saved["bytes"] > 0
        (told,) = runtime.status()["paused"]
        assert (told["step"], told["reason"]) == (since, "the file system is slow")
        assert told_as_paused() == [1]
        resumed = order("resume")
        eventually(lambda: max(steps(store)) > max(saved["step"], resumed["step"]), "an automatic snapshot")
        between = [step for step in steps(store) if since <= step < resumed["step"]]
        assert between == [saved["step"]]
        assert told_as_paused() == [0]
        job.go("end")
        assert job.wait() == [0, 0]
    assert audited(order) == [("pause", "done"), ("checkpoint", "done"), ("resume", "done")]


@pytest.mark.slow
def test_a_pause_ends_by_itself(launch: Launch, order: Order, runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "run"
    with launch.plain(1, train, str(store), 5) as job:
        job.wait_for("stepped")
        since = order("pause", "--for", "2s")["step"]
        eventually(lambda: "the time it was paused for is over" in runtime.log(), "the end of the pause")
        eventually(lambda: max(steps(store), default=0) > since, "an automatic snapshot")
        job.go("end")
        job.wait()


@pytest.mark.slow
def test_a_restart_goes_on_from_the_newest_snapshot_and_is_no_failure(
    launch: Launch, runtime: Runtime, order: Order, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    options = ["--max-restarts", "0", "--rdzv-id", "gpt", "--no-preflight"]
    with launch.service(2, train, str(store), 10, options=options, CKPTSVC_LAUNCH_STANDBY="false") as job:
        for rank in range(2):
            job.wait_for("stepped", rank, step=20)
        eventually(lambda: steps(store), "a checkpoint")
        said = order("restart", "gpt", "--reason", "new data")
        assert "attempt 2 has begun" in said["what"][0]
        attached = job.wait_for("attached", 0, attempt=2)
        assert attached["step"] > 0
        assert attached["value"] == attached["step"]
        job.wait_for("stepped", 0, attempt=2)
        (own,) = runtime.status()["coordinates"]
        assert own["restarts"] == 0
        assert any("restarted by" in each and "new data" in each for each in own["incidents"])
        refused = order("restart", "nobody", status=10)
        assert "gpt" in refused["error"]["hint"]
        job.go("end")
        assert job.wait() == [0]
    assert audited(order) == [("restart", "done")]


WAIT = 'while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.05; done'


def test_a_launched_job_is_restarted_and_leaves_a_node_that_is_drained(
    runtime: Runtime, order: Order, tmp_path: Path
) -> None:
    port, runs = free_port(), []

    def start(number: int) -> None:
        options = ["--nnodes", "2:2", "--rdzv-id", "gpt", "--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "0"]
        runs.append(
            Run(runtime, tmp_path, WAIT, *options, "--node", f"n{number}", "--node-rank", str(number), "--no-preflight")
        )

    try:
        start(0)
        start(1)
        assert {runs[0].rank(1, rank)[1] for rank in (0, 1)} == {"n0", "n1"}
        start(2)
        eventually(lambda: "node n2 joined as a spare" in runtime.log(), "the spare")
        assert order("exclude", "n2", "--job", "gpt", "--reason", "a fan")["done"]
        assert "attempt 2 has begun" in order("restart", "gpt")["what"][0]
        assert {runs[0].rank(2, rank)[1] for rank in (0, 1)} == {"n0", "n1"}
        left = order("drain", "n1", "--timeout", "30s", status=3)["left"]
        assert any("cannot do without n1" in line for line in left)
        order("include", "n2", "--job", "gpt")
        assert order("drain", "n1", "--timeout", "30s")["done"]
        assert {runs[0].rank(3, rank)[1] for rank in (0, 1)} == {"n0", "n2"}
        assert order("drain", "n2", "--job", "gpt", status=3)["left"]  # through any agent that has the job

        def excluded() -> set[str]:
            return {node["node"] for node in order("nodes")["nodes"] if node["excluded"]}

        eventually(lambda: excluded() == {"n1", "n2"}, "the list of nodes to be written")
        refused = Run(runtime, tmp_path, WAIT, "--rdzv-id", "another", "--node", "n1", "--nnodes", "1:2",
            "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--no-preflight")  # fmt: skip
        assert refused.end() == 87
        assert "takes no new jobs: drained by" in refused.log.read_text()
        (tmp_path / "go").touch()
        assert [run.end() for run in runs] == [0, 0, 0]
    finally:
        for run in runs:
            run.process.kill()
            run.process.wait()
    entries = [(e["verb"], e["target"], e["outcome"], e["asked_on"]) for e in order("audit")["entries"]]
    assert ("drain", "n1", "done", "") in entries
    assert ("drain", "n1", "done", "n1") in entries  # as the agent of the coordinator has it
    assert ("restart", "", "done", "") in entries


class Nodes:
    """`ckptsvc run` on several nodes of one machine."""

    def __init__(self, runtime: Runtime, folder: Path, store: Path, nnodes: str) -> None:
        spec = {"file": __file__, "function": "train", "arguments": [str(store), 10], "folder": str(folder)}
        folder.mkdir()
        script = Path(__file__).parents[1] / "harness" / "rank.py"
        flags = ["--nnodes", nnodes, "--rdzv-id", "gpt", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        self._command = [sys.executable, "-m", "ckptsvc.cli.main", "run", *flags, "--no-preflight", "--no-standby"]
        self._runtime, self._folder, self._rank = runtime, folder, [str(script), json.dumps(spec)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        self.job = Job(runtime, folder, 3, self.processes, self.logs)

    def start(self, node: str) -> None:
        """Start it on one more node."""
        self.logs.append(self._folder / f"{node}.log")
        with self.logs[-1].open("wb") as log:
            command = [*self._command, "--node", node, "--node-rank", node[1:], *self._rank]
            self.processes.append(
                subprocess.Popen(command, env=self._runtime.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )


@pytest.mark.slow
def test_a_node_is_drained_and_the_job_goes_on_without_it(runtime: Runtime, order: Order, tmp_path: Path) -> None:
    store = tmp_path / "run"
    nodes = Nodes(runtime, tmp_path / "job", store, "2:2")
    with nodes.job as job:
        nodes.start("n0")
        nodes.start("n1")
        for rank in range(2):
            job.wait_for("stepped", rank)
        nodes.start("n2")
        eventually(lambda: "node n2 joined as a spare" in runtime.log(), "the spare")
        leads = order("drain", "n0", "--timeout", "60s", status=3)
        assert any("coordinated by the agent of n0" in line or "cannot" in line for line in leads["left"])
        order("undrain", "n0")
        drained = order("drain", "n1", "--reason", "a fan", "--timeout", "60s")
        assert drained["done"]
        eventually(lambda: job.reports("attached", 1)[-1]["attempt"] > 1, "ranks on another node")
        status = runtime.status(runtime.sockets / "node-n1")
        assert status["ranks"] == []
        assert "a fan" in status["vacated"] or "drained by" in status["vacated"]
        aside = runtime.status(runtime.sockets / "node-n0")["coordinates"][0]["aside"]
        assert "is excluded: drained by" in aside["n1"]
        nodes.processes[1].kill()  # it is switched off
        goes_on(job, 30)
        assert job.reports("attached")[-1]["value"] == job.reports("attached")[-1]["step"] > 0
        job.go("end")
        assert [nodes.processes[0].wait(60), nodes.processes[2].wait(60)] == [0, 0]
    verbs = [(entry["verb"], entry["target"], entry["outcome"]) for entry in order("audit")["entries"]]
    assert ("drain", "n1", "done") in verbs
    assert ("drain", "n0", "failed") in verbs
