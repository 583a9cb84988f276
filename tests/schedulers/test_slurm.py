"""The batch template under a real Slurm with virtual nodes: a lost node, the end of its time, an array, scancel.

Needs Slurm's daemons and root (`make test-slurm` installs and runs); everywhere else it is skipped.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.runtime import Runtime, eventually
from harness.slurm import Slurm, missing

from ckptsvc.agent.coordination.drain import drain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

TEMPLATE = Path(__file__).parents[2] / "deploy" / "slurm" / "ckptsvc.sbatch"
TRAIN = Path(__file__).with_name("train.py")
PATIENCE = 240.0


class Job:
    """A batch job made from the template."""

    def __init__(self, slurm: Slurm, folder: Path, *options: str, arguments: tuple[str, ...], **environ: str) -> None:
        self._slurm, self._folder = slurm, folder
        command = ["sbatch", "--parsable", f"--chdir={folder}", *options, str(TEMPLATE), str(TRAIN), *arguments]
        self.number = slurm.run(*command, **environ).strip()

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("*.out")))

    @property
    def state(self) -> str:
        return self._slurm.job(self.number).get("JobState", "")

    def said(self, pattern: str, times: int = 1) -> list[re.Match[str]]:
        """Wait until the output has matches of the pattern; returns them."""

        def found() -> list[re.Match[str]]:
            return list(re.finditer(pattern, self.output()))

        with self.explained():
            eventually(lambda: len(found()) >= times or self.state in ("FAILED", "CANCELLED"), pattern, PATIENCE)
            assert len(found()) >= times, f"the job ended without {pattern}"
        return found()

    def ends(self, state: str) -> None:
        with self.explained():
            ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            eventually(lambda: self.state in ended, "the job to end", PATIENCE)
            assert self.state == state

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._slurm.job(self.number)}\n{self.output()}") from None


@pytest.fixture
def slurm(request: pytest.FixtureRequest, runtime: Runtime, tmp_path: Path) -> Iterator[Slurm]:
    """Three nodes, or so many with switches as the test says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ckptsvc = programs / "ckptsvc"
    ckptsvc.write_text(f'#!/bin/sh\nexec {sys.executable} -m ckptsvc.cli.main "$@"\n')
    ckptsvc.chmod(0o755)
    count, switches = getattr(request, "param", (3, ()))
    cluster = Slurm(runtime.root / "slurm", runtime.environ, count, switches)
    cluster.environ["PATH"] = f"{programs}{os.pathsep}{cluster.environ['PATH']}"
    try:
        cluster.start()
        yield cluster
    finally:
        runtime.leaves_snapshots = True  # Slurm kills an agent with its step, and what it held waits for the next one
        cluster.stop()
        for log in (runtime.root / "slurm").glob("*.log"):
            shutil.copy(log, tmp_path)


def processes_of(runtime: Runtime, node: str) -> list[int]:
    """What runs for a job on a virtual node: launcher, rank, agent and Slurm's step daemon."""
    found = set()
    for process in runtime.processes():
        with contextlib.suppress(OSError):
            here = f"SLURMD_NODENAME={node}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if here:
                found.add(process.pid)
                parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
                if "slurmstepd" in Path(f"/proc/{parent}/cmdline").read_text():
                    found.add(parent)
    return sorted(found)


def steps_of(lines: list[re.Match[str]]) -> list[int]:
    return [int(line["step"]) for line in lines]


