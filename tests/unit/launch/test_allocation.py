"""The nodes of a job as Slurm and PBS tell them, and what cannot be right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import ConfigError
from ckptsvc.launch.allocation import FIRST_PORT, PORTS, Allocation, allocated

# Recorded from Slurm 22.05.8: `sbatch --nodes=3 --ntasks-per-node=1`, in the script and in task 1 of `srun` in it.
SLURM_BATCH = {
    "SLURMD_NODENAME": "n1",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "n[1-3]",
    "SLURM_NPROCS": "3",
    "SLURM_NTASKS": "3",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "1(x3)",
}
SLURM_STEP = SLURM_BATCH | {
    "SLURMD_NODENAME": "n2",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
# What Slurm's plug-in for Slingshot machines (mpi/cray_shasta) adds for its own tasks.
SHASTA = {
    "PALS_APID": "7.0",
    "PALS_LOCAL_RANKID": "0",
    "PALS_NODEID": "1",
    "PALS_RANKID": "1",
    "PMI_RANK": "1",
    "PMI_SIZE": "3",
}
PBS = {"PBS_JOBID": "12.server", "PBS_NODEFILE": "/shared/nodes"}
PALS = {
    "PALS_APID": "3f0b",
    "PALS_LOCAL_RANKID": "0",
    "PALS_LOCAL_SIZE": "1",
    "PALS_NODEID": "2",
    "PALS_RANKID": "2",
    "PMI_SIZE": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
NODES = "x1.site\nx1.site\nx2.site\nx3.site\n"


def found(environ: dict[str, str], hostname: str = "host", nodes: str | OSError = NODES) -> Allocation | None:
    def read(path: str) -> str:
        if isinstance(nodes, OSError):
            raise nodes
        return nodes

    return allocated(environ, hostname, read)


def test_without_a_scheduler_there_is_nothing_to_find() -> None:
    assert found({"HOME": "/root", "RANK": "0", "WORLD_SIZE": "2"}) is None


class TestSlurm:
    def test_a_task_of_a_step(self) -> None:
        it = found(SLURM_STEP)
        assert it == Allocation("slurm", "7.0", ("n1", "n2", "n3"), 1)
        assert it.node == "n2"

    def test_a_step_on_some_of_the_job_s_nodes(self) -> None:
        step = {"SLURM_STEP_NODELIST": "n[2-3]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0"}
        tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "0"}
        assert found(SLURM_STEP | step | tasks) == Allocation("slurm", "7.0", ("n2", "n3"), 0)

    def test_a_node_that_goes_by_another_name_counts_by_its_number(self) -> None:
        it = found({k: v for k, v in SLURM_STEP.items() if k != "SLURMD_NODENAME"})
        assert it is not None
        assert it.node_rank == 1

    def test_a_batch_script_on_one_node(self) -> None:
        one = {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
        assert found(SLURM_BATCH | one) == Allocation("slurm", "7", ("n1",), 0)

    def test_on_a_slingshot_machine_srun_sets_the_variables_of_pals_too(self) -> None:
        assert found(SLURM_STEP | SHASTA) == Allocation("slurm", "7.0", ("n1", "n2", "n3"), 1)

    def test_mpirun_in_a_batch_script(self) -> None:
        assert found(SLURM_BATCH | OPEN_MPI) == Allocation("slurm", "7", ("n1", "n2"), 1)

    def test_each_incarnation_has_a_name_and_a_port_of_its_own(self) -> None:
        array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
        changes = [{}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "2"}, array, {"CKPTSVC_JOB": "mine"}]
        jobs = [found(SLURM_STEP | change) for change in changes]
        assert [job.job for job in jobs if job] == ["7.0", "7.1", "7r2.0", "5_3.0", "mine"]
        ports = {job.port for job in jobs if job}
        assert len(ports) == 5
        assert ports <= set(range(FIRST_PORT, FIRST_PORT + PORTS))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"SLURM_STEP_TASKS_PER_NODE": "1,4,1", "SLURM_STEP_NUM_TASKS": "6"}, ["4", "--ntasks-per-node=1"]),
            ({"SLURM_STEP_NODELIST": "n[1-"}, ["SLURM_STEP_NODELIST", "'n[1-'"]),
            ({"SLURM_STEP_NODELIST": "n[1-2]"}, ["SLURM_STEP_NODELIST names 2", "SLURM_STEP_NUM_NODES is 3"]),
            ({"SLURM_STEP_NUM_NODES": "three"}, ["SLURM_STEP_NUM_NODES", "'three'"]),
            ({"SLURMD_NODENAME": "", "SLURM_NODEID": "3"}, ["SLURM_STEP_TASKS_PER_NODE", "node 3"]),
            ({"SLURMD_NODENAME": "", "SLURM_NODEID": ""}, ["SLURM_NODEID", "--node-rank"]),
            ({"SLURM_JOB_ID": "7/../x"}, ["SLURM_JOB_ID", "CKPTSVC_JOB"]),
        ],
    )
    def test_what_cannot_be_right_is_refused_by_name(self, changes: dict[str, str], said: list[str]) -> None:
        with pytest.raises(ConfigError) as error:
            found(SLURM_STEP | changes)
        assert all(part in str(error.value) for part in said), str(error.value)

    def test_a_batch_script_of_several_nodes_is_not_all_of_them(self) -> None:
        with pytest.raises(ConfigError, match="srun --ntasks-per-node=1"):
            found(SLURM_BATCH)

    def test_an_interactive_shell_is_not_a_step_of_its_own(self) -> None:
        with pytest.raises(ConfigError, match="the job has 3 nodes"):
            found(SLURM_STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "n1"})

    def test_a_job_without_a_list_of_nodes(self) -> None:
        with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST is not"):
            found({"SLURM_JOB_ID": "7"})


class TestPbs:
    def test_each_host_counts_once(self) -> None:
        assert found(PBS, "x2.site") == Allocation("pbs", "12.server", ("x1.site", "x2.site", "x3.site"), 1)

    @pytest.mark.parametrize("hostname", ["x3", "x3.site", "x3.other"])
    def test_a_host_is_found_with_and_without_its_domain(self, hostname: str) -> None:
        it = found(PBS, hostname)
        assert it is not None
        assert it.node == "x3.site"

    def test_under_mpiexec(self) -> None:
        it = found(PBS | PALS, "whatever")
        assert it is not None
        assert (it.node, it.node_rank, len(it.nodes)) == ("x3.site", 2, 3)

    def test_under_an_mpiexec_on_fewer_nodes(self) -> None:
        it = found(PBS | OPEN_MPI, "whatever")
        assert it is not None
        assert (it.node, it.nodes) == ("x2.site", ("x1.site", "x2.site"))

    def test_under_pbsdsh_where_the_host_goes_by_another_name(self) -> None:
        it = found(PBS | {"PBS_NODENUM": "2", "PBS_TASKNUM": "4"}, "elsewhere")
        assert it is not None
        assert it.node_rank == 2

    def test_one_node(self) -> None:
        it = found(PBS, "whatever", "x9\n" * 4)
        assert it is not None
        assert (it.nodes, it.node_rank) == (("x9",), 0)

    def test_an_element_of_an_array(self) -> None:
        it = found(PBS | {"PBS_JOBID": "12[3].server"}, "x1")
        assert it is not None
        assert it.job == "12[3].server"

    @pytest.mark.parametrize(
        ("changes", "nodes", "said"),
        [
            ({"PBS_NODEFILE": ""}, NODES, ["PBS_NODEFILE is not"]),
            ({}, FileNotFoundError(2, "No such file or directory"), ["/shared/nodes", "No such file", "copy it"]),
            ({}, "", ["/shared/nodes", "0 hosts"]),
            ({}, "x1\n-oops\n", ["'-oops'"]),
            ({}, "x1\nx 2\n", ["'x 2'"]),
            ({}, NODES, ["host", "3", "mpiexec or pbsdsh"]),
            ({"PBS_NODENUM": "9"}, NODES, ["none of the 3"]),
            (PALS | {"PALS_LOCAL_SIZE": "2"}, NODES, ["mpiexec", "2 processes", "--ppn 1"]),
            (PALS | {"PMI_SIZE": "4"}, NODES, ["4 processes", "3 nodes"]),
            ({"PBS_JOBID": "a b"}, "x1\n", ["PBS_JOBID", "CKPTSVC_JOB"]),
        ],
    )
    def test_what_cannot_be_right_is_refused(
        self, changes: dict[str, str], nodes: str | OSError, said: list[str]
    ) -> None:
        with pytest.raises(ConfigError) as error:
            found(PBS | changes, "host", nodes)
        assert all(part in str(error.value) for part in said), str(error.value)


VARIABLES = sorted({*SLURM_STEP, *PALS, *OPEN_MPI, *PBS, "SLURM_RESTART_COUNT", "PBS_NODENUM"})
VALUES = ["", "0", "1", "2", "-1", "x", "n[1-3]", "n1", "1(x3)", "4294967290"]


@given(st.dictionaries(st.sampled_from(VARIABLES), st.sampled_from(VALUES), max_size=12), st.text(max_size=40))
def test_any_environment_gives_a_consistent_allocation_or_a_config_error(environ: dict[str, str], nodes: str) -> None:
    try:
        it = found(environ, "n2", nodes)
    except ConfigError:
        return
    if it is not None:
        assert 0 <= it.node_rank < len(it.nodes)
        assert it.job
