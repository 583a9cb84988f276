"""Asking the scheduler to give a bad node to no further job; the job that runs there is not touched.

    Slurm     scontrol update nodename=NODE state=drain reason=REASON        (Slurm operator)
    PBS Pro   pbsnodes -o -C COMMENT NODE                                    (PBS operator)

Off by default (`scheduler.drain`): a node is taken from everybody. What goes wrong is told, never raised: a job that
has lost a node has other things to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

TIMEOUT = 20.0
"""Seconds the scheduler's command may take; its server may be the thing that is broken."""

MAX_REASON = {"scontrol": 200, "pbsnodes": 80}
"""Characters of the reason that each command takes (pbsnodes(8B): 80)."""

MAX_OUTPUT = 500

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")


@dataclass(frozen=True, slots=True)
class Drained:
    """What came of it: whether the scheduler has agreed, and one sentence."""

    done: bool
    detail: str


async def drain(node: str, reason: str, *, enabled: bool, environ: Mapping[str, str] = os.environ) -> Drained:
    """Ask the scheduler that runs here to drain a node.

    Args:
        node: its name, as the scheduler calls it.
        reason: one sentence for the operator who will look at it.
        enabled: the setting `scheduler.drain`.
        environ: tells which scheduler there is, and where its command is (PATH).
    """
    outcome = await _drain(node, reason, enabled, environ)
    level = logging.INFO if outcome.done else logging.WARNING
    log(logger, level, Event.NODE_DRAINED, "%s", outcome.detail, node=node)
    return outcome


async def _drain(node: str, reason: str, enabled: bool, environ: Mapping[str, str]) -> Drained:
    if not enabled:
        return Drained(False, f"node {node} is not drained: scheduler.drain is not set; its fault: {reason}")
    if _HOST.fullmatch(node) is None:
        return Drained(False, f"{node[:80]!r} is not the name of a node; nothing is drained")
    name = _command(environ)
    path = shutil.which(name, path=environ.get("PATH"))
    if path is None:
        return Drained(False, f"node {node} is not drained: neither scontrol nor pbsnodes is to be found")
    words = f"ckptsvc: {''.join(c if c.isprintable() else ' ' for c in reason)}"[: MAX_REASON[name]]
    if name == "scontrol":
        arguments = ["update", f"nodename={node}", "state=drain", f"reason={words}"]
    else:
        arguments = ["-o", "-C", words, node]
    failure = await _run([path, *arguments], environ)
    if failure:
        return Drained(False, f"node {node} is not drained: {name} {failure}")
    return Drained(True, f"node {node} is drained: {reason}")


def _command(environ: Mapping[str, str]) -> str:
    """The command of the scheduler whose job this is, or of the one that is installed."""
    if "SLURM_JOB_ID" in environ:
        return "scontrol"
    if "PBS_JOBID" in environ:
        return "pbsnodes"
    return "scontrol" if shutil.which("scontrol", path=environ.get("PATH")) else "pbsnodes"


async def _run(command: list[str], environ: Mapping[str, str]) -> str:
    """Run it for at most `TIMEOUT` seconds; returns what went wrong, or ""."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environ),
        )
    except OSError as error:
        return f"does not start: {error.strerror}"
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
    except TimeoutError:
        return f"has not answered in {TIMEOUT:g} s"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                process.kill()
                await asyncio.wait_for(process.communicate(), 1.0)
    if process.returncode == 0:
        return ""
    said = " ".join(output.decode(errors="replace").split())[:MAX_OUTPUT]
    return f"exited with status {process.returncode}: {said}"
