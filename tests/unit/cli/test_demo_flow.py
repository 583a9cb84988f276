"""The parts of the demo that can be tried without training: the killer, the reader of saves, the copy of a run."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ckptsvc.cli.demonstration import flow
from ckptsvc.cli.demonstration.facts import Run, Step
from ckptsvc.cli.demonstration.flow import KILL_AFTER, KILLED_RANK, Killer, copy_run, read_saves
from ckptsvc.cli.demonstration.processes import DemoFailed, Events
from ckptsvc.cli.demonstration.story import Story
from ckptsvc.format.commit import COMMIT, CommitRecord, checkpoint_name
from ckptsvc.storage import connect


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def start(rank: int, attempt: int, pid: int = 1, steps_done: int = 0, source: str | None = None) -> dict:
    facts = {"rank": rank, "attempt": attempt, "pid": pid, "steps_done": steps_done, "source": source}
    return {"event": "start", "time": time.time()} | facts


def step(number: int, attempt: int) -> dict:
    facts = {"step": number, "attempt": attempt, "loss_hex": "0x1p+0", "seconds": 0.1, "checkpoint_seconds": 0.0}
    return {"event": "step", "time": time.time(), "rank": 0} | facts


def test_the_killer_kills_the_rank_and_reports_what_followed(victim, tmp_path: Path) -> None:
    killer, log, agent = Killer(Story(quiet=True)), [], tmp_path / "agent.log"

    def see(event: dict) -> None:
        log.append(json.dumps(event) + "\n")
        killer.see(event)

    see(start(0, 1, pid=os.getpid()))
    see(start(KILLED_RANK, 1, pid=victim.pid))
    for number in range(1, KILL_AFTER):
        see(step(number, 1))
    assert victim.poll() is None
    see(step(KILL_AFTER, 1))
    assert victim.wait(10) == -signal.SIGKILL
    died = {"event": "rank-died", "rank": KILLED_RANK}
    long_ago, now = (datetime.fromtimestamp(at, UTC).isoformat() for at in (1.0, time.time()))
    agent.write_text("".join(json.dumps(died | {"ts": ts}) + "\n" for ts in (long_ago, now)))
    see(step(KILL_AFTER + 1, 1))
    for rank in range(4):
        see(start(rank, 2, steps_done=30, source="memory"))
    see(step(31, 2))
    see(step(32, 2))

    incident = killer.report(Run.from_log(log, "run", "FSDP2", "run"), Events(agent))
    assert (incident.rank, incident.pid, incident.node) == (KILLED_RANK, victim.pid, "node-1")
    assert (incident.step, incident.resumed_from, incident.source) == (KILL_AFTER + 1, 30, "memory")
    assert incident.repeated == 4
    assert 0 <= incident.known_after < 10
    assert incident.stepping == json.loads(log[-2])["time"]


def test_ranks_that_restored_from_different_places_are_all_named(victim, tmp_path: Path) -> None:
    killer = Killer(Story(quiet=True))
    lines = [start(KILLED_RANK, 1, pid=victim.pid), step(KILL_AFTER, 1)]
    lines += [start(0, 2, steps_done=30, source="memory"), start(1, 2, steps_done=30)]
    for event in lines:
        killer.see(event)
    run = Run.from_log((json.dumps(event) + "\n" for event in lines), "run", "FSDP2", "run")
    incident = killer.report(run, Events(tmp_path / "missing"))
    assert incident.source == "memory and nothing"
    assert (incident.known, incident.stepping) == (None, None)


def test_the_killer_does_not_kill_without_knowing_whom(monkeypatch) -> None:
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("killed"))
    with pytest.raises(DemoFailed, match="never said that it had started"):
        Killer(Story(quiet=True)).see(step(KILL_AFTER, 1))


def test_a_kill_that_did_not_happen_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="never seen"):
        Killer(Story(quiet=True)).report(Run("run", "FSDP2", "run"), Events(tmp_path / "log"))


def save(store: Path, number: int, epoch: int, *, committed: bool = True) -> Path:
    folder = store / checkpoint_name(number, epoch)
    folder.mkdir(parents=True)
    (folder / "r00000-00000000.safetensors").write_bytes(b"x" * 10)
    commit = CommitRecord(
        step=number, epoch=epoch, attempt=epoch, job="j", writer="w", index="index-00000000.safetensors",
        index_bytes=1, index_digest="0" * 32, shards=4, bytes=40, world_size=4, created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    if committed:
        (folder / COMMIT).write_bytes(commit.encode())
    return folder


def test_saves_are_timed_from_the_step_that_took_them(tmp_path: Path) -> None:
    at = 1_790_000_000.0
    os.utime(save(tmp_path, 6, 1) / COMMIT, (at + 0.5, at + 0.5))
    save(tmp_path, 12, 1)
    save(tmp_path, 9, 2, committed=False)
    steps = (Step(6, 1.0, at + 0.25, 0.3, 0.125, 1), Step(12, 1.0, at, 0.3, 0.1, 2))
    saves, unfinished = read_saves(connect(tmp_path.as_uri()), Run("run", "FSDP2", "run", steps))
    assert [(s.step, s.nbytes, s.shards) for s in saves] == [(6, 40, 4), (12, 40, 4)]
    assert (saves[0].blocked, saves[0].durable) == (0.125, 0.375)
    assert (saves[1].blocked, saves[1].durable) == (None, None)  # attempt 1 did not log step 12
    assert unfinished == [checkpoint_name(9, 2)]


def test_a_copy_ends_with_the_step_asked_for(tmp_path: Path) -> None:
    store, copy = tmp_path / "store", tmp_path / "copy"
    for number in (6, 12):
        save(store, number, 1)
    save(store, 18, 1, committed=False)
    (store / "epochs").mkdir()
    (store / "epochs" / "00000001.json").write_text("{}")
    copy_run(store, copy, 6)
    assert sorted(path.name for path in copy.iterdir()) == ["epochs", checkpoint_name(6, 1)]
    assert (copy / checkpoint_name(6, 1) / COMMIT).exists()
    for missing in (7, 18):
        with pytest.raises(DemoFailed, match=f"no checkpoint of step {missing}"):
            copy_run(store, tmp_path / "other", missing)


def test_nothing_of_the_outer_environment_gets_in(monkeypatch, tmp_path: Path) -> None:
    for name in ("CKPTSVC_SAVE_EVERY", "RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")
    environ = flow._environ(tmp_path, tmp_path / "arenas")
    assert not {"CKPTSVC_SAVE_EVERY", "RANK", "MASTER_PORT"} & environ.keys()
    assert environ["CKPTSVC_AGENT_SOCKET_DIR"] == str(tmp_path)
    assert environ["PATH"] == os.environ["PATH"]


def test_the_plan_fits_together() -> None:
    """The kill and the branch lie where there is something to lose and something to resume."""
    assert flow.STEPS % flow.EVERY == 0
    assert flow.BRANCH_FROM % flow.EVERY == 0
    assert KILL_AFTER % flow.EVERY > 0
    assert flow.BRANCH_FROM < flow.BRANCH_TO <= flow.STEPS
    assert KILL_AFTER + 2 * flow.EVERY < flow.STEPS
