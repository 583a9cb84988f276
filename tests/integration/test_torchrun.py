"""torchrun itself, with `--rdzv-backend=ckptsvc`: its ranks are killed, and come back as often as that happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from harness.etcd import EtcdServer
from harness.job import free_port
from harness.runtime import Runtime, eventually
from torch.distributed.elastic.rendezvous.api import RendezvousParameters

from ckptsvc.integrations.rendezvous import place_of
from ckptsvc.rpc.etcd import parse_url

ROOT = Path(__file__).resolve().parents[2]
GROUP = "torchrun.handlers"

SCRIPT = """
import os, sys, time
import torch, torch.distributed as dist
notes, end = sys.argv[1:]
dist.init_process_group("gloo")
sum_ = torch.ones(1)
dist.all_reduce(sum_)
name = "-".join(os.environ[v] for v in ("CKPTSVC_ATTEMPT", "RANK"))
open(f"{notes}/{name}.new", "w").write(f"{os.getpid()} {sum_.item():.0f} {os.environ['CKPTSVC_NODE']}")
os.rename(f"{notes}/{name}.new", f"{notes}/{name}")
going = torch.ones(1)
while going.item():
    time.sleep(0.05)
    going.fill_(0 if os.path.exists(end) else 1)
    dist.all_reduce(going, op=dist.ReduceOp.MIN)
