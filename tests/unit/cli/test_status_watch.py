"""`ckptsvc status --watch` and `--url`: what a person sees of the agents' documents."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.pages import coordinated, document, incident, job_of
from harness.runtime import Runtime, eventually
from harness.stored import cli
from rich.console import Console, Group

from ckptsvc.cli import status, status_watch
from ckptsvc.cli.agents import Answer
from ckptsvc.errors import AgentUnavailable

SILENT = Answer(Path("/run/b"), None, AgentUnavailable("the agent did not answer in time"))


def seen(told: dict[str, Any], width: int = 100) -> list[str]:
    """What is drawn, without colours."""
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(Group(*status_watch.picture(Answer(Path("/run/a"), told), width)))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_job_of_which_a_rank_has_died_and_one_is_stalled() -> None:
    job = job_of(16, 4)
    job.ended[9] = job.ranks.pop(9), True
    drawn = seen(
        document(coordinated(job, (3,), aside={"n9": "a spare"}), incidents=[incident(), incident(job="other")])
    )
    assert drawn[0].startswith("agent of nid000001  up 24 h")
    assert "job llama-8b  attempt 2" in drawn
    assert "  step 12,430 (0.17/s); 30 steps at risk; 15 of 16 ranks on 4 nodes; 1 restart" in drawn
    assert "  X 1 dead  ! 1 stalled  . 14 training" in drawn
    assert [line for line in drawn if line.startswith("  nid")] == [
        "  nid000001 ...!", "  nid000002 ....", "  nid000003 .X..", "  nid000004 ....",
    ]  # fmt: skip
    assert any(" ".join(line.split()) == "12,400 committed 21 s 18 s ago 96.0 GiB memory, store" for line in drawn)
    assert len([line for line in drawn if "hung: rank 17" in line]) == 1
    assert "  n9: a spare" in drawn
    assert any(line.startswith("  goodput 93.4 %; the rest: blocked 0.6 %") for line in drawn)


@pytest.mark.parametrize("width", [30, 48, 80])
def test_narrow_terminals(width: int) -> None:
    drawn = seen(document(coordinated(job_of(2048), (17,)), incidents=[incident()]), width)
    assert max(map(len, drawn)) <= width
    assert ".!" in "".join(drawn)
    assert len("".join(drawn)) < 4000  # a sign a node, not a rank


def test_nothing_that_a_terminal_would_obey() -> None:
    hostile = "x\x1b[2J[red]\n"
    told = document(
        coordinated(job_of(2, name=hostile), nics=[hostile]),
        incidents=[incident(job=hostile, sentence=hostile)],
        node=hostile,
    )
    drawn = "\n".join(seen(told))
    assert "\x1b" not in drawn
    assert drawn.count("\\x1b[2J[red]\\n") == 4


def test_an_agent_without_jobs_and_one_that_is_silent() -> None:
    assert "no job" in seen(document())
    text = io.StringIO()
    Console(file=text, width=100).print(*status_watch.picture(SILENT, 100))
    assert "agent in /run/b does not answer" in text.getvalue()


def test_without_a_terminal_each_look_is_a_line_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [Answer(Path("/run/a"), document(coordinated(job_of(8), (3,)))), SILENT]
    looks = iter([answers, [], [], []])
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path))

    def ask(directory: Path) -> list[Answer]:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(status, "ask_all", ask)
    monkeypatch.setattr(status, "WATCH_EVERY", 0.001)
    code, out, err = cli("status", "--watch")
    assert code == 130
    assert out.split("  ")[1:] == ["job llama-8b", "8 of 8 ranks", "step 12,430", "checkpoint 12,400",
        "30 at risk", "1 restart", "goodput 93.4 %", "1 stalled\n"]  # fmt: skip
    assert err.count("no agent runs") == 1  # and not again and again
    assert "/run/b does not answer" in err
    for flags in ((), ("--json",)):
        looks = iter([[]])  # nothing to watch from the beginning
        code, out, err = cli("status", "--watch", *flags, "--dir", str(tmp_path / "none"))
        assert (code, "no agent runs" in out + err) == (20, True)


def troubled() -> dict[str, Any]:
    """A node that is drained, with a job that is paused, one that waits for nodes, and one that has ended."""
    job = job_of(8)
    launch = {"attempt": 1, "restarts": 0, "max_restarts": 3, "max_nodes": 4, "stop_wanted": "", "ended": None,
        "status": None, "reason": ""}  # fmt: skip
    pause = {"job": "llama-8b", "step": 12_440, "by": "ada", "reason": "file system update", "until": None}
    disk = {"directory": "/d", "problem": "/d is full", "store_problem": "the store is away", "snapshots": [],
        "drains_allowed": 1}  # fmt: skip
    drain = {"epoch": 3, "step": 12_400, "draining": True, "age": 7200.0}
    return document(
        coordinated(job, drains=[drain]), paused=[pause], vacated="drained by bob", local_disk=disk,
        elections=[{"job": "llama-8b", "coordinator": "", "address": "", "term": 0, "here": False, "refused": False,
            "problem": "etcd does not answer"}],
        launches=[
            launch | {"job": "soon", "phase": "gathering", "nodes": 1, "min_nodes": 4},
            launch | {"job": "over", "phase": "ended", "nodes": 1, "min_nodes": 1, "status": 86, "reason": "a crash"},
        ],
    )  # fmt: skip


def test_what_the_page_shows_of_orders_launches_drains_and_troubles_is_there_too() -> None:
    drawn = seen(troubled())
    trouble = ["takes no new jobs: drained by bob", "/d is full", "the store is away", "etcd does not answer"]
    assert drawn[1:5] == trouble
    for line in ("  paused by ada: no automatic snapshots from step 12,440 on; file system update",
            "  lustre:///scratch/ana/llama-8b", "  step 12,400 waits on local disks for the durable store for 2 h",
            "job soon: waits for nodes: 1 of 4 have come", "job over: ended with status 86: a crash"):  # fmt: skip
        assert line in drawn
    lines = [line.partition("  ")[2] for line in status_watch.lines(troubled())]
    assert "node nid000001  takes no new jobs: drained by bob" in lines
    assert any(line.startswith("job llama-8b") and line.endswith("saves are paused") for line in lines)
    assert "job soon  waits for nodes: 1 of 4 have come" in lines


def test_a_q_ends_it_and_the_terminal_is_as_before(runtime: Runtime) -> None:
    ours, theirs = pty.openpty()
    before = subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout
    command = [sys.executable, "-m", "ckptsvc.cli.main", "status", "--watch"]
    environ = runtime.environ | {"TERM": "xterm", "COLUMNS": "60"}
    process = subprocess.Popen(command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
    drawn = b""
    while b"q ends this" not in drawn:
        drawn += os.read(ours, 4096)
    assert b"no agent runs" in drawn
    os.write(ours, b"q")
    eventually(lambda: process.poll() is not None, "the end")
    assert process.returncode == 0
    assert subprocess.run(["stty", "-a"], stdin=theirs, capture_output=True, check=True).stdout == before
    os.close(ours)
    os.close(theirs)


def test_the_address_of_the_page_has_the_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path))
    told = document(page="http://127.0.0.1:9464")
    monkeypatch.setattr(status, "ask_all", lambda directory: [Answer(Path("/run/a"), told)])
    code, out, _ = cli("status", "--url")
    token = (tmp_path / "http-token").read_text()
    assert (code, out) == (0, f"http://127.0.0.1:9464/?token={token}\n")
    monkeypatch.setattr(status, "ask_all", lambda directory: [Answer(Path("/run/a"), document(page=""))])
    code, out, err = cli("status", "--url")
    assert (code, out) == (10, "")
    assert "agent.metrics_listen" in err


def test_nonsense_of_another_users_agent_does_not_end_the_watching() -> None:
    told = document(coordinated(job_of(8), (3,)))
    told["coordinates"][0]["aside"] = []
    mad, good = Answer(Path("/run/b"), told, None, "bob", 8), Answer(Path("/run/a"), document(), None, "ada", 7)
    text = io.StringIO()
    Console(file=text, width=100).print(status_watch._screen(lambda: [mad, good], 100))
    assert "the agent of user bob answers with nonsense" in text.getvalue()
    assert "no job" in text.getvalue()
