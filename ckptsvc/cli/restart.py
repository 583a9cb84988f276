"""`ckptsvc restart`: a new attempt of a launched job."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders


@click.command()
@click.argument("job", required=False)
@orders.options(timeout="5min")
def command(job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool, reason: str) -> int:
    """Have JOB start anew: its ranks are stopped, and started from the newest snapshot there is.

    Steps since then are lost: `ckptsvc checkpoint` first keeps them. That is no failure: it takes none of the job's
    restarts, and is held against no node. Only what `ckptsvc run` has started can be started anew. JOB may be left
    out where there is only one.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    return orders.to_job("Restart", job, directory, timeout, no_wait, as_json, reason=reason)
