"""Hosts are killed with all they hold before anything of it was written: other hosts' memory has it."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.hosts import Hosts, hosts
from harness.job import free_port
from harness.runtime import Runtime, eventually

from ckptsvc.rpc.certificates import issue, make_authority

PATIENCE = 120.0

TRAIN = """
import os, sys, time
import torch, torch.distributed as dist
import ckptsvc
notes, store = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()

def content(step):
    return torch.randn(700_001, generator=torch.Generator().manual_seed(step))

model = torch.nn.ParameterDict({"tensor": content(0)})
tensor = model["tensor"].data
run = ckptsvc.attach({"model": model}, store=store)
name = "-".join(os.environ[v] for v in ("CKPTSVC_ATTEMPT", "RANK"))
same = torch.equal(tensor, content(run.steps_done))
print(run.steps_done, run.restored_from, same, dist.get_world_size(), file=open(f"{notes}/{name}.new", "w"), flush=True)
os.rename(f"{notes}/{name}.new", f"{notes}/{name}")
while run.steps_done < 20:
    tensor.copy_(content(run.steps_done + 1))
    run.step()
    if run.steps_done == 5:
        run.wait()
    hold = "hold" if os.environ["CKPTSVC_ATTEMPT"] == "1" else "again"
    while os.path.exists(f"{notes}/{hold}-{run.steps_done}") and not os.path.exists(f"{notes}/go-{run.steps_done}"):
        time.sleep(0.05)
