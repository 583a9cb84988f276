"""`ckptsvc exclude`: a node that no ranks are started on."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders
from ckptsvc.cli.excluding import without_agent
from ckptsvc.quantities import parse_duration
from ckptsvc.rpc.v1.agent_pb2 import VerbRequest


@click.command()
@click.argument("node")
@click.option("--job", metavar="NAME", help="Tell the coordinator of this job only.")
@click.option("--for", "seconds", metavar="TIME", help="For so long, as 2h or 1d; default: until told otherwise.")
@orders.options(timeout="1min")
def command(
    node: str, job: str | None, seconds: str | None, directory: Path | None, timeout: str, no_wait: bool,
    as_json: bool, reason: str,
) -> int:  # fmt: skip
    """Start no ranks on NODE any more, for so long or until `ckptsvc include`.

    It holds for the jobs that begin from now on and, for those whose coordinators the agents of this node can reach,
    from their next attempt on. A job that has too few other nodes takes it all the same. `ckptsvc nodes` lists all.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    length = parse_duration(seconds) if seconds else 0.0
    own = job is None and not orders.is_for_others()
    done = without_agent(node, directory, reason, length, excluded=True) if own else None
    if done is not None:
        return orders.tell("Exclude", VerbRequest(node=node), [done], as_json)
    status, _ = orders.to_node(
        "Exclude", node, job, directory, timeout, no_wait, as_json, reason=reason, seconds=length
    )
    return status
