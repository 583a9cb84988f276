"""Hosts that are cut off, killed or frozen under a launched job: network namespaces with links of their own."""

import json
import os
import signal
from pathlib import Path

import pytest
from harness.hosts import Hosts, hosts
from harness.job import free_port
from harness.runtime import Runtime, eventually, tmpfs
from harness.shell_run import Run, alive
from harness.stored import cli

WAIT = 'while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.05; done'


class Cluster:
    """One job on several hosts; node n1 is the coordinator's."""

    def __init__(self, runtime: Runtime, made: Hosts, folder: Path, nnodes: str, port: int) -> None:
        self.runtime, self.hosts, self.folder = runtime, made, folder
        self._options = ["--nnodes", nnodes, "--rdzv-id", "job", "--rdzv-endpoint", f"{made.address(1)}:{port}"]
        self.runs: dict[int, Run] = {}

    def start(self, number: int, *options: str, script: str = WAIT, joined: bool = True) -> Run:
        """`ckptsvc run` on a host; waits until it has joined."""
        own = ["--node", f"n{number}", "--node-rank", str(number - 1), "--address", self.hosts.address(number)]
        before = self.hosts.on(number)
        run = Run(
            self.runtime, self.folder, script, *self._options, *own, "--max-restarts", "9", *options, before=before
        )
        self.runs[number] = run
        if joined:
            eventually(lambda: f"node n{number} joined" in self.runtime.log(), f"n{number}: {run.log.read_text()}")
        return run

    def agent(self, number: int) -> int:
        """The process of a host's agent, once there is one."""
        return eventually(lambda: [a.pid for a in self.runtime.agents() if f"--name n{number}" in a.command], "it")[0]

    def places(self, attempt: int, ranks: int) -> list[str]:
        """The nodes that ranks of an attempt run on, once they do."""
        return [self.runs[1].rank(attempt, rank)[1] for rank in range(ranks)]

    def let_end(self) -> dict[int, int]:
        (self.folder / "go").touch()
        return {number: run.end() for number, run in self.runs.items()}

    def close(self) -> None:
        for run in self.runs.values():
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()


@pytest.fixture
def cluster(request, runtime, tmp_path):
    """Makes clusters of three hosts, or of as many as the test says."""
    with hosts(getattr(request, "param", 3)) as made:
        started = []

        def begin(nnodes):
            started.append(Cluster(runtime, made, tmp_path, nnodes, free_port()))
            return started[-1]

        yield begin
        for each in started:
            each.close()


def test_a_spare_takes_the_place_of_a_host_that_is_cut_off(cluster):
    job = cluster("2")
    for number in (1, 2, 3):
        job.start(number)
    assert job.places(1, 2) == ["n1", "n2"]
    cut_off = job.runs[1].pid(1, 1)
    job.hosts.cut(2)
    assert job.places(2, 2) == ["n1", "n3"]
    assert "node n2 is gone (neither its agent nor its host answers)" in job.runtime.log()
    assert alive(cut_off)  # nobody can reach it
    job.hosts.mend(2)
    eventually(lambda: not alive(cut_off), "the rank of the older attempt to be stopped")
    listed = Path(job.runtime.environ["HOME"], ".local/state/ckptsvc/nodes.json")
    eventually(listed.exists, "the list of nodes that have failed")
    assert json.loads(listed.read_text())["nodes"].keys() == {"n2"}
    assert job.let_end() == {1: 0, 2: 0, 3: 0}
    assert job.runs[1].attempts() == ["1", "2"]


def test_a_frozen_agent_or_a_broken_one_ends_no_job(cluster):
    job = cluster("2")
    for number in (1, 2):
        job.start(number)
    assert job.places(1, 2) == ["n1", "n2"]
    frozen = job.agent(2)
    os.kill(frozen, signal.SIGSTOP)
    eventually(lambda: "agent of n2 disconnected" in job.runtime.log(), "the agent to be missed")
    os.kill(frozen, signal.SIGCONT)
    eventually(lambda: job.runtime.status(job.runtime.sockets / "node-n2"), "it to answer")
    os.kill(frozen, signal.SIGKILL)
    eventually(lambda: job.agent(2) != frozen, "another agent")
    assert job.let_end() == {1: 0, 2: 0}
    assert job.runs[1].attempts() == ["1"]


@pytest.mark.slow
def test_without_spares_the_job_shrinks_when_a_host_is_killed(cluster):
    job = cluster("1:3")
    for number in (1, 2, 3):
        job.start(number, "--nproc-per-node", "2")
    assert job.places(1, 6) == ["n1", "n1", "n2", "n2", "n3", "n3"]
    job.hosts.kill(2)
    assert job.places(2, 4) == ["n1", "n1", "n3", "n3"]
    job.runs.pop(2).process.wait()
    assert job.let_end() == {1: 0, 3: 0}


@pytest.mark.slow
def test_a_node_on_the_list_is_not_used_while_there_are_others(cluster):
    job = cluster("2")
    state = Path(job.runtime.environ["HOME"], ".local/state/ckptsvc")
    state.mkdir(parents=True)
    bad = {"score": 9.0, "at": 4e9, "why": "it lost power"}
    (state / "nodes.json").write_text(json.dumps({"version": 1, "nodes": {"n2": bad}}))
    for number in (1, 2, 3):
        job.start(number)
    assert job.places(1, 2) == ["n1", "n3"]
    assert "nodes that have failed too often: n2 (it lost power)" in job.runtime.log()
    assert job.let_end() == {1: 0, 2: 0, 3: 0}


