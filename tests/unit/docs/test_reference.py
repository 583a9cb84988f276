"""The pages that are made from the code are what the code makes."""

import importlib.util
import sys
from types import ModuleType

import pytest
from harness.documentation import DOCS, pages

from ckptsvc.errors import BY_CODE, EXIT_STATUS
from ckptsvc.telemetry import IncidentKind, NicTrouble, Skip


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "python.md", "errors.md"])
def test_a_page_made_from_the_code_is_current(name: str, generate: ModuleType) -> None:
    made = generate.pages()
    assert name in made
    assert (DOCS / "reference" / name).read_text() == made[name], "say `make reference`"


def test_every_command_and_every_error_is_described(generate: ModuleType) -> None:
    made = generate.pages()
    paths = [path for path, _ in generate.all_commands()]
    assert {"ckptsvc run", "ckptsvc certs issue", "ckptsvc bench faults"} <= set(paths)
    assert all(f" {path}\n" in made["cli.md"] for path in paths)
    assert all(f"[`{code}`]" in made["errors.md"] for code in BY_CODE)


def sections(text: str) -> dict[str, str]:
    """Heading -> what stands below it."""
    parts = text.split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_what_to_do_is_said_for_every_error() -> None:
    told = sections(pages()["troubleshooting.md"])
    assert set(told) == set(BY_CODE)
    for code in BY_CODE:
        assert told[code].strip().startswith(f"Exit status {EXIT_STATUS[code]}."), code


@pytest.mark.parametrize("words", [IncidentKind, NicTrouble, Skip])
def test_recovery_speaks_of_every_kind(words: type) -> None:
    text = pages()["recovery.md"]
    missing = [word for word in words if f"`{word}`" not in text and f"skipped: {word.replace('-', ' ')}" not in text]
    assert missing == []
