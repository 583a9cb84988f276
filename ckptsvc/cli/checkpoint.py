"""`ckptsvc checkpoint`: a checkpoint now, whatever the interval."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders


@click.command()
@click.argument("job", required=False)
@orders.options(timeout="10min")
def command(job: str | None, directory: Path | None, timeout: str, no_wait: bool, as_json: bool, reason: str) -> int:
    """Have JOB take a checkpoint now, and wait until it is committed.

    All ranks take it at the same step, the first that all can be told of in time. It is taken also while the job is
    paused, and goes to the durable store even where most snapshots stay on local disks. JOB may be left out where
    there is only one.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    return orders.to_job("Checkpoint", job, directory, timeout, no_wait, as_json, reason=reason)
