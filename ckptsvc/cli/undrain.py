"""`ckptsvc undrain`: a drained node takes jobs again."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders


@click.command()
@click.argument("node", required=False)
@click.option("--job", metavar="NAME", help="Through the agent that has this job: for the node of another host.")
@orders.options(timeout="1min")
def command(
    node: str | None, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool, reason: str
) -> int:
    """Take jobs on NODE again after `ckptsvc drain`; without NODE, on this one.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    status, _ = orders.to_node("Undrain", node, job, directory, timeout, no_wait, as_json, reason=reason)
    return status
