"""`ckptsvc include`: a node that ranks are started on again."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders
from ckptsvc.cli.excluding import without_agent
from ckptsvc.rpc.v1.agent_pb2 import VerbRequest


@click.command()
@click.argument("node")
@click.option("--job", metavar="NAME", help="Tell the coordinator of this job only.")
@orders.options(timeout="1min")
def command(
    node: str, job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool, reason: str
) -> int:
    """Start ranks on NODE again after `ckptsvc exclude`, and forget what failures are held against it.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    own = job is None and not orders.is_for_others()
    done = without_agent(node, directory, reason, 0.0, excluded=False) if own else None
    if done is not None:
        return orders.tell("Include", VerbRequest(node=node), [done], as_json)
    status, _ = orders.to_node("Include", node, job, directory, timeout, no_wait, as_json, reason=reason)
    return status
