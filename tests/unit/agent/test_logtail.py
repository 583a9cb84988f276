"""The end of a log, as text that can be shown anywhere."""

import os
from pathlib import Path

import pytest

from ckptsvc.agent.logtail import MAX_BYTES, MAX_LINE, clean, one_line, tail


def test_only_the_end_is_read_and_no_half_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    lines = tail(log).splitlines()
    assert lines[-1] == "line 99999"
    assert all(line.startswith("line ") for line in lines)
    assert MAX_BYTES - 20 < len("\n".join(lines)) <= MAX_BYTES


def test_one_endless_line_is_cut(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * (MAX_BYTES * 3))
    assert tail(tmp_path / "log") == "x" * MAX_LINE


def test_an_empty_log_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert tail(tmp_path / "log") == ""
    (tmp_path / "log").write_bytes(b"a\xff\xfeb\n\0\x07c\n")
    assert tail(tmp_path / "log") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b\nc"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing", Path("/dev/zero")):
        with pytest.raises(OSError):
            tail(path)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b[31;1mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link", "textlink"),
        ("10%\r50%\r100%\r\nnext", "100%\nnext"),
        ("a\tb", "a       b"),
        ("\x1bcreset\x9b31m", "reset31m"),
        ("right\u202eleft\u200b", "rightleft"),
        ("\n\n  indented\n\n", "  indented"),
        ("naïve 漢字", "naïve 漢字"),
        ("\x1b", ""),
    ],
)
def test_no_command_to_a_terminal_is_left(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_in_one_line() -> None:
    assert one_line(" a\n\x1b[1m b\t c ") == "a b c"