dist.destroy_process_group()
"""


class Torchruns:
    """torchruns of one job, each a node with an agent of its own."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime, self._folder = runtime, folder
        self._notes = folder / "notes"
        self._notes.mkdir()
        (folder / "train.py").write_text(SCRIPT)
        # What `pip install` would have made of the table in pyproject.toml, whatever is installed here.
        plug_in = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]["ckptsvc"]
        metadata = folder / "site" / "ckptsvc_torchrun-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ckptsvc-torchrun\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nckptsvc = {plug_in}\n")
        self._port = free_port()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, nnodes: str, number: int, *options: str, where: str = "") -> subprocess.Popen[bytes]:
        """One of them; `where` is the etcd of an elected coordinator, else the first one's agent coordinates."""
        endpoint = ["--local-addr", "127.0.0.1"] if where else ["--rdzv-endpoint", f"127.0.0.1:{self._port}"]
        place = f"coordination={where}" if where else f"is_host={'true' if number == 0 else 'false'}"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", nnodes, "--nproc-per-node", "1",
            "--rdzv-backend", "ckptsvc", *endpoint, "--rdzv-id", "pair", "--rdzv-conf", f"node=n{number},{place}",
            *options,
            str(self._folder / "train.py"), str(self._notes), str(self._folder / "end"),
        ]  # fmt: skip
        environ = self._runtime.environ
        path = os.pathsep.join(filter(None, [str(self._folder / "site"), environ.get("PYTHONPATH")]))
        with self.log(number).open("ab") as log:
            process = subprocess.Popen(command, env=environ | {"PYTHONPATH": path}, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def log(self, number: int) -> Path:
        return self._folder / f"torchrun-{number}.log"

    def rank(self, attempt: int, rank: int) -> tuple[int, int, str]:
        """(process, sum over all ranks, node) of a rank, once it has met the others."""
        path = self._notes / f"{attempt}-{rank}"
        eventually(path.exists, f"rank {rank} of attempt {attempt}: {self.story()}", 60)
        pid, total, node = path.read_text().split()
        return int(pid), int(total), node

    def story(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(self._folder.glob("torchrun-*.log")))

    def let_end(self) -> list[int]:
        (self._folder / "end").touch()
        return [process.wait(60) for process in self.started]

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@pytest.fixture
def torchruns(runtime: Runtime, tmp_path: Path) -> Any:
    found = Torchruns(runtime, tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_comes_back_on_both_nodes(torchruns: Torchruns, runtime: Runtime, kills: int) -> None:
    for number in (0, 1):
        torchruns.start("2", number, "--max-restarts", str(kills))
    for attempt in range(1, kills + 1):
        (first, total, _), (second, _, _) = torchruns.rank(attempt, 0), torchruns.rank(attempt, 1)
        assert total == 2
        os.kill((first, second)[attempt % 2], signal.SIGKILL)
    assert torchruns.rank(kills + 1, 0)[1] == 2
    assert torchruns.let_end() == [0, 0]
    assert "job pair ends with 0: all ranks have ended" in runtime.log()


@pytest.mark.parametrize("by", ["--rdzv-conf", "environment"])
def test_the_etcd_of_elections_is_known(
    by: str, runtime: Runtime, etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes with the job, to the agent that is started for it and to the ranks; one of two servers is down."""
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(runtime.sockets))
    servers = (etcd.url, f"127.0.0.1:{free_port()}")
    options = {"coordination": "+".join(servers)} if by == "--rdzv-conf" else {}
    if not options:
        monkeypatch.setenv("CKPTSVC_AGENT_COORDINATION", ",".join(servers))
    place = place_of(RendezvousParameters("ckptsvc", "", "pair", 2, 2, node="n0", **options))
    assert place.coordinator == str(parse_url(",".join(servers)))
    assert place.agent_arguments[-2:] == ["--coordination", place.coordinator]
    alone = place_of(RendezvousParameters("ckptsvc", "", "pair", 1, 1, **options))
    assert alone.coordinator == ""
    named = place_of(RendezvousParameters("ckptsvc", "127.0.0.1:7", "pair", 2, 2, is_host="false"))
    assert named.coordinator == "127.0.0.1:7"


@pytest.mark.slow
def test_the_coordinator_is_elected_where_that_is_wanted(
    torchruns: Torchruns, runtime: Runtime, etcd: EtcdServer
) -> None:
    """The coordinator's agent is killed, and then a rank: another agent has taken over by then."""
    for number in (0, 1):
        torchruns.start("2", number, "--max-restarts", "2", where=etcd.url)
    first = torchruns.rank(1, 0)
    assert (first[1], torchruns.rank(1, 1)[1]) == (2, 2)
    told = {n: runtime.status(runtime.sockets / f"node-{n}")["elections"][0]["here"] for n in ("n0", "n1")}
    (leader,) = [name for name, here in told.items() if here]
    (agent,) = [a for a in runtime.agents() if f"--name {leader}" in a.command]
    os.kill(agent.pid, signal.SIGKILL)
    os.kill(first[0], signal.SIGKILL)
    assert torchruns.rank(2, 0)[1] == 2
    assert torchruns.let_end() == [0, 0]
    assert runtime.log().count("this agent coordinates") == 2


def test_ranks_of_ckptsvc_run_find_the_variables_that_torchrun_sets(runtime: Runtime) -> None:
    """Both start the same program, which tells its environment."""
    environ = runtime.environ
    flags = ["--standalone", "--nproc-per-node", "2", "--virtual-local-rank", "--no-python", "sh", "-c"]
    found = []
    for module in ("torch.distributed.run", "ckptsvc.cli.main"):
        folder = runtime.root / module
        folder.mkdir()
        program = [*flags, f'env -0 > "{folder}/$RANK"']
        command = [sys.executable, "-m", module, *(["run", "--no-preflight"] if "ckptsvc" in module else []), *program]
        subprocess.run(command, env=environ, check=True, capture_output=True, timeout=120)
        lines = (folder / "1").read_text().split("\0")
        found.append({name: value for name, _, value in (x.partition("=") for x in lines) if name not in environ})
    theirs, ours = found
    own = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}  # between torchrun and what it forks
    assert set(theirs) - set(ours) <= own
    assert len(theirs.keys() & ours.keys()) >= 15
    different = {name for name in theirs if name in ours and theirs[name] != ours[name]}
    assert different <= {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"} | {
        "TORCHELASTIC_USE_AGENT_STORE"  # torchrun lends the ranks its own store; here rank 0 makes one
    }
    assert (ours["LOCAL_RANK"], ours["CUDA_VISIBLE_DEVICES"], ours["RANK"]) == ("0", "1", "1")


@pytest.mark.slow
def test_an_endpoint_and_an_election_exclude_each_other(torchruns: Torchruns, etcd: EtcdServer) -> None:
    process = torchruns.start("2", 0, "--rdzv-endpoint", "127.0.0.1:9", where=etcd.url)
    assert process.wait(60) == 1
    assert "--rdzv-endpoint and coordination in --rdzv-conf exclude each other" in torchruns.story()


@pytest.mark.slow
def test_a_torchrun_that_gives_up_leaves_the_others(torchruns: Torchruns, runtime: Runtime) -> None:
    """The one whose rank is killed may not restart; the other goes on alone."""
    torchruns.start("1:2", 0, "--max-restarts", "3")
    eventually(lambda: "node n0 joined" in runtime.log(), torchruns.story())
    second = torchruns.start("1:2", 1, "--max-restarts", "0")
    pid, _, _ = next(found for rank in (0, 1) if (found := torchruns.rank(1, rank))[2] == "n1")
    os.kill(pid, signal.SIGKILL)
    assert second.wait(60) == 1
    assert torchruns.rank(2, 0)[1:] == (1, "n0")
    assert torchruns.let_end() == [0, 1]


@pytest.mark.slow
def test_without_a_name_several_nodes_do_not_start(torchruns: Torchruns) -> None:
    process = torchruns.start("2", 0, "--rdzv-id", "none")
    assert process.wait(60) == 1
    assert "a job of several nodes needs --rdzv-endpoint HOST:PORT and --rdzv-id NAME" in torchruns.story()
