"""`ckptsvc bench store`, as a program, on a directory and on a bucket."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from harness.object_servers import ObjectServer, S3Bucket
from harness.runtime import Runtime, eventually

BENCH = [sys.executable, "-m", "ckptsvc.cli.main", "bench", "store"]


def test_everybody_takes_turns_and_nothing_is_left(runtime: Runtime, tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--size", "1000001", "--repeat", "2", "--vs", "fsspec", "--json"]
    ended = subprocess.run([*BENCH, *arguments], env=runtime.environ, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert document["bytes"] == 245 * 4096, "whole pages"
    assert document["unavailable"] == {}
    assert {(row["system"], row["what"]) for row in document["rows"]} == {
        (name, what) for name in ("ckptsvc", "raw O_DIRECT", "raw buffered", "fsspec") for what in ("write", "read")
    }
    assert all(row["rate"]["low"] > 0 and row["memory"] < 1000 for row in document["rows"])
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_measured_with_the_clients_of_others(
    runtime: Runtime, s3_bucket: S3Bucket, moto_server: ObjectServer
) -> None:
    runtime.environ.update(moto_server.environ, CKPTSVC_STORE_OPTIONS=json.dumps({"s3": s3_bucket.options}))
    arguments = [s3_bucket.url, "--size", "9MiB", "--repeat", "1", "--vs", "", "--json"]
    ended = subprocess.run([*BENCH, *arguments], env=runtime.environ, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    systems = {row["system"] for row in document["rows"]}
    assert "ckptsvc" in systems
    assert {(row["system"], row["what"]) for row in document["rows"]} == {
        (name, what) for name in systems for what in ("write", "read")
    }
    assert all(row["rate"]["low"] > 0 for row in document["rows"])
    assert (s3_bucket.names(), s3_bucket.uploads()) == ([], [])


def test_interrupted_it_leaves_nothing(runtime: Runtime, tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--size", "32MiB", "--repeat", "100", "--vs", ""]
    process = subprocess.Popen(
        [*BENCH, *arguments], env=runtime.environ, stdout=subprocess.PIPE, start_new_session=True
    )
    eventually(lambda: list(tmp_path.rglob("object-*")), "something to be written")
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_cannot_is_an_error_and_not_a_traceback(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = subprocess.run([*BENCH, str(tmp_path / "file"), "--size", "4096", "--vs", ""], env=runtime.environ,
        capture_output=True, text=True, timeout=100)  # fmt: skip
    assert ended.returncode == 4
    assert "the driver of this store cannot do it" in ended.stderr
    assert "Traceback" not in ended.stderr
