"""Makes the pages of docs/reference/ that are made from the code: settings, commands, Python, errors.

    python docs/generate.py             (make reference)

They are committed, so that they can be read and reviewed; tests/unit/docs/test_reference.py sees that they are current.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import ckptsvc
from ckptsvc.cli.bench import command as bench
from ckptsvc.cli.config import markdown
from ckptsvc.cli.main import cli
from ckptsvc.errors import BY_CODE, EXIT_STATUS, GRPC_STATUS

FOLDER = Path(__file__).parent / "reference"

MADE = "<!-- Made by docs/generate.py from {}: change that, and say `make reference`. -->\n\n"

_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):\n", re.MULTILINE)
_ENTRY = re.compile(r"^    (?=\S)", re.MULTILINE)
_SPELLINGS = re.compile(r"(--[a-z-]+), (--[a-z_]+)\b")
_SPAN = re.compile(r"(`[^`]*`)")


def pages() -> dict[str, str]:
    """Name of each page -> its text."""
    return {"settings.md": settings(), "cli.md": commands(), "python.md": python(), "errors.md": errors()}


def safe(text: str) -> str:
    """Text as Markdown that shows its angle brackets and stars; code is left as it is."""
    shown = str.maketrans({"&": "&amp;", "<": "&lt;", "*": "\\*"})
    return "".join(part if part.startswith("`") else part.translate(shown) for part in _SPAN.split(text))


# ---- settings ----------------------------------------------------------------------------------------------------


def settings() -> str:
    """What `ckptsvc config reference` prints."""
    title, _, rest = markdown().partition("\n")
    lead = "Everything that can be set, with its default. `ckptsvc config reference` prints this page for your version."
    return f"{MADE.format('ckptsvc/settings.py')}{title}\n\n{lead}\n{safe(rest)}"


# ---- commands ----------------------------------------------------------------------------------------------------

_CLI = """# Commands

Every command, with all its options. `ckptsvc COMMAND --help` says the same. [Exit statuses](errors.md) are the same for
all; `--json` gives one JSON document on the standard output, also for an error. Options of `ckptsvc run` can be spelled
with underscores, too, as torchrun's.

"""


def commands() -> str:
    """All commands with their help."""
    parts = [MADE.format("ckptsvc/cli"), _CLI]
    parts += [_command(path, command) for path, command in all_commands()]
    return "".join(parts)


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Path ("ckptsvc certs init") and command, of every one that people see."""
    yield from _below("ckptsvc", cli)


def _below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if command is not cli:
        yield path, command
    if isinstance(command, click.Group):
        with click.Context(command, info_name=path) as context:
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                if found is not None and not found.hidden:
                    yield from _below(f"{path} {name}", found)
    elif command is bench:
        for name, module in sorted(importlib.import_module("ckptsvc.cli.bench").OTHERS.items()):
            yield f"{path} {name}", importlib.import_module(module).command


def _command(path: str, command: click.Command) -> str:
    depth = "##" if path.count(" ") == 1 else "###"
    with click.Context(command, info_name=path) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        options = [each for each in command.params if isinstance(each, click.Option)]
        records = [record for each in options if (record := each.get_help_record(context))]
    lines = [f"{depth} {path}", "", "```text", f"{path} {usage}", "```", "", *_help(command.help or "")]
    if records:
        lines += ["| option | |", "|---|---|"]
        lines += [f"| {_code(option)} | {safe(about).replace('|', chr(92) + '|')} |" for option, about in records]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n\n"


def _code(option: str) -> str:
    """An option as code in a table; of two spellings that differ by "-" and "_", the first."""
    text = _SPELLINGS.sub(lambda both: both[1] if both[2].replace("_", "-") == both[1] else both[0], option)
    return f"`{text}`" if "|" not in text else f"<code>{text.replace('<', '&lt;').replace('|', '&#124;')}</code>"


def _help(text: str) -> Iterator[str]:
    """Paragraphs; those that click leaves as they are are code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield from ("```text", paragraph[2:], "```", "")
        else:
            yield from (safe(paragraph), "")


# ---- Python ------------------------------------------------------------------------------------------------------

_PYTHON = """# Python

Two calls in the training loop, calls to read checkpoints, and what they may raise.
[The training loop](../using/loop.md) shows them at work. `import ckptsvc` imports neither torch nor gRPC; the first
use of a name does.

