"""What `ckptsvc run` was not told about the job's nodes, taken from the scheduler; what it was told wins."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ckptsvc.errors import ConfigError
from ckptsvc.launch.allocation import Allocation, allocated
from ckptsvc.launch.hostlist import MAX_TEXT
from ckptsvc.rpc.secret import is_loopback

SCONTROL_TIMEOUT = 10.0
"""Seconds to wait for Slurm to say where a node is whose name nobody else knows."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The job's nodes and this one among them.

    Attributes:
        low, high: how many nodes the job starts with; both 0 where nothing was said.
        node_rank: position of this node; -1: nothing was said.
        job: name of the job, the same on all nodes; "": nothing was said.
        coordinator: HOST:PORT of the coordinator; "": nothing was said.
        node: name of this node where it is not its host's; "": it is.
        address: where other nodes reach this one; "": nothing was said.
        folder: of this node's agent, in the directory of the user's agents; "": that directory itself.
    """

    low: int = 0
    high: int = 0
    node_rank: int = -1
    job: str = ""
    coordinator: str = ""
    node: str = ""
    address: str = ""
    folder: str = ""


def placed(given: Nodes, environ: Mapping[str, str], hostname: str) -> Nodes:
    """Fill in what the flags leave open.

    Raises:
        ConfigError: something is missing that nobody says, or the scheduler's variables contradict each other.
    """
    complete = given.high == 1 or (given.high > 1 and given.job and given.coordinator and given.node_rank >= 0)
    found = None if complete else allocated(environ, hostname, _text)
    low, high = (given.low, given.high) if given.high else (len(found.nodes),) * 2 if found else (1, 1)
    folder = f"node-{given.node}" if given.node else ""
    if high == 1:
        job = given.job or f"{found.job if found else 'run'}-{os.getpid()}-{secrets.token_hex(3)}"
        return Nodes(1, 1, 0, job, given.coordinator, given.node, given.address or "127.0.0.1", folder)
    if found is None:
        if not (given.coordinator and given.job):
            raise ConfigError("a job of several nodes needs --rdzv-endpoint HOST:PORT and --rdzv-id NAME")
        address = given.address or ("127.0.0.1" if _points_here(given.coordinator) else hostname)
        return Nodes(low, high, given.node_rank, given.job, given.coordinator, given.node, address, folder)
    return _from_scheduler(given, Nodes(low, high), found, hostname)


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read(MAX_TEXT + 1)


def _from_scheduler(given: Nodes, counts: Nodes, found: Allocation, hostname: str) -> Nodes:
    here = on_one_host(found)
    job = given.job or found.job
    coordinator = given.coordinator or f"{'127.0.0.1' if here else found.nodes[0]}:{found.port}"
    node = given.node or ("" if _same_host(found.node, hostname) else found.node)
    return Nodes(
        counts.low,
        counts.high,
        given.node_rank if given.node_rank >= 0 else found.node_rank,
        job,
        coordinator,
        node,
        given.address or ("127.0.0.1" if here or _points_here(coordinator) else found.node),
        f"node-{node}" if node else "",
    )


def on_one_host(allocation: Allocation) -> bool:
    """Whether all nodes are this very host, under several names (`slurmd -N`); the first one that is not, decides."""
    return all(_is_here(_address_of(name, allocation.scheduler)) for name in allocation.nodes)


def _address_of(name: str, scheduler: str) -> str:
    """The IP address of a node; "" if nobody knows it."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return _slurm_address(name) if scheduler == "slurm" else ""
    return str(found[0][4][0])


def _slurm_address(name: str) -> str:
    """What Slurm has as the node's address: its name may be Slurm's alone."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", "--oneliner", "--", name],
            capture_output=True,
            text=True,
            timeout=SCONTROL_TIMEOUT,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    address = next((word[9:] for word in shown.split() if word.startswith("NodeAddr=")), "")
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return "" if address in ("", name) else _address_of(address, "")


def _is_here(address: str) -> bool:
    """Whether an address is one of this host's."""
    if not address:
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _same_host(node: str, hostname: str) -> bool:
    return node.partition(".")[0] == hostname.partition(".")[0]


def _points_here(coordinator: str) -> bool:
    return is_loopback(coordinator.rpartition(":")[0].strip("[]"))


def parse_nodes(text: str | None) -> tuple[int, int]:
    """The bounds in "N" or "MIN:MAX"; (0, 0) for None.

    Raises:
        ConfigError: neither, or impossible.
    """
    if text is None:
        return 0, 0
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise ConfigError(f"--nnodes {text!r} is not a number", hint="for example 4, or 2:4") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"--nnodes {text} is impossible")
    return bounds
