"""Pages of the site that are kept elsewhere in the repository: the disk format, the decisions, the READMEs.

A hook of mkdocs (`mkdocs.yml`). A line `<!-- include: PATH -->` of a page stands for that file without its title.
Links between these files become links between pages; links to source files become their names.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "proto/FORMAT.md": "reference/format.md",
    "storage_drivers/README.md": "stores/drivers.md",
    **{
        f"proto/decisions/{path.name}": f"decisions/{path.name}"
        for path in sorted((ROOT / "proto" / "decisions").glob("*.md"))
    },
}
"""File of the repository -> page of the site that it is."""

_LINK = re.compile(r"\[([^][]+)\]\(([^()\s]+)\)")
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_HEADING = re.compile(r"^(##+ )", re.MULTILINE)
_TITLE = re.compile(r"\A# (.+)\n")

LOW = "---\nsearch:\n  boost: 0.3\n---\n\n"
"""Reasons come after instructions in what the search finds."""

DECISIONS = """# Decisions

Why it is made as it is. One record for each decision: the problem, what was considered, what was chosen, and what that
costs. They are in `proto/decisions/`, and are changed only by a later one.

"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        rank = LOW if page.startswith("decisions/") else ""
        files.append(File.generated(config, page, content=rank + text_of(source, page)))
    files.append(File.generated(config, "decisions/index.md", content=LOW + decisions()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put the files in that a page includes."""
    return included(markdown, page.file.src_uri)


def included(markdown: str, page: str) -> str:
    """The text of a page with the files that it includes; their headings are a level lower here."""

    def text(found: re.Match[str]) -> str:
        return _HEADING.sub(r"#\1", _TITLE.sub("", text_of(found[1], page)).strip("\n"))

    return _INCLUDE.sub(text, markdown)


def text_of(source: str, page: str) -> str:
    """A file of the repository as (part of) a page."""

    def moved(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        if target.startswith(("#", "https://", "http://")):
            return link[0]
        path, hash_, anchor = target.partition("#")
        path = normpath(PurePosixPath(source).parent / path)
        there = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        return f"[{text}]({relpath(there, PurePosixPath(page).parent)}{hash_}{anchor})" if there else text

    return _LINK.sub(moved, (ROOT / source).read_text(encoding="utf-8"))


def decisions() -> str:
    """The list of the decisions."""
    rows = []
    for source, page in PAGES.items():
        if page.startswith("decisions/"):
            title = (ROOT / source).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            number, _, rest = title.replace(": ", " ", 1).partition(" ")
            rows.append(f"- {number}: [{rest}]({page.removeprefix('decisions/')})")
    return DECISIONS + "\n".join(rows) + "\n"