def test_a_job_that_loses_a_node_goes_on_and_ends_well(slurm: Slurm, runtime: Runtime, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=3", arguments=(f"{tmp_path}/run", "250", "0.05"), NODES="1:3", RANKS="1")
    job.said(r"attached step=0 world=3")
    job.said(r"done step=60")
    eventually(lambda: list(tmp_path.glob("run/step-*/COMMIT")), "the first checkpoint")
    runtime.leaves_snapshots = True  # in the memory of the node that is lost
    victims = processes_of(runtime, "n2")
    assert len(victims) >= 4, "launcher, rank, agent and slurmstepd"
    for pid in [slurm.slurmd("n2"), *victims]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    (again, *_) = job.said(r"attached step=(?P<step>\d+) world=2 node=(?P<node>\w+)", 2)
    assert int(again["step"]) > 0
    assert again["node"] in ("n1", "n3")
    job.said(r"finished step=250")
    job.ends("COMPLETED")
    assert slurm.job(job.number)["Restarts"] == "0"


def test_before_its_time_is_over_a_job_saves_and_is_requeued_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    options = ("--nodes=2", "--time=2", "--signal=B:USR1@60")
    environ = {"NODES": "2", "RANKS": "1", "CKPTSVC_SCHEDULER_MARGIN": "off"}
    job = Job(slurm, tmp_path, *options, arguments=(f"{tmp_path}/run", "1000000", "0.05"), **environ)
    job.said(r"attached step=0 world=2")
    (stopped, *_) = job.said(r"stopped on request \(SIGUSR1.*\); step (?P<step>\d+) is committed")
    (_, again) = job.said(r"\[0\] attached step=(?P<step>\d+) world=2", 2)
    assert int(again["step"]) == int(stopped["step"]) > 0
    assert again[0].endswith("from=store") or "from=store" in job.output()
    assert slurm.job(job.number)["Restarts"] == "1"


def test_a_job_stops_by_itself_before_its_time_is_over(slurm: Slurm, tmp_path: Path) -> None:
    options = ("--nodes=1", "--time=1", "--signal=B:USR2@1")
    job = Job(slurm, tmp_path, *options, arguments=(f"{tmp_path}/run", "1000000", "0.05"), RANKS="1")
    job.said(r"the scheduler ends the job in \d+ s")
    job.said(r"attached step=[1-9]\d* world=1")


def test_an_element_of_an_array_is_requeued_alone(slurm: Slurm, tmp_path: Path) -> None:
    options = ("--nodes=1", "--array=0-1", "--time=10")
    store = f"{tmp_path}/run-$SLURM_ARRAY_TASK_ID"
    job = Job(slurm, tmp_path, *options, arguments=(store, "1000000", "0.05"), RANKS="1")
    job.said(r"done step=20 ", 2)
    # Slurm gives the array's own number to its last element.
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job.number}_1")
    (again,) = job.said(r"attached step=(?P<step>[1-9]\d*) world=1 .*from=store")
    assert int(again["step"]) >= 20
    assert slurm.job(f"{job.number}_1")["Restarts"] == "1"
    assert slurm.job(f"{job.number}_0")["Restarts"] == "0"


def test_a_bad_node_is_drained(slurm: Slurm) -> None:
    environ = slurm.environ | {"SLURM_JOB_ID": "1"}
    outcome = asyncio.run(drain("n3", "two uncorrected errors, card 1", enabled=True, environ=environ))
    assert outcome.done, outcome.detail
    words = slurm.run("sinfo", "--noheader", "--nodes=n3", "--format=%T %E")
    assert words.strip() == "drained ckptsvc: two uncorrected errors, card 1"
    outcome = asyncio.run(drain("n9", "not there", enabled=True, environ=environ))
    assert not outcome.done
    assert "Invalid node name" in outcome.detail


def test_a_job_that_is_cancelled_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=2", arguments=(f"{tmp_path}/run", "1000000", "0.05"), NODES="2", RANKS="1")
    job.said(r"done step=20")
    slurm.run("scancel", job.number)
    job.ends("CANCELLED")


@pytest.mark.parametrize("slurm", [(4, ("n1,n3", "n2,n4"))], indirect=True)
def test_copies_are_kept_at_another_switch(slurm: Slurm, runtime: Runtime, tmp_path: Path) -> None:
    """Without a word from Slurm, n1 and n3 are partners, and n2 and n4."""
    environ = {"NODES": "4", "RANKS": "1", "CKPTSVC_TIERS_PARTNER": "copy"}
    job = Job(slurm, tmp_path, "--nodes=4", arguments=(f"{tmp_path}/run", "400", "0.05"), **environ)
    kept = re.compile(r"step \d+: a copy of what n(\d) holds")
    for log in [runtime.sockets / f"node-n{number}" / "agent.log" for number in (1, 2, 3, 4)]:
        number = int(log.parent.name[-1])
        with job.explained():
            eventually(lambda log=log: log.exists() and kept.search(log.read_text()), f"what n{number} keeps", PATIENCE)
        assert {int(other) % 2 for other in kept.findall(log.read_text())} == {(number + 1) % 2}
    job.said(r"finished step=400")
    job.ends("COMPLETED")
