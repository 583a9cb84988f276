"""`ckptsvc doctor --store`, as a program: what it finds, what it leaves (nothing), and stores that hang or refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.object_servers import ObjectServer, S3Bucket
from harness.runtime import Runtime, eventually

from ckptsvc.cli.store_probe.load import FOLDER

DOCTOR = [sys.executable, "-m", "ckptsvc.cli.main", "doctor"]
SMALL = ["--size", "1MiB", "--repeat", "1", "--seconds", "2"]


def start(runtime: Runtime, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DOCTOR, *map(str, arguments)],
        env=runtime.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(runtime: Runtime, *arguments: object) -> tuple[int, str, str]:
    process = start(runtime, *arguments)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """A store with something in it that is nobody's business."""
    store = tmp_path / "store"
    (store / "step-000000000001.e00001").mkdir(parents=True)
    (store / "step-000000000001.e00001" / "COMMIT").write_text("mine")
    yield store
    assert [p.name for p in store.rglob("*")] == ["step-000000000001.e00001", "COMMIT"]


def test_a_store_is_measured_and_nothing_is_left(runtime: Runtime, there: Path) -> None:
    status, out, err = run(runtime, "--store", there, "--json", *SMALL)
    assert (status, err) == (0, "")
    store = json.loads(out)["store"]
    assert (store["url"], store["hung"], store["left"]) == (f"file://{there}", "", "")
    found = store["found"]
    assert found["race"]["winners"] == [1] * 10
    assert all(len(times) for times in found["metadata"]["calls"].values())
    assert all(sample["seconds"] for stage in ("write", "read") for sample in found[stage]["samples"])
    assert {each["setting"] for each in store["advice"]} >= {"retention.rate", "save.early_cores", "tiers"}
    out = run(runtime, "--store", there, *SMALL)[1]
    assert "of 8 writers of one object exactly one won" in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_directory_that_was_not_there_is_not_there_afterwards(runtime: Runtime, tmp_path: Path) -> None:
    assert run(runtime, "--store", tmp_path / "new", *SMALL)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_one_has_left_is_removed_once_it_is_old(runtime: Runtime, there: Path) -> None:
    for name, age in (("old", 7200), ("young", 60)):
        folder = there / f"{FOLDER}{name}"
        folder.mkdir()
        (folder / "x").write_text("x")
        os.utime(folder / "x", (time.time() - age,) * 2)
    out = run(runtime, "--store", there, *SMALL)[1]
    assert f"removed what an earlier measurement had left: {FOLDER}old" in out
    assert [p.name for p in there.glob(f"{FOLDER}*")] == [f"{FOLDER}young"]
    (there / f"{FOLDER}young" / "x").unlink()
    (there / f"{FOLDER}young").rmdir()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_nothing(runtime: Runtime, there: Path, how: signal.Signals) -> None:
    process = start(runtime, "--store", there, "--size", "4MiB", "--repeat", "100", "--seconds", "100")
    eventually(lambda: list(there.glob(f"{FOLDER}*/*-*")), "something to be written")
    os.kill(process.pid, how)
    status = process.wait(60)
    process.communicate()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    eventually(lambda: not list(there.glob(f"{FOLDER}*")), "all of it to be removed")


def test_a_store_that_hangs_is_given_up_and_named(runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "store"
    Path(f"{store}.plan").write_text(json.dumps([{"op": "write", "nth": 3, "times": 0, "hang": True}]))
    began = time.monotonic()
    status, out, _ = run(runtime, "--store", f"faulty+file://{store}", "--patience", "1s", *SMALL)
    assert status == 3
    assert "the store did not answer any more: writing" in out
    assert "of 8 writers" in out, "what was found before is shown"
    assert time.monotonic() - began < 60
    assert not store.exists() or list(store.iterdir()) == []


def test_a_store_that_hangs_for_good_keeps_what_was_written_and_it_is_said(runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "store"
    plan = [{"op": "write", "nth": 3, "times": 0, "hang": True}, {"op": "delete", "nth": 80, "times": 0, "hang": True},
        {"op": "list", "times": 0, "error": "store-unavailable"}]  # fmt: skip
    Path(f"{store}.plan").write_text(json.dumps(plan))
    arguments = ["--store", f"faulty+file://{store}", "--patience", "1s", "--json", *SMALL]
    status, out, _ = run(runtime, *arguments)
    assert status == 3
    document = json.loads(out)["store"]
    assert document["hung"] == "write"
    assert document["left"].startswith(f"faulty+file://{store}/{FOLDER}")


def test_a_store_that_refuses_is_an_error(runtime: Runtime, tmp_path: Path) -> None:
    store = tmp_path / "store"
    Path(f"{store}.plan").write_text(json.dumps([{"op": "put_if_absent", "times": 0, "error": "store-denied"}]))
    status, _, err = run(runtime, "--store", f"faulty+file://{store}", *SMALL)
    assert status == 6
    assert "fault injected" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("allowed", ["nothing", "listing"])
def test_where_nothing_can_be_written_nothing_is_said_to_be_left(
    runtime: Runtime, tmp_path: Path, allowed: str
) -> None:
    store = tmp_path / "store"
    denied = ["put_if_absent", "delete", *(["children", "list"] if allowed == "nothing" else [])]
    Path(f"{store}.plan").write_text(json.dumps([{"op": op, "times": 0, "error": "store-denied"} for op in denied]))
    status, out, err = run(runtime, "--store", f"faulty+file://{store}", "--json", *SMALL)
    assert (status, json.loads(out.splitlines()[0])["store"]["left"]) == (6, "")
    assert f"fault injected into {'children' if allowed == 'nothing' else 'put_if_absent'}" in out + err


def test_a_bucket_is_measured_and_nothing_is_left(
    runtime: Runtime, s3_bucket: S3Bucket, moto_server: ObjectServer
) -> None:
    runtime.environ.update(moto_server.environ, CKPTSVC_STORE_OPTIONS=json.dumps({"s3": s3_bucket.options}))
    s3_bucket.write("mine", b"1")
    status, out, err = run(runtime, "--store", s3_bucket.url, "--json", *SMALL)
    assert (status, err) == (0, "")
    store = json.loads(out)["store"]
    assert (store["url"], store["hung"], store["left"]) == (s3_bucket.url, "", "")
    assert store["found"]["race"]["winners"] == [1] * 10
    assert all(sample["seconds"] for stage in ("write", "read") for sample in store["found"][stage]["samples"])
    assert {next(iter(way), "") for way, _ in store["found"]["tune"]["ways"]} == {"", "connections", "part"}
    assert {each["setting"] for each in store["advice"]} >= {"retention.rate", "tiers"}
    assert s3_bucket.names() == ["mine"]
    status, out, err = run(runtime, "--store", "s3://no-such-bucket-of-ours", "--json", *SMALL)
    assert (status, json.loads(out.splitlines()[0])["store"]["left"]) == (4, "")
    assert "there is no such bucket" in out


def test_a_node_is_checked(runtime: Runtime) -> None:
    status, out, _ = run(runtime, "--json")
    document = json.loads(out)
    assert status == (3 if document["node"]["unfit"] else 0)
    assert document["store"] is None


@pytest.mark.parametrize("arguments", [["--store", "memory://x"], ["--store", "/x", "--size", "1TiB"]])
def test_wrong_arguments(runtime: Runtime, arguments: list[str]) -> None:
    assert run(runtime, *arguments)[0] == 2
