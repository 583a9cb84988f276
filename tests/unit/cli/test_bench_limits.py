"""The raw limits move the bytes that they are timed for."""

import os
from pathlib import Path

import pytest

from ckptsvc.cli.benchmarks import limits
from ckptsvc.cli.benchmarks.limits import PAGE, Scratch, cold_reads, direct_write

NBYTES = 20 * (1 << 20) + 12_345  # several blocks, and no whole page at the end


def test_memcpy_copies_all_of_it_and_nothing_more() -> None:
    scratch = Scratch(NBYTES)
    scratch.view[:] = bytes(len(scratch.view))
    assert scratch.memcpy() > 0
    assert scratch.view[:NBYTES] == b"\1" * NBYTES
    assert bytes(scratch.view[NBYTES:]).count(1) == 0


def test_memcpy_copies_more_than_it_has_to_copy_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SOURCE_LIMIT", 1 << 20)
    scratch = Scratch(NBYTES)
    scratch.view[:] = bytes(len(scratch.view))
    scratch.memcpy()
    assert scratch.view[:NBYTES] == b"\1" * NBYTES


@pytest.mark.parametrize("flag", [0, os.O_DIRECT])
def test_a_raw_write_writes_the_bytes(tmp_path: Path, flag: int) -> None:
    scratch = Scratch(NBYTES)
    scratch.view[:NBYTES] = os.urandom(NBYTES)
    try:
        assert limits._write(tmp_path / "file", scratch, flag) > 0
    except OSError:
        pytest.skip("no direct I/O here")
    assert (tmp_path / "file").read_bytes()[:NBYTES] == scratch.view[:NBYTES]


def test_a_raw_write_leaves_nothing_and_says_how_it_wrote(tmp_path: Path) -> None:
    seconds, how = direct_write(tmp_path, Scratch(NBYTES))
    assert seconds > 0
    assert "fsync" in how
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", limits._WAYS)
def test_a_raw_read_reads_the_bytes(tmp_path: Path, way: str) -> None:
    content = os.urandom(NBYTES)
    (tmp_path / "file").write_bytes(content)
    scratch = Scratch(NBYTES)
    try:
        assert limits._read(tmp_path / "file", scratch, *limits._WAYS[way]) > 0
    except OSError:
        pytest.skip("no direct I/O here")
    assert scratch.view[:NBYTES] == content


def test_cold_reads_tries_every_way_and_says_how_the_cache_was_emptied(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(NBYTES))
    found, how = cold_reads(paths, Scratch(NBYTES))
    assert set(found) >= {"buffered", "buffered, 2 runs"}
    assert all(seconds > 0 for seconds in found.values())
    assert how


def test_the_scratch_memory_has_room_for_whole_pages() -> None:
    assert len(Scratch(1).view) % PAGE == 0
