"""Which nodes a scheduler has given to the job, and which of them this is: what `ckptsvc run` need not be told.

`ckptsvc run` is started once per node, and its environment says how:

    Slurm    srun --ntasks-per-node=1       the step's node list, SLURM_NODEID
             the batch script, one node     the job's node list
    PBS      mpiexec --ppn 1 (PALS, MPICH, Open MPI)   its rank variables; names from $PBS_NODEFILE
             pbsdsh                          PBS_NODENUM; names from $PBS_NODEFILE
             the job script, one node        $PBS_NODEFILE

The file that PBS_NODEFILE names is on the first node of the job only; a job script for several nodes copies it to
where all can read it (deploy/pbs).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptsvc.errors import ConfigError, InvalidInput
from ckptsvc.launch.hostlist import MAX_HOSTS, MAX_TEXT, expand
from ckptsvc.launch.placement import Placement, checked_name, detect, number

FIRST_PORT, PORTS = 20000, 10000
"""Coordinators listen on one of these ports, chosen by the job's name: below the range of ephemeral ports."""

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's numbers for batch scripts, interactive shells and the like: no step that srun was asked for."""

_MPI = ("openmpi", "pals", "pmi")

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of one job, seen from one of them.

    Attributes:
        scheduler: "slurm" or "pbs".
        job: name of this incarnation of the job: of its step, its element in an array, its requeue.
        nodes: names of the nodes in the order of their ranks, each once.
        node_rank: number of this node: 0 <= node_rank < len(nodes).
    """

    scheduler: str
    job: str
    nodes: tuple[str, ...]
    node_rank: int

    @property
    def node(self) -> str:
        """Name of this node."""
        return self.nodes[self.node_rank]

    @property
    def port(self) -> int:
        """Where the coordinator on the first node listens; the same on all nodes, another one for another job."""
        return FIRST_PORT + zlib.crc32(self.job.encode()) % PORTS


def allocated(environ: Mapping[str, str], hostname: str, read: Callable[[str], str]) -> Allocation | None:
    """What the scheduler says, or None where this process is under neither Slurm nor PBS.

    Args:
        environ: the environment of `ckptsvc run`.
        hostname: the name of this machine.
        read: returns the text of the file that PBS_NODEFILE names, or raises OSError.

    Raises:
        ConfigError: variables are missing or contradict each other, or this process was not started once per node.
    """
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    if "SLURM_JOB_ID" in given:
        return _slurm(given, hostname)
    if "PBS_JOBID" in given:
        return _pbs(given, hostname, read)
    return None


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def _slurm(environ: Mapping[str, str], hostname: str) -> Allocation:
    step = environ.get("SLURM_STEP_ID", "")
    in_step = step.isdecimal() and int(step[:12]) < _FIRST_SPECIAL_STEP
    if not in_step:
        environ = {name: value for name, value in environ.items() if name != "SLURM_STEP_ID"}
    names, variable = _slurm_nodes(environ, in_step)
    place = _once_per_node(environ, hostname)
    # srun sets the variables of PMI, and on Slingshot machines those of PALS, for its own tasks.
    by_srun = in_step and place.rank == number(environ, ("SLURM_PROCID",))[0]
    if place.source in _MPI and not by_srun:
        names = _first(names, place.world_size, variable)
        node_rank = place.rank
    elif in_step:
        node_rank = _slurm_node_rank(environ, names)
    elif len(names) > 1:
        raise ConfigError(
            f"this is the one process of a batch script, but the job has {len(names)} nodes ({variable})",
            hint="start it once per node: srun --ntasks-per-node=1 ckptsvc run ..., or use --standalone",
        )
    else:
        node_rank = 0
    return Allocation("slurm", _slurm_job(environ, step if in_step else ""), names, node_rank)


def _slurm_nodes(environ: Mapping[str, str], in_step: bool) -> tuple[tuple[str, ...], str]:
    """Names of the nodes, and the variable that lists them."""
    lists = [("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES")] if in_step else []
    lists += [("SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"), ("SLURM_NODELIST", "SLURM_NNODES")]
    found = next((pair for pair in lists if pair[0] in environ), None)
    if found is None:
        raise ConfigError(
            "SLURM_JOB_ID is set, but SLURM_JOB_NODELIST is not",
            hint="run it in the environment that Slurm gives, or say --nnodes, --node-rank, --rdzv-id, --rdzv-endpoint",
        )
    variable, counter = found
    try:
        names = tuple(dict.fromkeys(expand(environ[variable])))
    except InvalidInput as error:
        raise ConfigError(f"{variable}: {error.what}", hint="unset it, or say --nnodes, --node-rank ...") from None
    count, _ = number(environ, (counter,))
    if count is not None and count != len(names):
        raise ConfigError(f"{variable} names {len(names)} nodes, but {counter} is {count}")
    return names, variable


def _slurm_node_rank(environ: Mapping[str, str], names: tuple[str, ...]) -> int:
    """By name where Slurm says ours, for the list's order is what the other nodes see too; else by number."""
    name = environ.get("SLURMD_NODENAME")
    if name in names:
        return names.index(name)
    node_rank, _ = number(environ, ("SLURM_NODEID",))
    if node_rank is None:
        raise ConfigError("SLURM_STEP_ID is set, but SLURM_NODEID is not", hint="say --node-rank")
    if node_rank >= len(names):
        raise ConfigError(f"SLURM_NODEID is {node_rank}, but the job has {len(names)} nodes")
    return node_rank


