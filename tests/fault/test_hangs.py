"""Ranks that hang, in real processes: seen, the right one named, killed where that is sure, and stepping again.

Most ranks here have no torch (`harness.beating`): agent, coordinator and launcher are the real ones.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness.job import Job, Launch
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc
from ckptsvc.agent.incidents import IncidentLog
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

QUICK = {
    "CKPTSVC_HEALTH_FLOOR": "500ms",
    "CKPTSVC_HEALTH_CONFIRM": "200ms",
    "CKPTSVC_HEALTH_STARTUP": "60s",
}
"""Settings under which a hang is noticed within a second."""

WARM = 120
"""Steps after which a training has a history."""


def incidents(runtime: Runtime) -> list[pb.Incident]:
    """What was kept of the job's incidents, in the order of their ids."""
    kept = IncidentLog(runtime.root / ".local/state/ckptsvc/incidents").newest_first()
    return sorted((k.incident for k in kept if isinstance(k.incident, pb.Incident)), key=lambda i: i.id)


def await_incident(runtime: Runtime, action: str) -> pb.Incident:
    """Wait for an incident about which this was done."""

    def found() -> pb.Incident | None:
        return next((i for i in incidents(runtime) if any(action in done for done in i.actions)), None)

    incident: pb.Incident = eventually(found, f"an incident with: {action}")
    return incident


def await_steps(job: Job, attempt: int, rank: int = 0) -> None:
    """Wait for steps that have not been done yet."""
    done = max((x["step"] for x in job.reports("stepped", rank) if x["attempt"] == attempt), default=0)
    job.wait_for("stepped", rank, attempt=attempt, step=done + 80)


def end(job: Job) -> None:
    """End the job in good order."""
    job.go("end")
    assert job.wait() == [0]


@pytest.mark.slow
def test_stopped_ranks_are_killed_one_after_the_other(launch: Launch, runtime: Runtime) -> None:
    """In a step, before the first one, and inside a phase with a history of its own."""
    with launch.beating(3, **QUICK) as job:
        await_steps(job, 1)
        job.fault("stop", rank=1)
        await_steps(job, 2)
        job.fault("hang_in_an_evaluation", rank=2, attempt=2)
        await_steps(job, 3)
        (pid,) = {line["pid"] for line in job.reports("begun", 0) if line["attempt"] == 3}
        os.kill(pid, signal.SIGSTOP)
        await_steps(job, 4)
        end(job)
    assert [(i.kind, i.attempt, i.rank) for i in incidents(runtime)] == [("hung", 1, 1), ("hung", 2, 2), ("hung", 3, 0)]
    for incident in incidents(runtime):
        assert "its process is stopped (state T)" in incident.signals
        assert incident.sentence.startswith(f"rank {incident.rank} on {incident.node} hung: ")
        assert [action.split()[0] for action in incident.actions] == ["SIGKILL", "restart"]
        assert 0.5 < incident.detected < 30
        assert len(incident.ranks) == 3
    assert any("in phase evaluation, where 0.5 s are allowed" in signal for signal in incidents(runtime)[1].signals)
    assert re.search(r"stopping attempt 1: rank 1 on \S+ hung: ", job.output())


def test_a_rank_that_computes_for_ever_is_killed_when_it_stands_still(launch: Launch, runtime: Runtime) -> None:
    with launch.beating(2, "--log-dir", str(runtime.root / "logs"), **QUICK) as job:
        await_steps(job, 1)
        job.fault("compute", rank=1)
        incident = await_incident(runtime, "SIGKILL")
        await_steps(job, 2)
        end(job)
    assert (incident.rank, incident.confidence) == (1, 0.8)
    assert [evidence.log_tail for evidence in incident.ranks] == ["rank 0 begins", "rank 1 begins"]
    lines = [json.loads(line) for line in (runtime.root / ".local/state/ckptsvc/audit.jsonl").read_text().splitlines()]
    own = {line["verb"]: line for line in lines if line["user"] == "ckptsvc"}  # nobody has ordered it
    assert (own["kill"]["target"], own["kill"]["outcome"], own["restart"]["uid"]) == ("rank 1", "done", -1)
    assert own["restart"]["what"] == f"hung: {incident.sentence}"


def test_a_job_that_pauses_goes_on(launch: Launch, runtime: Runtime) -> None:
    """A declared evaluation is not even an incident; a pause of one rank, which is no work, is told and survived."""
    with launch.beating(2, **(QUICK | {"CKPTSVC_HEALTH_CONFIRM": "60s"})) as job:
        await_steps(job, 1)
        job.fault("evaluate", rank=1)
        await_steps(job, 1)
        job.fault("pause", rank=0)
        await_incident(runtime, "went on by itself after")
        await_steps(job, 1)
        end(job)
    assert not [done for i in incidents(runtime) for done in i.actions if "restart" in done]
    assert {line["attempt"] for line in job.reports()} == {1}


