"""The fault matrix of `ckptsvc bench faults`, kind by kind: seen, the right one named, and the job goes on."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.etcd import program

from ckptsvc.cli.benchmarks.faults.command import Bench
from ckptsvc.cli.benchmarks.faults.kinds import KINDS, Kind, Need
from ckptsvc.cli.benchmarks.faults.world import processes_with

SHORT = ("missed",)
"""Kinds that no other test has, and that take a few seconds."""


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench({"CKPTSVC_HEALTH_CONFIRM": "1s"}) as found:
        yield found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The temporary directories that are made from now on."""
    found, make = [], tempfile.mkdtemp

    def mkdtemp(*args, **options) -> str:
        found.append(make(*args, **options))
        return found[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.name, marks=[] if kind.name in SHORT else pytest.mark.slow) for kind in KINDS]
)
def test_a_job_comes_through(bench: Bench, kind: Kind, made: list[str], request: pytest.FixtureRequest) -> None:
    if kind.needs is Need.ETCD:
        bench.etcd = program(request.getfixturevalue("_programs"))
    if why := bench.missing(kind):
        pytest.skip(why)
    outcome = bench.run(kind)
    assert outcome.problem == "", outcome
    assert made
    assert not [path for path in made if Path(path).exists()]
    assert not [pid for path in made for pid in processes_with(f"CKPTSVC_AGENT_SOCKET_DIR={path}")]
