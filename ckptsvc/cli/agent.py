"""`ckptsvc agent`: the agent of this node, in the foreground."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

import click

from ckptsvc.cli.terminal import note, printable
from ckptsvc.config import agents_directory, load
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import parse_duration
from ckptsvc.settings import Settings
from ckptsvc.telemetry import start_logging


@click.command()
@click.option("--listen", help="Where other agents reach this one; default 127.0.0.1:0.")
@click.option("--metrics-listen", help='Where Prometheus reaches this one, or "off".')
@click.option("--name", help="Name of this node; default: its host name.")
@click.option("--coordination", metavar="etcd://HOST:PORT,...", help="Where agents elect their jobs' coordinators.")
@click.option("--max-write-rate", metavar="SIZE/s|off", help="What this node may write to stores; default: no limit.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Directory of the sockets.")
@click.option(
    "--system", is_flag=True, help="Serve all users of this node, each by an agent of his own. Only for root."
)
@click.option("--linger", help="End after so long without ranks and saves (for example 60s); default: never.")
@click.option("--json-log", is_flag=True, help='The same as log.format = "json".')
@click.option(
    "--check-config", is_flag=True, help="Check whether an agent could start here with the settings; then end."
)
@click.option("--replace", is_flag=True, help="Have the agent that runs start anew in place, as it is installed now.")
def command(
    listen: str | None, metrics_listen: str | None, name: str | None, coordination: str | None,
    max_write_rate: str | None, directory: Path | None, linger: str | None, system: bool, json_log: bool,
    check_config: bool, replace: bool,
) -> None:  # fmt: skip
    """Run the agent of this node until it is told to stop (SIGTERM)."""
    overrides = {
        "agent.listen": listen,
        "agent.metrics_listen": metrics_listen,
        "agent.name": name,
        "agent.coordination": coordination,
        "store.max_write_rate": max_write_rate,
        "log.format": "json" if json_log else None,
    }
    read = partial(load, os.environ, overrides)
    settings = read()
    if system and (directory is not None or linger is not None):
        raise ConfigError("--system has no --dir and no --linger", hint="set system.directory, system.linger")
    if check_config:
        _check(settings, system=system)
        note("nothing is wrong with the settings; `ckptsvc config show --origin` says where they come from")
        return
    if system:
        start_logging(settings.log.format, settings.log.level)
        from ckptsvc.agent.supervisor.supervisor import (
            Supervisor,  # and not the agent: root's process has no gRPC in it
        )

        given = [("--listen", listen), ("--metrics-listen", metrics_listen), ("--name", name),
            ("--coordination", coordination), ("--max-write-rate", max_write_rate)]  # fmt: skip
        arguments = [part for flag, value in given if value is not None for part in (flag, value)]
        asyncio.run(Supervisor(settings, arguments + ["--json-log"] * json_log, os.environ).run())
        return
    if directory is None:
        directory = agents_directory(settings, os.environ)
    if replace:
        from ckptsvc.agent.process import handover

        note(f"a new agent serves in {directory}; for {handover.replace(directory):.1f} s there was none")
        return
    from ckptsvc.agent.server import Options, serve

    ends = parse_duration(linger) if linger else None
    asyncio.run(serve(Options(directory, settings, ends, read, overrides=overrides)))


def _check(settings: Settings, *, system: bool) -> None:
    """Whether an agent would start, or the service of all users; ConfigError if not."""
    from ckptsvc.agent.process.conditions import check_node, ground_of, remarks

    if system:
        from ckptsvc.agent.supervisor.supervisor import Supervisor

        check_node(settings)
        Supervisor(settings, (), os.environ)
    else:
        ground_of(settings, os.environ)
    for remark in remarks(settings):
        note(f"warning: {printable(remark)}")
