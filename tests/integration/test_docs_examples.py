"""What the documentation tells a reader to type does what the documentation says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.documentation import Block, Shell, blocks, fits, pages, steps

TOLD = {page: list(blocks(page, text)) for page, text in pages().items()}


def pages_with(value: str) -> list[str]:
    """Pages that have blocks to be run of that kind: "" or "slow"."""
    return [page for page, told in TOLD.items() if any((b.mark, b.value) == ("run", value) for b in told)]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    opened = Shell(tmp_path)
    yield opened
    opened.close()


def follow(page: str, shell: Shell, values: set[str]) -> None:
    for block in TOLD[page]:
        if block.mark == "file":
            path = shell.folder / block.value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.mark == "run" and block.value in values:
            check(block, shell)


def check(block: Block, shell: Shell) -> None:
    for command, shown in steps(block):
        status, printed = shell.run(command)
        said = f"{block.where}: {command}\nended with {status}, and printed\n{printed}"
        assert status == 0, said
        assert shown is None or fits(shown, printed), f"{said}\nbut the page shows\n{shown}"


def test_there_are_examples() -> None:
    assert {"first-steps.md", "using/convert.md"} <= set(pages_with(""))
    assert {"using/retention.md"} <= set(pages_with("slow"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", pages_with(""))
def test_the_examples_of_a_page_work(page: str, shell: Shell) -> None:
    follow(page, shell, {""})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", pages_with("slow"))
def test_the_long_examples_of_a_page_work(page: str, shell: Shell) -> None:
    follow(page, shell, {"", "slow"})
