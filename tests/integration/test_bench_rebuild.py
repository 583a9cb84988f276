"""`ckptsvc bench rebuild`, as a program."""

import json
import subprocess
import sys

import numpy as np
import pytest
from harness.runtime import Runtime

from ckptsvc.cli.benchmarks.rebuild import ARENAS, CASES, Case, rebuild
from ckptsvc.format.checksum import EXTENT

BENCH = [sys.executable, "-m", "ckptsvc.cli.main", "bench", "rebuild"]


def test_every_case_is_measured_beside_memcpy(runtime: Runtime) -> None:
    arguments = ["--size", "1MB", "--threads", "2", "--repeat", "1", "--json"]
    ended = subprocess.run([*BENCH, *arguments], env=runtime.environ, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert document["bytes"] == EXTENT, "whole extents"
    assert [(row["what"], row["threads"]) for row in document["rows"]] == [(case.what, 2) for case in CASES]
    for case, row in zip(CASES, document["rows"], strict=True):
        assert row["rate"]["low"] > 0
        assert row["touched"]["low"] == pytest.approx(row["of_memcpy"]["low"] * (case.nodes - case.losses + 1) / 2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", [case for case in CASES if case.losses == 1], ids=lambda case: case.what)
def test_all_of_the_arena_is_rebuilt(case: Case, threads: int) -> None:
    arenas = [np.full(5 * EXTENT, 1 << number % 8, np.uint8) for number in range(ARENAS)]
    arenas[-1][:] = 0
    for number in range(threads):
        rebuild(case, arenas, number, threads)
    assert (arenas[-1] == (1 << case.read) - 1).all()


def test_a_size_that_does_not_fit_into_memory_is_refused(runtime: Runtime) -> None:
    ended = subprocess.run(
        [*BENCH, "--size", "100TiB"], env=runtime.environ, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert "times as much memory" in ended.stderr
    assert "Traceback" not in ended.stderr
