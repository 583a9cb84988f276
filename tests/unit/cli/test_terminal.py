"""Output as a person and as a program gets it."""

import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.cli import terminal
from ckptsvc.cli.terminal import Screen, cells, duration, fold_name, natural, plural, printable, size

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(width: int | None, environ: dict[str, str], *rows: tuple[str, str]) -> list[str]:
    stream = io.StringIO() if width is None else Terminal()
    screen = Screen(stream, {"COLUMNS": str(width), "TERM": "xterm"} | environ)
    screen.table(
        ("NAME", "N"), rows, right=("N",), fold="NAME", style=lambda row, column: "bad" if column == "N" else ""
    )
    return stream.getvalue().splitlines()


def test_a_table_is_as_wide_as_it_must_be() -> None:
    assert shown(None, {}, ("a", "1"), ("long name", "12,345")) == [
        "NAME            N",
        "a               1",
        "long name  12,345",
    ]


def test_a_pipe_never_gets_colours_nor_folds() -> None:
    name = "x" * 300
    assert shown(None, {}, (name, "1"))[1] == f"{name}  1"


def test_a_terminal_gets_colours_unless_it_must_not() -> None:
    assert any(ESCAPE in line for line in shown(80, {}, ("a", "1")))
    for environ in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert not any(ESCAPE in line for line in shown(80, environ, ("a", "1")))
    assert any(ESCAPE in line for line in shown(80, {"NO_COLOR": ""}, ("a", "1"))), "empty is not set: no-color.org"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width: int) -> None:
    name = "optimizer/state/layers.10.attention.wq.weight/exp_avg"
    lines = shown(width, {"NO_COLOR": "1"}, (name, "1"), ("b", "2"))
    assert max(map(len, lines)) <= width
    assert "".join(line.removesuffix("1").strip() for line in lines[1:-1]) == name
    assert lines[1].endswith("  1")
    assert lines[-1].split() == ["b", "2"]


def test_wide_characters_count_double() -> None:
    rows = shown(None, {}, ("日本", "1"), ("abcd", "2"))
    assert cells(rows[1]) == cells(rows[2])


@given(st.text(st.characters(codec="utf-8").filter(str.isprintable)), st.integers(16, 40))
def test_folding_keeps_every_character(name: str, width: int) -> None:
    pieces = fold_name(name, width)
    assert pieces[0] + "".join(piece.removeprefix("  ") for piece in pieces[1:]) == name
    assert all(cells(piece) <= width for piece in pieces)


@given(st.text())
def test_nothing_from_a_file_commands_the_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()


def test_what_the_locale_cannot_write_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Screen(stream, {}).line("größe")
    stream.flush()
    assert raw.getvalue() == b"gr\\xf6\\xdfe\n"


def test_names_are_sorted_as_people_count() -> None:
    names = ["layers.10.w", "layers.2.w", "layers.2.b", "10", "9", "²"]
    assert sorted(names, key=natural) == ["9", "10", "layers.2.b", "layers.2.w", "layers.10.w", "²"]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1024**2 - 1, "1.0 MiB"), (3 << 30, "3.0 GiB")],
)  # fmt: skip
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0.0 s"), (0.04, "0.0 s"), (59, "59 s"), (100, "2 min"), (5400, "90 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_of_things() -> None:
    assert (plural(1, "shard"), plural(0, "shard"), plural(3000, "shard")) == ("1 shard", "0 shards", "3,000 shards")


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"name": "größe\ud800\n", "n": 2**70}
    terminal.emit(document)
    out = capsys.readouterr().out
    assert out.isascii()
    assert out.count("\n") == 1
    assert json.loads(out) == document
    with pytest.raises(ValueError, match="JSON"):
        terminal.emit({"n": float("nan")})


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("label", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("environ", [{}, {"NO_COLOR": "1"}])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    stream = Terminal()
    for name, value in ({"COLUMNS": "80", "TERM": "xterm-256color"} | environ).items():
        monkeypatch.setenv(name, value)
    if not environ:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    with terminal.progress("[verify]", 3 << 20) as advance:
        advance(3 << 20)
    assert "[verify]" in stream.getvalue()
    assert "3.0/3.0 MiB" in stream.getvalue()
    assert (f"{ESCAPE}[38;5" in stream.getvalue()) == (not environ)
    assert os.environ["COLUMNS"] == "80"
