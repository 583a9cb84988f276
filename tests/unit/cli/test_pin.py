"""`ckptsvc pin` and `unpin`, and what `ls`, `inspect` and `gc` say of pins, metrics and retention."""

import json
import math
import os
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from harness.stored import Run, Tensor, cli

from ckptsvc.format.commit import COMMIT, PINS, metrics_text
from ckptsvc.interop.conversion.ledger import Ledger, Plan
from ckptsvc.pipeline.catalog import Ref, find, read_commit
from ckptsvc.storage import connect

TENSORS = {"w": Tensor(np.zeros(5000, np.float32), cut="dim 0")}
LOSSES = {100: 2.0, 200: 1.0, 300: math.nan, 400: 1.5}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Five checkpoints, all but the last with a loss."""
    (tmp_path / "sockets").mkdir(mode=0o700)
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path / "sockets"))
    made = Run(f"file://{tmp_path}/run")
    for step in (100, 200, 300, 400, 500):
        name = made.save(step, TENSORS, world=2)
        if step in LOSSES:
            record = read_commit(made.store, Ref(1, step))
            record = msgspec.structs.replace(record, metrics=metrics_text({"loss": LOSSES[step]}))
            made.store.delete(f"{name}/{COMMIT}")
            made.store.put_if_absent(f"{name}/{COMMIT}", record.encode())
    return made


def steps(run: Run) -> list[int]:
    return [ref.step for ref, _ in find(run.store)]


def document(*arguments: object) -> dict:
    status, out, err = cli(*arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_pins_and_deletions_are_in_the_audit_log(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    cli("pin", run.url, "--step", 200)
    cli("pin", run.url, "--step", 200)  # it is already
    cli("gc", run.url, "--expire", "--keep", 3)  # a dry run
    cli("gc", run.url, "--expire", "--keep", 3, "--delete")
    cli("unpin", run.url, "--step", 200)
    entries = document("audit")["entries"]
    assert [(entry["verb"], entry["target"].rpartition("/")[2]) for entry in entries] == [
        ("pin", Ref(1, 200).name), ("delete", Ref(1, 100).name), ("unpin", Ref(1, 200).name)
    ]  # fmt: skip


def test_a_pin_is_set_shown_and_taken_away(run: Run) -> None:
    name = Ref(1, 200).name
    assert cli("pin", run.url, "--step", 200, "--note", "for \x1b[31mthe paper") == (0, "", f"{name} is pinned\n")
    status, _, err = cli("pin", run.url, name)
    assert status == 0
    assert "was pinned already: for \\x1b[31mthe paper" in err
    assert ["pinned" in row.split() for row in cli("ls", run.url).out.splitlines()].count(True) == 1
    assert [c["step"] for c in document("ls", run.url)["checkpoints"] if c["pinned"]] == [200]
    assert "for \\x1b[31mthe paper" in cli("inspect", run.url, name).out
    assert document("inspect", run.url, name)["pinned"] == "for \x1b[31mthe paper"
    assert document("inspect", run.url)["pinned"] is None
    assert document("unpin", f"{run.url}/{name}") == {
        "store": run.url, "name": name, "pinned": False, "changed": True,
    }  # fmt: skip
    assert cli("unpin", run.url, name).err == f"{name} was not pinned\n"
    assert run.store.children(PINS) == []


def test_the_newest_is_pinned_if_nothing_is_said_and_nothing_is_unpinned(run: Run) -> None:
    assert document("pin", run.url)["name"] == Ref(1, 500).name
    status, _, err = cli("unpin", run.url)
    assert status == 2
    assert "which checkpoint?" in err
    assert cli("unpin", run.url, "--step", 300).status == 10
    assert document("unpin", run.url, "--step", 500)["changed"]


def test_what_is_not_there_cannot_be_pinned(run: Run) -> None:
    run.save(600, TENSORS, commit=False)
    assert cli("pin", run.url, "--step", 600).status == 10
    assert cli("pin", run.url, Ref(3, 3).name).status == 10
    assert cli("pin", run.url, "../x").status == 2


def test_metrics_are_listed(run: Run) -> None:
    found = document("ls", run.url)["checkpoints"]
    assert [c["metrics"] for c in found] == [{}, {"loss": 1.5}, {"loss": "nan"}, {"loss": 1.0}, {"loss": 2.0}]
    assert "loss=1.5" in cli("ls", run.url).out
    assert document("inspect", run.url, "--step", 100)["checkpoint"]["metrics"] == {"loss": 2.0}
    assert "loss=2" in cli("inspect", run.url, "--step", 100).out


def test_a_dry_run_shows_what_each_rule_keeps(run: Run) -> None:
    cli("pin", run.url, "--step", 100)
    rules = ("--keep", 1, "--best", 2, "--metric", "loss")
    found = {c["step"]: (c["fate"], c["why"]) for c in document("gc", run.url, "--dry-run", *rules)["checkpoints"]}
    assert found == {
        500: ("keep", ["the newest", "among the last 1"]),
        400: ("keep", ["among the 2 with the lowest loss"]),
        300: ("remove", []),
        200: ("keep", ["among the 2 with the lowest loss"]),
        100: ("keep", ["pinned"]),
    }
    status, out, _ = cli("gc", run.url, *rules)
    assert status == 0
    assert "4 of 5 checkpoints are kept" in out
    assert "no rule keeps it" in out
    assert "a running job does so by itself" in out
    assert steps(run) == [500, 400, 300, 200, 100]


def test_delete_alone_leaves_checkpoints(run: Run) -> None:
    assert cli("gc", run.url, "--keep", 1, "--delete").status == 0
    assert steps(run) == [500, 400, 300, 200, 100]


def test_expire_deletes_what_no_rule_keeps(run: Run) -> None:
    run.save(50, TENSORS, world=2, commit=False)
    found = document("gc", run.url, "--delete", "--expire", "--every", 200, "--keep", 1)
    assert {c["step"]: c["fate"] for c in found["checkpoints"]} == {
        500: "keep", 400: "keep", 300: "removed", 200: "keep", 100: "keep",
    }  # fmt: skip
    assert steps(run) == [500, 400, 200, 100]
    assert [g["fate"] for g in found["garbage"]] == ["too young"]
    assert cli("verify", run.url).status == 0


def test_settings_are_the_rules(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSVC_SAVE_KEEP", "2")
    assert document("gc", run.url)["policy"]["last"] == 2
    assert "--expire --delete would remove 3 checkpoints" in cli("gc", run.url).out
    assert document("gc", run.url, "--keep", "0")["policy"]["last"] == 0


def test_contradictions_are_refused(run: Run) -> None:
    assert cli("gc", run.url, "--delete", "--dry-run").status == 2
    status, _, err = cli("gc", run.url, "--expire")
    assert status == 2
    assert "--keep" in err
    assert cli("gc", run.url, "--best", 3, "--keep", 1).status == 2
    assert "whatever the other rules" in cli("gc", run.url, "--every", "100").err


def test_records_of_conversions_are_garbage_once_they_are_old(run: Run, tmp_path: Path) -> None:
    folder = "convert-step-000000000700"
    Ledger(run.store, folder).claim(Plan(identity="x", title="t", created="2026-01-01T00:00:00Z", epoch=1))
    beside = connect(f"file://{tmp_path}/model.convert")
    Ledger(beside).claim(Plan(identity="x", title="t", created="2026-01-01T00:00:00Z"))
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "a.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "other.partial").write_text("a download")
    young = document("gc", run.url, "--delete")
    assert [(g["folder"], g["fate"]) for g in young["garbage"]] == [(folder, "too young")]
    then = time.time() - 3 * 3600
    for path in tmp_path.rglob("*"):
        os.utime(path, (then, then))
    assert [g["folder"] for g in document("gc", run.url, "--delete")["garbage"]] == [folder]
    found = document("gc", f"{tmp_path}/model", "--delete")
    assert [g["folder"] for g in found["garbage"]] == ["model.partial", "model.convert"]
    assert {g["fate"] for g in found["garbage"]} == {"removed"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.partial", "run", "sockets"]
    assert document("gc", str(tmp_path))["garbage"] == []
