"""The command around the demo."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptsvc.cli import demo
from ckptsvc.cli.demonstration.facts import Facts
from ckptsvc.cli.demonstration.flow import Demo
from ckptsvc.cli.demonstration.processes import DemoFailed
from ckptsvc.cli.main import main

Make = Callable[..., Facts]


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    return caught.value.code


@pytest.fixture
def play(monkeypatch, tmp_path: Path) -> Callable[[object], None]:
    """Makes `Demo.run` return facts or raise an error, in a temporary directory below `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def set_outcome(outcome: object) -> None:
        def run(_: Demo) -> Facts:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(Demo, "run", run)

    return set_outcome


def left_in(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.is_dir()]


def test_a_pass_leaves_the_report_only(play, demo_facts_of: Make, tmp_path: Path, capsys) -> None:
    play(demo_facts_of())
    assert exit_status("--report", str(tmp_path / "page.html")) == 0
    assert left_in(tmp_path) == []
    assert "A rank was killed" in (tmp_path / "page.html").read_text()
    output = capsys.readouterr().out
    assert "passed" in output
    assert str(tmp_path / "page.html") in output.replace("\n", "")


def test_a_failed_check_is_status_1_and_leaves_the_logs(play, demo_facts_of: Make, tmp_path: Path, capsys) -> None:
    play(demo_facts_of(apart=(1e-7, 1e-3)))
    assert exit_status("--report", str(tmp_path / "page.html")) == 1
    assert [(tmp_path / name / "logs").is_dir() for name in left_in(tmp_path)] == [True]
    streams = capsys.readouterr()
    assert "FAILED" in streams.out
    assert str(tmp_path / left_in(tmp_path)[0]) in streams.err


def test_a_demo_that_broke_off_says_why_and_leaves_the_logs(play, tmp_path: Path, capsys) -> None:
    play(DemoFailed("run-node-0 ended with status 1", hint="the end of its log"))
    assert exit_status() == 1
    assert len(left_in(tmp_path)) == 1
    assert "error: run-node-0 ended with status 1\nhint: the end of its log" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(play, tmp_path: Path) -> None:
    play(KeyboardInterrupt())
    assert exit_status() == 130
    assert left_in(tmp_path) == []


def test_json_is_all_that_goes_to_the_output(play, demo_facts_of: Make, tmp_path: Path, capsys) -> None:
    play(demo_facts_of())
    assert exit_status("--json", "--report", str(tmp_path / "page.html")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] is True
    assert facts["incidents"][0]["resumed_from"] == 6
    assert facts["runs"][0]["losses"]["1"] == facts["runs"][1]["losses"]["1"]
    assert len(facts["checks"]) == 10


def test_keep_takes_a_new_or_empty_directory(play, demo_facts_of: Make, tmp_path: Path, capsys) -> None:
    play(demo_facts_of())
    assert exit_status("--keep", str(tmp_path / "kept")) == 0
    assert (tmp_path / "kept" / "report.html").exists()
    assert exit_status("--keep", str(tmp_path / "kept")) == 2
    assert "is not empty" in capsys.readouterr().err


def test_without_torch_it_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert exit_status() == 2
    assert "pip install ckptsvc[torch]" in capsys.readouterr().err


def test_machine_facts_are_this_machines() -> None:
    facts = demo.machine_facts()
    assert "cores" in facts["machine"]
    assert "torch 2" in facts["software"]
