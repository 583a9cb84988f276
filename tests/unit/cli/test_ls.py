"""`ckptsvc ls`."""

import json
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from harness.damage import newer_record
from harness.increments import Saver, big_run, floats
from harness.stored import Run, Tensor, cli

from ckptsvc.cli.terminal import size
from ckptsvc.storage import connect


@pytest.fixture
def run() -> Run:
    return Run(f"memory://{uuid.uuid4()}")


def test_newest_first_with_what_matters(run: Run) -> None:
    run.save(100, {"w": Tensor(np.zeros(100_000, np.float32))}, world=2, epoch=1)
    run.save(20, epoch=2)
    status, out, err = cli("ls", run.url)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].split() == ["NAME", "STEP", "EPOCH", "RANKS", "SIZE", "AGE", "STATE"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["step-000000000020.e00002", "20", "2", "1"],
        ["step-000000000100.e00001", "100", "1", "2"],
    ]
    assert all(line.endswith(" s  committed") for line in lines[1:])
    assert " 398.9 KiB " in lines[2] or " 39" in lines[2]
    assert max(map(len, lines)) < 80


def test_json(run: Run) -> None:
    run.save(7, {"w": Tensor(np.zeros(10, np.float32))}, world=2, job="me")
    run.save(8, commit=False)
    out = cli("ls", run.url, "--json").out
    document = json.loads(out)
    (entry,) = document.pop("checkpoints")
    assert document == {"store": run.url, "not_committed": 1}
    age = datetime.now(UTC) - datetime.fromisoformat(entry.pop("created"))
    assert 0 <= age.total_seconds() < 60
    on_disk = sum(e.size for e in run.store.list("step-000000000007.e00001") if "/r" in e.key)
    assert (entry.pop("bytes"), entry.pop("written")) == (on_disk, on_disk)
    assert entry == {
        "name": "step-000000000007.e00001", "step": 7, "epoch": 1, "state": "committed", "world_size": 2, "attempt": 1,
        "job": "me", "shards": 2, "why": None, "pinned": False, "metrics": {}, "refers": [],
    }  # fmt: skip


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_what_was_written_is_shown_where_that_is_less(tmp_path: Path, version: str) -> None:
    """Records of format 2.0 do not say it."""
    if version == "2.0":
        shutil.copytree(Path(__file__).parents[2] / "compat" / "golden" / "2.0", tmp_path / "run")
    else:
        saver = Saver(connect(f"file://{tmp_path}/run"))
        for step in (1, 2):
            saver.save(big_run({"frozen": floats(50_000), "trained": floats(9000, step)}), step)
    listed = json.loads(cli("ls", tmp_path / "run", "--json").out)["checkpoints"]
    for each in listed:
        folder = tmp_path / "run" / each["name"]
        assert each["written"] == sum(p.stat().st_size for p in folder.glob("r*.safetensors"))
        assert json.loads((folder / "COMMIT").read_bytes())["format"] == version
    newest = listed[0]
    assert newest["written"] < 0.5 * newest["bytes"]
    lines = cli("ls", tmp_path / "run").out.splitlines()
    assert lines[0].split() == ["NAME", "STEP", "EPOCH", "RANKS", "SIZE", "WRITTEN", "AGE", "STATE"]
    assert lines[1].split()[4:8] == [*size(newest["bytes"]).split(), *size(newest["written"]).split()]


def test_uncommitted_saves_are_shown_when_asked_for(run: Run) -> None:
    run.save(7)
    run.save(8, {"w": Tensor(np.zeros(10_000, np.float32))}, commit=False)
    status, out, err = cli("ls", run.url)
    assert status == 0
    assert "step-000000000008" not in out
    assert err == "1 save not committed (--all shows them)\n"
    _, out, err = cli("ls", run.url, "--all")
    assert out.splitlines()[1].split()[:2] == ["step-000000000008.e00001", "8"]
    assert out.splitlines()[1].endswith("not committed")
    assert err == ""
    entry = json.loads(cli("ls", run.url, "--all", "--json").out)["checkpoints"][0]
    assert (entry["state"], entry["world_size"]) == ("not committed", None)
    assert entry["bytes"] > 40_000


def test_nothing_is_no_error_and_says_what_is_there(tmp_path: Path) -> None:
    Run(f"file://{tmp_path}/gpt").save(1)
    status, out, err = cli("ls", tmp_path)
    assert (status, out) == (0, "")
    assert "it holds runs: gpt" in err
    status, out, err = cli("ls", tmp_path / "gtp", "--json")
    assert json.loads(out) == {"store": f"file://{tmp_path}/gtp", "checkpoints": [], "not_committed": 0}


def test_records_that_cannot_be_used_are_shown_and_hide_no_others(tmp_path: Path) -> None:
    run = Run(f"file://{tmp_path}")
    for step in (1, 2, 3):
        run.save(step)
    (tmp_path / "step-000000000003.e00001" / "COMMIT").write_text(newer_record(tmp_path, "3.0"))
    (tmp_path / "step-000000000002.e00001" / "COMMIT").write_bytes(b"x" * 100_000)
    status, out, err = cli("ls", tmp_path)
    assert status == 0
    assert [line.split("  ")[-1] for line in out.splitlines()[1:]] == ["newer format", "damaged", "committed"]
    assert "format 3.0" in err
    assert "too large for a commit record" in err
    found = json.loads(cli("ls", tmp_path, "--json").out)["checkpoints"]
    assert [entry["state"] for entry in found] == ["newer format", "damaged", "committed"]
    assert "format 3.0" in found[0]["why"]
    assert found[0]["created"] is None


def test_one_checkpoint(run: Run) -> None:
    run.save(1)
    run.save(2, commit=False)
    assert len(cli("ls", f"{run.url}/step-000000000001.e00001").out.splitlines()) == 2
    assert cli("ls", f"{run.url}/step-000000000002.e00001").out.endswith("not committed\n")


def test_what_a_record_says_cannot_command_the_terminal(run: Run) -> None:
    name = run.save(1)
    run.store.delete(f"{name}/COMMIT")
    run.store.put_if_absent(f"{name}/COMMIT", b'{"format": "\x1b[31m1.0"}')
    assert "\x1b" not in "".join(map(str, cli("ls", run.url)))