"""


def python() -> str:
    """What `import ckptsvc` offers."""
    from ckptsvc.client.signals import StopTraining  # torch

    parts = [MADE.format("the docstrings of what ckptsvc/__init__.py offers"), _PYTHON]
    offered = {name: getattr(ckptsvc, name) for name in ckptsvc._HOMES}
    parts += [_function(f"ckptsvc.{name}", what, "##") for name, what in offered.items() if inspect.isfunction(what)]
    for name, what in offered.items():
        if inspect.isclass(what):
            parts += _class(f"ckptsvc.{name}", what)
    stop = inspect.cleandoc(StopTraining.__doc__ or "")
    status = f"It is a `SystemExit` with status {EXIT_STATUS['interrupted']}."
    parts.append(f"## StopTraining\n\n{stop} {status} Its `reason` says what was saved.\n\n")
    parts.append("## Errors\n\nAll are in `ckptsvc.errors`, below `CkptsvcError`: [Errors](errors.md).\n")
    return "".join(parts)


def _class(name: str, cls: type) -> Iterator[str]:
    yield f"## {name}\n\n{_docstring(cls)}"
    for key, value in vars(cls).items():
        if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield _function(key, value, "###")


def _function(name: str, what: Any, depth: str) -> str:
    if isinstance(what, property):
        signature = f"{name} -> {inspect.signature(what.fget).return_annotation}"
    else:
        signature = f"{name.rpartition('.')[2]}{_signature(what)}"
    return f"{depth} {name}\n\n```python\n{signature}\n```\n\n{_docstring(what)}"


def _signature(function: Any) -> str:
    found = inspect.signature(function)
    given = [p for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=given)).replace("'", "")
    if len(text) <= 80:
        return text
    inside, _, result = text.rpartition(") -> ")
    return "(\n    " + re.sub(r", (?=\w+:|\*, )|(?<=\*), ", ",\n    ", inside[1:]) + f",\n) -> {result}"


def _docstring(what: Any) -> str:
    """A docstring in Google's form as Markdown."""
    parts = _SECTION.split(inspect.cleandoc(what.__doc__ or ""))
    lines = [safe(parts[0].strip()), ""]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines += [f"**{title}**", ""]
        entries = [" ".join(entry.split()) for entry in _ENTRY.split(f"\n{body}")[1:]]
        if title == "Returns":
            entries = [" ".join(entries)]
        for entry in entries:
            names, colon, about = entry.partition(": ")
            known = colon and title != "Returns"
            lines.append(f"- `{names}`: {safe(about)}" if known else f"- {safe(entry)}")
        lines.append("")
    return "\n".join(lines) + "\n"


# ---- errors ------------------------------------------------------------------------------------------------------

_ERRORS = """# Errors and exit statuses

What each error means and with which status a command ends because of it. The code is the same in JSON output, in logs,
in an exception's `code` and in gRPC's trailers; codes and statuses are only ever added. What to do about each:
[Troubleshooting](../troubleshooting.md).

A command also ends with 0 when all is done, with 3 when a part is done, with 130 after Ctrl-C, and with 141 when nobody
reads its output any more. For schedulers: 85 says "requeue me", 86 "do not", 87 "not on this node".

| code | status | it means | exception |
|---|---|---|---|
"""


def errors() -> str:
    """The table of errors."""
    rows = []
    for code, cls in sorted(BY_CODE.items(), key=lambda item: (EXIT_STATUS[item[0]], item[0])):
        about = (cls.__doc__ or "").partition("\n")[0] if code != "internal" else "Unexpected: an error of ckptsvc's."
        again = " It may pass by itself." if cls.retryable else ""
        link = f"[`{code}`](../troubleshooting.md#{code})"
        rows.append(f"| {link} | {EXIT_STATUS[code]} | {safe(about + again)} | `{cls.__name__}` |\n")
    return MADE.format("ckptsvc/errors.py") + _ERRORS + "".join(rows) + "".join(_grpc())


def _grpc() -> Iterator[str]:
    yield "\n## gRPC\n\nThe status of a call that fails; its trailers have the code.\n\n| status | codes |\n|---|---|\n"
    for status in sorted(set(GRPC_STATUS.values())):
        codes = ", ".join(f"`{code}`" for code in sorted(GRPC_STATUS) if GRPC_STATUS[code] == status)
        yield f"| `{status}` | {codes} |\n"


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
