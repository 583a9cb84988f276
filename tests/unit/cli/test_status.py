"""`ckptsvc status`: what it makes of the agents' documents. Real agents answer in tests/integration/test_cli.py."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from harness.stored import cli

from ckptsvc.cli import status
from ckptsvc.cli.agents import Answer, ask_all
from ckptsvc.errors import AgentUnavailable

SILENT = Answer(Path("/run/b"), None, AgentUnavailable("the agent did not answer in time"))


def document(job: str = "gpt", **changes: Any) -> dict[str, Any]:
    """What an agent says that coordinates a job of two ranks of which one is gone."""
    ranks = [
        {"job": job, "attempt": 2, "rank": rank, "world_size": 2, "pid": 100 + rank, "store": "file:///runs/\x1b[31mgpt",
            "step": 1234, "heartbeat_age": age, "committed": committed}
        for rank, age, committed in ((0, 0.25, 1200), (1, 900.0, -1), (2, None, -1))
    ]  # fmt: skip
    saves = [
        {"job": job, "epoch": epoch, "step": step, "outcome": outcome, "code": "", "reason": reason, "bytes": 3 << 20,
            "seconds": 0.5}
        for epoch, step, outcome, reason in (
            (1, 1300, "failed", "no space"), (2, 1100, "committed", "committed"), (2, 1200, "skipped", "no arena\n"),
            (1, 10, "committed", ""), (1, 20, "committed", ""), (1, 30, "committed", ""), (1, 40, "fenced", "taken"),
        )
    ]  # fmt: skip
    return {
        "status_version": 1, "version": "0.1.0", "node": "n1", "pid": 7, "started": time.time() - 7200,
        "address": "127.0.0.1:1", "metrics": "127.0.0.1:2", "ranks": ranks, "saves": saves, "arena_limit": 8 << 30,
        "max_write_rate": 2 << 30,
        "compression": [{"job": job, "compressed": False, "why": "the store takes 900 MB/s, compression 500 MB/s"}],
        "arenas": [{"job": job, "rank": r, "state": s, "step": 1, "bytes": 64 << 20} for r, s in
            ((0, "kept"), (0, "staged"), (1, "kept"))],
        "coordinates": [{"job": job, "attempt": 2, "epoch": 2, "world_size": 2, "live_ranks": 1, "nodes": ["n1"],
            "running_saves": [1230], "in_memory": [1200, 1100], "on_disk": [1100, 1200], "restarts": 1,
            "incidents": ["attempt 1: rank 1 killed"], "aside": {"n3": "a spare"},
            "nics": ["cxi1 on n1: its link is 'down'"]}],
        "local_disk": {"directory": "/local", "problem": "", "drains_allowed": 1,
            "store_problem": "the store is slow", "snapshots": [
                {"job": job, "epoch": 2, "step": step, "stage": stage, "complete": True, "shards": 2,
                    "durable": durable, "draining": 1, "bytes": 64 << 20, "age": 90.0}
                for step, stage, durable in ((1200, "pending", 1), (1100, "committed", 2), (1230, "pending", 0))]},
        "elections": [{"job": job, "coordinator": "n1", "address": "127.0.0.1:1", "term": 7, "here": True, "refused": 0,
            "problem": "etcd does not answer"}],
    } | changes  # fmt: skip


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Answer]:
    found = [Answer(Path("/run/a"), document())]
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path))
    monkeypatch.setattr(status, "ask_all", lambda directory: found)
    return found


def test_what_a_person_sees(answers: list[Answer]) -> None:
    code, out, err = cli("status")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "agent of n1",
        "pid 7, up 2 h, version 0.1.0, /run/a",
        "listens on 127.0.0.1:1, metrics on 127.0.0.1:2",
        "arenas 192.0 MiB of 8.0 GiB: 2 kept, 1 staged",
        "writes at most 2.0 GiB/s to stores",
        "local disk 192.0 MiB: 3 snapshots, newest step 1,230 (pending)",
        "draining step 1,200: 1 of 2 shards durable, 90 s old; 1 more behind it",
        "the store is slow",
        "",
        "job gpt",
        "store file:///runs/\\x1b[31mgpt",
        "coordinator n1, elected in term 7",
        "etcd does not answer",
        "not compressed: the store takes 900 MB/s, compression 500 MB/s",
        "coordinated here: attempt 2, epoch 2, 1 of 2 ranks on 1 node",
        "steps being saved: 1230; in memory: 1200, 1100; on local disks: 1100, 1200",
        "1 restart",
        "attempt 1: rank 1 killed",
        "n3: a spare",
        "cxi1 on n1: its link is 'down'",
        "RANK PID STEP HEARTBEAT COMMITTED",
        "0 100 1,234 0.2 s ago 1,200",
        "1 101 1,234 15 min ago none",
        "2 102 1,234 none yet none",
        "SAVED STEP OUTCOME SIZE TOOK WHY",
        "1,200 skipped 3.0 MiB 0.5 s no arena\\n",
        "1,100 committed 3.0 MiB 0.5 s",
        "1,300 failed 3.0 MiB 0.5 s no space",
        "40 fenced 3.0 MiB 0.5 s taken",
        "30 committed 3.0 MiB 0.5 s",
    ]
    assert max(map(len, out.splitlines())) < 80


def test_json_is_what_the_agents_say(answers: list[Answer], tmp_path: Path) -> None:
    answers.append(SILENT)
    code, out, err = cli("status", "--json")
    assert (code, err) == (3, "")
    assert json.loads(out) == {
        "directory": str(tmp_path),
        "agents": [
            {"directory": "/run/a", "error": None, "status": answers[0].status},
            {"directory": "/run/b", "status": None,
                "error": {"code": "agent-unavailable", "what": "the agent did not answer in time"}},
        ],
    }  # fmt: skip


def test_an_agent_that_does_not_answer_is_shown(answers: list[Answer]) -> None:
    answers.append(SILENT)
    code, out, _ = cli("status")
    assert code == 3
    assert "agent of n1" in out
    assert "agent in /run/b\n  does not answer: the agent did not answer in time" in out


def test_one_job(answers: list[Answer]) -> None:
    both = document()
    for name in ("ranks", "arenas", "saves", "coordinates"):
        both[name] = both[name] + document("bert")[name]
    both["compression"] += document("bert")["compression"]
    both["local_disk"]["snapshots"] += document("bert")["local_disk"]["snapshots"]
    answers[:] = [Answer(Path("/run/a"), both), Answer(Path("/run/c"), document("bert"))]
    found = json.loads(cli("status", "--job", "gpt", "--json").out)["agents"]
    assert [each["directory"] for each in found] == ["/run/a"]
    assert found[0]["status"] == document() | {"started": both["started"]}
    out = cli("status", "--job", "bert").out
    assert out.count("job bert") == 2
    assert "gpt\n" not in out.replace("[31mgpt\n", "")
    code, out, err = cli("status", "--job", "nix")
    assert (code, out) == (10, "")
    assert "no agent of this node has a job 'nix'" in err


def test_an_idle_agent(answers: list[Answer]) -> None:
    idle = document(ranks=[], arenas=[], saves=[], coordinates=[], metrics="", local_disk=None, max_write_rate=None)
    answers[:] = [Answer(Path("/run/a"), idle)]
    assert cli("status").out.splitlines()[2:] == ["  listens on 127.0.0.1:1", "  arenas 0 B of 8.0 GiB"]


def test_no_agent(tmp_path: Path) -> None:
    code, out, err = cli("status", "--dir", tmp_path)
    assert (code, out) == (20, "")
    assert str(tmp_path) in err
    assert "hint: " in err
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / "agent.lock").touch()  # of an agent that is gone
    assert ask_all(tmp_path) == []


def test_watching_goes_on(answers: list[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([[], answers, answers])

    def ask(directory: Path) -> list[Answer]:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(status, "ask_all", ask)
    monkeypatch.setattr(status, "WATCH_EVERY", 0.001)
    code, out, err = cli("status", "--watch", "--json")
    assert code == 130
    assert [len(json.loads(line)["agents"]) for line in out.splitlines()] == [1, 1]
    assert "no agent runs" in err
