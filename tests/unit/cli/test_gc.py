"""`ckptsvc gc`."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from ckptsvc_drivers.posix import PosixStore
from harness.increments import Saver, big_run, floats
from harness.stored import Run, Tensor, cli

from ckptsvc.cli import gc
from ckptsvc.cli.agents import Answer
from ckptsvc.cli.terminal import size
from ckptsvc.errors import AgentUnavailable, StoreFull
from ckptsvc.pipeline.catalog import take_epoch
from ckptsvc.pipeline.garbage import remove_garbage
from ckptsvc.pipeline.increments import Economy
from ckptsvc.storage import connect

TENSORS = {"w": Tensor(np.zeros(5000, np.float32), cut="dim 0")}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One good checkpoint; of two saves that were never committed one is three hours old."""
    (tmp_path / "sockets").mkdir(mode=0o700)
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path / "sockets"))
    made = Run(f"file://{tmp_path}/run")
    made.save(10, TENSORS, world=2)
    old = made.save(20, TENSORS, world=2, commit=False)
    made.save(30, TENSORS, world=2, commit=False)
    age(made, old)
    return made


def age(run: Run, *folders: str) -> None:
    """Three hours."""
    then = time.time() - 3 * 3600
    for folder in folders:
        for path in Path(run.url.removeprefix("file://"), folder).iterdir():
            os.utime(path, (then, then))


def folders(run: Run) -> list[str]:
    return sorted(run.store.children())


def rows(out: str) -> dict[str, str]:
    return {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()[1:3]}


def test_nothing_is_deleted_unless_asked_for(run: Run) -> None:
    before = sorted(run.store.list())
    status, out, err = cli("gc", run.url)
    assert (status, err) == (0, "")
    found = rows(out)
    assert found["step-000000000020.e00001"].startswith("2 ")
    assert found["step-000000000020.e00001"].endswith("3 h remove save not committed")
    assert "too young" in found["step-000000000030.e00001"]
    assert out.splitlines()[-1].startswith("--delete would remove 2 objects, ")
    assert out.splitlines()[-1].endswith("this was a dry run")
    assert sorted(run.store.list()) == before


def test_delete_takes_what_is_old_enough(run: Run) -> None:
    status, out, _ = cli("gc", run.url, "--delete")
    assert status == 0
    assert "removed 2 objects" in out
    assert folders(run) == ["step-000000000010.e00001", "step-000000000030.e00001"]
    assert cli("verify", run.url).status == 0
    assert cli("gc", run.url, "--delete", "--older-than", "0").status == 0
    assert folders(run) == ["step-000000000010.e00001"]
    status, out, err = cli("gc", run.url)
    assert (status, out, err) == (0, "", f"nothing to remove in {run.url}\n")


def test_json(run: Run) -> None:
    def document(*arguments: str) -> dict:
        status, out, err = cli("gc", run.url, "--json", *arguments)
        assert (status, err) == (0, "")
        return json.loads(out)

    first = document()
    assert {key: first[key] for key in ("store", "dry_run", "older_than")} == {
        "store": run.url, "dry_run": True, "older_than": 3600.0,
    }  # fmt: skip
    by_name = {each["folder"]: each for each in first["garbage"]}
    old, young = by_name["step-000000000020.e00001"], by_name["step-000000000030.e00001"]
    assert (old["fate"], young["fate"]) == ("remove", "too young")
    assert {o["key"].split("/")[0] for o in old["objects"]} == {"step-000000000020.e00001"}
    assert old["bytes"] == sum(o["bytes"] for o in old["objects"])
    assert first["found"] == {"objects": 4, "bytes": old["bytes"] + young["bytes"]}
    assert first["removed"] == {"objects": 2, "bytes": old["bytes"]}
    second = document("--delete")
    assert (second["dry_run"], second["removed"]) == (False, first["removed"])
    assert document()["found"]["objects"] == 2
    assert document("--older-than", "7d")["removed"]["objects"] == 0


def test_what_expires_is_counted_by_what_becomes_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the size of shards: most of each lies in the first checkpoint, which stays for the newest one."""
    monkeypatch.setenv("CKPTSVC_AGENT_SOCKET_DIR", str(tmp_path))
    saver = Saver(connect(f"file://{tmp_path}/run"), Economy(incremental=True))
    for step in (1, 2, 3, 4):
        saver.save(big_run({"frozen": floats(50_000), "trained": floats(9000, step)}), step)
    arguments = ("gc", f"{tmp_path}/run", "--keep", "1", "--expire")
    before = {path: path.stat().st_size for path in (tmp_path / "run").glob("step-*/r*.safetensors")}
    document = json.loads(cli(*arguments, "--json").out)
    told = {each["step"]: each for each in document["checkpoints"]}
    assert [told[step]["fate"] for step in (1, 2, 3, 4)] == ["keep", "remove", "remove", "keep"]
    going = told[2]["written"] + told[3]["written"]
    assert f"--expire --delete would remove 2 checkpoints, {size(going)}; " in cli(*arguments).out
    assert f"removed 2 checkpoints, {size(going)}\n" in cli(*arguments, "--delete").out
    assert going == sum(nbytes for path, nbytes in before.items() if not path.exists())
    assert going < 0.5 * (told[2]["bytes"] + told[3]["bytes"])


def test_a_step_that_an_agent_is_saving_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {
        "coordinates": [{"running_saves": [20]}],
        "arenas": [{"state": "kept", "step": 30}, {"state": "staged", "step": 40}],
    }
    answers = [Answer(Path("/a"), status), Answer(Path("/b"), None, AgentUnavailable("hangs"))]
    monkeypatch.setattr(gc, "ask_all", lambda directory: answers)
    _, out, err = cli("gc", run.url, "--delete", "--older-than", "0")
    assert folders(run) == ["step-000000000010.e00001", "step-000000000020.e00001"]
    assert " running " in out
    assert "hangs" in err


def test_a_save_that_commits_while_we_look_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(store, garbage, pace):
        run.save(garbage.ref.step, TENSORS, world=2)
        return remove_garbage(store, garbage)

    monkeypatch.setattr(gc, "remove_garbage", late)
    _, out, _ = cli("gc", run.url, "--delete")
    assert "committed meanwhile" in out
    assert cli("verify", run.url, "--step", 20).status == 0


def test_wrong_arguments(run: Run) -> None:
    assert cli("gc", run.url, "--older-than", "soon").status == 2
    status, _, err = cli("gc", f"{run.url}/step-000000000020.e00001")
    assert status == 2
    assert "give the run" in err


def shifted(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The clock of this process, not that of the file system."""
    clock = time.time
    monkeypatch.setattr(gc.time, "time", lambda: clock() + seconds)


