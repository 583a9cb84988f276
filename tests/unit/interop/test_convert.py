"""Conversions into a format of the test's own: what is at the target when, and what is refused."""

import os
import sys
import types
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from harness.declared import Arrays

from ckptsvc.errors import Damaged, InvalidInput, RunBusy, SaveFailed, StoreError, StoreFull
from ckptsvc.geometry.box import Box
from ckptsvc.interop.conversion import convert, target
from ckptsvc.interop.conversion.convert import Conversion
from ckptsvc.interop.conversion.leftovers import leftovers
from ckptsvc.interop.conversion.memory import available, checked_memory, resident
from ckptsvc.interop.conversion.request import Request, open_sources
from ckptsvc.interop.formats import FORMATS, Format
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.outputs import Fill, Output, OutputFile, Small
from ckptsvc.pipeline.catalog import take_epoch
from ckptsvc.pipeline.commit import check_fence
from ckptsvc.storage import connect
from ckptsvc.types import DTYPES

MEMORY = (600 << 20) + resident()
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format of one raw file a tensor, and a list of them at last; with the option `one` a single file `all.raw`."""

    def write(logical: Logical, options: Mapping[str, str]) -> Output:
        files, at = [], 0
        for name in logical.names():
            meta = logical.meta(name)
            dtype = options.get("force", meta.dtype)
            nbytes = int(np.prod(meta.shape)) * DTYPES[dtype].itemsize
            fill = Fill(at if "one" in options else 0, name, Box.full(meta.shape), dtype)
            files.append(OutputFile(f"data/{name.replace('/', '.')}", nbytes, fills=[fill]))
            at += nbytes
        if "one" in options:
            return Output([OutputFile("all.raw", at, fills=[file.fills[0] for file in files])])
        listed = "\n".join(file.key for file in files).encode()
        return Output(files, lambda digests: [Small("counts", str(len(digests)).encode()), Small("list", listed)])

    module = types.ModuleType("ckptsvc.interop.flat")
    module.write = write
    module.detect = lambda files: False
    monkeypatch.setitem(sys.modules, "ckptsvc.interop.flat", module)
    monkeypatch.setitem(FORMATS, "flat", Format("raw files", "flat:detect", "flat:read", "flat:write"))


@pytest.fixture
def source() -> Arrays:
    weights = {f"model/{name}": RNG.standard_normal((30, 40)).astype(np.float32) for name in "abc"}
    return Arrays(weights | {"model/n": np.arange(5), "optimizer/state/a/exp_avg": np.ones(7, np.float32)})


def begin(source: Arrays, place: object, *, fmt: str = "flat", memory: int = MEMORY, **more: Any) -> Conversion:
    settings = {key: more.pop(key) for key in ("dry", "restart", "part") if key in more}
    request = Request(sources=("arrays",), target=f"{fmt}:{place}" if fmt else str(place), **more)
    return Conversion(request, open_sources(request, [source]), memory, **settings)


def done(conversion: Conversion) -> Conversion:
    conversion.run(lambda nbytes: None)
    assert conversion.finish()
    conversion.close()
    return conversion


def below(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_a_local_target_gets_its_name_when_it_is_whole(source: Arrays, tmp_path: Path) -> None:
    conversion = begin(source, tmp_path / "out")
    conversion.run(lambda nbytes: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.convert", "out.partial"]
    for folder in ("out.convert", "out.partial/data"):
        (tmp_path / folder / ".tmp-0123").touch()  # as an interrupted write leaves it
    assert conversion.finish()
    conversion.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert below(tmp_path / "out") == ["counts", *(f"data/{n.replace('/', '.')}" for n in source.names()), "list"]
    assert (tmp_path / "out/data/model.b").read_bytes() == source.arrays["model/b"].tobytes()
    assert (tmp_path / "out/counts").read_bytes() == b"5"


def test_a_format_of_one_file_becomes_a_file_where_the_target_is_called_one(source: Arrays, tmp_path: Path) -> None:
    for name, is_file in (("x.raw", True), ("folder", False), ("x.other", False)):
        done(begin(source, tmp_path / name, options={"one": ""}))
        assert (tmp_path / name).is_file() == is_file
        assert (tmp_path / name if is_file else tmp_path / name / "all.raw").stat().st_size == source.nbytes
    assert len(list(tmp_path.iterdir())) == 3


def test_in_any_other_store_the_last_file_is_last(source: Arrays) -> None:
    url = f"memory://{uuid.uuid4()}/run"
    conversion = begin(source, url)
    conversion.run(lambda nbytes: None)
    store = connect(url)
    assert "list" not in store.children()
    assert conversion.finish()
    assert store.read("list").startswith(b"data/")
    assert not list(connect(f"{url}.convert").list())
    with pytest.raises(InvalidInput, match="is not empty"):
        begin(source, url)


def test_records_of_a_conversion_into_a_whole_bucket_are_in_that_bucket(source: Arrays) -> None:
    """s3://bucket.convert would be another bucket, perhaps somebody else's."""
    bucket = f"memory://{uuid.uuid4()}"
    first = begin(source, bucket)
    first.run(lambda nbytes: None)
    first.close()
    store = connect(bucket)
    assert store.children() == [".convert", "data"]
    assert not list(connect(f"{bucket}.convert").list())
    (left,) = leftovers(store, "")
    assert left.folder == ".convert"
    assert {entry.key.partition("/")[0] for entry in left.entries} == {".convert"}
    with pytest.raises(RunBusy):
        begin(source, bucket, only=("model.[abc]",))
    done(begin(source, bucket, only=("model.[abc]",), restart=True))
    assert store.children() == ["counts", "data", "list"]
    assert len(store.children("data")) == 3


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("s3://bucket", True),
        ("s3://bucket/run", False),
        ("fsspec+gs://bucket", True),
        ("daos://pool/cont", True),
        ("daos://pool/cont/run", False),
        ("file:///run", False),
    ],
)
def test_which_targets_are_whole_buckets(url: str, whole: bool) -> None:
    assert target._is_whole(url) is whole