def test_a_stopped_agent_does_its_ranks_no_harm(launch: Launch, runtime: Runtime) -> None:
    with launch.beating(2, **QUICK) as job:
        await_steps(job, 1)
        (agent,) = runtime.agents()
        os.kill(agent.pid, signal.SIGSTOP)
        time.sleep(2.5)
        await_steps(job, 1)
        os.kill(agent.pid, signal.SIGCONT)
        time.sleep(1.0)
        await_steps(job, 1)
        job.fault("stop", rank=0)
        await_steps(job, 2)
        end(job)
    assert [i.rank for i in incidents(runtime)] == [0]


@pytest.mark.slow
def test_a_new_agent_takes_the_watch_over(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    """It has no history of the ranks; a stopped process needs none."""
    with launch.service(2, train, {}, str(tmp_path / "run"), **QUICK) as job:
        job.wait_for("stepped", 1, count=20)
        (agent,) = runtime.agents()
        os.kill(agent.pid, signal.SIGKILL)
        eventually(lambda: agent not in runtime.agents() and runtime.agents(), "another agent")
        eventually(lambda: runtime.log().count("registered") == 4, "the ranks to register again")
        os.kill(job.reports("begun", 1)[-1]["pid"], signal.SIGSTOP)
        job.wait_for("stepped", 1, attempt=2)
        job.go("end")
        job.results()


@pytest.mark.parametrize("automatic", [pytest.param("never", marks=pytest.mark.slow), "always"])
def test_a_job_without_a_launcher(launch: Launch, runtime: Runtime, tmp_path: Path, automatic: str) -> None:
    settings = QUICK | {"CKPTSVC_HEALTH_AUTOMATIC": automatic}
    with launch.plain(2, train, {"0": "stop"}, str(tmp_path / "run"), **settings) as job:
        job.wait_for("fault", 1)
        if automatic == "always":
            assert await_incident(runtime, "SIGKILL").rank == 1
            eventually(lambda: job.processes[1].poll() == -signal.SIGKILL, "the rank's end")
        else:
            (incident,) = eventually(lambda: incidents(runtime), "an incident")
            assert incident.rank == 1
            time.sleep(1)
            assert job.processes[1].poll() is None


def train(rank: Rank, faults: dict[str, str], store: str) -> int:
    """Steps over gloo until the test says to end; in attempt n, rank 1 does faults[n] after some of them."""
    rank.join()
    tensor, ends = torch.zeros(10), torch.zeros(1)
    run = ckptsvc.attach({"tensor": tensor}, store=store, every=10)
    fault = faults.get(str(rank.attempt), "") if rank.number == 1 else ""
    for step in range(1, 100_000):
        ends.fill_((rank.folder / "go-end").exists())
        dist.all_reduce(ends)
        if ends:
            break
        if fault and step == WARM:
            rank.report("fault")
            FAULTS[fault](run)
        time.sleep(0.01)
        run.step()
        if step % 10 == 0:
            rank.report("stepped", count=step)
    run.close()
    return run.steps_done


def stop(run: ckptsvc.Session) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loop_with_the_interpreter_lock(run: ckptsvc.Session) -> None:
    sum(iter(int, 1))


def loop_without_it(run: ckptsvc.Session) -> None:
    while True:
        torch.mm(torch.ones(1500, 1500), torch.ones(1500, 1500))


def wait_for_a_data_loader(run: ckptsvc.Session) -> None:
    read, _ = os.pipe()
    os.read(read, 1)


def hang_in_an_evaluation(run: ckptsvc.Session) -> None:
    for _ in range(25):  # longer than the agent's looks are apart: it is to see enough of them
        with run.phase("evaluation"):
            time.sleep(0.3)
    with run.phase("evaluation"):
        wait_for_a_data_loader(run)


FAULTS = {
    f.__name__: f
    for f in (stop, loop_with_the_interpreter_lock, loop_without_it, wait_for_a_data_loader, hang_in_an_evaluation)
}


@pytest.mark.slow
def test_a_stopped_rank_of_a_training(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    with launch.service(2, train, {"1": "stop"}, str(tmp_path / "run"), **QUICK) as job:
        job.wait_for("stepped", 1, attempt=2)
        job.go("end")
        steps = job.results()
    assert min(steps) > WARM - 20, "the second attempt has not begun where the first one was saved"
    assert [i.rank for i in incidents(runtime)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"stop"}))
def test_other_hangs_of_a_training(launch: Launch, runtime: Runtime, tmp_path: Path, fault: str) -> None:
    with launch.service(2, train, {"1": fault}, str(tmp_path / "run"), **QUICK) as job:
        incident = await_incident(runtime, "SIGKILL")
        job.wait_for("stepped", 1, attempt=2)
        job.go("end")
        job.results()
    assert incident.rank == 1
    assert len(incident.signals) > 2
