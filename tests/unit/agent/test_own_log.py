"""The log of an agent that nobody else bounds."""

import os
from pathlib import Path

import pytest

from ckptsvc.agent.process.own_log import put_aside


def test_a_log_that_is_too_long_is_put_aside_once_and_whoever_has_it_open_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    worker = os.dup(fd)
    try:
        for number in range(3):
            os.write(fd, b"x" * 60)
            put_aside(log, fd, 100)
            assert log.stat().st_size == 60
            os.write(worker, b"%d" % number * 60)
            put_aside(log, fd, 100)
            assert (log.stat().st_size, (tmp_path / "agent.log.1").read_text()) == (0, "x" * 60 + str(number) * 60)
        assert (tmp_path / "agent.log.1").stat().st_mode & 0o777 == 0o600
    finally:
        os.close(fd)
        os.close(worker)


def test_what_is_not_the_log_is_left_alone(tmp_path: Path) -> None:
    log, other = tmp_path / "agent.log", tmp_path / "other"
    other.write_text("y" * 200)
    log.write_text("x" * 200)
    for path, flags in ((other, os.O_WRONLY), ("/dev/null", os.O_WRONLY)):
        fd = os.open(path, flags)
        put_aside(log, fd, 100)
        os.close(fd)
    assert (log.stat().st_size, other.stat().st_size, (tmp_path / "agent.log.1").exists()) == (200, 200, False)


def test_where_there_is_no_room_for_a_copy_the_log_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    log = tmp_path / "agent.log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, b"x" * 200)
    put_aside(log, fd, 100)
    os.close(fd)
    assert (log.stat().st_size, (tmp_path / "agent.log.1").exists()) == (0, False)
