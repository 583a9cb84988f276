"""What a benchmark says of the machine is true: CPU time of real processes, files that really leave the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ckptsvc_drivers.linux import file_system, in_page_cache

from ckptsvc.cli.benchmarks.machine import available_memory, cpu_seconds, evict, facts

BURN = "import os, time\nwhile sum(os.times()[:2]) < {seconds}: pass\n"


def test_cpu_seconds_counts_a_child_while_it_runs_and_after_it_has_ended() -> None:
    before = cpu_seconds([os.getpid()])
    code = BURN.format(seconds=0.3) + "print('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"done\n"
        while_it_runs = cpu_seconds([os.getpid()]) - before
        alone = cpu_seconds([child.pid])
        child.communicate(b"\n")
    assert min(alone, while_it_runs) >= 0.25
    assert cpu_seconds([os.getpid()]) - before >= 0.25


def test_cpu_seconds_counts_a_process_once_and_none_that_is_not_there() -> None:
    mine = cpu_seconds([os.getpid()])
    assert mine > 0
    assert cpu_seconds([os.getpid(), os.getpid()]) == pytest.approx(mine, abs=0.1)
    assert cpu_seconds([2**22 + 1]) == 0


def test_an_evicted_file_is_cold(tmp_path: Path) -> None:
    if file_system(str(tmp_path)) in ("tmpfs", "ramfs"):
        pytest.skip("nothing is cold here")
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    with open(path, "rb") as file:
        assert in_page_cache(file.fileno(), 0, 8 << 20)
        how = evict([path])
        assert in_page_cache(file.fileno(), 0, 8 << 20) == how.startswith("warm")
    assert "posix_fadvise" in how or "drop_caches" in how


def test_what_is_in_memory_only_is_said_to_be() -> None:
    shm = Path("/dev/shm")
    if file_system(str(shm)) != "tmpfs":
        pytest.skip("no tmpfs")
    assert evict([shm / "x"]) == "in memory: nothing is cold on tmpfs"
    assert evict([]) == "nothing to evict"


def test_the_facts_name_processor_memory_file_system_and_versions() -> None:
    found = facts("/tmp")
    assert set(found) == {"processor", "memory", "file system", "software", "load"}
    assert f"{len(os.sched_getaffinity(0))} cores" in found["processor"]
    assert "torch 2" in found["software"]
    assert file_system("/tmp") in found["file system"]
    assert 0 < available_memory() < 2**50
