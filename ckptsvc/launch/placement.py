"""Where does this process stand in its job? A launcher's environment -> one frozen `Placement`.

`_LAUNCHERS` is the table: which launcher sets which variables. The first row that started this process
wins: the innermost launcher, for `mpirun` and `torchrun` themselves run under a Slurm step whose numbers
are those of their own daemons. What the winner does not say (a job script that exports only
RANK=$SLURM_PROCID and WORLD_SIZE) is taken from a later row, if that row counts the same rank of the same
world. No row: rank 0 of 1.

`ckptsvc run` and DeepSpeed's launcher set torchrun's variables for their ranks; Kubernetes' training
operators set RANK and WORLD_SIZE alone and start one rank a pod.

CKPTSVC_JOB, CKPTSVC_ATTEMPT and CKPTSVC_NODE, which `ckptsvc run` sets, win over what a launcher says. An
empty variable is as good as none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptsvc.errors import ConfigError

LOCAL_JOB = "local"
"""The job id where neither a scheduler nor a person gave one."""

RESTARTS_PER_REQUEUE = 1000
"""attempt = requeues x this + restarts: torchrun counts its restarts from 0 again after a requeue."""

_JOB_VARIABLES = ("CKPTSVC_JOB", "SLURM_JOB_ID", "PBS_JOBID", "PALS_APID", "TORCHELASTIC_RUN_ID")
_NODE_VARIABLES = ("CKPTSVC_NODE", "SLURMD_NODENAME")
_DEADLINE_VARIABLES = ("CKPTSVC_DEADLINE", "SLURM_JOB_END_TIME")  # PBS sets none: its job script does (deploy/pbs)
# Job and node names become parts of file names and metric labels; PBS calls an array job "12[3].host".
_NAME = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:@+=\[\]-]{0,127}")
_NUMBER = re.compile(r"[0-9]{1,9}")
_TASKS_PER_NODE = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one process stands in its job.

    Attributes:
        job: id of the job, the same for all its ranks and all its attempts.
        attempt: number of this incarnation of the job's ranks; grows with every restart.
        rank: 0 <= rank < world_size.
        world_size: number of ranks of the job.
        local_rank: number of this rank on its node. Never name anything after it alone: in torchrun's
            virtual-local-rank mode every rank reads 0.
        local_size: number of ranks on this node.
        node: name of the node, as its scheduler calls it.
        node_rank: number of the node in the job; rank // local_size where no launcher says it.
        deadline: when the scheduler will end the job, in unix seconds, or None where that is not known.
        source: who said so: "torchrun", "openmpi", "pals", "pmi", "slurm" or "plain".
    """

    job: str
    attempt: int
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: str
    node_rank: int
    deadline: float | None
    source: str


class _Launcher(NamedTuple):
    """The variables of one launcher; of several for one number the first that is set counts.

    Attributes:
        started: the variable whose presence says that this launcher started this very process.
    """

    source: str
    started: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    node_rank: tuple[str, ...]


_LAUNCHERS = (
    _Launcher(
        source="torchrun",
        started="RANK",
        rank=("RANK",),
        world_size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),  # the second of each is DeepSpeed's name for it
        node_rank=("GROUP_RANK", "CROSS_RANK"),
    ),
    _Launcher(
        source="openmpi",
        started="OMPI_COMM_WORLD_RANK",
        rank=("OMPI_COMM_WORLD_RANK",),
        world_size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        node_rank=(),  # OMPI_COMM_WORLD_NODE_RANK is the number of a rank on its node, not of the node
    ),
    _Launcher(
        source="pals",
        started="PALS_RANKID",
        rank=("PALS_RANKID",),
        world_size=("PALS_SIZE", "PMI_SIZE"),
        local_rank=("PALS_LOCAL_RANKID",),
        local_size=("PALS_LOCAL_SIZE",),
        node_rank=("PALS_NODEID",),
    ),
    _Launcher(
        source="pmi",
        started="PMI_RANK",
        rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("PMI_LOCAL_RANK", "MPI_LOCALRANKID"),  # the second of each is MPICH's and Intel MPI's
        local_size=("PMI_LOCAL_SIZE", "MPI_LOCALNRANKS"),
        node_rank=(),
    ),
    _Launcher(
        source="slurm",
        # A batch script has SLURM_PROCID=0 and SLURM_NTASKS=n too, but is one process and not rank 0 of n.
        started="SLURM_STEP_ID",
        rank=("SLURM_PROCID",),
        world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank=("SLURM_LOCALID",),
        local_size=("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
        node_rank=("SLURM_NODEID",),
    ),
)


def detect(environ: Mapping[str, str], hostname: str) -> Placement:
    """Find the place of this process in its job. Pure: all it knows is what it is given.

    Args:
        environ: the environment of the process.
        hostname: the name of this machine, used as the node's name where nothing else names it.

    Raises:
        ConfigError: a variable is not a number, two contradict each other, or one that must go with another
            is missing; the message names the variables.
    """
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    launchers = [row for row in _LAUNCHERS if row.started in given]
    if launchers:
        rank, world_size = _ranks(given, launchers[0])
        agreeing = [row for row in launchers if _agrees(given, row, rank, world_size)]
        local_rank, local_size, node_rank = _local_ranks(given, agreeing, world_size)
    else:
        rank, world_size, local_rank, local_size, node_rank = 0, 1, 0, 1, 0
    return Placement(
        job=_job(given),
        attempt=_attempt(given),
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        node=_node(given, hostname),
        node_rank=rank // local_size if node_rank is None else node_rank,
        deadline=_deadline(given),
        source=launchers[0].source if launchers else "plain",
    )


