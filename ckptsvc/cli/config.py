"""`ckptsvc config`: which settings are in force, where each came from, and what there is to set."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

import click

from ckptsvc.cli.settings import sections, values
from ckptsvc.cli.terminal import Screen, emit, note, printable
from ckptsvc.config import OTHER_VARIABLES, config_files, load
from ckptsvc.errors import ConfigError
from ckptsvc.storage.registry import check_options

DEFAULT = "default"


ORDER = """A value is taken from the last of these that has one: the default,
/etc/ckptsvc/config.toml, $XDG_CONFIG_HOME/ckptsvc/config.toml (~/.config),
the file that CKPTSVC_CONFIG names, the variable CKPTSVC_<SECTION>_<KEY>, a flag."""


@click.group(help=f"Show, check and explain settings.\n\n{ORDER}")
def command() -> None:
    """See `ORDER`."""


@command.command()
@click.argument("wanted", nargs=-1, metavar="[SECTION | SECTION.KEY]...")
@click.option("--origin", is_flag=True, help="Say where each value came from.")
@click.option("--changed", is_flag=True, help="Only what is not the default.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def show(wanted: tuple[str, ...], origin: bool, changed: bool, as_json: bool) -> None:
    """Print the settings of a process started here and now, as a settings file that gives the same.

    \b
    JSON: {"files": [...], "settings": [{"key", "value", "origin"}]};
    a value is TOML. Secrets in store.options are not shown.
    """  # noqa: D301  \b is click's
    settings = load(os.environ)
    rows = [row for row in values(settings) if not (changed and row[2] == DEFAULT)]
    known = {key for key, _, _ in values(settings)} | {section for section, _, _ in sections()}
    if unknown := [each for each in wanted if each not in known]:
        near = get_close_matches(unknown[0], known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "`ckptsvc config reference` lists all"
        raise ConfigError(f"there is no setting {unknown[0]}", hint=hint)
    rows = [row for row in rows if not wanted or row[0] in wanted or row[0].partition(".")[0] in wanted]
    if as_json:
        found = [{"key": key, "value": value, "origin": where} for key, value, where in rows]
        emit({"files": [str(path) for path in config_files(os.environ)], "settings": found})
        return
    screen, section = Screen(), ""
    width = max((len(f"{key.partition('.')[2]} = {value}") for key, value, _ in rows), default=0)
    for key, value, where in rows:
        table, _, name = key.partition(".")
        if table != section:
            if section:
                screen.line()
            screen.line(screen.paint(f"[{table}]", "head"))
            section = table
        text = f"{name} = {printable(value)}"
        if origin:
            said = f"# {printable(where)}"
            text = f"{text.ljust(min(width, 44))}  {screen.paint(said, 'quiet' if where == DEFAULT else 'good')}"
        screen.line(text)


@command.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def check(files: tuple[Path, ...]) -> None:
    """Check settings files without starting anything; without FILES, those that are in force here.

    \b
    Exit status: 0; 2 an unknown key or a wrong value, with its place.
    """  # noqa: D301  \b is click's
    chosen = list(files) or config_files(os.environ)
    settings = load({} if files else os.environ, files=chosen)
    for scheme, options in settings.store.options.items():
        check_options(scheme, options)
    note(f"{', '.join(printable(str(path)) for path in chosen) or 'no settings file'}: nothing is wrong")


@command.command()
def reference() -> None:
    """Print everything that can be set, as Markdown."""
    click.echo(markdown(), nl=False)


def markdown() -> str:
    """The reference of all settings and environment variables."""
    lines = ["# Settings", "", ORDER, ""]
    lines += ["Durations and sizes may carry a unit: ms, s, min, h, d; kB, MB, GB, TB and KiB, MiB, GiB, TiB.", ""]
    for section, title, settings in sections():
        lines += [f"## [{section}]", "", f"{title[:1].upper()}{title[1:]}", ""]
        lines += ["| key | value | default | |", "|---|---|---|---|"]
        for setting in settings:
            cells = (f"`{setting.key.partition('.')[2]}`", setting.kind, f"`{setting.default}`", setting.about)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += ["", f"In the environment: `CKPTSVC_{section.upper()}_<KEY>`.", ""]
    lines += ["## Other variables", "", "| variable | |", "|---|---|"]
    lines += [f"| `{name}` | {about} |" for name, about in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"
