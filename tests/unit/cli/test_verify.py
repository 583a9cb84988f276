"""`ckptsvc verify`."""

import json
from pathlib import Path

import numpy as np
import pytest
from harness.damage import Damage, damaged, newer_record
from harness.stored import EXTENT, Run, Tensor, cli

NEWEST, OLDER = "step-000000000020.e00001", "step-000000000010.e00001"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(f"file://{tmp_path}")
    tensors = {f"model/layers.{n}.w": Tensor(np.ones(8 * EXTENT, np.float32), cut="dim 0") for n in range(12)}
    for step in (10, 20):
        made.save(step, tensors, world=2)
    return made


def test_all_is_well(run: Run) -> None:
    status, out, err = cli("verify", run.url)
    assert (status, err) == (0, "")
    assert out.startswith(f"{NEWEST}  ok  2 shards, 1.5 MiB in 0.")
    status, out, _ = cli("verify", run.url, "--all")
    assert [line.split("  ")[:2] for line in out.splitlines()[:2]] == [
        [NEWEST, "ok"],
        [OLDER, "ok"],
    ]
    assert out.splitlines()[2] == "2 checkpoints, none bad"
    assert cli("verify", run.url, "--step", 10).out.startswith(OLDER)
    assert cli("verify", f"{run.url}/{OLDER}").out.startswith(OLDER)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            Damage("r00001-*", "flip", 9 * EXTENT + 7),
            ["r00001-", "bytes 36,864 to 40,960", "checksum mismatch", "model/"],
        ),
        (Damage("r00000-*", "flip", 100), ["r00000-", "bytes 0 to 4,096", "its header"]),
        (Damage("r00000-*", "remove"), ["the shard is missing", "model/layers.0.w", "and 8 more"]),
        (Damage("r00000-*", "cut", 5 * EXTENT + 1), ["the shard has 20481 bytes"]),
        (Damage("index-*", "flip", -1), ["index-", "does not match the checksum in its commit record"]),
        (Damage("index-*", "remove"), ["index-", "missing"]),
        (Damage("COMMIT", "flip", 20), ["COMMIT:"]),
        (Damage("COMMIT", "empty"), ["COMMIT"]),
    ],
    ids=str,
)
def test_damage_is_named(run: Run, tmp_path: Path, damage: Damage, words: list[str]) -> None:
    with damaged(tmp_path, damage) as path:
        status, out, err = cli("verify", run.url)
        assert (status, err) == (12, "")
        assert out.startswith(f"{NEWEST}  damaged")
        assert path.name in out
        assert [word for word in words if word not in out] == []
        assert cli("verify", run.url, "--step", 10).status == 0
        status, out, _ = cli("verify", run.url, "--all")
        assert status == 12
        assert "2 checkpoints, 1 bad" in out
    assert cli("verify", run.url).status == 0


def test_json(run: Run, tmp_path: Path) -> None:
    with damaged(tmp_path, Damage("r00001-*", "flip", 9 * EXTENT)) as path:
        status, out, err = cli("verify", run.url, "--all", "--json")
        document = json.loads(out)
        assert (status, err) == (12, "")
        assert (document["store"], document["ok"]) == (run.url, False)
        bad, good = document["checkpoints"]
        (damage,) = bad.pop("damage")
        assert damage.pop("tensors")
        assert damage == {
            "file": f"{NEWEST}/{path.name}", "start": 9 * EXTENT, "stop": 10 * EXTENT, "why": "checksum mismatch",
        }  # fmt: skip
        assert bad.pop("seconds") >= 0
        assert bad == {"name": NEWEST, "state": "damaged", "shards": 2, "bytes": good["bytes"]}
        assert good["damage"] == []
    assert json.loads(cli("verify", run.url, "--json").out)["ok"] is True


def test_a_newer_format_is_told_from_damage(run: Run, tmp_path: Path) -> None:
    with damaged(tmp_path, Damage("COMMIT", "replace", text=newer_record(tmp_path, "3.0"))):
        status, out, _ = cli("verify", run.url, "--all")
        assert status == 13
        assert out.startswith(f"{NEWEST}  newer format\n")
        assert "format 3.0" in out
        assert cli("verify", run.url).status == 13
        record = tmp_path / OLDER / "COMMIT"
        record.write_bytes(b"{}")
        assert cli("verify", run.url, "--all").status == 12


@pytest.mark.parametrize(("arguments", "status"), [(["--step", "3"], 10), (["--all", "--step", "10"], 2), (["no"], 2)])
def test_wrong_addresses(run: Run, arguments: list[str], status: int) -> None:
    assert cli("verify", run.url, *arguments).status == status


def test_nothing_there(tmp_path: Path) -> None:
    status, out, _ = cli("verify", tmp_path / "none", "--all", "--json")
    assert status == 10
    assert json.loads(out)["error"]["code"] == "no-checkpoint"


def test_what_was_never_committed_is_not_verified(tmp_path: Path) -> None:
    name = Run(f"file://{tmp_path}").save(1, commit=False)
    status, out, err = cli("verify", tmp_path, name)
    assert (status, out) == (10, "")
    assert "never finished" in err
