"""Draining a node by the scheduler's own command; what goes wrong is told and never raised."""

import asyncio
from pathlib import Path

import pytest

from ckptsvc.agent.coordination import drain as module
from ckptsvc.agent.coordination.drain import MAX_OUTPUT, Drained, drain

SLURM, PBS = {"SLURM_JOB_ID": "7"}, {"PBS_JOBID": "7.server"}


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Stand-ins that note their arguments, one a line."""
    for name in ("scontrol", "pbsnodes"):
        stand_in(tmp_path, name, f'for each in "$@"; do echo "$each"; done > {tmp_path}/{name}.said')
    return tmp_path


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    path.chmod(0o755)


def asked(
    folder: Path, environ: dict[str, str], node: str = "n1", reason: str = "a reason", on: bool = True
) -> Drained:
    return asyncio.run(drain(node, reason, enabled=on, environ=environ | {"PATH": str(folder)}))


def test_slurm(commands: Path) -> None:
    assert asked(commands, SLURM) == Drained(True, "node n1 is drained: a reason")
    said = (commands / "scontrol.said").read_text().splitlines()
    assert said == ["update", "nodename=n1", "state=drain", "reason=ckptsvc: a reason"]


def test_pbs(commands: Path) -> None:
    assert asked(commands, PBS, "x1.site").done
    assert (commands / "pbsnodes.said").read_text().splitlines() == ["-o", "-C", "ckptsvc: a reason", "x1.site"]


def test_an_agent_outside_any_job_uses_what_is_installed(commands: Path) -> None:
    assert asked(commands, {}).done
    assert (commands / "scontrol.said").exists()
    (commands / "scontrol").unlink()
    assert asked(commands, {}).done
    assert (commands / "pbsnodes.said").exists()


def test_off_by_default_nothing_is_run(commands: Path) -> None:
    outcome = asked(commands, SLURM, on=False)
    assert outcome == Drained(False, "node n1 is not drained: scheduler.drain is not set; its fault: a reason")
    assert not list(commands.glob("*.said"))


@pytest.mark.parametrize("node", ["", "-o", "n1 n2", "n1;reboot", "n[1-9]", "a" * 300])
def test_what_is_no_node_is_not_passed_on(commands: Path, node: str) -> None:
    assert not asked(commands, SLURM, node).done
    assert not list(commands.glob("*.said"))


def test_a_reason_is_one_line_and_short_enough(commands: Path) -> None:
    assert asked(commands, PBS, reason="first\nsecond\0third" + "x" * 500).done
    lines = (commands / "pbsnodes.said").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("ckptsvc: first second third")
    assert len(lines[2]) == 80


def test_a_refusal_is_told(commands: Path) -> None:
    stand_in(
        commands, "scontrol", f"echo 'slurm_update error: Invalid user id'; head -c {10 * MAX_OUTPUT} /dev/zero; exit 1"
    )
    outcome = asked(commands, SLURM)
    assert not outcome.done
    assert "scontrol exited with status 1: slurm_update error: Invalid user id" in outcome.detail
    assert len(outcome.detail) < 2 * MAX_OUTPUT


def test_a_scheduler_that_does_not_answer_is_not_waited_for(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    stand_in(commands, "scontrol", "exec sleep 60")
    assert asked(commands, SLURM).detail == "node n1 is not drained: scontrol has not answered in 0.2 s"


def test_no_scheduler_at_all(tmp_path: Path) -> None:
    outcome = asyncio.run(drain("n1", "r", enabled=True, environ={"PATH": str(tmp_path)}))
    assert outcome == Drained(False, "node n1 is not drained: neither scontrol nor pbsnodes is to be found")


def test_a_command_that_does_not_start(commands: Path) -> None:
    (commands / "scontrol").write_text("#!/nonexistent/interpreter\n")
    assert "does not start" in asked(commands, SLURM).detail