def test_it_goes_on_with_what_is_finished(source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptsvc.interop.conversion.tasks.TASK_BYTES", 1)
    first = begin(source, tmp_path / "out")
    first.run(lambda nbytes: None, number=0, of=2)
    assert not first.finish()
    first.close()
    before = len(first.finished)
    assert 0 < before < len(first.tasks)
    source.reads.clear()
    second = begin(source, tmp_path / "out")
    assert second.plan == first.plan
    assert len(second.finished) == before
    written: list[int] = []
    second.run(written.append)
    assert sum(written) < second.nbytes
    assert second.finish()
    assert below(tmp_path / "out")[0] == "counts"


def test_what_was_completed_but_for_its_records_is_complete(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = begin(source, tmp_path / "out")
    conversion.run(lambda nbytes: None)
    monkeypatch.setattr(conversion.target.ledger, "forget", lambda keep: None)  # as if it was killed here
    assert conversion.finish()
    again = begin(source, tmp_path / "out")
    assert again.complete
    assert again.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("one", [True, False])
def test_what_appears_under_its_name_meanwhile_is_left_alone(source: Arrays, tmp_path: Path, one: bool) -> None:
    place, more = (tmp_path / "out.raw", {"options": {"one": ""}}) if one else (tmp_path / "out", {})
    mine = place if one else place / "mine"
    conversion = begin(source, place, **more)
    conversion.run(lambda nbytes: None)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("precious")
    with pytest.raises(StoreError, match="cannot be renamed"):
        conversion.finish()
    conversion.close()
    with pytest.raises(InvalidInput, match="has appeared since"):
        begin(source, place, **more)
    assert mine.read_text() == "precious"
    mine.unlink()
    again = done(begin(source, place, **more))
    assert len(again.finished) == len(again.tasks)
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name]


def test_killed_while_a_single_file_has_both_names_it_goes_on(source: Arrays, tmp_path: Path) -> None:
    conversion = begin(source, tmp_path / "out.raw", options={"one": ""})
    conversion.run(lambda nbytes: None)
    conversion.close()
    os.link(tmp_path / "out.raw.partial/all.raw", tmp_path / "out.raw")
    done(begin(source, tmp_path / "out.raw", options={"one": ""}))
    assert [path.name for path in tmp_path.iterdir()] == ["out.raw"]
    assert (tmp_path / "out.raw").stat().st_nlink == 1


def test_what_nobody_knows_is_not_built_upon(source: Arrays, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/stray").touch()
    with pytest.raises(InvalidInput, match=r"out.partial is there already"):
        begin(source, tmp_path / "out")


def test_another_plan_for_the_same_target_is_refused(source: Arrays, tmp_path: Path) -> None:
    begin(source, tmp_path / "out").close()
    for other in ({"dtype": "bfloat16"}, {"only": ("model.a",)}):
        with pytest.raises(RunBusy, match="another conversion is unfinished"):
            begin(source, tmp_path / "out", **other)
    changed = Arrays(source.arrays | {"model/a": source.arrays["model/b"]})
    with pytest.raises(RunBusy, match="another conversion is unfinished"):
        begin(changed, tmp_path / "out")
    done(begin(changed, tmp_path / "out", restart=True))
    assert (tmp_path / "out/data/model.a").read_bytes() == source.arrays["model/b"].tobytes()


def test_what_is_there_is_left_alone(source: Arrays, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(InvalidInput, match="is there already"):
        begin(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    late = begin(source, tmp_path / "out", part=(1, 2))
    assert late.complete, "one of several processes takes it for what the others have made"


def test_lossy_casts_are_made_only_when_asked_for(source: Arrays, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="would be rounded to bfloat16"):
        begin(source, tmp_path / "out", options={"force": "bfloat16"}, only=("model.[abc]",))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidInput, match="cannot be cast to float8"):
        begin(source, tmp_path / "out", options={"force": "float8_e5m2"}, only=("model.[abc]",))
    wide = done(begin(source, tmp_path / "wide", options={"force": "float64"}, only=("model.[abc]",)))
    assert not [note for note in wide.notes if "rounded" in note.what]
    half = done(begin(source, tmp_path / "half", dtype="float16"))
    assert "3 tensors are rounded from float32 to float16" in [note.what for note in half.notes]
    assert (tmp_path / "half/data/model.a").read_bytes() == source.arrays["model/a"].astype(np.float16).tobytes()
    assert (tmp_path / "half/data/optimizer.state.a.exp_avg").stat().st_size == 28, "only weights are cast"


def test_a_full_disk_and_too_little_memory_are_found_before(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="too little memory"):
        begin(source, tmp_path / "out", memory=20 << 20)
    with pytest.raises(InvalidInput, match="that are free here"):
        checked_memory(available() * 2)
    real = target.os.statvfs

    class Full:
        def __init__(self, place: Path) -> None:
            self.f_frsize, self.f_bavail = real(place).f_frsize, 3

    monkeypatch.setattr(target.os, "statvfs", Full)
    with pytest.raises(StoreFull, match="are free"):
        begin(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_in_passing_is_asked_again(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.time, "sleep", lambda seconds: None)
    error = StoreError("the read failed")
    error.retryable = True
    source.fail = error
    done(begin(source, tmp_path / "out"))
    source.fail = StoreError("the read failed for good")
    again = begin(source, tmp_path / "more")
    with pytest.raises(StoreError, match="for good"):
        again.run(lambda nbytes: None)
    again.close()
    assert not (tmp_path / "more").exists()


def test_own_tensors_of_ranks_are_lost_in_formats_that_have_no_ranks(source: Arrays, tmp_path: Path) -> None:
    own = Arrays(source.arrays | {"@rank/0/cursor": np.zeros(3)})
    conversion = done(begin(own, tmp_path / "out"))
    assert any(note.kind == "lost" and "@rank/0/cursor" in note.what for note in conversion.notes)
    native = done(begin(own, tmp_path / "native", fmt=""))
    assert "@rank/0/cursor" in {fill.name for file in native.output.files for fill in file.fills}


def test_a_dry_run_leaves_nothing(source: Arrays, tmp_path: Path) -> None:
    for fmt in ("flat", ""):
        begin(source, tmp_path / "out", fmt=fmt, dry=True).close()
    assert list(tmp_path.iterdir()) == []
    assert source.reads == []


def test_a_source_is_told_by_its_own_files_only(source: Arrays, tmp_path: Path) -> None:
    """Not by what lies beside it, as a target does, but by their sizes and times."""
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.pt", "sub/b.pt"):
        (folder / name).write_bytes(b"1234")
    source.identity = ""

    def identities() -> list[str]:
        found = []
        for place in (folder, folder / "a.pt"):
            source.origin = f"flat:{place}"
            found.append(open_sources(Request(sources=("x",), target=str(folder / "native")), [source]).identity)
        return found

    first = identities()
    begin(source, folder / "out").close()
    assert (folder / "out.convert").exists()
    (folder / "native").mkdir()
    (folder / "native/file").touch()
    assert identities() == first
    (folder / "sub/b.pt").write_bytes(b"12345")
    assert [a == b for a, b in zip(first, identities(), strict=True)] == [False, True]
    os.utime(folder / "a.pt", ns=(1, 1))
    assert not set(first) & set(identities())


@pytest.mark.parametrize("fmt", ["flat", ""])
def test_a_file_removed_before_the_end_is_missed(source: Arrays, tmp_path: Path, fmt: str) -> None:
    conversion = begin(source, tmp_path / "out", fmt=fmt)
    conversion.run(lambda nbytes: None)
    store, key, made = conversion.target.store, conversion.output.files[0].key, conversion.output.finish

    def removed(digests: Any) -> Any:
        store.delete(key)
        return made(digests)

    conversion.output = msgspec.structs.replace(conversion.output, finish=removed)
    with pytest.raises(SaveFailed, match="missing or cut short"):
        conversion.finish()
    assert not conversion.finish(), "it is seen at once the next time"
    assert not list(tmp_path.rglob("COMMIT"))
    assert fmt == "" or not (tmp_path / "out").exists()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("fmt", ["flat", ""])
def test_what_was_thrown_away_meanwhile_is_not_called_complete(
    source: Arrays, tmp_path: Path, fmt: str, alone: bool
) -> None:
    conversion = begin(source, tmp_path / "out", fmt=fmt)
    conversion.run(lambda nbytes: None)
    conversion.target.discard(conversion.ref)
    with pytest.raises(SaveFailed, match="thrown away"):
        conversion.finish(alone=alone)


def test_records_of_another_conversion_of_the_same_step_are_left(source: Arrays, tmp_path: Path) -> None:
    done(begin(source, tmp_path / "out", fmt=""))
    other = begin(source, tmp_path / "out", fmt="", dtype="bfloat16")
    other.run(lambda nbytes: None)
    first = begin(source, tmp_path / "out", fmt="")
    assert first.complete
    assert first.finish()
    assert other.finish()


def test_only_one_process_works_on_a_share(source: Arrays, tmp_path: Path) -> None:
    for fmt in ("flat", ""):
        first = begin(source, tmp_path / f"out{fmt}", fmt=fmt)
        for more in ({}, {"restart": True}, {"part": (1, 2)}):
            with pytest.raises(RunBusy, match="is at work"):
                begin(source, tmp_path / f"out{fmt}", fmt=fmt, **more)
        done(first)
        assert not list(tmp_path.rglob("process-*"))
        assert not (tmp_path / "outflat.convert").exists()


def test_what_was_made_meanwhile_is_not_made_again(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptsvc.interop.conversion.tasks.TASK_BYTES", 1)
    first = begin(source, tmp_path / "out")
    helper = begin(source, tmp_path / "out", part=None)
    helper.run(lambda nbytes: None)
    written: list[int] = []
    first.run(written.append)
    assert written == []
    first.target.discard(None)
    helper.finished.clear()
    with pytest.raises(SaveFailed, match="thrown away"):
        helper.run(written.append)
    assert written == []


def test_a_source_that_changes_while_it_is_read_is_not_completed(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a.pt", "b.pt"):
        (tmp_path / "source" / name).write_bytes(b"1234")
    source.origin = f"flat:{tmp_path / 'source'}"
    source.identity = ""
    for fmt in ("flat", ""):
        conversion = begin(source, tmp_path / f"out{fmt}", fmt=fmt)
        conversion.run(lambda nbytes: None)
        os.utime(tmp_path / "source/b.pt", ns=(1, len(fmt)))
        with pytest.raises(Damaged, match=r"b\.pt in .* has changed"):
            conversion.finish()
        conversion.close()
        early = begin(source, tmp_path / f"early{fmt}", fmt=fmt)
        os.utime(tmp_path / "source/a.pt", ns=(1, len(fmt)))
        with monkeypatch.context() as patched:
            patched.setattr(convert, "LOOK_AGAIN", 0.0)
            with pytest.raises(Damaged, match=r"a\.pt in .* has changed"):
                early.run(lambda nbytes: None)
        early.close()
        with pytest.raises(RunBusy, match="another conversion is unfinished"):
            begin(source, tmp_path / f"out{fmt}", fmt=fmt)
    assert not list(tmp_path.rglob("COMMIT"))
    assert not (tmp_path / "outflat").exists()


def test_a_job_that_takes_the_run_meanwhile_is_not_fenced_off(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, looks = target.newest_epoch, []

    def and_then_the_job(store: Any) -> int:
        looks.append(looked(store))
        if len(looks) == 2:  # the first look is when it is planned
            take_epoch(store, "training", 0, "f" * 32, "now")
        return looks[-1]

    monkeypatch.setattr(target, "newest_epoch", and_then_the_job)
    with pytest.raises(InvalidInput, match="the run of job training"):
        begin(source, tmp_path / "out", fmt="")
    assert looks == [0, 0, 1]
    check_fence(connect(str(tmp_path / "out")), "training", 1)


def test_another_version_or_other_rules_are_another_plan(
    source: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text('include = "llama"\n')
    begin(source, tmp_path / "out", family=str(rules)).close()
    begin(source, tmp_path / "out", family=str(rules)).close()
    rules.write_text('include = "llama"\ntitle = "changed"\n')
    with pytest.raises(RunBusy, match="another conversion is unfinished"):
        begin(source, tmp_path / "out", family=str(rules))
    rules.write_text('include = "llama"\n')
    monkeypatch.setattr("ckptsvc.__version__", "0.0.1")
    with pytest.raises(RunBusy, match="another conversion is unfinished"):
        begin(source, tmp_path / "out", family=str(rules))


@pytest.mark.parametrize("suffix", ["", ".partial", ".convert"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_target_that_is_a_link_is_refused(source: Arrays, tmp_path: Path, suffix: str, dangling: bool) -> None:
    if not dangling:
        (tmp_path / "real").mkdir()
    (tmp_path / f"out{suffix}").symlink_to(tmp_path / "real")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match="is a symbolic link"):
        begin(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
