"""What may be deleted, and what never."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness.damage import newer_record
from harness.stored import Run, Tensor

from ckptsvc.pipeline.catalog import Ref, find, list_refs, open_checkpoint, take_epoch
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.pipeline.retain import expire, retire
from ckptsvc.pipeline.retention import Policy
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import Entry
from ckptsvc.storage.wrappers import Wrapper

TENSORS = {"w": Tensor(np.arange(1000, dtype=np.float32), cut="dim 0")}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(f"file://{tmp_path}")


def keys(run: Run) -> set[str]:
    return {entry.key for entry in run.store.list()}


def test_only_the_newest_are_kept(run: Run) -> None:
    for epoch, step in ((1, 10), (1, 20), (2, 5), (2, 15)):
        run.save(step, TENSORS, epoch=epoch)
    run.save(30, TENSORS, epoch=1, commit=False)
    gone = expire(run.store, Policy(last=2), [Ref(1, 10)]).gone
    assert gone == [Ref(1, 20)]
    assert list_refs(run.store) == [Ref(2, 15), Ref(2, 5), Ref(1, 30), Ref(1, 10)]
    assert expire(run.store, Policy()).gone == []
    assert len(list_refs(run.store)) == 4


def test_a_clock_that_is_ahead_takes_no_deletion_out_of_the_hands_of_who_is_at_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1, TENSORS)
    run.save(2, TENSORS)
    retire(run.store, Ref(1, 1))
    monkeypatch.setattr(time, "time", lambda: 5e9)
    assert expire(run.store, Policy()).gone == []
    assert expire(run.store, Policy(), resume_after=0.0).gone == [Ref(1, 1)]


def test_young_is_by_the_times_of_the_commits_whatever_clocks_say(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        run.save(step, TENSORS)
    monkeypatch.setattr(time, "time", lambda: 5e9)
    assert expire(run.store, Policy(last=1, age=3600.0)).gone == []
    assert expire(Untimed(run.store), Policy(last=1, age=1e-9)).gone == [Ref(1, 1)]


class Untimed(Wrapper):
    """Of objects without times."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return (entry._replace(modified=0.0) for entry in super().list(prefix))


def test_records_that_cannot_be_used_are_neither_counted_nor_deleted(run: Run, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        run.save(step, TENSORS)
    newer = newer_record(tmp_path, "3.0")
    (tmp_path / "step-000000000004.e00001" / "COMMIT").write_text(newer)
    (tmp_path / "step-000000000003.e00001" / "COMMIT").write_text("{}")
    assert expire(run.store, Policy(last=1)).gone == [Ref(1, 1)]
    assert [ref.step for ref in list_refs(run.store)] == [4, 3, 2]


def test_a_whole_run_has_no_garbage(run: Run) -> None:
    take_epoch(run.store, "job", 1, "me", "now")
    run.save(1, TENSORS, world=3)
    assert list(find_garbage(run.store)) == []


def test_what_interrupted_saves_leave_is_found_and_nothing_else(run: Run, tmp_path: Path) -> None:
    take_epoch(run.store, "job", 1, "me", "now")
    run.save(1, TENSORS, world=2)
    take_epoch(run.store, "another job", 2, "me too", "now")
    good = keys(run)
    run.save(2, TENSORS, world=2, commit=False)
    run.save(3, TENSORS, epoch=2, commit=False)
    folder = tmp_path / "step-000000000001.e00001"
    (folder / "index-00000000.safetensors").write_bytes(b"x" * 10)
    (folder / "r00000-00000000.safetensors").write_bytes(b"y" * 20)
    (folder / ".tmp-0123").write_bytes(b"z")
    (tmp_path / "epochs" / ".tmp-4567").write_bytes(b"z")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / "mine").write_text("mine")
    found = {garbage.folder: garbage for garbage in find_garbage(run.store)}
    assert found.keys() == {"step-000000000002.e00001", "step-000000000003.e00002", folder.name, "epochs"}
    assert found["step-000000000002.e00001"].ref == Ref(1, 2)
    assert found["step-000000000002.e00001"].why == "save not committed"
    assert "may still be running" in found["step-000000000003.e00002"].why
    assert (found[folder.name].nbytes, len(found[folder.name].entries)) == (31, 3)
    for garbage in found.values():
        assert remove_garbage(run.store, garbage)
    assert keys(run) == good | {"notes.txt", "step-7/mine"}
    assert list(find_garbage(run.store)) == []
    (commit,) = (commit for _, commit in find(run.store))
    assert verify_checkpoint(open_checkpoint(run.store, Ref(1, 1), commit)) == []


def test_what_cannot_be_read_is_left_alone(run: Run, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        run.save(step, TENSORS)
    newer = newer_record(tmp_path, "3.0")
    (tmp_path / "step-000000000001.e00001" / "COMMIT").write_bytes(b"damaged")
    (tmp_path / "step-000000000002.e00001" / "COMMIT").write_text(newer)
    (index,) = (tmp_path / "step-000000000003.e00001").glob("index-*")
    index.write_bytes(index.read_bytes()[:-1])
    for folder in tmp_path.glob("step-*"):
        (folder / "r00099-00000000.safetensors").write_bytes(b"stray")
    assert list(find_garbage(run.store)) == []


def test_a_folder_is_as_old_as_its_newest_object(run: Run, tmp_path: Path) -> None:
    name = run.save(1, TENSORS, world=2, commit=False)
    now = time.time()
    for path, age in zip(sorted((tmp_path / name).iterdir()), (7200, 60), strict=True):
        os.utime(path, (now - age, now - age))
    (garbage,) = find_garbage(run.store)
    assert now - garbage.modified == pytest.approx(60, abs=1)


def test_an_empty_folder_goes_too(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "step-000000000001.e00001"
    folder.mkdir()
    (garbage,) = find_garbage(run.store)
    assert (garbage.nbytes, garbage.modified, garbage.entries) == (0, 0.0, ())
    assert remove_garbage(run.store, garbage)
    assert not folder.exists()


def test_a_save_that_commits_meanwhile_is_kept(run: Run) -> None:
    run.save(1, TENSORS, commit=False)
    (garbage,) = find_garbage(run.store)
    run.save(1, TENSORS)
    before = keys(run)
    assert remove_garbage(run.store, garbage) is False
    assert keys(run) == before
