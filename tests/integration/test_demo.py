"""The demo itself, as `make demo` runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "ckptsvc.cli.main", "demo"]


def processes_of(*marks: str) -> list[str]:
    """Command lines of the other processes that contain one of the marks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(mark in command for mark in marks) and int(entry.name) != os.getpid():
            found.append(command)
    return found


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_passes(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    done = subprocess.run([*COMMAND, "--json", "--keep", str(kept)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["passed"]
    assert len(facts["checks"]) == 10
    assert facts["incidents"][0]["source"] == "memory"
    assert [len(run["losses"]) for run in facts["runs"]] == [48, 48, 12, 12]
    assert "</html>" in (kept / "report.html").read_text()
    assert processes_of(str(kept)) == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_demo_that_is_told_to_stop_takes_everything_with_it(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with subprocess.Popen([*COMMAND, "--keep", str(kept)], stdout=subprocess.DEVNULL) as demo:
        deadline = time.monotonic() + 150
        while '"step": 8' not in read(kept / "run.jsonl") and time.monotonic() < deadline:
            time.sleep(0.05)
        marks = str(kept), f"demo-{demo.pid}/"
        assert len(processes_of(*marks)) >= 2 + 2 + 4  # agents, launchers, ranks
        assert list(Path("/dev/shm").glob(f"*demo-{demo.pid}"))
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(30) == 128 + signal.SIGTERM
    time.sleep(1.0)  # for whoever would start one again
    assert processes_of(*marks) == []
    assert list(Path("/dev/shm").glob(f"*demo-{demo.pid}")) == []
