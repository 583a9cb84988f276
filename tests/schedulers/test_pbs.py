"""The PBS job script with stand-ins of the commands of PBS (`pbs/`), on virtual nodes: addresses of loopback."""

import subprocess
import sys
from pathlib import Path

import pytest
from harness.runtime import Runtime

TEMPLATE = Path(__file__).parents[2] / "deploy" / "pbs" / "ckptsvc.pbs"
STAND_INS = Path(__file__).with_name("pbs")
HOSTS = ("127.0.1.1", "127.0.1.2")

RANK = """\
echo "$PBS_JOBID $RANK/$WORLD_SIZE $CKPTSVC_NODE $CKPTSVC_JOB $CKPTSVC_DEADLINE" >> {notes}
case $PBS_JOBID in {stopped}) exit 85 ;; esac
"""


class Pbs:
    """A folder that stands for the server and its queue."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.spool, self.work, self.notes = folder / "spool", folder / "work", folder / "notes"
        for made in (self.spool / "jobs", self.spool / "bin", self.work):
            made.mkdir(parents=True)
        ckptsvc = self.spool / "bin" / "ckptsvc"
        settings = " ".join(f"{k}='{v}'" for k, v in runtime.environ.items() if k.startswith(("CKPTSVC_", "PYTHON")))
        ckptsvc.write_text(f'#!/bin/sh\nexec env {settings} {sys.executable} -m ckptsvc.cli.main "$@"\n')
        ckptsvc.chmod(0o755)
        (self.spool / "walltime").write_text("01:02:03")
        (self.work / "ckptsvc.pbs").write_bytes(TEMPLATE.read_bytes())
        self.path = f"{self.spool / 'bin'}:{STAND_INS}:/usr/bin:/bin"
        self.environ = runtime.environ | {"PATH": self.path, "PBS_SPOOL": str(self.spool)}

    def submit(self, **variables: str) -> None:
        command = ["qsub", "-v", ",".join(["PBS_SPOOL", *variables]), "ckptsvc.pbs"]
        path = {"PATH": self.path}
        subprocess.run(
            command, cwd=self.work, env=self.environ | path | variables, check=True, stdout=subprocess.DEVNULL
        )

    def run(self, number: int, **more: str) -> tuple[int, str]:
        """Run a job on its nodes; returns the exit status and what it has printed."""
        job = self.spool / "jobs" / str(number)
        nodes = job / "nodefile"
        nodes.write_text("".join(f"{host}\n" for host in HOSTS))
        variables = dict(pair.split("=", 1) for pair in (job / "variables").read_text().split("\0") if pair)
        environ = {
            "HOME": self.environ["HOME"],
            "PATH": self.path,
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBID": f"{number}.server",
            "PBS_NODEFILE": str(nodes),
            "PBS_NODENUM": "0",
            "PBS_O_WORKDIR": str(self.work),
            "PBS_TASKNUM": "1",
        }
        ended = subprocess.run(
            ["bash", str(job / "script")], env=environ | variables | more, capture_output=True, text=True, timeout=100
        )
        return ended.returncode, ended.stdout + ended.stderr

    @property
    def submitted(self) -> list[str]:
        return sorted(path.name for path in (self.spool / "jobs").iterdir())


@pytest.fixture
def pbs(runtime: Runtime, tmp_path: Path) -> Pbs:
    return Pbs(runtime, tmp_path)


def ranks(pbs: Pbs, stopped: str = "none") -> str:
    """A program for the ranks: notes where it is, and ends as a rank that was stopped in the jobs named."""
    path = pbs.work / "rank.sh"
    path.write_text(RANK.format(notes=pbs.notes, stopped=stopped))
    return f"--no-python sh {path}"


def seen(pbs: Pbs) -> list[list[str]]:
    return sorted(line.split() for line in pbs.notes.read_text().splitlines())


@pytest.mark.parametrize("start", ["mpiexec -n 2 --ppn 1", "pbsdsh --"])
def test_all_nodes_find_each_other(pbs: Pbs, start: str) -> None:
    pbs.submit(TRAIN=ranks(pbs), NODES="2", RANKS="2", START=start)
    status, output = pbs.run(1)
    assert status == 0, output
    where = [line[1:3] for line in seen(pbs)]
    assert where == [["0/4", HOSTS[0]], ["1/4", HOSTS[0]], ["2/4", HOSTS[1]], ["3/4", HOSTS[1]]]
    jobs = {line[3] for line in seen(pbs)}
    assert len(jobs) == 1
    assert jobs.pop().startswith("1.server.")
    assert pbs.submitted == ["1"]
    assert not list(pbs.work.glob(".*")), "it cleans up"


def test_the_end_of_the_walltime_is_known_to_the_ranks(pbs: Pbs) -> None:
    pbs.submit(TRAIN=ranks(pbs), NODES="2", RANKS="1")
    status, output = pbs.run(1)
    assert status == 0, output
    ((began, deadline),) = {(int(line[3].rpartition(".")[2]), int(line[4])) for line in seen(pbs)}
    assert deadline - began == 3723


def test_a_job_that_has_saved_and_stopped_submits_itself_again(pbs: Pbs) -> None:
    pbs.submit(TRAIN=ranks(pbs, "1.server"), NODES="2", RANKS="1")
    status, output = pbs.run(1)
    assert status == 85, output
    assert pbs.submitted == ["1", "2"]
    status, output = pbs.run(2)
    assert status == 0, output
    assert [line[:2] for line in seen(pbs)] == [[f"{n}.server", f"{r}/2"] for n in (1, 2) for r in (0, 1)]
    assert pbs.submitted == ["1", "2"]


def test_where_it_may_it_is_run_again_under_its_own_number(pbs: Pbs) -> None:
    (pbs.spool / "operator").touch()
    pbs.submit(TRAIN=ranks(pbs, "*"), NODES="2", RANKS="1")
    assert pbs.run(1)[0] == 85
    assert (pbs.spool / "rerun").read_text() == "1.server\n"
    assert pbs.submitted == ["1"]


def test_an_element_of_an_array_is_not_submitted_as_an_array(pbs: Pbs) -> None:
    pbs.submit(TRAIN=ranks(pbs, "*"), NODES="2", RANKS="1")
    status, output = pbs.run(1, PBS_ARRAY_INDEX="3", PBS_ARRAY_ID="1[].server")
    assert status == 85
    assert "an operator may say: qrerun" in output
    assert pbs.submitted == ["1"]


def test_a_job_that_fails_is_not_run_again(pbs: Pbs) -> None:
    pbs.submit(TRAIN="--max-restarts 0 --no-python false", NODES="2", RANKS="1")
    status, output = pbs.run(1)
    assert status == 1, output
    assert pbs.submitted == ["1"]
