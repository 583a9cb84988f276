"""Commands, options, settings, variables and metrics that the documentation names are there."""

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from harness.documentation import ROOT, blocks, pages

import ckptsvc
from ckptsvc.cli.bench import OTHERS
from ckptsvc.cli.bench import command as bench
from ckptsvc.cli.main import cli
from ckptsvc.cli.settings import values
from ckptsvc.config import OTHER_VARIABLES, load
from ckptsvc.telemetry import Metrics
from ckptsvc.telemetry.service import DECLARED as SERVICE

ELSEWHERE = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(
    path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file()
)]  # fmt: skip
PAGES = pages() | {name: (ROOT / name).read_text("utf-8") for name in ELSEWHERE}
WRITTEN = {name: text for name, text in PAGES.items() if not name.startswith("reference/")}

FOREIGN = {
    "--array", "--help", "--lustre-dir", "--map-by", "--mode", "--no-kill", "--nodes", "--ntasks-per-node", "--overlap",
    "--signal", "--requeue", "--version", "--rdzv-backend",
}  # fmt: skip
"""Options of other programs that are named without the program."""

_SPAN = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?<![\w./\[-])ckptsvc ((?:[a-z]|--?[a-z])[^\n]*)")
_OPTION = re.compile(r"--?[a-zA-Z][\w-]*")
_PUNCTUATION = re.compile(r"^[;|&<>()]+$")


def spans(text: str) -> Iterator[str]:
    yield from _SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def shown_commands(name: str, text: str) -> Iterator[str]:
    """What follows "ckptsvc" wherever a command is shown, in a block, in a span or in an indented line."""
    for block in blocks(name, text):
        if block.language in ("bash", "console", ""):
            joined = block.text.replace("\\\n", " ")
            lines = [line for line in joined.split("\n") if block.language != "console" or line.startswith("$ ")]
            yield from (found[1] for line in lines for found in _COMMAND.finditer(line.partition(" #")[0]))
    for span in spans(text):
        if found := re.match(r"ckptsvc ([a-z-].*)", span):
            yield found[1]
    for line in re.findall(r"^ {4}ckptsvc (.*)$", text, re.MULTILINE):
        yield line.partition(" #")[0]


def problems(shown: str) -> Iterator[str]:
    """What is not there of a command that is shown (without "ckptsvc")."""
    lexer = shlex.shlex(shown.replace("...", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe in what a person types after it
        words = shown.split()
    end = next((n for n, word in enumerate(words) if _PUNCTUATION.match(word)), len(words))
    yield from wrong(cli, "ckptsvc", words[:end])


def wrong(command: click.Command, path: str, words: list[str]) -> Iterator[str]:
    with click.Context(command, info_name=path) as context:
        if isinstance(command, click.Group) and words and not words[0].startswith("-"):
            below = command.get_command(context, words[0])
            if below is None:
                if re.fullmatch(r"[a-z-]+", words[0]):
                    yield f"{path} {words[0]}"
                return
            yield from wrong(below, f"{path} {words[0]}", words[1:])
            return
        if command is bench and words and words[0] in OTHERS:
            module = __import__(OTHERS[words[0]], fromlist=["command"])
            yield from wrong(module.command, f"{path} {words[0]}", words[1:])
            return
        known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}
    for word in words:
        if path == "ckptsvc run" and word.endswith(".py"):
            return  # the script's own from here on
        option = word.partition("=")[0]
        if _OPTION.fullmatch(option) and option not in known and (path, option) != ("ckptsvc", "--version"):
            yield f"{path} {option}"


def all_options() -> set[str]:
    found: set[str] = set()
    todo: list[click.Command] = [cli, *(__import__(m, fromlist=["command"]).command for m in OTHERS.values())]
    while todo:
        command = todo.pop()
        with click.Context(command) as context:
            if isinstance(command, click.Group):
                todo += [each for n in command.list_commands(context) if (each := command.get_command(context, n))]
            found |= {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return found


# ---- commands and options


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("ls STORE --all", []),
        ("lst STORE", ["ckptsvc lst"]),
        ("certs issue ~/a --out b | tee c --no-such", []),
        ("certs issue ~/a --outt b", ["ckptsvc certs issue --outt"]),
        ("run --nnodes 2 train.py --own", []),
        ("run --nodes 2 train.py", ["ckptsvc run --nodes"]),
        ("bench faults --peer torchrun", []),
        ("bench store URL --peer x", ["ckptsvc bench store --peer"]),
    ],
)
def test_a_command_that_is_not_there_is_found(shown: str, expected: list[str]) -> None:
    assert list(problems(shown)) == expected


@pytest.mark.parametrize("name", WRITTEN)
def test_commands_and_options_are_there(name: str) -> None:
    found = {problem for shown in shown_commands(name, WRITTEN[name]) for problem in problems(shown)}
    known = all_options() | FOREIGN
    alone = {span.split()[0].partition("=")[0] for span in spans(WRITTEN[name]) if _OPTION.match(span)}
    found |= {option for option in alone if option.startswith("--") and option not in known}
    assert found == set()


def test_commands_are_seen_where_they_are_shown() -> None:
    assert sum(len(list(shown_commands(name, text))) for name, text in WRITTEN.items()) > 100


# ---- settings and variables

KEYS = {key for key, _, _ in values(load({}))}
SECTIONS = {key.partition(".")[0] for key in KEYS}
FILES = {"agent.lock", "agent.log", "agent.sock"}
"""Look like settings."""


@pytest.mark.parametrize("name", WRITTEN)
def test_settings_and_variables_are_there(name: str) -> None:
    named = {match[0] for span in spans(WRITTEN[name]) if (match := re.match(r"[a-z]+\.[a-z_]+(?=$|[ =])", span))}
    found = {key for key in named if key.partition(".")[0] in SECTIONS and key not in KEYS | FILES}
    known = {f"CKPTSVC_{key.replace('.', '_').upper()}" for key in KEYS} | set(OTHER_VARIABLES)
    variables = set(re.findall(r"\bCKPTSVC_[A-Z][A-Z_]*[A-Z]\b(?!_)", WRITTEN[name]))
    found |= {v for v in variables if v not in known and not v.startswith("CKPTSVC_TEST_")}
    assert found == set()


@pytest.mark.parametrize("name", [name for name in WRITTEN if name.endswith(".md")])
def test_settings_files_that_are_shown_are_accepted(name: str, tmp_path: Path) -> None:
    for block in blocks(name, WRITTEN[name]):
        if block.language == "toml" and set(tomllib.loads(block.text)) <= SECTIONS:
            path = tmp_path / f"line-{block.line}.toml"
            path.write_text(block.text)
            load({"PATH": os.environ["PATH"]}, files=[path])


# ---- metrics


def metrics() -> set[str]:
    """Names under which Prometheus knows what agents say, and the service of many users."""
    return {each.name for each in SERVICE} | {
        sample for family in Metrics(ckptsvc.__version__).registry.collect() for sample in spellings(family)
    }


def spellings(family: object) -> set[str]:
    name, kind = family.name, family.type
    ends = {"counter": ["_total"], "info": ["_info"], "histogram": ["", "_bucket", "_sum", "_count"]}.get(kind, [""])
    return {f"{name}{end}" for end in ends}


@pytest.mark.parametrize("name", PAGES)
def test_metrics_are_there(name: str) -> None:
    named = set(re.findall(r"(?<![\w:.])ckptsvc_[a-z_]*[a-z](?![\w*:])", PAGES[name])) - {"ckptsvc_drivers"}
    assert named - metrics() == set()
