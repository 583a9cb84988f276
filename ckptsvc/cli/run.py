"""`ckptsvc run`: torchrun's flags, our agent."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from pathlib import Path

import click

from ckptsvc.agent.coordination import login_of
from ckptsvc.agent.launcher import Launch, Launcher
from ckptsvc.config import Settings, load, runtime_dir
from ckptsvc.errors import ConfigError
from ckptsvc.rpc.dial import is_alive
from ckptsvc.rpc.etcd import check_reachable, parse_url


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nnodes", default="1", metavar="N|MIN:MAX", help="Nodes of the job.")
@click.option("--nproc-per-node", "--nproc_per_node", "nproc", default="1", metavar="N|auto|gpu|cpu",
    help="Ranks on this node.")  # fmt: skip
@click.option("--node-rank", "--node_rank", type=int, default=-1, help="Position of this node; default: as they come.")
@click.option("--rdzv-id", "--rdzv_id", "job", help="Name of the job, the same on all nodes.")
@click.option("--rdzv-endpoint", "--rdzv_endpoint", "--coordinator", "coordinator", metavar="HOST:PORT",
    help="Where the coordinator listens: the agent of node rank 0.")  # fmt: skip
@click.option("--coordination", metavar="etcd://HOST:PORT,...",
    help="Elect the coordinator there, instead of --rdzv-endpoint.")  # fmt: skip
@click.option("--max-restarts", "--max_restarts", type=click.IntRange(0), default=3, show_default=True)
@click.option("--standalone", is_flag=True, help="One node, nothing to agree with others.")
@click.option("--node", help="Name of this node; default: its host name.")
@click.option("--address", default="", help="Where other nodes reach this one; default: by the host name.")
@click.option("--log-dir", "--log_dir", type=click.Path(path_type=Path), help="Keep each rank's output here.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.option("--no-python", "--no_python", is_flag=True, help="SCRIPT is a program, not Python.")
@click.option("--stop-grace", type=float, default=60.0, show_default=True,
    help="Seconds for a last save after SIGTERM.")  # fmt: skip
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    nnodes: str, nproc: str, node_rank: int, job: str | None, coordinator: str | None,
    coordination: str | None, max_restarts: int, standalone: bool, node: str | None, address: str,
    log_dir: Path | None, module: bool, no_python: bool, stop_grace: float, script: str, arguments: tuple[str, ...],
) -> int:  # fmt: skip
    """Start the ranks of a job on this node, and restart them when one dies.

    Run it once on every node, by hand, ssh, srun or mpiexec, where you would run torchrun.
    """
    low, high = _nodes(nnodes)
    if standalone and high > 1:
        raise ConfigError("--standalone means one node", hint="drop it, or --nnodes")
    if coordinator and coordination:
        raise ConfigError("--rdzv-endpoint and --coordination exclude each other")
    settings = load(os.environ, {"agent.coordination": coordination})
    elected = _elected(settings) if high > 1 and not coordinator else ""
    if high > 1 and (not (coordinator or elected) or not job):
        raise ConfigError(
            "a job of several nodes needs --rdzv-id NAME, and --rdzv-endpoint HOST:PORT or --coordination"
        )
    name = node or settings.agent.name or socket.gethostname()
    directory = Path(settings.agent.socket_dir) if settings.agent.socket_dir else runtime_dir(os.environ)
    if node:
        directory = directory / f"node-{node}"
    leads = high == 1 or node_rank == 0
    agent = ["--name", name]
    if not is_alive(directory):
        agent += ["--linger", "30s"]  # an agent that we start is ours: it goes when it is done
        if leads and coordinator:
            agent += ["--listen", coordinator]
        if elected:
            agent += ["--coordination", elected]
    launch = Launch(
        command=_command(script, arguments, module, no_python),
        job=job or f"run-{os.getpid()}-{secrets.token_hex(3)}",
        node=name,
        node_rank=node_rank if high > 1 else 0,
        min_nodes=low,
        max_nodes=high,
        nproc=_nproc(nproc),
        max_restarts=max_restarts,
        address=address or ("127.0.0.1" if high == 1 or _is_loopback(coordinator) else socket.gethostname()),
        coordinator=elected or ("" if leads else coordinator or ""),
        directory=directory,
        agent_arguments=agent,
        log_dir=log_dir,
        stop_grace=stop_grace,
    )
    return asyncio.run(Launcher(launch, os.environ).run())


def _elected(settings: Settings) -> str:
    """Where the job's coordinator is elected, "" if it is not; fails now if nobody answers there."""
    if not settings.agent.coordination:
        return ""
    url = parse_url(settings.agent.coordination)
    asyncio.run(check_reachable(url, login_of(url, settings.etcd)))
    return str(url)


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise ConfigError(f"--nnodes {text!r} is not a number", hint="for example 4, or 2:4") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"--nnodes {text} is impossible")
    return bounds


def _nproc(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text in ("auto", "gpu"):
        devices = [d for d in os.listdir("/dev") if d.startswith("nvidia") and d[6:].isdecimal()]
        if devices:
            return len(devices)
        if text == "gpu":
            raise ConfigError("--nproc-per-node gpu: this node has no GPU")
    if text in ("auto", "cpu"):
        return os.cpu_count() or 1
    raise ConfigError(f"--nproc-per-node {text!r} is not a number, auto, gpu or cpu")


def _command(script: str, arguments: tuple[str, ...], module: bool, no_python: bool) -> list[str]:
    if no_python:
        return [script, *arguments]
    return [sys.executable, "-u", *(["-m"] if module else []), script, *arguments]


def _is_loopback(coordinator: str | None) -> bool:
    host = (coordinator or "").rpartition(":")[0]
    return host.startswith("127.") or host in ("localhost", "[::1]")
