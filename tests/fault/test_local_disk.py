"""The local disk tier under faults: kills in mid-drain, a full or damaged disk, a durable store that is away.

A few of these are of every run, the others for `-m slow`. Step n's tensor is full of n, so that what a restore brings
back can be told from the values.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.damage import assert_intact, steps
from harness.job import SCRIPT, Job, Launch, free_port
from harness.rank import Rank
from harness.runtime import Runtime, eventually, tmpfs

import ckptsvc
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.storage import connect

ELEMENTS = 3_000_000  # 12 MB: drained in several pieces


def train(rank: Rank, store: str, elements: int = ELEMENTS) -> dict[str, Any]:
    """Steps and saves when the test says so, until it says to end."""
    if rank.world > 1:
        rank.join()
    tensor = torch.full((elements,), -1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = ckptsvc.attach({"tensor": tensor}, store=store, every=1)
        values = sorted({tensor.min().item(), tensor.max().item()})
        words = [str(w.message) for w in said]
        rank.report("attached", step=run.steps_done, values=values, tier=run.restored_from, said=words)
        for step in range(run.steps_done + 1, 1000):
            rank.until(str(step))
            if (rank.folder / "go-end").exists():
                break
            tensor.fill_(step)
            run.step()
            rank.report("stepped", step=step, skipped=run.skipped)
        waited = run.wait(timeout=60) if (rank.folder / "go-wait").exists() else None
    run.close()
    words = [str(w.message) for w in said]
    return {"skipped": run.skipped, "waited": waited, "said": [w for w in words if w.startswith("ckptsvc")]}


class Node:
    """A job on one node with a local disk.

    Attributes:
        disk, store: where snapshots go first, and then.
    """

    def __init__(self, launch: Launch, runtime: Runtime, folder: Path, **environ: str) -> None:
        self.launch, self.runtime = launch, runtime
        self.disk, self.store = folder / "disk", folder / "run"
        self.environ = {"CKPTSVC_TIERS_LOCAL": str(self.disk), "CKPTSVC_JOB": "job", **environ}
        runtime.environ |= self.environ  # for agents that the test starts itself

    def job(self, store: str = "", world: int = 1, elements: int = ELEMENTS) -> Job:
        return self.launch.plain(world, train, store or str(self.store), elements, **self.environ)

    def to_step(self, job: Job, last: int, first: int = 1, ranks: int = 1) -> None:
        for step in range(first, last + 1):
            job.go(str(step))
            for rank in range(ranks):
                assert job.wait_for("stepped", rank, step=step)["skipped"] == 0

    def end(self, job: Job, step: int) -> list[Any]:
        job.go("end")
        job.go(str(step + 1))
        return job.results()

    def copies(self) -> list[int]:
        """Steps with a copy on the disk."""
        return sorted({int(p.parent.name[5:17]) for p in self.disk.rglob("*.safetensors.json")})

    def snapshots(self) -> dict[int, dict[str, Any]]:
        """What the agent says of the disk, by step."""
        return {each["step"]: each for each in self.runtime.status()["local_disk"]["snapshots"]}

    def committed(self, step: int, timeout: float = 60.0) -> None:
        eventually(lambda: step in steps(self.store), f"step {step} to be committed", timeout)

    def reboot(self) -> None:
        """All that is in memory is gone: the agent, its workers, the arenas."""
        self.runtime.kill_agents()
        for folder in self.runtime.arenas.iterdir():
            shutil.rmtree(folder)


@pytest.fixture
def node(launch: Launch, runtime: Runtime, tmp_path: Path) -> Node:
    return Node(launch, runtime, tmp_path)


@pytest.mark.slow
def test_a_save_goes_over_the_local_disk_and_is_committed_as_ever(node: Node, runtime: Runtime) -> None:
    with node.job() as job:
        node.to_step(job, 3)
        node.committed(3)
        assert set(node.copies()) <= {1, 2, 3}
        job.go("wait")
        (result,) = node.end(job, 3)
    assert result["waited"] is True
    assert not result["said"]
    assert assert_intact(node.store)[0] == 3
    eventually(lambda: node.copies() == [], "the disk to be tidied when the job has ended")
    runtime.stop(runtime.agents()[0])
    assert list(node.disk.iterdir()) == []


@pytest.mark.slow
def test_a_large_snapshot_is_written_to_the_disk_while_it_is_copied(node: Node, runtime: Runtime) -> None:
    """And when its rank is killed in mid-copy, nothing of it stays there."""
    node.environ["CKPTSVC_SAVE_EARLY_CORES"] = "1"
    with node.job(elements=20_000_000) as job:
        node.to_step(job, 2)
        node.committed(2)
        runtime.arm("in_copy")
        job.go("3")
        runtime.reached("in_copy")
        eventually(lambda: list(node.disk.rglob("step-000000000003*/*")), "the writing to begin")
        job.kill()
        runtime.let_go("in_copy")
        eventually(lambda: not list(node.disk.rglob("step-000000000003*/*")), "it to be given up")
    assert assert_intact(node.store) == [2, 1]


# ---- kills


def kill_agent(runtime: Runtime, worker: int) -> None:
    """SIGKILL for the agent; its ranks start another one at once. Waits until its worker is gone."""
    os.kill(runtime.agents()[0].pid, signal.SIGKILL)
    eventually(lambda: worker not in [process.pid for process in runtime.workers()], "the worker to be gone")


POINTS = ("after_local", "before_drain", "in_drain", "after_drain")
FIRST = ("agent", "in_drain")
"""That of every run; the others are for `-m slow`."""

KILLS = [(whom, point) for whom in ("worker", "agent", "trainer") for point in POINTS]


@pytest.mark.parametrize(
    ("whom", "point"), [pytest.param(*kill, marks=() if kill == FIRST else pytest.mark.slow) for kill in KILLS]
)
def test_a_drain_goes_on_after_a_kill(node: Node, runtime: Runtime, point: str, whom: str) -> None:
    with node.job() as job:
        node.to_step(job, 1)
        node.committed(1)
        runtime.arm(point)
        node.to_step(job, 2, 2)
        pid = runtime.reached(point)
        if whom == "worker":
            os.kill(pid, signal.SIGKILL)
        elif whom == "agent":
            kill_agent(runtime, pid)
        else:
            job.kill()
        runtime.let_go(point)
        node.committed(2)
        if whom != "trainer":
            node.to_step(job, 3, 3)
            node.committed(3)
            node.end(job, 3)
    assert assert_intact(node.store)[0] == (2 if whom == "trainer" else 3)
    folder = node.store / "step-000000000002.e00001"
    assert len(list(folder.glob("r*"))) == 1, "the shard that was drained again has the same name"


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["worker", "agent"])
@pytest.mark.parametrize("point", ["in_drain", "after_drain"])
def test_a_drain_that_compresses_goes_on_after_a_kill(node: Node, runtime: Runtime, point: str, whom: str) -> None:
    """What it had written has other names than what is written then, and is garbage."""
    node.environ |= {"CKPTSVC_SAVE_COMPRESSION": "zstd", "CKPTSVC_SAVE_INCREMENTAL": "true"}
    with node.job() as job:
        node.to_step(job, 1)
        node.committed(1)
        runtime.arm(point)
        node.to_step(job, 2, 2)
        pid = runtime.reached(point)
        if whom == "worker":
            os.kill(pid, signal.SIGKILL)
        else:
            kill_agent(runtime, pid)
        runtime.let_go(point)
        node.committed(2)
        node.to_step(job, 3, 3)
        node.committed(3)
        node.end(job, 3)
    assert assert_intact(node.store) == [3, 2, 1]
    for step in (1, 2, 3):
        files = (node.store / f"step-{step:012}.e00001").glob("r*")
        assert all(path.stat().st_size < ELEMENTS for path in files), "it is compressed"
    store = connect(str(node.store))
    found = [garbage.why for garbage in find_garbage(store)]
    assert found == (["not part of the committed checkpoint"] if point == "after_drain" else [])
    for garbage in list(find_garbage(store)):
        assert remove_garbage(store, garbage)
    assert list(find_garbage(store)) == []
    assert assert_intact(node.store) == [3, 2, 1]


@pytest.mark.slow
def test_a_shard_that_was_drained_is_not_drained_again(node: Node, runtime: Runtime) -> None:
    """The agent is killed when one of two shards is in the store: only the other one is written by the next agent."""
    with node.job(world=2) as job:
        node.to_step(job, 1, ranks=2)
        node.committed(1)
        runtime.arm("before_drain")
        node.to_step(job, 2, 2, ranks=2)
        pid = runtime.reached("before_drain")
        eventually(lambda: node.snapshots()[2]["durable"] == 1, "the other shard to be durable")
        (there,) = (node.store / "step-000000000002.e00001").glob("r*")
        before = there.stat()
        kill_agent(runtime, pid)
        runtime.let_go("before_drain")
        node.committed(2)
        assert (there.stat().st_ino, there.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        node.end(job, 2)
    assert assert_intact(node.store)[0] == 2


# ---- the durable store is away, the disk is full


def faulty(node: Node, *faults: dict[str, Any]) -> str:
    """The store behind a plan of faults; returns its address."""
    fresh = node.store.with_name("run.new")
    fresh.write_text(json.dumps(faults))
    fresh.rename(f"{node.store}.plan")
    return f"faulty+file://{node.store}"


AWAY = {"op": "write", "key": "step*", "error": "store-unavailable", "times": 0}


def test_training_goes_on_while_the_store_is_away_and_the_drains_catch_up_in_order(node: Node) -> None:
    """Eight snapshots with two arenas: the arenas are free as soon as the local disk has them."""
    url = faulty(node, AWAY)
    with node.job(url) as job:
        node.to_step(job, 4)
        eventually(
            lambda: "store fails" in node.runtime.status()["local_disk"]["store_problem"], "the trouble to be told"
        )
        assert steps(node.store) == []
        assert node.snapshots()[1]["draining"] == 1, "the first one is never given up"
        node.to_step(job, 8, 5)
        faulty(node)
        node.committed(1)
        node.committed(8)
        node.end(job, 8)
    order = [line for line in node.runtime.log().splitlines() if ": committed" in line]
    assert [line.split()[2] for line in order] == ["1:", "8:"], "of a long queue, only the newest is drained"
    assert assert_intact(node.store) == [8, 1]


@pytest.mark.slow
def test_a_short_queue_is_drained_in_order(node: Node) -> None:
    node.environ["CKPTSVC_TIERS_DURABLE_BACKLOG"] = "8"
    url = faulty(node, AWAY)
    with node.job(url) as job:
        node.to_step(job, 4)
        faulty(node)
        node.committed(4)
        node.end(job, 4)
    order = [line for line in node.runtime.log().splitlines() if ": committed" in line]
    assert [line.split()[2] for line in order] == ["1:", "2:", "3:", "4:"]
    assert assert_intact(node.store) == [4, 3, 2, 1]


def test_a_full_disk_costs_nothing_but_the_detour(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "30m") as mount:
        node = Node(launch, runtime, tmp_path, CKPTSVC_TIERS_LOCAL_LIMIT="100%")
        node.disk = mount / "disk"
        node.environ["CKPTSVC_TIERS_LOCAL"] = str(node.disk)
        with node.job() as job:
            node.to_step(job, 1)
            node.committed(1)
            (mount / "ballast").write_bytes(bytes(12 << 20))
            node.to_step(job, 2, 2)
            node.committed(2)
            assert "takes no shard" in runtime.status()["local_disk"]["problem"]
            (mount / "ballast").unlink()
            node.to_step(job, 3, 3)
            node.committed(3)
            assert runtime.status()["local_disk"]["problem"] == ""
            node.end(job, 3)
        assert assert_intact(node.store) == [3, 2, 1]


@pytest.mark.slow
def test_a_disk_that_cannot_be_used_is_done_without(node: Node) -> None:
    node.disk.parent.joinpath("disk").write_text("not a directory")
    with node.job() as job:
        node.to_step(job, 1)
        node.committed(1)
        assert "is not used" in node.runtime.status()["local_disk"]["problem"]
        node.end(job, 1)


# ---- back from the disk


def test_after_the_loss_of_all_memory_the_newest_is_restored_from_the_disk(node: Node) -> None:
    url = faulty(node)
    with node.job(url, 2) as job:
        node.to_step(job, 1, ranks=2)
        node.committed(1)
        faulty(node, AWAY)
        node.to_step(job, 3, 2, ranks=2)
        eventually(lambda: node.snapshots().get(3, {}).get("complete"), "step 3 to be on the disk")
        for rank in range(2):
            job.kill(rank)
        job.wait()
        node.reboot()
    with node.job(url, 2) as job:
        for rank in range(2):
            attached = job.wait_for("attached", rank)
            assert (attached["step"], attached["tier"], attached["values"]) == (3, "local", [3.0])
        faulty(node)
        node.committed(3)  # the drain of before goes on
        node.to_step(job, 4, 4, ranks=2)
        node.committed(4)
        node.end(job, 4)
    assert assert_intact(node.store)[:2] == [4, 3]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["*.safetensors", "*.json"])
def test_a_damaged_copy_is_not_restored_but_an_older_one_loudly(node: Node, what: str) -> None:
    url = faulty(node)
    with node.job(url) as job:
        node.to_step(job, 1)
        node.committed(1)
        faulty(node, AWAY)
        node.to_step(job, 2, 2)
        eventually(lambda: node.snapshots().get(2, {}).get("complete"), "step 2 to be on the disk")
        job.kill()
        job.wait()
        node.reboot()
    (path,) = node.disk.rglob(f"step-000000000002*/{what}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with node.job(url) as job:
        attached = job.wait_for("attached")
        assert (attached["step"], attached["tier"], attached["values"]) == (1, "local", [1.0])
        if what == "*.safetensors":
            assert any("cannot restore step 2" in words for words in attached["said"])
        assert re.search(r"error: .*(do|does) not match (their|its own) checksum", node.runtime.log())
        faulty(node)
        node.to_step(job, 2, 2)
        node.committed(2)
        node.end(job, 2)
    assert assert_intact(node.store)[:2] == [2, 1]


@pytest.mark.slow
def test_what_an_agent_that_is_gone_for_good_has_left_is_made_durable_by_another(node: Node) -> None:
    """Its job does not come back. Whoever serves the user next on this node finds its folder."""
    with node.job(faulty(node)) as job:
        node.to_step(job, 1)
        node.committed(1)
        faulty(node, AWAY)
        node.to_step(job, 2, 2)
        eventually(lambda: node.snapshots().get(2, {}).get("complete"), "step 2 to be on the disk")
        job.kill()
        job.wait()
        node.reboot()
    faulty(node)
    (folder,) = node.disk.glob("ckptsvc-*")
    young = node.runtime.start_agent()
    assert node.snapshots() == {}, "its agent may come back"
    young.terminate()
    young.wait()
    for path in (folder, *folder.iterdir()):
        os.utime(path, (1, 1))
    agent = node.runtime.start_agent()
    node.committed(2)
    assert assert_intact(node.store) == [2, 1]
    eventually(lambda: not node.snapshots() or node.snapshots()[2]["stage"] == "committed", "the agent to know it")
    agent.terminate()
    agent.wait()


# ---- the policy


@pytest.mark.slow
def test_every_third_goes_on_and_so_does_the_last(node: Node) -> None:
    node.environ["CKPTSVC_TIERS_DURABLE_EVERY"] = "3"
    with node.job() as job:
        node.to_step(job, 5)
        eventually(lambda: 5 in node.snapshots() and node.snapshots()[5]["stage"] == "local", "step 5 to stay local")
        node.committed(4)
        assert steps(node.store) == [4, 1]
        eventually(lambda: node.copies() == [4, 5], "older ones to go: local_keep is 2")
        node.end(job, 5)
    node.committed(5)
    assert assert_intact(node.store) == [5, 4, 1]
    eventually(lambda: node.copies() == [], "the disk to be tidied")


@pytest.mark.slow
def test_what_somebody_waits_for_goes_on(node: Node) -> None:
    node.environ["CKPTSVC_TIERS_DURABLE_EVERY"] = "100"
    with node.job() as job:
        node.to_step(job, 3)
        job.go("wait")
        (result,) = node.end(job, 3)
    assert result["waited"] is True
    assert assert_intact(node.store) == [3, 1]


# ---- several nodes


class Nodes:
    """A job of two nodes: each is a `ckptsvc run` with its own agent, its own disk folder and one rank.

    Its coordinator listens on another port each time.
    """

    def __init__(self, launch: Launch, runtime: Runtime, store: str, disk: Path) -> None:
        port = free_port()
        self._runtime = runtime
        environ = {"CKPTSVC_TIERS_LOCAL": str(disk), "CKPTSVC_LAUNCH_STANDBY": "false"}
        first = launch._launched(self._command(0, port), 2, train, (store,), environ)
        spec = first.processes[0].args[-1]  # type: ignore[attr-defined]
        self.logs = [first._folder / "launcher.log", first._folder / "launcher-1.log"]
        with self.logs[1].open("wb") as log:
            second = subprocess.Popen(
                [*self._command(1, port), str(SCRIPT), spec], env=runtime.environ | environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        self.job = Job(runtime, first._folder, 2, [first.processes[0], second], self.logs)

    def _command(self, number: int, port: int) -> list[str]:
        run = [sys.executable, "-m", "ckptsvc.cli.main", "run"]
        return [*run, "--nnodes", "2", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node",
            f"n{number}", "--node-rank", str(number), "--no-preflight"]  # fmt: skip

    def directory(self, number: int) -> Path:
        return self._runtime.sockets / f"node-n{number}"

    def disk(self, number: int) -> dict[int, dict[str, Any]]:
        found = self._runtime.status(self.directory(number))["local_disk"]["snapshots"]
        return {each["step"]: each for each in found}

    def agent(self, number: int) -> int:
        return int((self.directory(number) / "ready").read_text().split("\n")[0])


def to_step(job: Job, last: int, first: int) -> None:
    for step in range(first, last + 1):
        job.go(str(step))
        for rank in range(2):
            job.wait_for("stepped", rank, step=step)


@pytest.mark.slow
@pytest.mark.parametrize("whose", [0, 1], ids=["the coordinator", "another"])
def test_two_nodes_drain_together_though_an_agent_is_killed(
    launch: Launch, runtime: Runtime, tmp_path: Path, whose: int
) -> None:
    """What is on the disks, and has not been drained, the next coordinator has drained in order."""
    node = Node(launch, runtime, tmp_path)
    nodes = Nodes(launch, runtime, faulty(node), tmp_path / "disk")
    with nodes.job as job:
        to_step(job, 1, 1)
        node.committed(1)
        faulty(node, AWAY)
        to_step(job, 3, 2)
        for number in range(2):
            eventually(lambda n=number: nodes.disk(n).get(3, {}).get("complete"), "step 3 to be on both disks")
        before = nodes.agent(whose)
        os.kill(before, signal.SIGKILL)
        faulty(node)
        node.committed(3)
        assert nodes.agent(whose) != before
        eventually(lambda: runtime.status(nodes.directory(whose))["ranks"], "the rank to register again")
        to_step(job, 4, 4)
        node.committed(4)
        job.go("end")
        job.go("5")
        assert job.wait() == [0, 0]
    assert assert_intact(node.store) == [4, 3, 2, 1]


@pytest.mark.slow
def test_a_node_that_has_lost_its_memory_reads_its_disk_and_the_other_need_not(
    launch: Launch, runtime: Runtime, tmp_path: Path
) -> None:
    node = Node(launch, runtime, tmp_path)
    nodes = Nodes(launch, runtime, faulty(node), tmp_path / "disk")
    with nodes.job as job:
        to_step(job, 1, 1)
        node.committed(1)
        faulty(node, AWAY)
        to_step(job, 3, 2)
        for number in range(2):
            eventually(lambda n=number: nodes.disk(n).get(3, {}).get("complete"), "step 3 to be on both disks")
        rank_of_n1 = job.reports("begun", 1)[-1]["pid"]
        lost = {Path(os.readlink(link)).parent for link in Path(f"/proc/{rank_of_n1}/map_files").iterdir()
            if ".arena" in os.readlink(link)}  # fmt: skip
        for process in runtime.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        eventually(lambda: not runtime.processes(), "everything to be gone")
    assert len(lost) == 1
    shutil.rmtree(lost.pop())
    nodes = Nodes(launch, runtime, faulty(node, AWAY), tmp_path / "disk")
    with nodes.job as job:
        for rank in range(2):
            attached = job.wait_for("attached", rank)
            assert (attached["step"], attached["tier"], attached["values"]) == (3, "local", [3.0])
        faulty(node)
        node.committed(3)
        job.go("end")
        job.go("4")
        assert job.wait() == [0, 0]
    log = runtime.log()
    assert log.count("is back in memory from the local disk") == 1