@pytest.mark.parametrize(("days", "said"), [(1, "24 h ahead of"), (-1, "24 h behind"), (1e-4, "")])
def test_ages_are_by_the_clock_of_the_store(run: Run, monkeypatch: pytest.MonkeyPatch, days: float, said: str) -> None:
    shifted(monkeypatch, days * 86400)
    status, out, err = cli("gc", run.url, "--delete")
    assert status == 0
    assert folders(run) == ["step-000000000010.e00001", "step-000000000030.e00001"], "20 is 3 h old, and 30 is new"
    assert rows(out)["step-000000000020.e00001"].endswith("3 h removed save not committed")
    assert (f"this node's clock is {said} the store's" in err) == bool(said)


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [*(tmp_path / "run").iterdir(), tmp_path / "run"]:
        path.chmod(0o500)  # with rights that root has all the same:
    monkeypatch.setattr(PosixStore, "put_if_absent", lambda *arguments: pytest.fail("it writes"))
    status, out, _ = cli("gc", run.url)
    assert (status, "--delete would remove 2 objects" in out) == (0, True)


def test_a_full_store_can_be_emptied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> bool:
        raise StoreFull("no space left on device")

    monkeypatch.setattr(PosixStore, "put_if_absent", full)
    status, _, err = cli("gc", run.url, "--delete")
    assert (status, "this node's clock counts" in err) == (0, True)
    assert folders(run) == ["step-000000000010.e00001", "step-000000000030.e00001"]


def test_where_objects_have_no_times_nothing_counts_as_old(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    below = PosixStore.list
    monkeypatch.setattr(PosixStore, "list", lambda *a: (entry._replace(modified=0.0) for entry in below(*a)))
    status, _, err = cli("gc", run.url, "--delete")
    assert (status, len(folders(run))) == (4, 3)
    assert "does not say when its objects were written" in err
    assert cli("gc", run.url, "--delete", "--older-than", "0").status == 0
    assert folders(run) == ["step-000000000010.e00001"]


def test_the_newest_save_stays_however_old_it_is_while_its_job_has_the_run(run: Run) -> None:
    """Whose clock dated it may be wrong, and it may wait for its store."""
    take_epoch(run.store, "job", 1, "me", "2026-01-01T00:00:00Z")
    run.save(35, TENSORS, world=2, commit=False)
    age(run, "step-000000000030.e00001", "step-000000000035.e00001")
    status, out, err = cli("gc", run.url, "--delete")
    assert status == 0
    assert folders(run) == ["epochs", *(f"step-0000000000{step}.e00001" for step in (10, 20, 30, 35))]
    assert "3 h may be running save not committed (it may still be running)" in " ".join(out.split())
    assert "--latest" in err
    run.save(32, TENSORS, world=2)
    assert cli("gc", run.url, "--delete").status == 0
    assert "step-000000000030.e00001" not in folders(run), "nobody waits for it: a newer one is committed"
    assert "step-000000000035.e00001" in folders(run)
    assert cli("gc", run.url, "--delete", "--latest").status == 0
    assert "step-000000000035.e00001" not in folders(run)
    run.save(40, TENSORS, world=2, commit=False)
    age(run, "step-000000000040.e00001")
    for attempt, owner, kept in ((2, "job", True), (3, "another job", False)):
        take_epoch(run.store, owner, attempt, "me", "2026-01-01T00:00:00Z")
        assert cli("gc", run.url, "--delete").status == 0
        assert ("step-000000000040.e00001" in folders(run)) == kept, "whose job has begun anew; another one has"


def test_what_is_no_run_is_told_as_by_ls(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    for where in (tmp_path / "file", tmp_path / "none"):
        status, out, err = cli("gc", str(where))
        assert (status, out) == (0, "")
        assert "nothing to remove" in err
        assert "hint: is the address right?" in err
    assert "hint: it holds runs: run" in cli("gc", str(tmp_path)).err
    assert cli("gc", str(tmp_path / "none"), "--delete").status == 0
    assert not (tmp_path / "none").exists()
    assert "hint" not in cli("gc", run.url).err
