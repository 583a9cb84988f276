"""The frame of every HTML page that the service makes: one file, which loads nothing. And the views of notebooks."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources


def frame(title: str, style: str, body: str, script: str = "") -> str:
    """A whole page.

    Args:
        title: text.
        style: CSS, after that of all pages (base.css).
        body: HTML.
        script: run when all of the body is there.
    """
    end = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_sources(style, script))}">\n'
        f"<title>{escape(title)}</title>\n<style>{_whole(style)}</style>\n</head>\n"
        f"<body>\n{body}\n{end}</body>\n</html>\n"
    )


def policy(style: str, script: str = "") -> str:
    """The Content-Security-Policy to send with such a page: the one it has in itself, and nobody may frame it."""
    return f"{_sources(style, script)}; frame-ancestors 'none'"


def view(
    title: str,
    where: str,
    facts: Sequence[tuple[str, str]],
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    note: str = "",
) -> str:
    """What a notebook shows of an object: static, in the notebook's own colours.

    Args:
        title: what it is.
        where: where that is.
        facts: (name, value).
        columns: names; those that begin with ">" are aligned to the right.
        rows: cells of a table.
        note: below it.
    """
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    kinds = [' class="right"' if name.startswith(">") else "" for name in columns]
    names = zip(columns, kinds, strict=True)
    head = "".join(f'<th scope="col"{kind}>{escape(name.removeprefix(">"))}</th>' for name, kind in names)
    lines = ""
    for row in rows:
        cells = zip(row, kinds, strict=True)
        lines += f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell, kind in cells)}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>" if rows else ""
    return (
        f'<div class="ckptsvc-view"><style>{_file("view.css")}</style><p class="head">{escape(title)}</p>'
        f'<p class="where">{escape(where)}</p><dl>{tiles}</dl><div class="scroll">{table}</div>'
        f"{f'<p class=note>{escape(note)}</p>' if note else ''}</div>"
    )


def _sources(style: str, script: str) -> str:
    """By checksums: what somebody has smuggled into the body is not run. A script may speak to where it came from."""
    scripts = f" script-src {_checksum(script)}; connect-src 'self';" if script else ""
    return f"default-src 'none'; style-src {_checksum(_whole(style))};{scripts} base-uri 'none'; form-action 'none'"


def _whole(style: str) -> str:
    return _file("base.css") + style


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _checksum(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
