"""Stacks by py-spy: what is made of its answers, and what it may do wrong."""

import asyncio
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptsvc.agent.watching import spy
from ckptsvc.agent.watching.spy import MAX_OUTPUT, Dump, dump
from ckptsvc.rpc.testimony import MAX_FRAMES, Stack


def frame(name: str, line: int = 1, filename: str = "/x/train.py", module: str | None = None) -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": line, "module": module, "short_filename": "?", "locals": None}


def thread(ident: int, name: str | None, *frames: dict[str, Any], gil: bool = False) -> dict[str, Any]:
    return {"pid": os.getpid(), "thread_id": 1, "os_thread_id": ident, "thread_name": name, "active": True,
        "owns_gil": gil, "frames": list(frames), "process_info": None}  # fmt: skip


@pytest.fixture
def myself() -> Iterator[tuple[int, int]]:
    """This process, as something to look at."""
    pidfd = os.pidfd_open(os.getpid())
    yield os.getpid(), pidfd
    os.close(pidfd)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a shell script in the place of py-spy."""

    def install(script: str) -> None:
        program = tmp_path / "py-spy"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(spy, "find", lambda: str(program))

    return install


def says(answer: Any) -> str:
    return f"echo {shlex.quote(json.dumps(answer))}"


def run(myself: tuple[int, int], seconds: float = 20.0, *, native: bool = False) -> Dump:
    return asyncio.run(dump(*myself, seconds, native=native))


def test_the_main_thread_comes_first_and_frames_read_innermost_last(
    myself: tuple[int, int], stand_in: Callable[[str], None]
) -> None:
    answer = [
        thread(7, None, frame("wait")),
        thread(
            os.getpid(),
            "MainThread",
            frame("0x7f01", 0, "/lib/libc.so.6", "/lib/libc.so.6"),
            frame("c10d::Work::wait", 0, "/t/libtorch_cpu.so", "/t/libtorch_cpu.so"),
            frame("all_reduce", 3252, "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"),
            frame("<module>", 20),
            gil=True,
        ),
    ]
    stand_in(says(answer))
    assert run(myself) == Dump(
        [
            Stack("MainThread", True, [
                "<module> (/x/train.py:20)",
                "all_reduce (torch/distributed/distributed_c10d.py:3252)",
                "c10d::Work::wait (libtorch_cpu.so)",
                "?? (libc.so.6)",
            ]),
            Stack("thread 7", False, ["wait (/x/train.py:1)"]),
        ],
        ["thread MainThread holds the interpreter lock"],
    )  # fmt: skip


def test_of_a_deep_stack_the_innermost_frames_are_kept(
    myself: tuple[int, int], stand_in: Callable[[str], None]
) -> None:
    stand_in(says([thread(os.getpid(), "MainThread", *(frame(f"f{n}") for n in range(MAX_FRAMES + 36)))]))
    frames = run(myself).stacks[0].frames
    assert (frames[0], frames[-1], len(frames)) == ("... 36 outer frames", "f0 (/x/train.py:1)", MAX_FRAMES + 1)


def test_a_read_that_contradicts_itself_is_tried_again(
    myself: tuple[int, int], stand_in: Callable[[str], None], tmp_path: Path
) -> None:
    good = says([thread(os.getpid(), "MainThread", frame("f"))])
    stand_in(f"if mkdir {tmp_path}/first 2>/dev/null; then echo 'Error: torn' >&2; exit 1; fi; {good}")
    assert run(myself).stacks[0].frames == ["f (/x/train.py:1)"]


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo 'Error: Permission denied' >&2; echo >&2; echo 'Caused by:' >&2; echo '  EPERM' >&2; exit 1",
            "py-spy: Error: Permission denied; EPERM"),
        ("exit 3", "py-spy: failed"),
        ("echo nonsense", "py-spy's answer is not understood"),
        ("echo '{}'", "py-spy's answer is not understood"),
        ("exec yes", f"py-spy: it says more than {MAX_OUTPUT} bytes"),
        ("exec yes >&2", f"py-spy: it says more than {MAX_OUTPUT} bytes"),
    ],
    ids=["denied", "failed", "nonsense", "other JSON", "flood", "flood of complaints"],
)  # fmt: skip
def test_its_failures_are_told(
    script: str, note: str, myself: tuple[int, int], stand_in: Callable[[str], None]
) -> None:
    stand_in(script)
    stacks, notes = run(myself)
    assert stacks == []
    assert notes[0].startswith(note)


def test_one_that_hangs_is_given_up_and_ended(
    myself: tuple[int, int], stand_in: Callable[[str], None], tmp_path: Path
) -> None:
    stand_in(f"echo $$ > {tmp_path}/pid; exec sleep 600")
    began = time.monotonic()
    assert run(myself, 0.5) == Dump([], ["py-spy had not finished after 0.5 s"])
    assert time.monotonic() - began < 20
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_a_killed_py_spy_has_left_stopped_goes_on(stand_in: Callable[[str], None]) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        pidfd = os.pidfd_open(child.pid)
        try:
            stand_in(f"kill -STOP {child.pid}; exec sleep 600")
            asyncio.run(dump(child.pid, pidfd, 1.0, native=True))
            state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state in "SR"
        finally:
            child.kill()
            os.close(pidfd)


def test_what_was_read_of_a_process_that_has_ended_is_not_shown(stand_in: Callable[[str], None]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pidfd = os.pidfd_open(child.pid)
    stand_in(says([thread(child.pid, "MainThread", frame("of another process"))]))
    assert asyncio.run(dump(child.pid, pidfd, 20.0)) == Dump([], ["the process has ended"])
    os.close(pidfd)


def test_it_need_not_be_installed(myself: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert run(myself) == Dump([], ["py-spy is not installed on this node"])


@pytest.mark.skipif(spy.find() is None, reason="py-spy is not installed")
def test_the_real_one_sees_what_the_process_itself_would_say() -> None:
    program = (
        "import time\ndef outer():\n inner()\ndef inner():\n print('ready', flush=True)\n time.sleep(600)\nouter()"
    )
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE))
        stack.callback(child.kill)
        pidfd = os.pidfd_open(child.pid)
        stack.callback(os.close, pidfd)
        assert child.stdout is not None
        child.stdout.readline()
        for native in (False, True):
            (main,), _ = asyncio.run(dump(child.pid, pidfd, 60.0, native=native))
            python = [line for line in main.frames if "(<string>:" in line]
            assert python == ["<module> (<string>:7)", "outer (<string>:3)", "inner (<string>:6)"]
            assert (main.frames != python) is native
