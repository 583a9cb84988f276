"""The supervisor of `doctor_probe`: it waits only so long, and sees to it that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ckptsvc.cli.store_probe.probe import Spec
from ckptsvc.errors import BY_CODE, CkptsvcError

LEAVE = 15.0
"""Seconds a probe has to remove what it has written."""


@dataclass(slots=True)
class Measured:
    """What a probe has found.

    Attributes:
        found: by stage.
        hung: the stage in which the store did not answer; "" if it always did.
        error: why it ended early, or None.
        left: what could not be removed again; "" if nothing is left.
    """

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    hung: str = ""
    error: CkptsvcError | None = None
    left: str = ""


def measure(spec: Spec, patience: float, on_stage: Callable[[str], None]) -> Measured:
    """Run a probe to its end, or until the store does not answer any more.

    Args:
        spec: what is to be measured.
        patience: seconds without a word, beyond those a stage may take, after which the store counts as hanging.
        on_stage: told of every stage that begins.
    """
    measured = Measured()
    root = Path(spec.url.removeprefix("file://")) if spec.url.startswith("file://") else None
    is_new = root is not None and not root.exists()
    with tempfile.TemporaryFile() as errors:
        process = _start(["-m", "ckptsvc.cli.store_probe.probe", msgspec.json.encode(spec).decode()], errors.fileno())
        writes = cleaned = False
        try:
            assert process.stdout is not None
            stage = "start"
            for message in _lines(process.stdout.fileno(), patience + spec.seconds):
                if message is None:
                    measured.hung = stage
                    break
                if "error" in message:
                    code, what, hint = message["error"]
                    measured.error = BY_CODE.get(code, CkptsvcError)(what, hint=hint)
                elif "writes" in message:
                    writes = message["writes"]
                elif "found" in message:
                    measured.found[message["stage"]] = message["found"]
                elif message["stage"]:
                    stage = message["stage"]
                    on_stage(stage)
            else:
                cleaned = process.wait(LEAVE) in (0, 1) and stage == "clean"
                if not cleaned and measured.error is None:
                    errors.seek(0)
                    last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
                    measured.error = CkptsvcError(f"the measurement ended in stage {stage!r}: {last[0]}")
        finally:
            if not _end(process, 0.0 if measured.hung else LEAVE) or not cleaned:
                cleaned = not writes or _clean(spec)
    if root is not None and is_new:
        with contextlib.suppress(OSError):
            root.rmdir()  # the driver has made it
    if not cleaned:
        measured.left = f"{spec.url.rstrip('/')}/{spec.folder}"
    return measured


def _start(arguments: list[str], errors: int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for this process, which then says so by closing the probe's standard input.
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )


def _lines(fd: int, patience: float) -> Iterator[dict[str, Any] | None]:
    """The messages of a probe until its end; None when there was none for too long."""
    buffer = b""
    while True:
        if not select.select([fd], [], [], patience)[0]:
            yield None
            return
        part = os.read(fd, 1 << 16)
        if not part:
            return
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line)


def _end(process: subprocess.Popen[bytes], patience: float) -> bool:
    """Have a probe end; returns whether it has by itself."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    if _has_ended(process, patience):
        return process.returncode == 0
    process.kill()
    _has_ended(process, 2.0)  # one that hangs in a dead file system does not end of SIGKILL either
    return False


def _has_ended(process: subprocess.Popen[bytes], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process.poll() is not None


def _clean(spec: Spec) -> bool:
    """Remove what is left of a probe that was killed."""
    process = _start(["-m", "ckptsvc.cli.store_probe.probe", "--clean", spec.url, spec.folder], subprocess.DEVNULL)
    return _end_of_clean(process)


def _end_of_clean(process: subprocess.Popen[bytes]) -> bool:
    if not _has_ended(process, LEAVE):
        _end(process, 0.0)
        return False
    _end(process, 0.0)
    return process.returncode == 0
