"""What the documentation tells a reader to type does what the documentation says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.documentation import Block, Shell, blocks, fits, pages, steps

TOLD = {page: list(blocks(page, text)) for page, text in pages().items()}
RUN = [page for page, found in TOLD.items() if any(block.mark == "run" for block in found)]


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
    assert {"first-steps.md", "using/convert.md"} <= set(RUN)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_work(page: str, shell: Shell) -> None:
    if all(block.value == "slow" for block in TOLD[page] if block.mark == "run"):
        pytest.skip("slow examples only")
    follow(page, shell, {""})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in RUN if any(block.value == "slow" for block in TOLD[page])])
def test_the_long_examples_of_a_page_work(page: str, shell: Shell) -> None:
    follow(page, shell, {"", "slow"})
