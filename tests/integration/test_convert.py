"""`ckptsvc convert` as a program: killed in the middle, on several workers, on a full disk, with bad input."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.stored import Run, Tensor, cli

from ckptsvc.format.commit import COMMIT
from ckptsvc.pipeline.failpoint import VARIABLE

RNG = np.random.default_rng(11)
TENSORS = {
    f"model/layers.{i}.weight": Tensor(RNG.standard_normal((200, 160)).astype(np.float32), cut=cut)
    for i, cut in enumerate(["dim 0", "dim 1", "flat", "whole"] * 3)
}
STATE = {
    f"optimizer/state/layers.{i}.weight/{slot}": Tensor(RNG.random((600, 640), np.float32), cut="flat")
    for i in range(12)
    for slot in ("exp_avg", "exp_avg_sq")
}
GROUPS = [{"lr": 0.1, "params": [f"layers.{i}.weight" for i in range(12)]}]
VALUES = {"optimizer": {"state": {}, "param_groups": GROUPS}}


@pytest.fixture
def source(tmp_path: Path) -> str:
    run = Run(str(tmp_path / "source"))
    own = {f"@rank/{r}/cursor": Tensor(np.array([r])) for r in range(2)}
    run.save(40, TENSORS | STATE | own, world=2, values=VALUES, aliases={"model/tied": "model/layers.0.weight"})
    return str(tmp_path / "source")


def convert(*arguments: object, status: int = 0) -> dict[str, Any]:
    ended = cli("convert", *arguments, "--json")
    assert ended.status == status, (ended.out, ended.err)
    found: dict[str, Any] = json.loads(ended.out)
    return found


def program(*arguments: object, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckptsvc.cli.main", "convert", *map(str, arguments), "--json"],
        env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def held(folder: Path, point: str, process: subprocess.Popen[str]) -> None:
    """Wait until the process is at a failpoint."""
    end = time.monotonic() + 60
    while not (folder / f"{point}.held").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("shards", [1, 5])
def test_the_same_tensors_values_and_aliases(source: str, tmp_path: Path, shards: int) -> None:
    found = convert(source, tmp_path / "out", "--option", f"shards={shards}")
    assert found["complete"]
    assert found["bytes_read"] <= 1.01 * sum(t.array.nbytes for t in (TENSORS | STATE).values()) + 300_000
    assert cli("diff", source, tmp_path / "out").status == 0
    assert cli("verify", tmp_path / "out").status == 0
    assert cli("verify", source, "--against", tmp_path / "out").status == 0
    again = convert(source, tmp_path / "out", "--option", f"shards={shards}")
    assert again["complete"]
    assert again["checkpoint"] == found["checkpoint"]
    assert again["bytes_read"] == 0, "there is nothing to do the second time"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["epochs", found["checkpoint"]]


@pytest.mark.parametrize("point", ["after_task", "before_complete"])
def test_killed_in_the_middle_it_goes_on_where_it_was(source: str, tmp_path: Path, point: str) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / point).touch()
    out = tmp_path / "out"
    arguments = (source, out, "--option", "shards=6")
    process = program(*arguments, **{VARIABLE: str(points)})
    held(points, point, process)
    process.kill()
    process.communicate()
    assert not list(out.rglob(COMMIT)), "it must not look whole"
    assert cli("verify", out).status == 10
    other = cli("convert", source, out, "--option", "shards=2")
    assert other.status == 11
    assert "another conversion is unfinished here" in other.err
    found = convert(*arguments)
    assert 0 < found["resumed"] <= found["bytes"]
    assert found["complete"]
    assert cli("diff", source, out).status == 0
    assert cli("verify", out).status == 0
    assert sorted(p.name for p in out.iterdir()) == ["epochs", found["checkpoint"]]


def test_a_finished_file_that_is_cut_short_is_made_again(source: str, tmp_path: Path) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / "before_complete").touch()
    out = tmp_path / "out"
    process = program(source, out, **{VARIABLE: str(points)})
    held(points, "before_complete", process)
    process.kill()
    process.communicate()
    victim = max(out.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(victim, 5000)
    found = convert(source, out)
    assert found["resumed"] < 10_000, "only the small file of the second rank was whole"
    assert cli("verify", out).status == 0


def test_the_same_command_is_refused_while_the_first_works(source: str, tmp_path: Path) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / "before_complete").touch()
    arguments = (source, tmp_path / "out")
    process = program(*arguments, **{VARIABLE: str(points)})
    held(points, "before_complete", process)
    for more in ((), ("--restart",)):
        ended = cli("convert", *arguments, *more)
        assert ended.status == 11
        assert f"process {process.pid} of this node is at work" in ended.err
    (points / "before_complete.held").unlink()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, (out, err)
    assert cli("diff", *arguments).status == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["epochs", json.loads(out)["checkpoint"]]


def test_restart_throws_the_unfinished_away(source: str, tmp_path: Path) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / "before_complete").touch()
    out = tmp_path / "out"
    process = program(source, out, **{VARIABLE: str(points)})
    held(points, "before_complete", process)
    process.kill()
    process.communicate()
    found = convert(source, out, "--option", "shards=2", "--restart")
    assert (found["files"], found["resumed"]) == (2, 0)
    assert sorted(p.name for p in out.iterdir()) == ["epochs", found["checkpoint"]]


def test_workers_share_the_files(source: str, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "out", "--option", "shards=4", "--workers", "2")
    assert found["complete"]
    assert found["bytes_read"] > 0
    assert cli("diff", source, tmp_path / "out").status == 0


def test_processes_of_an_allocation_share_the_files(source: str, tmp_path: Path) -> None:
    """As srun starts them: no one leads, and who is last completes the target."""
    arguments = (source, tmp_path / "out", "--option", "shards=4")
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    each = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"} for rank in range(2)]
    ranks = [program(*arguments, **step, **one) for one in each]
    ended = [process.communicate(timeout=100) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ended
    assert any(json.loads(out)["complete"] for out, _ in ended)
    assert cli("diff", source, tmp_path / "out").status == 0


def test_restart_is_refused_where_several_processes_work(source: str, tmp_path: Path) -> None:
    rank = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
    process = program(source, tmp_path / "out", "--restart", **rank)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "--alone --restart" in out + err
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_killed_is_named(source: str, tmp_path: Path) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / "after_task").touch()
    arguments = (source, tmp_path / "out", "--option", "shards=4", "--workers", "2")
    process = program(*arguments, **{VARIABLE: str(points)})
    held(points, "after_task", process)
    os.kill(int((points / "after_task.held").read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 22, (out, err)
    assert "of 2 (process" in err
    assert "SIGKILL" in err
    assert convert(*arguments)["resumed"] > 0


def test_a_target_too_small_is_found_before_the_work_starts(source: str, tmp_path: Path, small: Path) -> None:
    ended = cli("convert", source, small / "out")
    assert ended.status == 5
    assert "are free" in ended.err
    assert list(small.iterdir()) == [], "nothing was begun"


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """A file system of 2 MiB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


