"""`ckptsvc run` with ranks that are shell scripts: attempts, restarts, and agents that die under it."""

import os
import signal
from pathlib import Path

import pytest
from harness.job import free_port
from harness.runtime import eventually
from harness.shell_run import Run, alive, kill


@pytest.fixture
def run(runtime, tmp_path):
    """Starts runs; what is left of them is ended."""
    started = []

    def begin(script, *options):
        started.append(Run(runtime, tmp_path, script, *options))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGINT)
            each.process.wait(20)


FAIL_ONCE = "case $CKPTSVC_ATTEMPT-$RANK in 1-0) exit 3;; 1-*) exec sleep 60;; esac"
WAIT_ONCE = "case $CKPTSVC_ATTEMPT in 1) exec sleep 60;; esac"


class TestOneNode:
    def test_all_ranks_end_well(self, run):
        job = run("exit 0", "--nproc-per-node", "3")
        assert job.end() == 0
        assert job.attempts() == ["1"]

    def test_a_rank_that_fails_restarts_all(self, run):
        job = run(FAIL_ONCE, "--nproc-per-node", "2")
        assert job.end() == 0
        assert job.attempts() == ["1", "2"]
        assert "rank 0 exited with status 3" in job.log.read_text()

    def test_no_restarts_left(self, run):
        job = run("exit 7", "--max-restarts", "1")
        assert job.end() == 1
        assert job.attempts() == ["1", "2"]
        assert "no restarts left of 1" in job.log.read_text()

    def test_a_crash_loop_has_an_exit_status_of_its_own(self, run):
        job = run("exit 7", "--max-restarts", "100", "--nproc-per-node", "2")
        assert job.end() == 86
        assert job.attempts() == ["1", "2", "3"]
        assert (
            "3 attempts in a row have failed, and none has come to a first checkpoint; each time" in job.log.read_text()
        )

    def test_or_goes_on(self, run):
        job = run("exit 7", "--max-restarts", "5", "--crash-loop", "0")
        assert job.end() == 1
        assert len(job.attempts()) == 6

    def test_interrupted_from_the_keyboard(self, run):
        job = run("exec sleep 60")
        pid = job.pid(1, 0)
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_a_program_that_is_not_there(self, run, tmp_path):
        job = run("exec /nonexistent", "--max-restarts", "1")
        assert job.end() == 1
        assert "exited with status 127" in job.log.read_text()


class TestAgentsThatDie:
    def test_the_ranks_go_on(self, run, runtime):
        job = run('while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.05; done')
        job.pid(1, 0)
        runtime.kill_agents()
        eventually(lambda: "lost the agent" in job.log.read_text(), "the launcher to notice")
        eventually(runtime.agents, "another agent")
        (job.notes.parent / "go").touch()
        assert job.end() == 0
        assert job.attempts() == ["1"]

    def test_a_rank_that_dies_while_there_is_no_agent_is_reported_to_the_next_one(self, run, runtime):
        job = run(WAIT_ONCE)
        pid = job.pid(1, 0)
        os.kill(job.process.pid, signal.SIGSTOP)  # so that it does not start another one too soon
        runtime.kill_agents()
        kill(pid)
        os.kill(job.process.pid, signal.SIGCONT)
        assert job.end() == 0
        assert job.attempts() == ["1", "2"]

    @pytest.mark.parametrize("which", [0, 1])
    def test_on_two_nodes(self, run, runtime, which):
        """The coordinator is node 0's agent: without it a new one must make out where the job is."""
        options = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair")
        jobs = [run(WAIT_ONCE, *options, "--node-rank", str(n), "--node", f"n{n}") for n in (0, 1)]
        pids = [jobs[0].pid(1, rank) for rank in (0, 1)]
        os.kill(jobs[which].process.pid, signal.SIGSTOP)
        (agent,) = [a for a in runtime.agents() if f"--name n{which}" in a.command]
        kill(agent.pid)
        kill(pids[which])
        eventually(lambda: not Path(f"/proc/{agent.pid}/fd").exists() or not alive(agent.pid), "the agent to be gone")
        os.kill(jobs[which].process.pid, signal.SIGCONT)
        assert [job.end() for job in jobs] == [0, 0]
        assert jobs[0].attempts() == ["1", "2"]