def _slurm_job(environ: Mapping[str, str], step: str) -> str:
    """A name that no other step, array element or requeue of the job has: what they left must not meet."""
    if "CKPTSVC_JOB" in environ:
        return checked_name(environ["CKPTSVC_JOB"], "CKPTSVC_JOB", "CKPTSVC_JOB")
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    requeues, _ = number(environ, ("SLURM_RESTART_COUNT",))
    job += f"r{requeues}" if requeues else ""
    return checked_name(f"{job}.{step}" if step else job, "SLURM_JOB_ID", "CKPTSVC_JOB")


# ---- PBS -------------------------------------------------------------------------------------------------------------


def _pbs(environ: Mapping[str, str], hostname: str, read: Callable[[str], str]) -> Allocation:
    names = _pbs_nodes(environ, read)
    place = _once_per_node(environ, hostname)
    node_number, _ = number(environ, ("PBS_NODENUM",))
    if place.source in _MPI:
        node_rank, names = place.rank, _first(names, place.world_size, "PBS_NODEFILE")
    elif len(names) == 1:
        node_rank = 0
    elif (found := _by_name(hostname, names)) is not None:
        node_rank = found
    elif node_number is not None and node_number < len(names):
        node_rank = node_number
    else:
        raise ConfigError(
            f"this host, {hostname}, is none of the {len(names)} that PBS_NODEFILE lists",
            hint="run it in the job, by mpiexec or pbsdsh, once per node; or say --node-rank",
        )
    job = environ.get("CKPTSVC_JOB", environ["PBS_JOBID"])
    return Allocation("pbs", checked_name(job, "PBS_JOBID", "CKPTSVC_JOB"), names, node_rank)


def _pbs_nodes(environ: Mapping[str, str], read: Callable[[str], str]) -> tuple[str, ...]:
    """The hosts, each once: the file has a line for every rank that MPI would start."""
    path = environ.get("PBS_NODEFILE")
    if path is None:
        raise ConfigError(
            "PBS_JOBID is set, but PBS_NODEFILE is not",
            hint="pass it on to the other nodes, or say --nnodes, --node-rank, --rdzv-id and --rdzv-endpoint",
        )
    try:
        text = read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"PBS_NODEFILE, {path}, cannot be read: {getattr(error, 'strerror', '') or error}",
            hint="PBS writes it on the job's first node only: copy it to a directory that all nodes see, and set "
            "PBS_NODEFILE to the copy (as deploy/pbs does)",
        ) from None
    names = tuple(dict.fromkeys(line.strip() for line in text[: MAX_TEXT + 1].splitlines() if line.strip()))
    wrong = next((name for name in names if _HOST.fullmatch(name) is None), None)
    if wrong is not None or not 0 < len(names) <= MAX_HOSTS or len(text) > MAX_TEXT:
        what = f"{wrong[:80]!r} in it is not a host" if wrong is not None else f"it lists {len(names)} hosts"
        raise ConfigError(f"PBS_NODEFILE, {path}, is no list of hosts: {what}")
    return names


def _by_name(hostname: str, names: tuple[str, ...]) -> int | None:
    """Where a host is in the list; one of the two may have its domain behind it."""
    if hostname in names:
        return names.index(hostname)
    short = hostname.partition(".")[0]
    found = [n for n, name in enumerate(names) if name.partition(".")[0] == short]
    return found[0] if len(found) == 1 else None


# ---- both ------------------------------------------------------------------------------------------------------------


def _once_per_node(environ: Mapping[str, str], hostname: str) -> Placement:
    """Where srun or mpiexec has put this process, if it was one of them, and only once on this node."""
    # RANK and the like are for the ranks, and nothing that starts `ckptsvc run` in a scheduler's job sets them.
    place = detect({name: value for name, value in environ.items() if name != "RANK"}, hostname)
    if place.local_size > 1:
        how = ("srun", "srun --ntasks-per-node=1") if place.source == "slurm" else ("mpiexec", "mpiexec --ppn 1")
        raise ConfigError(
            f"{how[0]} has started {place.local_size} processes on this node",
            hint=f"`ckptsvc run` is started once per node and starts the ranks itself: {how[1]}, and "
            f"--nproc-per-node {place.local_size}",
        )
    return place


def _first(names: tuple[str, ...], count: int, variable: str) -> tuple[str, ...]:
    if count > len(names):
        raise ConfigError(f"mpiexec has started {count} processes, but {variable} lists {len(names)} nodes")
    return names[:count]
