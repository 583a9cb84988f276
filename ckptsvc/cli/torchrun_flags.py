"""torchrun's options that `ckptsvc run` has no use for: accepted, so that a command line need not be changed, and said.

The others are options of `ckptsvc run` itself, under the same names; PET_* variables, which torchrun reads too and
Kubernetes' training operator sets, are read there (torch/distributed/run.py of torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

WITHOUT_EFFECT: dict[tuple[str, ...], str] = {
    ("--rdzv-backend", "--rdzv_backend"): "the agents are the rendezvous",
    ("--rdzv-conf", "--rdzv_conf"): "the agents are the rendezvous",
    ("--monitor-interval", "--monitor_interval"): "the end of a rank is known at once",
    ("--start-method", "--start_method"): "see --standby",
    ("--role",): "there is one role, default",
    ("--event-log-handler", "--event_log_handler"): "see ckptsvc incidents",
    ("-r", "--redirects"): "with --log-dir all output is kept",
    ("-t", "--tee"): "all output is shown, and kept with --log-dir",
    ("--local-ranks-filter", "--local_ranks_filter"): "all output is shown",
    ("--duplicate-stdout-filters", "--duplicate_stdout_filters"): "all output is shown",
    ("--duplicate-stderr-filters", "--duplicate_stderr_filters"): "all output is shown",
    ("--logs-specs", "--logs_specs"): "with --log-dir all output is kept",
    ("--numa-binding", "--numa_binding"): "ranks are not bound to cores",
    ("--shutdown-timeout", "--shutdown_timeout"): "see --stop-grace",
    ("--signals-to-handle", "--signals_to_handle"): "SIGTERM and SIGUSR1 make the job save and stop",
}
"""Options with a value, and why they mean nothing here."""


def _say(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None:
        why = next(why for names, why in WITHOUT_EFFECT.items() if set(names) & set(parameter.opts))
        click.echo(f"ckptsvc run: {parameter.opts[-1]} has no effect: {why}", err=True)


def accepted(command: Decorated) -> Decorated:
    """Decorate a command so that it takes them."""
    for names in WITHOUT_EFFECT:
        name = f"ignored_{names[0].strip('-').replace('-', '_')}"
        command = click.option(*names, name, hidden=True, expose_value=False, callback=_say)(command)
    return command


def refuse_unknown(script: str) -> None:
    """An option that nobody knows has been taken for the script.

    Raises:
        click.NoSuchOption: that is so.
    """
    if script.startswith("-"):
        raise click.NoSuchOption(script)
