"""Damage to a stored run, done behind the back of the code under test, and undone again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ckptsvc.errors import CkptsvcError
from ckptsvc.pipeline.catalog import find, open_checkpoint, read_commit
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import connect


class Damage(NamedTuple):
    """What is done to which file of a run.

    Attributes:
        folder: the checkpoint's folder; the newest if "".
        file: a pattern that one file in it matches.
        how: "flip" one bit at byte `at` (from the end if negative), "cut" to `at` bytes, "remove", "empty",
            "replace" by `text`.
    """

    file: str
    how: str
    at: int = 0
    text: str = ""
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.how} {self.file}" + (f" at {self.at}" if self.how in ("flip", "cut") else "")


def checkpoints(store: Path) -> list[Path]:
    """Folders that have a commit record, newest (by epoch, then step) first."""
    folders = [path.parent for path in store.glob("step-*/COMMIT")]
    return sorted(folders, key=lambda f: f.name.split(".e")[::-1], reverse=True)


def steps(store: Path) -> list[int]:
    """Steps that are committed, newest first."""
    return [int(folder.name.split(".")[0].removeprefix("step-")) for folder in checkpoints(store)]


def assert_intact(store: Path) -> list[int]:
    """Every committed checkpoint verifies, unless it is deleted meanwhile; returns their steps, newest first."""
    opened = connect(str(store))
    for ref, commit in find(opened):
        assert not isinstance(commit, Exception), f"{ref}: {commit}"
        try:
            problems: object = verify_checkpoint(open_checkpoint(opened, ref, commit))
        except CkptsvcError as error:
            problems = error
        assert not problems or read_commit(opened, ref) is None, f"{ref}: {problems}"
    return steps(store)


@contextlib.contextmanager
def damaged(store: Path, damage: Damage) -> Iterator[Path]:
    """Do it; afterwards all is as before."""
    folder = store / damage.folder if damage.folder else checkpoints(store)[0]
    (path,) = folder.glob(damage.file)
    before = path.read_bytes()
    after = bytearray(before)
    match damage.how:
        case "flip":
            after[damage.at] ^= 1 << (damage.at % 8)
        case "cut":
            del after[damage.at :]
        case "empty":
            after.clear()
        case "replace":
            after[:] = damage.text.encode()
        case "remove":
            pass
        case how:
            raise AssertionError(how)
    assert damage.how == "remove" or after != before
    try:
        if damage.how == "remove":
            path.unlink()
        else:
            path.write_bytes(after)
        yield path
    finally:
        path.write_bytes(before)


def newer_record(store: Path, version: str, folder: Path | None = None) -> str:
    """A commit record (the newest) as a later format could have written it, with a checksum that is right."""
    import xxhash

    record: dict[str, Any] = json.loads(((folder or checkpoints(store)[0]) / "COMMIT").read_bytes())
    record["format"] = version
    del record["check"]
    record["check"] = xxhash.xxh3_64_hexdigest(_canonical(record))
    return _canonical(record).decode()


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