@pytest.mark.slow
def test_a_node_that_is_not_fit_is_not_taken_in(cluster, tmp_path):
    job = cluster("1:2")
    job.start(1)
    with tmpfs(tmp_path / "full", "1m") as full:
        unfit = job.start(2, "--log-dir", str(full), joined=False)
        assert unfit.end() == 87
    assert f"node n2 is not taken in: disk at {full}: {full} has 1 MiB left" in job.runtime.log()
    assert "is not taken in: disk at" in unfit.log.read_text()
    del job.runs[2]
    assert job.let_end() == {1: 0}


@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_a_node_whose_link_is_ten_times_slower_than_the_others_is_not_taken_in(cluster):
    job = cluster("3")
    for number in (1, 2, 3):
        job.start(number)
    job.hosts.slow(4, "4mbit")
    unfit = job.start(4, joined=False)
    assert unfit.end() == 87
    assert "is not taken in: network: 0." in unfit.log.read_text()
    assert "where the median of 2 others is" in job.runtime.log()
    del job.runs[4]
    assert job.let_end() == {1: 0, 2: 0, 3: 0}


@pytest.fixture
def with_certificates(runtime, tmp_path):
    """Hosts of a network like any other: agents of a user who has certificates."""
    with hosts(2, "10.77.0") as made:
        folder = tmp_path / "tls"
        assert cli("certs", "init", tmp_path / "authority")[0] == 0
        assert cli("certs", "issue", tmp_path / "authority", "--out", folder)[0] == 0
        for key, name in (("CA_FILE", "ca.pem"), ("CERT_FILE", "cert.pem"), ("KEY_FILE", "key.pem")):
            runtime.environ[f"CKPTSVC_TLS_{key}"] = str(folder / name)
        job = Cluster(runtime, made, tmp_path, "2", free_port())
        yield job
        job.close()


def test_a_job_on_several_hosts_needs_certificates_and_restarts_with_them(with_certificates, tmp_path):
    job = with_certificates
    for number in (1, 2):
        job.start(number)
    assert job.places(1, 2) == ["n1", "n2"]
    assert cli("certs", "issue", tmp_path / "authority", "--out", tmp_path / "tls")[0] == 0  # renewed meanwhile
    os.kill(job.agent(2), signal.SIGKILL)  # the next one shows the new certificate to the coordinator, which runs on
    os.kill(job.runs[2].pid(1, 1), signal.SIGKILL)
    assert job.places(2, 2) == ["n1", "n2"]
    assert job.let_end() == {1: 0, 2: 0}
    without = {key: value for key, value in job.runtime.environ.items() if not key.startswith("CKPTSVC_TLS_")}
    job.runtime.environ.clear()
    job.runtime.environ.update(without)
    refused = job.start(1, joined=False)
    assert refused.end() == 2
    assert "10.77.0.1" in refused.log.read_text()
    assert "certificates" in refused.log.read_text()


@pytest.mark.slow
def test_certificates_that_expire_or_are_of_another_authority_end_no_job(with_certificates, tmp_path):
    """Each host has its own. What is connected stays; and what connects does so again once they are right."""
    job, attempt = with_certificates, 1
    job.runtime.environ["CKPTSVC_LAUNCH_CRASH_LOOP"] = "0"
    for name in ("right", "wrong"):
        assert cli("certs", "init", tmp_path / name)[0] == 0

    def issue(number, authority, days="30"):
        assert cli("certs", "issue", tmp_path / authority, "--out", tmp_path / f"tls{number}", "--days", days)[0] == 0

    def said(sentence, count=1):
        eventually(lambda: job.runtime.log().count(sentence) == count, sentence)

    def restarts():
        """The job restarts, which takes all hosts."""
        nonlocal attempt
        os.kill(job.runs[2].pid(attempt, 1), signal.SIGKILL)
        attempt += 1
        assert job.places(attempt, 2) == ["n1", "n2"]

    for number in (1, 2):
        issue(number, "right")
        for key, name in (("CA_FILE", "ca.pem"), ("CERT_FILE", "cert.pem"), ("KEY_FILE", "key.pem")):
            job.runtime.environ[f"CKPTSVC_TLS_{key}"] = str(tmp_path / f"tls{number}" / name)
        job.start(number)
    assert job.places(1, 2) == ["n1", "n2"]

    # Signed by an authority that nobody knows: what there was before is shown.
    issue(2, "wrong")
    (tmp_path / "tls2" / "ca.pem").write_bytes((tmp_path / "right" / "ca.pem").read_bytes())
    said("new certificates are not used: ")
    restarts()
    os.kill(job.agent(2), signal.SIGKILL)  # the next one has nothing else
    eventually(lambda: "ckptsvc agent: tls.cert_file" in job.runtime.log(), "it to say why it does not start")
    rank = job.runs[2].pid(attempt, 1)
    assert alive(rank)
    issue(2, "right")
    eventually(lambda: job.runtime.log().count("agent of n2 serves") == 2, "another agent")
    restarts()

    # All files of one host are another authority's: it has no reason to doubt them.
    rank = job.runs[2].pid(attempt, 1)
    issue(2, "wrong")
    said("certificates were read anew")
    assert alive(rank)
    os.kill(job.agent(2), signal.SIGKILL)
    said("no secure connection: ")
    assert alive(rank)
    issue(2, "right")
    said("certificates were read anew", 2)
    restarts()

    rank = job.runs[2].pid(attempt, 1)
    issue(2, "right", days=str(10 / 86400))
    said("the certificate has expired, what is connected stays")
    assert alive(rank)
    restarts()
    issue(2, "right")
    said("certificates were read anew", 4)
    os.kill(job.agent(2), signal.SIGKILL)
    restarts()
    assert job.let_end() == {1: 0, 2: 0}
    assert "Traceback" not in job.runtime.log()