BAD: list[tuple[list[str], int, str]] = [
    (["--memory", "90MiB"], 2, "too little memory"),
    (["--memory", "1000TiB"], 2, "more than the"),
    (["--option", "shards=0"], 2, "out of range"),
    (["--option", "chards=1"], 2, "this format has no option"),
    (["--only", "nothing.*"], 2, "no tensor of"),
    (["--rename", "weight"], 2, "no rule for renaming"),
    (["--rename", "(=x"], 2, "no rule for renaming"),
    (["--rename", r"layers.\d+=same"], 2, "would be called"),
    (["--dtype", "int8"], 2, "cannot be cast"),
    (["--average", "last:3"], 10, "the mean of 3 is wanted"),
    (["--average", "some"], 2, "neither last:N"),
    (["--from-option", "step=41"], 10, "no committed checkpoint of step 41"),
    (["--shape", "llama3-8b"], 2, "goes with --dry-run"),
]


@pytest.mark.parametrize(("extra", "status", "what"), BAD, ids=[what for _, _, what in BAD])
def test_bad_input_is_refused_before_anything_is_written(
    source: str, tmp_path: Path, extra: list[str], status: int, what: str
) -> None:
    ended = cli("convert", source, tmp_path / "out", *extra)
    assert (ended.status, what in ended.err) == (status, True), ended.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_a_job_saves_to_is_left_alone(source: str, tmp_path: Path) -> None:
    from ckptsvc.pipeline.catalog import take_epoch
    from ckptsvc.storage import connect

    store = connect(str(tmp_path / "busy"))
    take_epoch(store, "training", 0, "owner", "now")
    ended = cli("convert", source, tmp_path / "busy")
    assert ended.status == 2
    assert "the run of job training" in ended.err


