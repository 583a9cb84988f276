"""`ckptsvc pause`: no automatic snapshots for a while."""

from __future__ import annotations

from pathlib import Path

import click

from ckptsvc.cli import orders
from ckptsvc.quantities import parse_duration


@click.command()
@click.argument("job", required=False)
@click.option("--for", "seconds", metavar="TIME", help="For so long, as 2h or 1d; default: until told otherwise.")
@orders.options(timeout="1min")
def command(
    job: str | None,
    seconds: str | None,
    directory: Path | None,
    timeout: str,
    no_wait: bool,
    as_json: bool,
    reason: str,
) -> int:
    """Have JOB take no automatic snapshots, until `ckptsvc resume` or for so long.

    What somebody orders (`ckptsvc checkpoint`, Session.save) is taken all the same, and so is the last one of a job
    that is told to stop. It holds for later attempts of the job, and through restarts of agents and coordinators. JOB
    may be left out where there is only one.

    \b
    Exit status: 0 done; 3 not done in time, or not everywhere; 10 no such job;
    20 no agent. With --no-wait, 0 once it has begun.
    \b
    JSON: {"verb", "job", "node", "done", "what": [...], "left": [...],
      "step", "bytes", "seconds"}; "what" are sentences about what has happened,
      "left" about what has not.
    """  # noqa: D301  \b is click's
    return orders.to_job(
        "Pause",
        job,
        directory,
        timeout,
        no_wait,
        as_json,
        reason=reason,
        seconds=parse_duration(seconds) if seconds else 0.0,
    )
