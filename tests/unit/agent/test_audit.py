"""The audit log: who may read it, what is in a line, and what happens when it cannot be written."""

import asyncio
import contextlib
import json
import logging
import os

import pytest
from harness.runtime import tmpfs

from ckptsvc.agent.orders.audit import MAX_TEXT, AuditLog, Entry, audit_path, read
from ckptsvc.config import load
from ckptsvc.errors import ConfigError, NotFound


def entry(**changes):
    fields = {"verb": "pause", "job": "gpt", "uid": 1000, "by": "ada", "node": "n7", "outcome": "done", "what": "so"}
    return Entry(**{**fields, **changes})


def test_a_line_is_appended_to_a_file_of_its_owner_alone(tmp_path):
    path = tmp_path / "state" / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry())
    log.append(entry(verb="drain", target="n7"))
    assert path.stat().st_mode & 0o777 == 0o600
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["user"] == "ada"
    assert first["time"].endswith("Z")
    assert (second["verb"], second["target"]) == ("drain", "n7")
    assert [each.verb for each in read(path)] == ["pause", "drain"]


def test_a_file_that_was_moved_away_is_made_anew(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry())
    path.rename(tmp_path / "audit.jsonl.1")
    log.append(entry(verb="resume"))
    assert [each.verb for each in read(path)] == ["resume"]


def test_several_writers_share_it(tmp_path):
    path = tmp_path / "audit.jsonl"

    async def write():
        logs = [AuditLog(path) for _ in range(4)]
        await asyncio.gather(*(log.record(entry(what=f"{number}")) for log in logs for number in range(20)))

    asyncio.run(write())
    assert sorted(each.what for each in read(path)) == sorted([str(n) for n in range(20)] * 4)


def test_a_long_text_is_cut_and_none_can_be_taken_for_a_line(tmp_path):
    path = tmp_path / "audit.jsonl"
    AuditLog(path).append(entry(what="x\n" * 5000, job="\n\x1b[2J"))
    (only,) = read(path)
    assert len(only.what) == MAX_TEXT
    assert only.job == "\n\x1b[2J"
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o700])
def test_a_file_that_others_can_use_is_not_written(tmp_path, mode):
    path = tmp_path / "audit.jsonl"
    path.write_text("")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="not a file of this user alone"):
        AuditLog(path).append(entry())


def test_nor_is_what_a_link_points_to(tmp_path):
    (tmp_path / "elsewhere").touch(mode=0o600)
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        AuditLog(tmp_path / "audit.jsonl").append(entry())


def test_nor_is_waited_for_who_reads_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "audit.jsonl", 0o600)
    with pytest.raises(OSError, match="No such device"):
        AuditLog(tmp_path / "audit.jsonl").append(entry())


def test_a_failure_stops_nothing_and_is_said_once_until_it_works_again(tmp_path, caplog):
    path = tmp_path / "folder" / "audit.jsonl"
    log = AuditLog(path)
    full = tmp_path / "folder"
    full.write_text("no directory")

    async def records(count):
        for _ in range(count):
            await log.record(entry())

    with caplog.at_level(logging.ERROR):
        asyncio.run(records(3))
        assert len(caplog.records) == 1
        assert "cannot be written" in caplog.text
        full.unlink()
        asyncio.run(records(1))
        path.unlink()
        full.rmdir()
        full.write_text("no directory")
        asyncio.run(records(2))
        assert len(caplog.records) == 2


def test_a_full_disk_is_such_a_failure(tmp_path, caplog):
    with tmpfs(tmp_path / "small", "64k") as folder:
        (folder / "filler").write_bytes(b"")
        with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
            file.write(bytes(1 << 20))
        asyncio.run(AuditLog(folder / "audit.jsonl").record(entry()))
    assert "No space left" in caplog.text


def test_half_a_line_does_not_spoil_the_next(tmp_path):
    with tmpfs(tmp_path / "small", "64k") as folder:
        log = AuditLog(folder / "audit.jsonl")
        (folder / "audit.jsonl").touch(0o600)
        (folder / "audit.jsonl").write_text("{}\n" * 1364)  # 4 bytes of a page are left
        with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
            file.write(bytes(1 << 20))
        assert "No space left" in asyncio.run(log.record(entry()))
        (folder / "filler").unlink()
        assert asyncio.run(log.record(entry())) == ""
        *_, half, whole = read(folder / "audit.jsonl")
    assert half == '{"ti'
    assert whole.verb == entry().verb


def test_lines_that_are_none_are_told_apart(tmp_path):
    path = tmp_path / "audit.jsonl"
    AuditLog(path).append(entry())
    with path.open("a") as file:
        file.write('{"half a li\n[1]\n')
    assert [isinstance(each, str) for each in read(path)] == [False, True, True]
    with pytest.raises(NotFound, match="nothing is in the audit log"):
        list(read(tmp_path / "none"))


def test_where_it_is(tmp_path):
    settings = load({}, files=[])
    assert audit_path(settings, {"HOME": "/home/ada"}).as_posix() == "/home/ada/.local/state/ckptsvc/audit.jsonl"
    assert audit_path(settings, {"STATE_DIRECTORY": "/var/lib/ckptsvc:/x"}).as_posix() == "/var/lib/ckptsvc/audit.jsonl"
    given = load({}, {"agent.audit_file": "/var/log/a.jsonl"}, files=[])
    assert audit_path(given, {}).as_posix() == "/var/log/a.jsonl"
    with pytest.raises(ConfigError, match="HOME is not set"):
        audit_path(settings, {})
