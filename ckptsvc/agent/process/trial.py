"""A trial of the program as it is installed now, before a process that others need executes it in its own place."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping

TRIAL_PATIENCE = 60.0
"""Seconds the program may take to show that it can start."""


async def obstacle(*flags: str, overrides: Mapping[str, object] | None = None) -> str:
    """Why the program, as it is installed now, could not take over; "" if nothing is known against it.

    Args:
        flags: more of them for `ckptsvc agent`.
        overrides: settings that this process was given on its command line, as it will be again.
    """
    given = {f"CKPTSVC_{k.replace('.', '_').upper()}": str(v) for k, v in (overrides or {}).items() if v is not None}
    command = [sys.executable, "-P", "-m", "ckptsvc.cli.main", "agent", "--check-config", *flags]
    try:
        trial = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, env={**os.environ, **given},
        )  # fmt: skip
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        output, _ = await asyncio.wait_for(trial.communicate(), TRIAL_PATIENCE)
    except TimeoutError:
        trial.kill()
        return f"it has not started within {TRIAL_PATIENCE:g} s"
    if trial.returncode == 0:
        return ""
    lines = output.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]  # a hint may follow
    return (errors or lines or [f"it ended with status {trial.returncode}"])[-1].removeprefix("error: ")