run.close()
"""
"""Every fifth step is saved; the first attempt stops at those steps for which the test says so, and never goes on from
the tenth, which is never written."""


class Training:
    """One job on several hosts, whose store takes nothing of step 10."""

    def __init__(self, runtime: Runtime, made: Hosts, folder: Path, nnodes: str) -> None:
        self.runtime, self.hosts, self.folder = runtime, made, folder
        self.notes, self.store = folder / "notes", folder / "store"
        self.notes.mkdir()
        (self.notes / "hold-10").touch()
        (folder / "train.py").write_text(TRAIN)
        (folder / "store.plan").write_text(json.dumps([{"op": "write", "key": "step-*10.*", "hang": True, "times": 0}]))
        self._endpoint = f"{made.address(1)}:{free_port()}"
        self._flags = ["--nnodes", nnodes, "--rdzv-id", "job", "--rdzv-endpoint", self._endpoint, "--max-restarts", "9",
            "--no-standby", "--no-preflight"]  # fmt: skip
        self.runs: dict[int, subprocess.Popen[bytes]] = {}
        self.agents: list[subprocess.Popen[bytes]] = []

    def serve(self, number: int, **environ: str) -> None:
        """An agent on a host that is there before any job, as a service's is."""
        folder = self.runtime.sockets / f"node-n{number}"
        folder.mkdir(mode=0o700)
        listen = self._endpoint if number == 1 else f"{self.hosts.address(number)}:0"
        command = [*self.hosts.on(number), sys.executable, "-m", "ckptsvc.cli.main", "agent", "--dir", str(folder),
            "--name", f"n{number}", "--listen", listen]  # fmt: skip
        with (folder / "agent.log").open("ab") as log:
            self.agents.append(subprocess.Popen(command, env=self.runtime.environ | environ, stdout=log, stderr=log))
        eventually((folder / "ready").exists, f"the agent of n{number}", PATIENCE)

    def start(self, *numbers: int, **environ: str) -> None:
        """`ckptsvc run` on hosts, at once, so that the job begins on all of them; waits until they have joined."""
        for number in numbers:
            self._run(number, environ)
        for number in numbers:
            eventually(lambda number=number: f"node n{number} joined" in self.runtime.log(), f"n{number} to join",
                PATIENCE)  # fmt: skip

    def _run(self, number: int, environ: dict[str, str]) -> None:
        own = ["--node", f"n{number}", "--node-rank", str(number - 1), "--address", self.hosts.address(number)]
        command = [*self.hosts.on(number), sys.executable, "-m", "ckptsvc.cli.main", "run", *self._flags, *own,
            str(self.folder / "train.py"), str(self.notes), f"faulty+file://{self.store}"]  # fmt: skip
        environ = self.runtime.environ | {"GLOO_SOCKET_IFNAME": "eth0", "CKPTSVC_SAVE_EVERY": "5"} | environ
        with (self.folder / f"run-{number}.log").open("wb") as log:
            self.runs[number] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def story(self) -> str:
        logs = "\n".join(
            f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.folder.glob("run-*.log")
        )
        return f"{logs}\n--- agents\n{self.runtime.log()}"

    def logged(self, text: str, times: int = 1) -> None:
        """Wait until the agents have said something so often."""
        try:
            eventually(lambda: self.runtime.log().count(text) >= times, f"{times} x {text!r}", PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def began(self, attempt: int, rank: int) -> list[str]:
        """(step, where from, whether every bit is right, world size) that a rank has begun with."""
        path = self.notes / f"{attempt}-{rank}"
        try:
            eventually(path.exists, f"rank {rank} of attempt {attempt}", PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None
        return path.read_text().split()

    def lose(self, number: int) -> None:
        """Kill all of a host, and what it had in memory."""
        self.hosts.kill(number)
        self.runs.pop(number).wait()

    def end(self) -> None:
        """The job ends by itself, in good order."""
        (self.folder / "store.release").touch()
        for number, run in self.runs.items():
            assert run.wait(PATIENCE) == 0, f"n{number}\n{self.story()}"

    def close(self) -> None:
        (self.folder / "store.release").touch()
        for run in self.runs.values():
            if run.poll() is None:
                run.kill()
                run.wait()


@pytest.fixture
def training(request: pytest.FixtureRequest, runtime: Runtime, tmp_path: Path) -> Iterator[Training]:
    """A training on so many hosts, as `--nnodes` says."""
    count, nnodes = request.param
    with hosts(count) as made:
        found = Training(runtime, made, tmp_path, nnodes)
        yield found
        found.close()
        runtime.leaves_snapshots = True  # those of the hosts that are lost
        for agent in found.agents:
            agent.terminate()
            agent.wait()
        shutil.rmtree(tmp_path / "store", ignore_errors=True)


def certificates(folder: Path) -> dict[str, str]:
    """This user's, as settings name them."""
    authority = make_authority("one", 1)
    user = pwd.getpwuid(os.geteuid()).pw_name
    files = zip(("ca", "cert", "key"), (authority.certificate, *issue(authority, user, 1)), strict=True)
    for name, data in files:
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return {f"CKPTSVC_TLS_{name.upper()}_FILE": str(folder / name) for name in ("ca", "cert", "key")}


@pytest.mark.parametrize("training", [(3, "2")], indirect=True)
@pytest.mark.parametrize("also", ["", *(pytest.param(more, marks=pytest.mark.slow) for more in ("tls", "a disk"))])
def test_a_spare_goes_on_from_the_partners_copy(training: Training, also: str) -> None:
    environ = certificates(training.folder) if also == "tls" else {}
    training.runtime.environ.update(environ)  # of whoever asks the agents, too
    for number in (1, 2, 3):
        disk = {"CKPTSVC_TIERS_LOCAL": str(training.folder / f"disk-{number}")} if also == "a disk" else {}
        training.start(number, CKPTSVC_TIERS_PARTNER="copy", **disk)
    training.logged("step 10: a copy of what", 2)
    training.lose(2)
    for rank in (0, 1):
        assert training.began(2, rank) == ["10", "memory", "True", "2"]
    assert ("shards are on local disks" in training.runtime.log()) == (also == "a disk")
    training.end()


@pytest.mark.parametrize("training", [(3, "2")], indirect=True)
def test_replicas_make_the_copies_themselves_and_a_spare_goes_on_from_one(training: Training) -> None:
    steps = (2, 4, 6, 8, 10)
    for step in steps:
        (training.notes / f"hold-{step}").touch()
    policy = {"CKPTSVC_TIERS_PARTNER": "copy", "CKPTSVC_TIERS_REPLICAS": "true"}
    for number in (1, 2, 3):
        training.start(number, **policy, CKPTSVC_SAVE_EVERY="2", CKPTSVC_SAVE_EXTENT="4096")
    sizes = {}
    for step in steps:
        training.logged(f"step {step}: a copy of what", 2)
        found = re.findall(rf"step {step}: a copy of what \w+ holds, (\d+) bytes", training.runtime.log())
        sizes[step] = [int(nbytes) for nbytes in found]
        if step != 10:
            (training.notes / f"go-{step}").touch()
    whole = 700_001 * 4 // 2
    # Two copies make the arenas, the next two have them mapped; from then on only what differs by rank is read.
    assert all(nbytes > whole for nbytes in sizes[2] + sizes[4])
    assert all(nbytes < whole // 20 for nbytes in sizes[10])
    training.lose(2)
    for rank in (0, 1):
        assert training.began(2, rank) == ["10", "memory", "True", "2"]
    training.end()


@pytest.mark.slow
@pytest.mark.parametrize("training", [(4, "4")], indirect=True)
def test_nodes_that_share_a_switch_are_no_partners_though_their_agents_know_of_none(training: Training) -> None:
    """n1 and n3 share one; without a word about that they are partners."""
    numbers = range(1, 5)
    for number in numbers:
        training.serve(number, CKPTSVC_TIERS_PARTNER="copy")
    for number in numbers:
        switch = {"SLURM_TOPOLOGY_ADDR": f"s{number % 2}.n{number}", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node"}
        training.start(number, **switch)
    training.logged("step 10: a copy of what", 4)
    for number in numbers:
        log = (training.runtime.sockets / f"node-n{number}" / "agent.log").read_text()
        partners = re.findall(r"step 10: a copy of what n(\d) holds", log)
        assert [int(partner) % 2 for partner in partners] == [(number + 1) % 2], training.story()
    (training.notes / "go-10").touch()
    training.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "partner", "gone"), [((3, "2:3"), "xor", [2]), ((4, "2:4"), "rs", [2, 4])], indirect=["training"]
)
def test_those_that_are_left_rebuild_what_was_lost_from_parity(
    training: Training, partner: str, gone: list[int]
) -> None:
    count = len(training.hosts)
    training.start(*range(1, count + 1), CKPTSVC_TIERS_PARTNER=partner)
    training.logged(f"step 10: parity of {count} nodes, for {len(gone)} losses", count)
    for number in gone:
        training.lose(number)
    for rank in range(count - len(gone)):
        assert training.began(2, rank) == ["10", "memory", "True", str(count - len(gone))]
    training.logged("are lost; they are rebuilt from parity on")
    training.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "partner", "kept"),
    [((5, "3"), "copy", ["a copy of what n1 holds", "a copy of what n3 holds"]), ((3, "1:3"), "xor", ["parity of 2"])],
    indirect=["training"],
)
def test_what_was_restored_is_kept_elsewhere_again_and_survives_the_next_loss(
    training: Training, partner: str, kept: list[str]
) -> None:
    (training.notes / "again-11").touch()
    training.start(1, 2, 3, CKPTSVC_TIERS_PARTNER=partner)
    for spare in range(4, len(training.hosts) + 1):
        training.start(spare, CKPTSVC_TIERS_PARTNER=partner)
    training.logged("step 10: a copy of what" if partner == "copy" else "step 10: parity of 3", 3)
    training.lose(2)
    assert training.began(2, 0)[:3] == ["10", "memory", "True"]
    training.logged("step 10, restored, is kept elsewhere again")
    for what in kept:
        training.logged(f"step 10: {what}", 2)
    training.lose(3)
    world = "3" if partner == "copy" else "1"
    assert training.began(3, 0) == ["10", "memory", "True", world]
    (training.notes / "go-11").touch()
    training.end()


@pytest.mark.slow
@pytest.mark.parametrize("training", [(3, "1:3")], indirect=True)
def test_where_a_node_and_its_partner_are_lost_an_older_checkpoint_has_to_do(training: Training) -> None:
    training.start(1, 2, 3, CKPTSVC_TIERS_PARTNER="copy")
    training.logged("step 10: a copy of what", 3)
    for number in (2, 3):
        training.lose(number)
    assert training.began(2, 0) == ["5", "store", "True", "1"]
    training.logged("step 10 was complete in memory and is lost, with the nodes")
    assert "and those that kept them; an older one has to do" in (training.folder / "run-1.log").read_text()
    training.end()