def test_damage_of_the_source_is_named_and_the_target_is_not_whole(source: str, tmp_path: Path) -> None:
    victim = max(Path(source).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        file.write(b"\xff\xfe\xfd")
    ended = cli("convert", source, tmp_path / "out")
    assert ended.status == 12
    assert victim.name in ended.err
    assert not list((tmp_path / "out").rglob(COMMIT))


def test_a_part_of_it_renamed_and_cast(source: str, tmp_path: Path) -> None:
    found = convert(
        source, tmp_path / "out", "--only", "model.layers.1*", "--rename", r"layers\.(\d+)=blocks.\1.inner", "--dtype",
        "bfloat16", "--drop-optimizer",
    )  # fmt: skip
    notes = " ".join(note["what"] for note in found["notes"])
    assert "rounded from float32 to bfloat16" in notes
    assert "left out, as asked" in notes
    shown = [json.loads(cli("inspect", tmp_path / "out", "--json", *more).out) for more in ([], ["--values"])]
    assert sorted((t["name"], t["dtype"]) for t in shown[0]["tensors"]) == [
        (f"model/blocks.{i}.inner.weight", "bfloat16") for i in (1, 10, 11)
    ]
    assert not [value for value in shown[1]["values"] if value["path"].startswith("optimizer")]


def test_the_mean_of_the_last_checkpoints(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    arrays = [RNG.standard_normal((40, 70)).astype(np.float32) for _ in range(4)]
    for step, array in enumerate(arrays):
        held = {"model/w": Tensor(array, cut="dim 1"), "model/n": Tensor(np.array([step])),
            "optimizer/state/w/exp_avg": Tensor(array)}  # fmt: skip
        run.save(step, held, world=2)
    found = convert(tmp_path / "run", tmp_path / "mean", "--average", "last:3")
    assert "mean of 3" in " ".join(note["what"] for note in found["notes"])
    mean = np.mean(np.stack(arrays[1:]).astype(np.float64), axis=0).astype(np.float32)
    truth = Run(str(tmp_path / "truth"))
    truth.save(3, {"model/w": Tensor(mean), "model/n": Tensor(np.array([3]))})
    assert cli("verify", tmp_path / "mean", "--against", tmp_path / "truth").status == 0


def test_against_names_what_differs(source: str, tmp_path: Path) -> None:
    other = Run(str(tmp_path / "other"))
    changed = TENSORS["model/layers.3.weight"].array.copy()
    changed[17, 5] += 0.5
    changed[18, 1] += 0.25
    tensors = TENSORS | STATE | {"model/layers.3.weight": Tensor(changed), "model/extra": Tensor(changed)}
    tensors["model/layers.4.weight"] = Tensor(changed[:10])
    other.save(40, tensors, world=2)
    ended = cli("verify", source, "--against", tmp_path / "other", "--json")
    assert ended.status == 1
    found = json.loads(ended.out)
    assert [m["name"] for m in found["only_in_a"]] == ["model/tied"]
    assert [m["name"] for m in found["only_in_b"]] == ["model/extra"]
    assert [m["name"] for m in found["mismatched"]] == ["model/layers.4.weight"]
    (different,) = found["different"]
    assert (different["name"], different["first"], different["differing"]) == ("model/layers.3.weight", [17, 5], 2)
    assert different["max_abs"] == pytest.approx(0.5)
    text = cli("verify", source, "--against", tmp_path / "other").out
    assert "2 of 32,000 elements, the first at [17, 5]; at most 0.5 apart" in text


def test_a_dry_run_writes_nothing_and_says_what_it_costs(source: str, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "out", "--dry-run", "--read-bandwidth", "1MB/s", "--write-bandwidth", "1GB/s")
    assert not (tmp_path / "out").exists()
    data = sum(t.array.nbytes for t in (TENSORS | STATE).values()) + 16
    assert found["bytes_needed"] == data
    assert data <= found["bytes_read"] <= data + 300_000
    assert found["seconds"] == pytest.approx(found["bytes_read"] / 1e6, rel=0.01)
    real = convert(source, tmp_path / "out")
    assert real["bytes"] == found["bytes_written"]
    assert real["bytes_read"] <= found["bytes_read"]


def test_what_a_person_sees(source: str, tmp_path: Path) -> None:
    plan = cli("convert", source, tmp_path / "out", "--dry-run", "--write-bandwidth", "1MB/s")
    assert re.search(r"read +36.6 MiB, 1.0\d\d for every byte that is needed", plan.out)
    assert re.search(r"time +38 s at these bandwidths", plan.out)
    made = cli("convert", source, tmp_path / "out", "--dtype", "float16", "--drop-optimizer")
    assert re.search(r"complete: 7\d\d.\d KiB in 2 files; 1.5 MiB read", made.out)
    assert "lost: 12 tensors are rounded from float32 to float16" in made.out
    again = cli("convert", source, tmp_path / "out", "--dtype", "float16", "--drop-optimizer")
    assert "complete already, nothing was done" in again.out


def test_a_known_shape_is_planned_without_a_source(tmp_path: Path) -> None:
    found = convert("--dry-run", "--shape", "llama3-8b", tmp_path / "out", "--read-bandwidth", "10GB/s")
    assert found["bytes_needed"] == pytest.approx(8.03e9 * 14, rel=0.01)
    assert found["amplification"] < 1.01
    assert cli("convert", "--dry-run", "--shape", "llama9", tmp_path / "out").status == 2


def test_the_mean_of_several_runs(tmp_path: Path) -> None:
    for name, number in (("a", 1.0), ("b", 4.0)):
        Run(str(tmp_path / name)).save(1, {"model/w": Tensor(np.full((5, 7), number))})
    assert cli("convert", tmp_path / "a", tmp_path / "b", tmp_path / "mean").status == 2, "only when it is said"
    convert(tmp_path / "a", tmp_path / "b", tmp_path / "mean", "--average", "all", "--workers", "2")
    Run(str(tmp_path / "truth")).save(1, {"model/w": Tensor(np.full((5, 7), 2.5))})
    assert cli("verify", tmp_path / "mean", "--against", tmp_path / "truth").status == 0


def test_workers_end_with_the_process_that_started_them(source: str, tmp_path: Path) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / "after_task").touch()
    arguments = (source, tmp_path / "out", "--option", "shards=4", "--workers", "2")
    process = program(*arguments, **{VARIABLE: str(points)})
    held(points, "after_task", process)
    worker = Path("/proc") / (points / "after_task.held").read_text() / "status"
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    with contextlib.suppress(OSError):  # it has gone
        while "State:\tZ" not in worker.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
    assert convert(*arguments)["resumed"] > 0
