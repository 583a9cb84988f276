"""`ckptsvc bench control`: one real coordinator, and as many simulated agents as a large machine has."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys

import click

from ckptsvc.cli.benchmarks.control.run import FAULTS, Control
from ckptsvc.cli.benchmarks.machine import facts, load
from ckptsvc.cli.terminal import Screen, emit
from ckptsvc.errors import ConfigError

AURORA = (10_624, 12)
"""Nodes and ranks on each (tiles of its accelerators) of the machine that the default is taken from."""

SPARE_FILES = 256
"""Descriptors beside the connections."""


@click.command()
@click.option("--agents", type=click.IntRange(4, 1 << 17), default=AURORA[0], show_default=True, help="Nodes.")
@click.option("--ranks", type=click.IntRange(1, 256), default=AURORA[1], show_default=True, help="Ranks of each.")
@click.option("--kills", type=click.IntRange(1, 1000), default=5, show_default=True,
    help="Times that each fault is tried; each restarts the job.")  # fmt: skip
@click.option("--faults", default=",".join(FAULTS), show_default=True, metavar="NAME,...", help="Which ones.")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=20.0, show_default=True,
    help="Seconds for which the steady state is watched.")  # fmt: skip
@click.option("--json", "as_document", is_flag=True, help="One JSON document.")
def command(agents: int, ranks: int, kills: int, faults: str, seconds: float, as_document: bool) -> None:
    """Measure what one coordinator costs, and how fast it is, in a job of that size.

    The coordinator is a real agent, alone in its process, reached by gRPC over loopback. The agents are simulated in
    this process: real reports, a call each, and an answer to every order and every ping; no ranks behind them.

    \b
    rank    one is killed                    cut     a node is cut off: its connections stay, nothing answers
    node    one ends, launcher and agent too frozen  a rank is stopped, so that all others wait for it

    \b
    JSON: {"facts", "command", "rows": [{"what", "unit", "median", "p99", "times", "bar", "met"}], "notes"}
    """  # noqa: D301  \b is click's
    chosen = tuple(name for name in faults.split(",") if name)
    if unknown := [name for name in chosen if name not in FAULTS]:
        raise ConfigError(f"--faults {unknown[0]} is not known", hint=f"known: {', '.join(FAULTS)}")
    share = _share(agents)
    about = facts(os.getcwd())
    control = Control(agents, ranks, kills, seconds, share, chosen)
    gc.disable()  # among a million objects it takes a second, for which ten thousand agents would say nothing
    try:
        asyncio.run(_until_told_to_stop(control))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    about["load"] = f"{about['load']} before, {load()} after"
    if as_document:
        spelled = f"ckptsvc bench control --agents {agents} --ranks {ranks} --kills {kills}"
        spelled += f" --faults {faults} --seconds {seconds:g}"
        rows = [row.document() for row in control.rows]
        emit({"facts": about, "command": spelled, "rows": rows, "notes": control.notes})
    else:
        _show(Screen(), about, control)


async def _until_told_to_stop(control: Control) -> None:
    """SIGTERM ends the benchmark as Ctrl-C does: the coordinator and its files go first."""
    running = asyncio.ensure_future(control.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await running


def _share(agents: int) -> int:
    """Agents on one connection: 1, unless there are too few descriptors for that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = hard - SPARE_FILES if hard != resource.RLIM_INFINITY else 1 << 30
    if there < 1:
        raise ConfigError(f"the benchmark needs more than {hard} file descriptors", hint="ulimit -Hn")
    # The coordinator inherits it.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return -(-agents // there)


def _show(screen: Screen, about: dict[str, str], control: Control) -> None:
    for name in ("processor", "memory", "software", "load"):
        screen.line(f"{screen.paint(name.ljust(12), 'head')}{about[name]}")
    screen.line()
    screen.line(screen.paint(control.title, "head"))
    marks = {True: "met", False: "not met", None: ""}
    cells = [(f"{row.what} [{row.unit}]", *row.texts(), marks[row.met]) for row in control.rows]
    style = {"met": "good", "not met": "bad"}
    screen.table(
        ("measure", "median", "p99", "times", "bar", ""),
        cells,
        right=("median", "p99", "times"),
        style=lambda number, column: style.get(cells[number][-1], "") if column == "" else "",
        indent="  ",
    )
    screen.line()
    for note in control.notes:
        screen.line(note)
