"""What `ckptsvc run` takes from the scheduler, and that its flags win."""

import os
from pathlib import Path

import pytest

from ckptsvc.cli.main import main
from ckptsvc.cli.placing import Nodes, parse_nodes, placed
from ckptsvc.errors import ConfigError

HERE = ("127.0.1.1", "127.0.1.2", "127.0.1.3")  # nodes that are all this host
ELSEWHERE = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1: nobody's


def slurm(nodes: tuple[str, ...], rank: int) -> dict[str, str]:
    """The environment of a task of `srun --ntasks-per-node=1`."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": nodes[rank],
        "SLURM_NODEID": str(rank),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURM_STEP_NUM_NODES": str(len(nodes)),
        "SLURM_STEP_NUM_TASKS": str(len(nodes)),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{len(nodes)})",
    }


def test_without_flags_and_scheduler_there_is_one_node() -> None:
    nodes = placed(Nodes(), {}, "host")
    assert (nodes.low, nodes.high, nodes.node_rank, nodes.coordinator, nodes.folder) == (1, 1, 0, "", "")
    assert nodes.job.startswith("run-")
    assert nodes.address == "127.0.0.1"


def test_several_nodes_without_a_scheduler_must_be_told_where_they_meet() -> None:
    with pytest.raises(ConfigError, match="--rdzv-endpoint"):
        placed(Nodes(2, 2), {}, "host")
    with pytest.raises(ConfigError, match="--rdzv-id"):
        placed(Nodes(2, 2, coordinator="127.0.0.1:29400"), {}, "host")


def test_everything_by_hand() -> None:
    given = Nodes(2, 4, 1, "job", "127.0.0.1:29400", "n1", "127.0.0.9")
    assert placed(given, slurm(HERE, 0), "host") == Nodes(
        2, 4, 1, "job", "127.0.0.1:29400", "n1", "127.0.0.9", "node-n1"
    )
    assert placed(Nodes(2, 2, 1, "job", "other:29400"), {}, "host").address == "host"


def test_virtual_nodes_on_one_host_meet_on_loopback() -> None:
    found = [placed(Nodes(), slurm(HERE, rank), "host") for rank in range(3)]
    assert [node.node_rank for node in found] == [0, 1, 2]
    assert [node.node for node in found] == list(HERE)
    assert {(node.low, node.high, node.job, node.address) for node in found} == {(3, 3, "7.0", "127.0.0.1")}
    (coordinator,) = {node.coordinator for node in found}
    assert coordinator.startswith("127.0.0.1:2")
    assert len({node.folder for node in found}) == 3, "an agent for each"


def test_real_hosts_meet_at_the_first_one() -> None:
    found = [placed(Nodes(), slurm(ELSEWHERE, rank), ELSEWHERE[rank]) for rank in range(2)]
    (coordinator,) = {node.coordinator for node in found}
    assert coordinator.startswith("192.0.2.1:2")
    assert [node.address for node in found] == list(ELSEWHERE)
    assert [node.node for node in found] == ["", ""]
    assert [node.folder for node in found] == ["", ""]


def test_one_host_among_others_is_not_all_of_them() -> None:
    assert placed(Nodes(), slurm((HERE[0], ELSEWHERE[0]), 0), "host").coordinator.startswith("127.0.1.1:2")
    assert placed(Nodes(), slurm((ELSEWHERE[0], HERE[0]), 1), "host").coordinator.startswith("192.0.2.1:2")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (Nodes(low=1, high=2), {"low": 1, "high": 2}),
        (Nodes(node_rank=0), {"node_rank": 0}),
        (Nodes(job="mine"), {"job": "mine"}),
        (Nodes(coordinator="127.0.0.1:7"), {"coordinator": "127.0.0.1:7"}),
        (Nodes(node="x"), {"node": "x"}),
        (Nodes(address="127.0.0.7"), {"address": "127.0.0.7"}),
    ],
)
def test_each_flag_wins_over_the_scheduler(given: Nodes, names: dict[str, object]) -> None:
    nodes = placed(given, slurm(HERE, 2), "host")
    assert {name: getattr(nodes, name) for name in names} == names
    assert nodes.high == (given.high or 3)


def test_one_node_by_flag_asks_no_scheduler() -> None:
    assert placed(Nodes(1, 1), {"SLURM_JOB_ID": "7"}, "host").high == 1
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        placed(Nodes(), {"SLURM_JOB_ID": "7"}, "host")


def test_one_node_of_a_scheduler_has_a_job_of_its_own_each_time() -> None:
    jobs = {placed(Nodes(), slurm(HERE[:1], 0), "host").job for _ in range(2)}
    assert len(jobs) == 2
    assert all(job.startswith("7.0-") for job in jobs)


def test_a_node_that_only_slurm_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("n1.invalid", "n2.invalid")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$5 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=vm Port=17301"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert placed(Nodes(), slurm(names, 1), "vm").coordinator.startswith("127.0.0.1:2")
    scontrol.write_text("#!/bin/sh\necho 'Node n1 not found'; exit 1\n")
    assert placed(Nodes(), slurm(names, 1), "vm").coordinator.startswith("n1.invalid:2")


def test_nodes_on_several_hosts_are_refused_without_certificates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in slurm(ELSEWHERE, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["run", "train.py"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "the coordinator's address is 192.0.2.1:" in said
    assert "certificates" in said


@pytest.mark.parametrize(("text", "bounds"), [(None, (0, 0)), ("4", (4, 4)), ("2:4", (2, 4))])
def test_numbers_of_nodes(text: str | None, bounds: tuple[int, int]) -> None:
    assert parse_nodes(text) == bounds


@pytest.mark.parametrize("text", ["", "x", "0", "3:2", "-1", "1:2:3"])
def test_what_is_no_number_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--nnodes"):
        parse_nodes(text)
