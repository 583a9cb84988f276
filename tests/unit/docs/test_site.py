"""The site is built without a warning, loads nothing from anywhere, and every link in it leads somewhere."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from harness.documentation import ROOT, Block, blocks, fits, pages, steps

pytest.importorskip("mkdocs", reason="run make install")

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
NOT_LOADED = {"canonical", "next", "prev"}


class Page(HTMLParser):
    """What a page refers to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        href = given.get("href") or ""
        if tag == "a":
            self.links.add(href)
        elif tag == "link" and given.get("rel") not in NOT_LOADED:
            self.loads.add(href)
        self.loads |= {value for name, value in attrs if value and (tag, name) in LOADED}


# Not --quiet: with it, --strict sees no warnings.
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def test_all_pages_are_built(built: dict[str, Page]) -> None:
    assert {"index.html", "reference/format.html", "decisions/001-epochs-in-checkpoint-names.html"} <= set(built)
    assert {f"{page.removesuffix('.md')}.html" for page in pages()} <= set(built)


def test_nothing_is_loaded_from_elsewhere(site: Path, built: dict[str, Page]) -> None:
    assert all(page.loads for page in built.values())
    away = {load for page in built.values() for load in page.loads if urlsplit(load).scheme or load.startswith("//")}
    assert away == set()
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert "url(http" not in styles
    assert "url(//" not in styles
    assert "@import" not in styles


def test_every_link_leads_somewhere(site: Path, built: dict[str, Page]) -> None:
    assert list(broken(site, built)) == []


def broken(site: Path, built: dict[str, Page]) -> Iterator[str]:
    for name, page in built.items():
        for link in page.links:
            scheme, _, path, _, anchor = urlsplit(link)
            if scheme or name == "404.html":
                continue
            target = (site / name).parent.joinpath(unquote(path)).resolve() if path else site / name
            if not target.is_file():
                yield f"{name}: {link}"
            elif anchor and unquote(anchor) not in built[target.relative_to(site.resolve()).as_posix()].anchors:
                yield f"{name}: {link}: no such heading"


def test_a_broken_link_is_found(site: Path, built: dict[str, Page]) -> None:
    more = Page('<a href="security.html#no-such">a</a> <a href="nowhere.html">b</a> <a href="security.html">c</a>')
    assert sorted(broken(site, built | {"more.html": more})) == [
        "more.html: nowhere.html",
        "more.html: security.html#no-such: no such heading",
    ]


# ---- how pages are read


MARKED = """
<!-- run: slow -->
```console
$ x \\
  y
1
$ z
```

```bash
w
```
<!-- file: a/b.py -->
```python
q
```
"""


def test_marked_blocks_are_found_with_their_marks() -> None:
    found = list(blocks("p.md", MARKED))
    assert [(b.line, b.language, b.mark, b.value) for b in found] == [
        (3, "console", "run", "slow"), (10, "bash", "", ""), (14, "python", "file", "a/b.py"),
    ]  # fmt: skip
    assert list(steps(found[0])) == [("x \\\n  y\n", "1\n"), ("z\n", "")]
    assert list(steps(Block("p", 1, "bash", "w\n", "run", ""))) == [("w\n", None)]


@pytest.mark.parametrize(("name", "text"), pages().items(), ids=pages())
def test_every_mark_of_a_page_is_understood(name: str, text: str) -> None:
    marks = re.findall(r"<!-- (.*?) -->", text, re.DOTALL)
    known = [mark for mark in marks if re.fullmatch(r"run|run: slow|file: [\w./-]+", mark)]
    others = [mark for mark in marks if mark not in known]
    assert all(mark.startswith(("include: ", "Made by ")) for mark in others), others
    assert len(known) == sum(bool(block.mark) for block in blocks(name, text)), "a mark stands right before its block"


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a", True),
        ("a\n", "b\n", False),
        ("a\n", "a\nb\n", False),
        ("a ... c\n", "a b.b c\n", True),
        ("a ... c\n", "a\nc\n", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("...\na\n", "a\n", True),
        ("", "", True),
        ("", "a\n", False),
    ],
)
def test_what_is_shown_is_compared(shown: str, printed: str, expected: bool) -> None:
    assert fits(shown, printed) is expected