def _ranks(environ: Mapping[str, str], launcher: _Launcher) -> tuple[int, int]:
    """Rank and world size, checked."""
    rank, rank_variable = number(environ, launcher.rank)
    world_size, size_variable = number(environ, launcher.world_size)
    if rank is None or world_size is None:
        missing = launcher.rank if rank is None else launcher.world_size
        raise ConfigError(
            f"{launcher.started} is set, but {' or '.join(missing)} is not",
            hint=f"set both to run as one rank of several, or unset {launcher.started} to run alone",
        )
    if rank >= world_size:
        raise ConfigError(f"{rank_variable} is {rank}, but the world size ({size_variable}) is {world_size}")
    return rank, world_size


def _agrees(environ: Mapping[str, str], launcher: _Launcher, rank: int, world_size: int) -> bool:
    its_rank, _ = number(environ, launcher.rank)
    its_world_size, _ = number(environ, launcher.world_size)
    return (its_rank, its_world_size) == (rank, world_size)


def _local_ranks(
    environ: Mapping[str, str], launchers: Sequence[_Launcher], world_size: int
) -> tuple[int, int, int | None]:
    """Local rank, local size and the node's number (None where nobody says it), checked."""
    node_rank, _ = number(environ, [name for row in launchers for name in row.node_rank])
    local_rank, rank_variable = number(environ, [name for row in launchers for name in row.local_rank])
    size_variables = [name for row in launchers for name in row.local_size]
    size_variable = next((name for name in size_variables if name in environ), "")
    if local_rank is None and not size_variable:
        return 0, 1, node_rank
    if local_rank is None or not size_variable:
        there = rank_variable or size_variable
        missing = launchers[0].local_size if rank_variable else launchers[0].local_rank
        raise ConfigError(
            f"{there} is set, but {' or '.join(missing)} is not",
            hint=f"set {missing[0]} too, or unset {there} to run one rank a node",
        )
    local_size = _tasks_on_node(size_variable, environ[size_variable], node_rank or 0)
    if local_rank >= local_size:
        raise ConfigError(f"{rank_variable} is {local_rank}, but {size_variable} says {local_size} ranks on the node")
    if local_size > world_size:
        raise ConfigError(f"{size_variable} says {local_size} ranks on the node, but the world size is {world_size}")
    return local_rank, local_size, node_rank


def number(environ: Mapping[str, str], variables: Sequence[str]) -> tuple[int | None, str]:
    """The number in the first of `variables` that is set, and that variable's name; (None, "") if none is.

    Raises:
        ConfigError: it is not a number.
    """
    for name in variables:
        if name in environ:
            if _NUMBER.fullmatch(environ[name]) is None:
                raise ConfigError(f"{name} is {environ[name]!r}, which is not a number 0, 1, 2, ...")
            return int(environ[name]), name
    return None, ""


def _tasks_on_node(variable: str, text: str, node_rank: int) -> int:
    """Ranks on one node, from a number that holds for every node or from Slurm's list, "2(x3),1"."""
    if _NUMBER.fullmatch(text):
        return int(text)
    nodes = 0
    for group in text.split(","):
        match = _TASKS_PER_NODE.fullmatch(group)
        if match is None:
            raise ConfigError(f'{variable} is {text!r}, which is neither a number nor a list like "2(x3),1"')
        nodes += int(match[2] or 1)
        if node_rank < nodes:
            return int(match[1])
    raise ConfigError(f"{variable} is {text!r}, which says nothing about node {node_rank} of the job")


def _job(environ: Mapping[str, str]) -> str:
    for name in _JOB_VARIABLES:
        # torchrun says "none" where no rendezvous id was given
        if name in environ and (name, environ[name]) != ("TORCHELASTIC_RUN_ID", "none"):
            return checked_name(environ[name], name, "CKPTSVC_JOB")
    return LOCAL_JOB


def _node(environ: Mapping[str, str], hostname: str) -> str:
    for name in _NODE_VARIABLES:
        if name in environ:
            return checked_name(environ[name], name, "CKPTSVC_NODE")
    return checked_name(hostname, "the host's name", "CKPTSVC_NODE")


def checked_name(value: str, source: str, variable: str) -> str:
    """The name of a job or a node, if it can be part of a file name; `source` says where it is from.

    Raises:
        ConfigError: it cannot; the hint names the `variable` that gives another one.
    """
    if _NAME.fullmatch(value) is None:
        raise ConfigError(
            f"{source} is {value!r}, which cannot be part of a file name",
            hint=f"set {variable} to 1 to 128 letters, digits and any of _.:@+=-",
        )
    return value


def _attempt(environ: Mapping[str, str]) -> int:
    attempt, _ = number(environ, ("CKPTSVC_ATTEMPT",))
    if attempt is not None:
        return attempt
    requeues, _ = number(environ, ("SLURM_RESTART_COUNT",))
    restarts, _ = number(environ, ("TORCHELASTIC_RESTART_COUNT",))
    if restarts is None:
        return requeues or 0
    return (requeues or 0) * RESTARTS_PER_REQUEUE + restarts


def _deadline(environ: Mapping[str, str]) -> float | None:
    variable = next((name for name in _DEADLINE_VARIABLES if name in environ), None)
    if variable is None:
        return None
    try:
        deadline = float(environ[variable])
    except ValueError:
        deadline = math.nan
    if not (math.isfinite(deadline) and deadline > 0):
        raise ConfigError(f"{variable} is {environ[variable]!r}, which is not a time in unix seconds")
    return deadline
