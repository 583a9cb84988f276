"""Each launcher's environment, as it really is, and what must be refused."""

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import ConfigError
from ckptsvc.launch import Placement, detect

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "ROLE_RANK": "5",
    "ROLE_NAME": "default",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "run7",
}

# Recorded from Slurm 22.05.8: `sbatch -N3 -n5`, in the batch script and in rank 3 of `srun -N3 -n5` in it.
SLURM_BATCH = {
    "SLURMD_NODENAME": "n1",
    "SLURM_GTIDS": "0",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
SLURM_STEP = {
    "SLURMD_NODENAME": "n2",
    "SLURM_GTIDS": "2,3",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_NPROCS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
PALS = {
    "PBS_JOBID": "12345.aurora-pbs-0001",
    "PALS_APID": "3f0b",
    "PALS_RANKID": "13",
    "PALS_LOCAL_RANKID": "1",
    "PALS_LOCAL_SIZE": "12",
    "PALS_NODEID": "1",
    "PMI_RANK": "13",
    "PMI_SIZE": "24",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}


def place(environ: dict[str, str]) -> Placement:
    return detect(environ, "host")


def test_plain_is_one_rank_alone() -> None:
    assert place({"HOME": "/root"}) == Placement("local", 0, 0, 1, 0, 1, "host", 0, None, "plain")


def test_torchrun() -> None:
    assert place(TORCHRUN) == Placement("run7", 2, 5, 8, 1, 4, "host", 1, None, "torchrun")


def test_torchrun_without_a_rendezvous_id_is_the_local_job() -> None:
    assert place(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}).job == "local"


def test_torchrun_with_virtual_local_ranks() -> None:
    assert place(TORCHRUN | {"LOCAL_RANK": "0"}).local_rank == 0


def test_deepspeed_names_of_the_local_size_and_the_node() -> None:
    environ = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1"}
    placement = place(environ)
    assert (placement.local_size, placement.node_rank) == (4, 1)


def test_kubernetes_operators_start_one_rank_a_pod() -> None:
    assert place({"RANK": "2", "WORLD_SIZE": "4"}) == Placement("local", 0, 2, 4, 0, 1, "host", 2, None, "torchrun")


def test_slurm_step() -> None:
    assert place(SLURM_STEP) == Placement("1", 0, 3, 5, 1, 2, "n2", 1, None, "slurm")


def test_slurm_step_reads_the_ranks_of_its_own_node() -> None:
    last = SLURM_STEP | {"SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}
    assert place(last).local_size == 1


def test_slurm_batch_script_is_one_process_and_not_rank_0_of_5() -> None:
    assert place(SLURM_BATCH) == Placement("1", 0, 0, 1, 0, 1, "n1", 0, None, "plain")


def test_torchrun_under_slurm_counts_its_own_ranks_and_takes_the_rest_from_slurm() -> None:
    environ = SLURM_STEP | TORCHRUN | {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_END_TIME": "1790000000"}
    assert place(environ) == Placement("1", 1002, 5, 8, 1, 4, "n2", 1, 1790000000.0, "torchrun")


def test_attempts_grow_over_requeues_and_restarts() -> None:
    def attempt(requeues: int, restarts: int) -> int:
        counts = {"SLURM_RESTART_COUNT": str(requeues), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        return place(SLURM_STEP | TORCHRUN | counts).attempt

    attempts = [attempt(requeues, restarts) for requeues in range(3) for restarts in (0, 1, 99)]
    assert attempts == sorted(set(attempts))
    assert place(SLURM_STEP | {"SLURM_RESTART_COUNT": "4"}).attempt == 4


def test_a_script_that_exports_only_rank_and_world_size_keeps_slurms_node() -> None:
    placement = place(SLURM_STEP | {"RANK": "3", "WORLD_SIZE": "5"})
    assert (placement.local_rank, placement.local_size, placement.node_rank) == (1, 2, 1)


def test_numbers_of_a_launcher_that_counts_other_ranks_are_not_mixed_in() -> None:
    placement = place(SLURM_STEP | {"RANK": "3", "WORLD_SIZE": "16"})
    assert (placement.local_rank, placement.local_size, placement.node_rank) == (0, 1, 3)


def test_pals_on_aurora() -> None:
    assert place(PALS) == Placement("12345.aurora-pbs-0001", 0, 13, 24, 1, 12, "host", 1, None, "pals")


def test_open_mpi_node_is_computed() -> None:
    assert place(OPEN_MPI) == Placement("local", 0, 3, 4, 1, 2, "host", 1, None, "openmpi")


def test_open_mpi_under_slurm_is_not_the_step_of_its_daemons() -> None:
    placement = place(SLURM_STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI)
    assert (placement.source, placement.rank, placement.world_size, placement.job) == ("openmpi", 3, 4, "1")


@pytest.mark.parametrize("local", [("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")])
def test_pmi(local: tuple[str, str]) -> None:
    environ = {"PMI_RANK": "5", "PMI_SIZE": "6", local[0]: "2", local[1]: "3"}
    assert place(environ) == Placement("local", 0, 5, 6, 2, 3, "host", 1, None, "pmi")


def test_what_ckptsvc_run_sets_wins() -> None:
    ours = {"CKPTSVC_JOB": "job1", "CKPTSVC_ATTEMPT": "9", "CKPTSVC_NODE": "nodeB"}
    placement = place(SLURM_STEP | TORCHRUN | {"SLURM_RESTART_COUNT": "1"} | ours)
    assert (placement.job, placement.attempt, placement.node) == ("job1", 9, "nodeB")


def test_an_empty_variable_is_none_at_all() -> None:
    assert place({"RANK": "", "CKPTSVC_JOB": " "}).source == "plain"


def test_a_placement_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        place({}).rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"RANK": "0"}, ["RANK", "WORLD_SIZE"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK", "WORLD_SIZE", "4"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["RANK", "WORLD_SIZE"]),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, ["RANK", "'-1'"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, ["RANK", "'one'"]),
        ({"RANK": "1.0", "WORLD_SIZE": "4"}, ["RANK", "'1.0'"]),
        ({"RANK": "²", "WORLD_SIZE": "4"}, ["RANK", "'²'"]),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "4"}, ["RANK"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE", "8"]),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
        ({"PALS_RANKID": "1"}, ["PALS_RANKID", "PMI_SIZE"]),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, ["SLURM_STEP_TASKS_PER_NODE"]),
        (SLURM_STEP | {"SLURM_NODEID": "7"}, ["SLURM_STEP_TASKS_PER_NODE", "7"]),
        (SLURM_STEP | {"SLURM_JOB_END_TIME": "tomorrow"}, ["SLURM_JOB_END_TIME", "tomorrow"]),
        (SLURM_STEP | {"SLURM_JOB_END_TIME": "nan"}, ["SLURM_JOB_END_TIME"]),
        ({"CKPTSVC_ATTEMPT": "x"}, ["CKPTSVC_ATTEMPT"]),
        ({"CKPTSVC_JOB": "../../etc"}, ["CKPTSVC_JOB"]),
        ({"CKPTSVC_JOB": "."}, ["CKPTSVC_JOB"]),
        ({"CKPTSVC_JOB": "a" * 129}, ["CKPTSVC_JOB"]),
        ({"TORCHELASTIC_RUN_ID": "a b"}, ["TORCHELASTIC_RUN_ID", "CKPTSVC_JOB"]),
        ({"CKPTSVC_NODE": "a/b"}, ["CKPTSVC_NODE"]),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        place(environ)
    assert all(name in str(error.value) for name in names), str(error.value)


def test_a_host_without_a_usable_name_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="CKPTSVC_NODE"):
        detect({}, "")
    assert detect({"CKPTSVC_NODE": "a"}, "").node == "a"


VARIABLES = sorted({*TORCHRUN, *SLURM_STEP, *PALS, *OPEN_MPI, "CKPTSVC_JOB", "CKPTSVC_ATTEMPT", "SLURM_JOB_END_TIME"})
VALUES = ["", "0", "1", "2", "5", "-1", "x", "2(x2),1", "3,", "none"]


@given(st.dictionaries(st.sampled_from(VARIABLES), st.sampled_from(VALUES), max_size=14))
def test_any_environment_gives_a_consistent_placement_or_a_config_error(environ: dict[str, str]) -> None:
    try:
        placement = place(environ)
    except ConfigError:
        return
    assert 0 <= placement.rank < placement.world_size
    assert 0 <= placement.local_rank < placement.local_size <= placement.world_size
    assert placement.attempt >= 0
    assert placement.node_rank >= 0
    assert placement.job
    assert placement.deadline is None or math.isfinite(placement.deadline)
