"""How checkpoints are named on the command line."""

import uuid
from pathlib import Path

import pytest
from harness.stored import Run

from ckptsvc.cli import address
from ckptsvc.cli.address import Address, parse
from ckptsvc.errors import ConfigError, Damaged, InvalidInput, NoCheckpoint

NAME = "step-000000000010.e00001"


@pytest.fixture
def run() -> Run:
    return Run(f"memory://{uuid.uuid4()}")


def chosen(run: Run, **what) -> str:
    return address.choose(run.store, Address(run.url, **what)).ref.name


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("file:///runs/gpt",), Address("file:///runs/gpt")),
        (("FILE:///runs/gpt",), Address("file:///runs/gpt")),
        (("/runs/gpt", NAME), Address("file:///runs/gpt", NAME)),
        (("/runs/gpt", None, 3), Address("file:///runs/gpt", None, 3)),
        ((f"file:///runs/gpt/{NAME}",), Address("file:///runs/gpt", NAME)),
        ((f"file:///runs/gpt/{NAME}/",), Address("file:///runs/gpt", NAME)),
        ((f"/runs/gpt/{NAME}", NAME), Address("file:///runs/gpt", NAME)),
        ((f"/{NAME}",), Address("file:///", NAME)),
        ((f"memory://x/{NAME}",), Address("memory://x", NAME)),
        (("/runs/step-10",), Address("file:///runs/step-10")),
    ],
)
def test_an_address_means(arguments, meant) -> None:
    assert parse(*arguments) == meant


def test_a_relative_path_is_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(NAME) == Address(f"file://{tmp_path}", NAME)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("/r", "10"), "--step 10"),
        (("/r", "newest"), "step-0"),
        (("/r", NAME, 10), ""),
        ((f"/r/{NAME}", "step-000000000011.e00001"), ""),
        ((f"/r/{NAME}", None, 10), ""),
    ],
)
def test_what_names_nothing_or_too_much_is_refused(arguments, hint) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(*arguments)
    assert hint in refused.value.hint


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse("")


def test_the_newest_is_of_the_latest_epoch(run: Run) -> None:
    run.save(100, epoch=1)
    run.save(50, epoch=2)
    run.save(60, epoch=2, commit=False)
    assert chosen(run) == "step-000000000050.e00002"
    assert chosen(run, step=100) == "step-000000000100.e00001"
    run.save(100, epoch=3)
    assert chosen(run, step=100) == "step-000000000100.e00003"
    assert chosen(run, name="step-000000000100.e00001") == "step-000000000100.e00001"


def test_a_miss_says_what_there_is(run: Run) -> None:
    def hint(**what) -> str:
        with pytest.raises(NoCheckpoint) as missed:
            chosen(run, **what)
        return str(missed.value)

    assert "is the address right?" in hint()
    run.save(10, commit=False)
    assert "1 save not committed" in hint()
    assert "never finished" in hint(name=NAME)
    run.save(20)
    assert "the newest is step-000000000020.e00001" in hint(step=10)
    assert "the newest is step-000000000020.e00001" in hint(name="step-000000000030.e00001")


def test_the_folder_of_the_runs_names_them(tmp_path: Path) -> None:
    Run(f"file://{tmp_path}/gpt").save(1)
    (tmp_path / "other").mkdir()
    with pytest.raises(NoCheckpoint, match="it holds runs: gpt"):
        chosen(Run(f"file://{tmp_path}"))


def test_a_damaged_newest_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    run = Run(f"file://{tmp_path}")
    run.save(10)
    run.save(20)
    record = tmp_path / "step-000000000020.e00001" / "COMMIT"
    record.write_bytes(record.read_bytes().replace(b"job", b"jab"))
    with pytest.raises(Damaged, match=f"file://{tmp_path}: step-000000000020.e00001/COMMIT") as found:
        chosen(run)
    assert "verify" in found.value.hint
    assert chosen(run, step=10) == NAME
