"""`ckptsvc drain`: what must happen before a node is switched off."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders
from ckptsvc.cli.terminal import note


@click.command()
@click.argument("node", required=False)
@click.option("--undo", is_flag=True, help="Take jobs there again, as `ckptsvc undrain` does.")
@click.option("--job", metavar="NAME", help="Through the agent that has this job: for the node of another host.")
@orders.options(timeout="30min")
def command(
    node: str | None, undo: bool, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool,
    reason: str,
) -> int:  # fmt: skip
    """Get everything away from NODE (default: this one), wait, and say when it may be switched off.

    No new job is taken there. Each job that runs there takes a checkpoint; one that `ckptsvc run` has started goes on
    without the node, on spares or with fewer nodes. Saves are finished first, and copies of snapshots that the node
    keeps for others are made elsewhere. The scheduler is not told: it may have to be.

    Only the agents of NODE know all its jobs. With --job, or from another node, what is said is that the jobs that
    were asked about need it no more.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job or node;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    method = "Undrain" if undo else "Drain"
    status, own = orders.to_node(method, node, job, directory, timeout, no_wait, as_json, reason=reason)
    if not (undo or as_json or no_wait):
        note(verdict(node or "this node", is_done=not status, own=own))
    return status


def verdict(node: str, *, is_done: bool, own: bool) -> str:
    """What a person may do now. Only the node's own agents know all its jobs, and that it takes no new ones."""
    if not is_done:
        return f"{node} may not be switched off yet"
    if not own:
        return f"before {node} is switched off: `ckptsvc drain` there, which asks for all its jobs"
    return f"{node} may be switched off"
