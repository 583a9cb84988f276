"""`ckptsvc bench` as a program, on tiny states: it measures, says so, and leaves nothing behind."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ckptsvc.cli import bench
from ckptsvc.cli.bench import Bench
from ckptsvc.cli.benchmarks import launch
from ckptsvc.cli.benchmarks.spec import Spec
from ckptsvc.errors import ConfigError

PROGRAM = [sys.executable, "-m", "ckptsvc.cli.main", "bench"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for the store; afterwards, what was made in it and the agent's sockets are gone."""
    sockets = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(sockets))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in sockets.iterdir()} <= {"secret", "http-token"}
    shutil.rmtree(sockets)


def run(*arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *arguments, "--store", str(store)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def measured(*arguments: str, store: Path) -> dict[str, Any]:
    ended = run(*arguments, "--json", store=store)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_save_is_measured_beside_limits_and_peers(store: Path) -> None:
    found = measured("save", "--gib", "0.01", "--repeat", "2", "--vs", "torch_save,torchsnapshot", store=store)
    rows = {row["what"]: row for row in found["rows"]}
    assert set(rows) == {"loop blocked", "until durable", "CPU"}
    assert rows["loop blocked"]["against"] == "memcpy"
    assert rows["until durable"]["against"] == "direct write"
    for row in rows.values():
        assert row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
        assert set(row["peers"]) <= {"torch_save", "torchsnapshot"}
        assert "torch_save" in row["peers"]
    blocked, durable = rows["loop blocked"]["ours"], rows["until durable"]["ours"]
    assert 0 < blocked["median"] < durable["median"] < 60
    assert rows["loop blocked"]["met"] == (rows["loop blocked"]["ratio"]["median"] <= 1.15)
    assert found["warm_up"]["save"]["ckptsvc"]["blocked"] > 0
    missing = {"save: torchsnapshot": "torchsnapshot is not installed"}
    assert found["unavailable"] == ({} if find_spec("torchsnapshot") else missing)


@pytest.mark.slow
def test_ranks_restore_from_memory_and_from_the_store(store: Path) -> None:
    found = measured("restore", "--ranks", "2", "--gib", "0.01", "--repeat", "1", "--vs", "dcp", store=store)
    cold, memory = found["rows"]
    assert (cold["what"], memory["what"]) == ("cold, from the store", "after a kill, from memory")
    assert cold["peers"]["dcp"]["median"] > 0
    assert (cold["against"], memory["against"]) == ("cold read", "memcpy")


@pytest.mark.slow
def test_a_job_of_ranks_reads_every_byte_once(store: Path) -> None:
    found = measured("reshard", "--ranks", "2", "--gib", "0.4", "--repeat", "1", store=store)
    ratios = {row["what"]: row["ratio"]["median"] for row in found["rows"]}
    assert len(ratios) == 6
    assert all(1 < ratio <= 1.05 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_a_person_sees_a_table_for_small_tensors_and_overlap(store: Path) -> None:
    small = run("small", "--gib", "0.01", "--tensors", "100", "--repeat", "1", store=store)
    assert small.returncode == 0, small.stderr
    assert ">= 12x faster" in small.stdout
    overlap = run("overlap", "--gib", "0.01", "--repeat", "1", store=store)
    assert overlap.returncode == 0, overlap.stderr
    assert "training time lost in all" in overlap.stdout


def test_sigterm_leaves_nothing_behind(store: Path) -> None:
    process = subprocess.Popen([*PROGRAM, "save", "--gib", "0.01", "--repeat", "100", "--store", str(store)])
    deadline = time.monotonic() + 60
    while not list(store.glob("*/run-save/step-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["save", "--vs", "nobody"], "--vs nobody is not known"),
        (["save", "--gib", "100000"], "of memory"),
        (["everything"], "is not one of"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[str], said: str, store: Path) -> None:
    ended = run(*arguments, store=store)
    assert ended.returncode == 2
    assert said in ended.stderr


def test_a_store_inside_one_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory://"):
        Bench("memory://x", 1, 1, 1, (), None)


def test_a_rank_that_fails_ends_the_benchmark_with_what_it_said(store: Path) -> None:
    job = launch.Job(store, 1)
    spec = Spec(workload="nonsense", nbytes=1, repeat=1, store="", directory="")
    with pytest.raises(launch.BenchFailed, match="KeyError: 'nonsense'"):
        job.run(spec, lambda share: None)


def test_the_names_of_peers_are_those_that_can_be_measured() -> None:
    from ckptsvc.cli.benchmarks.peers import PEERS

    assert tuple(PEERS) == bench.PEERS
