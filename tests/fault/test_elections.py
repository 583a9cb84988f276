"""Elected coordinators: three agents stand for three nodes, and a real etcd chooses among them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from harness.damage import assert_intact, checkpoints, steps
from harness.etcd import EtcdServer
from harness.job import Job, Launch, free_port
from harness.rank import Rank
from harness.runtime import Runtime, eventually

import ckptsvc
from ckptsvc.rpc.etcd import Etcd, Login, parse_url

NODES = 3
PATIENCE = 90.0
"""Seconds for what takes one lease, 3 s, and an election."""


def train(rank: Rank, sockets: str, store: str) -> int:
    """A step whenever the test says so, or (once it says "run") as fast as it can; every one is to be saved."""
    rank.join()
    os.environ |= {"CKPTSVC_SOCKET": f"{sockets}/node-n{rank.number}", "CKPTSVC_NODE": f"n{rank.number}"}
    tensor = torch.zeros(100_000)
    run = ckptsvc.attach({"tensor": tensor, f"own{rank.number}": torch.ones(4)}, store=store, every=1)
    step = 0
    while not (rank.folder / "go-end").exists():
        step += 1
        if (rank.folder / "go-run").exists():
            time.sleep(0.05)
        else:
            rank.until(str(step))
        tensor.fill_(step)
        run.step()
        rank.report("stepped", step=step)
        torch.distributed.barrier()
    run.close()
    return step


class Nodes:
    """The agents, by number."""

    def __init__(self, runtime: Runtime, etcd: EtcdServer) -> None:
        self.runtime, self.url = runtime, etcd.url
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        for number in range(NODES):
            self.start(number)

    def directory(self, number: int) -> Path:
        return self.runtime.sockets / f"node-n{number}"

    def start(self, number: int) -> None:
        self.directory(number).mkdir(mode=0o700, exist_ok=True)
        options = ("--name", f"n{number}", "--coordination", self.url)
        self.agents[number] = self.runtime.start_agent(*options, directory=self.directory(number))

    def signal(self, number: int, what: signal.Signals) -> None:
        self.agents[number].send_signal(what)
        if what == signal.SIGKILL:
            self.agents.pop(number).wait()

    def stop(self) -> None:
        for agent in self.agents.values():
            agent.send_signal(signal.SIGCONT)
            agent.terminate()
        for agent in self.agents.values():
            agent.wait(PATIENCE)

    def elections(self, number: int) -> list[dict]:
        try:
            return self.runtime.status(self.directory(number), timeout=2.0)["elections"]
        except grpc.RpcError:
            return []

    def coordinator(self, *, after: int = 0, besides: tuple[int, ...] = ()) -> tuple[int, int]:
        """Wait until all agents (but those) agree on one of them, of a later term than `after`: its number and term."""

        def agreed() -> tuple[int, int] | None:
            beliefs = {n: self.elections(n) for n in self.agents if n not in besides}
            if not all(beliefs.values()):
                return None
            told = {(e["coordinator"], e["term"]) for found in beliefs.values() for e in found}
            here = [n for n, found in beliefs.items() if found[0]["here"]]
            ((name, term),) = told if len(told) == 1 else {("", 0)}
            return (here[0], term) if len(here) == 1 and name == f"n{here[0]}" and term > after else None

        return eventually(agreed, "the agents to agree on a coordinator", PATIENCE)


@pytest.fixture
def nodes(runtime: Runtime, etcd: EtcdServer) -> Iterator[Nodes]:
    found = Nodes(runtime, etcd)
    yield found
    found.stop()


def training(launch: Launch, nodes: Nodes, store: Path) -> Job:
    return launch.plain(NODES, train, str(nodes.runtime.sockets), str(store), CKPTSVC_AGENT_COORDINATION=nodes.url)


def committed(job: Job, store: Path, step: int) -> None:
    job.wait_for("stepped", step=step)
    eventually(lambda: step in steps(store), f"step {step} to be committed", PATIENCE)


def finish(job: Job, store: Path, step: int) -> None:
    """Steps from this one on until one is committed (a rank whose agent was away skips one), and the end."""
    newest, deadline = steps(store)[0], time.monotonic() + PATIENCE
    while steps(store)[0] == newest:
        assert time.monotonic() < deadline, f"nothing was saved after step {newest}\n{job.story()}"
        job.go(str(step))
        job.wait_for("stepped", step=step)
        step += 1
        time.sleep(0.5)
    job.go("end")
    job.go(str(step))
    assert job.results(PATIENCE) == [step] * NODES


def record_of(store: Path, step: int) -> bytes:
    (folder,) = [c for c in checkpoints(store) if c.name.startswith(f"step-{step:012}")]
    return (folder / "COMMIT").read_bytes()


def pid_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/fd").exists()


# ---- the coordinator


@pytest.mark.slow
def test_an_idle_coordinator_is_killed_and_another_takes_over(
    launch: Launch, nodes: Nodes, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with training(launch, nodes, store) as job:
        job.go("1")
        committed(job, store, 1)
        leader, term = nodes.coordinator()
        nodes.signal(leader, signal.SIGKILL)
        second, later = nodes.coordinator(after=term)
        assert second != leader
        nodes.start(leader)
        assert nodes.coordinator(after=term) == (second, later)  # who comes back follows
        finish(job, store, 2)
    assert len(assert_intact(store)) >= 2


def test_a_coordinator_killed_in_mid_save_leaves_the_commit_to_the_next(
    launch: Launch, nodes: Nodes, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with training(launch, nodes, store) as job:
        job.go("1")
        committed(job, store, 1)
        leader, term = nodes.coordinator()
        runtime.arm("before_record")
        job.go("2")
        worker = runtime.reached("before_record")
        nodes.signal(leader, signal.SIGKILL)
        eventually(lambda: not pid_alive(worker), "its worker to end")
        runtime.let_go("before_record")
        nodes.coordinator(after=term)
        nodes.start(leader)  # its rank's snapshot is in its arena
        committed(job, store, 2)
        finish(job, store, 3)
    assert assert_intact(store)[-2:] == [2, 1]


@pytest.mark.slow
def test_a_frozen_coordinator_that_wakes_up_neither_decides_nor_commits_again(
    launch: Launch, nodes: Nodes, runtime: Runtime, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with training(launch, nodes, store) as job:
        job.go("1")
        committed(job, store, 1)
        leader, term = nodes.coordinator()
        runtime.arm("before_record")
        job.go("2")
        runtime.reached("before_record")  # the worker of the coordinator is about to commit step 2
        nodes.signal(leader, signal.SIGSTOP)
        second, later = nodes.coordinator(after=term, besides=(leader,))
        assert second != leader
        nodes.signal(leader, signal.SIGCONT)
        assert nodes.coordinator(after=term) == (second, later)
        committed(job, store, 2)  # by the second, which has heard from all three now
        first = record_of(store, 2)
        runtime.let_go("before_record")  # and now the worker of the first goes on
        finish(job, store, 3)
        assert record_of(store, 2) == first
    assert assert_intact(store)[-2:] == [2, 1]
    assert "coordinates no more" in (nodes.directory(leader) / "agent.log").read_text()


RANK = """
echo "$CKPTSVC_ATTEMPT $RANK $$" >> "$1/notes"
trap "" TERM
[ "$CKPTSVC_ATTEMPT" = 1 ] || exit 0
while [ ! -e "$1/fail-$RANK" ]; do sleep 0.05; done
exit 9
"""


@pytest.mark.slow
def test_a_coordinator_killed_in_mid_restart_leaves_the_restart_to_the_next(
    runtime: Runtime, etcd: EtcdServer, tmp_path: Path
) -> None:
    script = tmp_path / "rank.sh"
    script.write_text(RANK)
    command = [sys.executable, "-m", "ckptsvc.cli.main", "run", "--no-python", "--coordination", etcd.url, "--rdzv-id",
        "job", "--nnodes", str(NODES), "--max-restarts", "2", "--address", "127.0.0.1"]  # fmt: skip
    launchers = []
    for number in range(NODES):
        options = ["--node", f"n{number}", "--node-rank", str(number), "sh", str(script), str(tmp_path)]
        with (tmp_path / f"n{number}.log").open("wb") as log:
            launchers.append(subprocess.Popen([*command, *options], env=runtime.environ, stdout=log, stderr=log))
    notes = tmp_path / "notes"
    try:
        eventually(lambda: notes.exists() and len(notes.read_text().splitlines()) == NODES, "the ranks", PATIENCE)
        told = [runtime.status(runtime.sockets / f"node-n{n}")["elections"][0] for n in range(NODES)]
        (leader,) = [n for n, election in enumerate(told) if election["here"]]
        (agent,) = [a for a in runtime.agents() if f"--name n{leader}" in a.command]
        (tmp_path / "fail-0").touch()
        log = tmp_path / "n1.log"
        eventually(
            lambda: "stopping attempt 1" in log.read_text(), "the restart to begin"
        )  # it takes 2 s: no rank obeys
        os.kill(agent.pid, signal.SIGKILL)
        assert [launcher.wait(PATIENCE) for launcher in launchers] == [0] * NODES, log.read_text()
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
    began = sorted(line.rsplit(" ", 1)[0] for line in notes.read_text().splitlines())
    assert began == [f"{attempt} {rank}" for attempt in (1, 2) for rank in range(NODES)]
    assert runtime.log().count("this agent coordinates") == 2


# ---- etcd


@pytest.mark.slow
def test_training_and_snapshots_go_on_while_etcd_is_away(
    launch: Launch, nodes: Nodes, runtime: Runtime, etcd: EtcdServer, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with training(launch, nodes, store) as job:
        job.go("1")
        committed(job, store, 1)
        _, term = nodes.coordinator()
        etcd.kill()
        eventually(
            lambda: not any(e["here"] for n in range(NODES) for e in nodes.elections(n)), "nobody to lead", PATIENCE
        )
        assert all("etcd does not answer" in e["problem"] for n in range(NODES) for e in nodes.elections(n))
        job.go("2")
        job.wait_for("stepped", step=2)
        eventually(lambda: len(list(store.glob("step-000000000002.*/r*"))) == NODES, "every shard to be written")
        assert steps(store) == [1]  # nobody may commit
        job.go("run")
        job.go("3")
        job.wait_for("stepped", step=12)
        etcd.start()
        nodes.coordinator(after=term)
        committed(job, store, 2)
        newest = steps(store)[0]
        eventually(lambda: steps(store)[0] > max(newest, 12), "saves to be committed again", PATIENCE)
        job.go("end")
        job.results(PATIENCE)
    assert_intact(store)


@pytest.mark.slow
def test_etcd_that_comes_back_at_once_costs_nothing(
    launch: Launch, nodes: Nodes, runtime: Runtime, etcd: EtcdServer, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    with training(launch, nodes, store) as job:
        job.go("1")
        committed(job, store, 1)
        nodes.coordinator()
        etcd.kill()
        etcd.start()
        job.go("2")
        committed(job, store, 2)
        finish(job, store, 3)


# ---- what should not be


@pytest.mark.slow
def test_nonsense_in_etcd_is_said_and_waited_out(
    nodes: Nodes, runtime: Runtime, etcd: EtcdServer, launch: Launch, tmp_path: Path
) -> None:
    store = tmp_path / "run"

    async def put(key: str, value: bytes, seconds: float) -> int:
        client = Etcd(parse_url(etcd.url), Login())
        lease = await client.grant(seconds)
        assert await client.create(key, value, lease.lease)
        await client.close()
        return lease.lease

    async def remove(lease: int) -> None:
        client = Etcd(parse_url(etcd.url), Login())
        await client.revoke(lease)
        await client.close()

    key = f"/ckptsvc/coordinators/{os.geteuid()}/guest"
    lease = asyncio.run(put(key, b"\xff{", 60))
    environ = {"CKPTSVC_AGENT_COORDINATION": etcd.url, "CKPTSVC_JOB": "guest"}
    with launch.plain(NODES, train, str(runtime.sockets), str(store), **environ) as job:
        eventually(lambda: "does not name a coordinator" in str(nodes.elections(0)), "the agent to complain", PATIENCE)
        asyncio.run(remove(lease))
        nodes.coordinator()
        job.go("1")
        committed(job, store, 1)
        finish(job, store, 2)


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("http://127.0.0.1:1", 2, "is not a URL of etcd"),
        ("etcd://root:secret@127.0.0.1:1", 2, "etcd.password_file"),
        ("etcd://127.0.0.1:{free}", 23, "etcd does not answer at"),
    ],
)
def test_run_says_at_once_what_is_wrong_with_its_etcd(runtime: Runtime, url: str, status: int, words: str) -> None:
    ended = run_once(runtime, url.format(free=free_port()))
    assert (ended.returncode, words in ended.stderr, "Traceback" in ended.stderr) == (status, True, False), ended.stderr
    assert "secret" not in ended.stderr


def test_run_says_when_etcd_refuses_the_password(runtime: Runtime, etcd: EtcdServer, tmp_path: Path) -> None:
    etcd.want_login("right")
    password = tmp_path / "password"
    password.write_text("wrong\n")
    password.chmod(0o600)
    ended = run_once(runtime, etcd.url, CKPTSVC_ETCD_USER="root", CKPTSVC_ETCD_PASSWORD_FILE=str(password))
    assert ended.returncode == 2
    assert "refuses us" in ended.stderr
    assert "wrong" not in ended.stderr


def test_an_agent_that_is_told_of_no_etcd_refuses_who_wants_elections(runtime: Runtime, etcd: EtcdServer) -> None:
    directory = runtime.sockets / "node-n0"
    directory.mkdir(mode=0o700)
    agent = runtime.start_agent("--name", "n0", directory=directory)
    ended = run_once(runtime, etcd.url)
    agent.terminate()
    agent.wait(PATIENCE)
    assert ended.returncode == 2
    assert "this agent knows no etcd" in ended.stderr


def test_a_private_agent_starts_with_an_etcd_that_is_away(runtime: Runtime) -> None:
    agent = runtime.start_agent("--coordination", f"etcd://127.0.0.1:{free_port()}")
    assert runtime.status(runtime.sockets)["elections"] == []
    agent.terminate()
    assert agent.wait(PATIENCE) == 0


def run_once(runtime: Runtime, url: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One node of two; only for what ends before the other is missed."""
    command = [sys.executable, "-m", "ckptsvc.cli.main", "run", "--nnodes", "2", "--rdzv-id", "x", "--node", "n0",
        "--address", "127.0.0.1", "--coordination", url, "--no-python", "true"]  # fmt: skip
    return subprocess.run(
        command, env=runtime.environ | environ, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
