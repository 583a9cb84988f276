"""`ckptsvc run`: torchrun's flags, our agent."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import xxhash

from ckptsvc.agent.coordination.elections import reachable
from ckptsvc.agent.launcher.launcher import Launch, Launcher
from ckptsvc.agent.launcher.standby import Standby, place_of, reason_against
from ckptsvc.cli import torchrun_flags
from ckptsvc.cli.devices import ranks_of
from ckptsvc.cli.placing import Nodes, parse_nodes, placed
from ckptsvc.cli.torchrun_flags import refuse_unknown
from ckptsvc.config import agents_directory, load
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address, parse_address
from ckptsvc.rpc.dial import address_of, agent_arguments, agents_home, is_alive
from ckptsvc.rpc.secret import is_loopback, require_loopback
from ckptsvc.settings import LaunchSettings, Settings
from ckptsvc.telemetry import start_logging


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@torchrun_flags.accepted
@click.option("--nnodes", envvar="PET_NNODES", metavar="N|MIN:MAX",
    help="Nodes of the job; default: those that Slurm or PBS gave, or 1. Others are spares.")  # fmt: skip
@click.option("--nproc-per-node", "--nproc_per_node", "nproc", envvar="PET_NPROC_PER_NODE", default="1",
    metavar="N|auto|gpu|xpu|cpu", help="Ranks on this node.")  # fmt: skip
@click.option("--node-rank", "--node_rank", envvar="PET_NODE_RANK", type=int, default=-1,
    help="Position of this node; default: as they come.")  # fmt: skip
@click.option("--rdzv-id", "--rdzv_id", "job", envvar="PET_RDZV_ID", help="Name of the job, the same on all nodes.")
@click.option("--rdzv-endpoint", "--rdzv_endpoint", "--coordinator", "coordinator", envvar="PET_RDZV_ENDPOINT",
    metavar="HOST:PORT", help="Where the coordinator listens: the agent of node rank 0.")  # fmt: skip
@click.option("--master-addr", "--master_addr", envvar="PET_MASTER_ADDR", metavar="HOST",
    help="With --master-port: as --rdzv-endpoint HOST:PORT.")  # fmt: skip
@click.option("--master-port", "--master_port", envvar="PET_MASTER_PORT", type=int, default=29500, metavar="PORT",
    hidden=True)  # fmt: skip
@click.option("--coordination", metavar="etcd://HOST:PORT,...",
    help="Elect the coordinator there, instead of --rdzv-endpoint.")  # fmt: skip
@click.option("--max-restarts", "--max_restarts", envvar="PET_MAX_RESTARTS", type=click.IntRange(0), default=3,
    show_default=True)  # fmt: skip
@click.option("--standalone", is_flag=True, help="One node, nothing to agree with others.")
@click.option("--node", help="Name of this node; default: its host name.")
@click.option("--address", "--local-addr", "--local_addr", "address", default="",
    help="Where other nodes reach this one; default: by the host name.")  # fmt: skip
@click.option("--log-dir", "--log_dir", type=click.Path(path_type=Path), help="Keep each rank's output here.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.option("--no-python", "--no_python", is_flag=True, help="SCRIPT is a program, not Python.")
@click.option("--run-path", "--run_path", is_flag=True, hidden=True)  # SCRIPT has an interpreter of its own in any case
@click.option("--virtual-local-rank", "--virtual_local_rank", is_flag=True,
    help="Show each rank its own GPU only; LOCAL_RANK is always 0.")  # fmt: skip
@click.option("--standby/--no-standby", default=None,
    help="Fork ranks from a warm interpreter that has torch imported; default: yes, for Python.")  # fmt: skip
@click.option("--preload", metavar="MODULE,...", help="What the warm interpreter imports.")
@click.option("--preflight/--no-preflight", default=None, help="Check this node before it takes part; default: yes.")
@click.option("--crash-loop", "--crash_loop", type=click.IntRange(0), metavar="N",
    help="Failed attempts in a row without progress that end the job; 0: never; default 3.")  # fmt: skip
@click.option("--grow", metavar="TIME|off",
    help="How long a job on too few nodes waits for a checkpoint when one has come; default 10m.")  # fmt: skip
@click.option("--max-write-rate", "--max_write_rate", metavar="SIZE/s|off",
    help="What a node may write to the store, where this job starts its agent; default: no limit.")  # fmt: skip
@click.option("--stop-grace", type=float, default=60.0, show_default=True,
    help="Seconds for a last save after SIGTERM; a second SIGTERM ends at once.")  # fmt: skip
@click.option("--status-file", type=click.Path(path_type=Path),
    help="Append exit status and name of this node here at the end, for a job script behind srun.")  # fmt: skip
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    nnodes: str | None, nproc: str, node_rank: int, job: str | None, coordinator: str | None,
    master_addr: str | None, master_port: int, coordination: str | None, max_restarts: int, standalone: bool,
    node: str | None, address: str, log_dir: Path | None, module: bool, no_python: bool, run_path: bool,
    virtual_local_rank: bool, standby: bool | None, preload: str | None, preflight: bool | None, crash_loop: int | None,
    grow: str | None, max_write_rate: str | None, stop_grace: float, status_file: Path | None, script: str,
    arguments: tuple[str, ...],
) -> int:  # fmt: skip
    """Start the ranks of a job on this node, and restart them when one dies.

    Run it once on every node, by hand, ssh, srun or mpiexec, where you would run torchrun. Under Slurm and PBS it
    finds out by itself which nodes the job has.
    """
    refuse_unknown(script)
    no_python = no_python and not run_path
    low, high = _bounds(nnodes, standalone)
    if high > 1 and master_addr and not (coordinator or coordination):
        coordinator = f"{master_addr}:{master_port}"
    if coordinator and coordination:
        raise ConfigError("--rdzv-endpoint and --coordination exclude each other")
    flags = {"standby": standby, "preload": preload, "preflight": preflight, "crash_loop": crash_loop, "grow": grow}
    given = {"agent.coordination": coordination, "store.max_write_rate": max_write_rate}
    settings = load(os.environ, given | {f"launch.{key}": value for key, value in flags.items()})
    etcd = "" if coordinator else settings.agent.coordination
    wanted = Nodes(low, high, node_rank, job or "", coordinator or etcd, node or "", address)
    nodes = placed(wanted, os.environ, socket.gethostname())
    elected = reachable(etcd, settings.etcd) if etcd and nodes.high > 1 else ""
    nodes = dataclasses.replace(nodes, coordinator="" if etcd else nodes.coordinator)
    name = nodes.node or settings.agent.name or socket.gethostname()
    leads = nodes.high == 1 or (nodes.node_rank == 0 and not elected)
    directory = _agent_directory(agents_home(agents_directory(settings, os.environ), settings), nodes, leads)
    if nodes.coordinator and not settings.tls.is_set:
        require_loopback(parse_address(nodes.coordinator).host, f"the coordinator's address is {nodes.coordinator}")
    launch = Launch(
        command=_command(script, arguments, module, no_python),
        job=nodes.job,
        node=name,
        node_rank=nodes.node_rank,
        min_nodes=nodes.low,
        max_nodes=nodes.high,
        nproc=ranks_of(nproc, os.environ),
        max_restarts=max_restarts,
        address=nodes.address,
        coordinator=elected or ("" if leads else nodes.coordinator),
        directory=directory,
        agent_arguments=agent_arguments(
            name, _listen(settings, nodes, leads, elected), elected, settings.store.max_write_rate
        ),
        log_dir=log_dir,
        preflight=(settings.arena.dir, _written_to(settings, log_dir)) if settings.launch.preflight else None,
        crash_loop=settings.launch.crash_loop,
        grow=settings.launch.grow,
        warm=None if no_python else _warm(settings.launch, script, module),
        stop_grace=stop_grace,
        virtual_local_rank=virtual_local_rank,
        json_log=settings.log.format == "json",
    )
    return _run(launch, status_file)


def _run(launch: Launch, status_file: Path | None) -> int:
    if launch.json_log:
        start_logging("json", job=launch.job, node=launch.node)
    status = asyncio.run(Launcher(launch, os.environ).run())
    if status_file is not None:
        _note(status_file, f"{status} {launch.node}\n")
    return status


def _listen(settings: Settings, nodes: Nodes, leads: bool, elected: str) -> str:
    """Where the agents of other nodes can reach the one that this job starts; "": as it is set.

    They do that where it leads, may be elected, or keeps copies.
    """
    if leads and not elected:
        return nodes.coordinator
    is_set = settings.origin["agent.listen"] != "default"
    reachable = settings.tls.is_set or is_loopback(nodes.address)
    return str(Address(nodes.address, 0)) if nodes.high > 1 and reachable and not is_set else ""


def _bounds(nnodes: str | None, standalone: bool) -> tuple[int, int]:
    low, high = parse_nodes("1" if standalone and nnodes is None else nnodes)
    if standalone and high > 1:
        raise ConfigError("--standalone means one node", hint="drop it, or --nnodes")
    return low, high


def _agent_directory(base: Path, nodes: Nodes, leads: bool) -> Path:
    """The node's own, so that what a killed agent has left in memory is found by the next one.

    The agent that leads must listen where the others look for it: if the one that is there, perhaps of a job that has
    just ended, listens elsewhere, the job gets another one.
    """
    directory = base / nodes.folder
    if leads and nodes.coordinator and is_alive(directory) and address_of(directory) != nodes.coordinator:
        return directory / f"job-{xxhash.xxh3_64_hexdigest(nodes.job.encode())}"
    return directory


def _note(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        print(f"ckptsvc run: {path} cannot be written: {error.strerror}", file=sys.stderr)


def _command(script: str, arguments: tuple[str, ...], module: bool, no_python: bool) -> list[str]:
    if no_python:
        return [script, *arguments]
    return [sys.executable, "-u", *(["-m"] if module else []), script, *arguments]


def _written_to(settings: Settings, log_dir: Path | None) -> list[str]:
    """Directories that a job writes to on this node, as far as they are known and there."""
    found = [tempfile.gettempdir()]
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        found.append(str(log_dir))
    store = settings.store.url.removeprefix("file://")
    if store.startswith("/"):
        found.append(str(next(folder for folder in (Path(store), *Path(store).parents) if folder.is_dir())))
    return found


def _warm(settings: LaunchSettings, script: str, module: bool) -> dict[str, Any] | None:
    """What a warm interpreter is told; None where there is to be none."""
    if not settings.standby or not settings.preload:
        return None
    file, first = place_of(script, module=module)
    why = reason_against(file)
    if why:
        click.echo(f"ckptsvc run: no standby: {why}", err=True)
        return None
    return Standby(settings.preload, settings.standby_memory).spec(first)
