"""`ckptsvc run` with ranks that are shell scripts: attempts, restarts, and agents that die under it."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.job import free_port
from harness.runtime import eventually
from harness.shell_run import Run, alive, kill

from ckptsvc.agent.launches import LONELY, Launcher, Launches
from ckptsvc.agent.local import Local
from ckptsvc.control.restart import JOIN_PATIENCE
from ckptsvc.errors import EXIT_STATUS
from ckptsvc.rpc.v1 import agent_pb2


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


class TestStop:
    """The wish to stop, with ranks that know nothing of it; ranks that save are in tests/fault/test_stop.py."""

    def test_what_does_not_stop_in_time_is_ended_and_can_be_continued(self, run):
        job = run("exec sleep 60", "--stop-grace", "0.5")
        pid = job.pid(1, 0)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 85
        assert "no last save within 0.5 s" in job.log.read_text()
        assert not alive(pid)

    def test_a_second_sigterm_ends_at_once(self, run):
        job = run("exec sleep 60", "--stop-grace", "600")
        job.pid(1, 0)
        job.process.send_signal(signal.SIGTERM)
        eventually(lambda: "SIGTERM: asking the job" in job.log.read_text(), "the first one to be seen")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 85
        assert "SIGTERM: ending now" in job.log.read_text()

    def test_sigusr1_has_no_time_limit_and_may_come_before_sigterm(self, run):
        job = run("exec sleep 60", "--stop-grace", "0.5")
        job.pid(1, 0)
        for _ in range(2):
            job.process.send_signal(signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            job.process.wait(2.0)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 85

    def test_while_nothing_runs_there_is_nothing_to_wait_for(self, run):
        options = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair")
        job = run("exit 0", *options, "--node-rank", "0", "--stop-grace", "600")
        eventually(job.handles_signals, "the launcher to handle signals")
        job.process.send_signal(signal.SIGUSR1)
        assert job.end() == 85
        assert job.attempts() == []

    def test_a_rank_that_fails_after_the_wish_to_stop_is_not_started_again(self, run):
        job = run('while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.05; done; exit 3')
        job.pid(1, 0)
        job.process.send_signal(signal.SIGUSR1)
        eventually(lambda: "asking the job" in job.log.read_text(), "the signal to be seen")
        (job.notes.parent / "go").touch()
        assert job.end() == 85
        assert job.attempts() == ["1"]
        assert "SIGUSR1 to ckptsvc run" in job.log.read_text()

    def test_a_job_script_can_read_how_each_node_ended(self, run, tmp_path):
        note = tmp_path / "status"
        assert run("exit 0", "--status-file", str(note), "--node", "a").end() == 0
        assert run("exit 7", "--status-file", str(note), "--node", "b", "--max-restarts", "0").end() == 1
        assert note.read_text() == "0 a\n1 b\n"

    def test_a_status_file_that_cannot_be_written_changes_nothing(self, run, tmp_path):
        job = run("exit 0", "--status-file", str(tmp_path / "none" / "status"))
        assert job.end() == 0
        assert "cannot be written" in job.log.read_text()


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


class TestAPlaceThatIsNotOurs:
    """The coordinator's port belongs to another program."""

    @pytest.fixture
    def port(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            yield taken.getsockname()[1]

    def start(self, run, port, number):
        endpoint = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job", "--node", f"n{number}"]
        return run("exit 0", "--nnodes", "2", *endpoint, "--node-rank", str(number))

    def test_an_agent_that_cannot_listen_says_so_at_once(self, run, port, runtime):
        job = self.start(run, port, 0)
        problem = f"cannot listen at 127.0.0.1:{port}"
        eventually(lambda: problem in job.log.read_text(), "that to be said")
        assert "Traceback" not in job.log.read_text() + runtime.log()

    @pytest.mark.slow
    def test_and_is_not_waited_for_for_ever(self, run, port):
        job = self.start(run, port, 0)
        assert job.end(90.0) == 20
        assert job.log.read_text().count("no agent: ") == 1  # and not at every attempt

    @pytest.mark.slow
    def test_nor_is_a_coordinator_that_does_not_answer(self, run, port):
        job = self.start(run, port, 1)
        eventually(
            lambda: f"no coordinator answers at 127.0.0.1:{port}; waiting 600 s" in job.log.read_text(), "it", 60.0
        )

    def test_metrics(self, runtime, port):
        agent = runtime.start_agent("--metrics-listen", f"127.0.0.1:{port}")
        assert agent.wait(30) == 2
        assert f"agent.metrics_listen: 127.0.0.1:{port}: Address already in use" in runtime.log()


class TestAlone:
    """A launcher that hears of no coordinator."""

    def missing(self, alone, attempt=0, warned=False):
        hello = agent_pb2.LauncherHello(job="job", attempt=attempt)
        launcher = Launcher(hello, "127.0.0.1:7", heard_at=time.monotonic() - alone, warned=warned)
        return Launches(Local("n0", None, None, None, ""))._missing(launcher, False)

    def test_is_told_once(self):
        assert self.missing(LONELY - 1) is None
        said = self.missing(LONELY + 1).notice.text
        assert said == "no coordinator answers at 127.0.0.1:7; waiting 600 s for it"
        assert self.missing(LONELY + 1, warned=True) is None

    def test_ends_at_last(self):
        end = self.missing(JOIN_PATIENCE + 1, warned=True).end
        assert (end.status, end.reason) == (20, "no coordinator answers at 127.0.0.1:7 for 601 s")

    def test_but_not_with_ranks(self):
        assert self.missing(JOIN_PATIENCE + 1, attempt=1).notice.text.endswith("; the ranks go on")
        assert self.missing(JOIN_PATIENCE + 1, attempt=1, warned=True) is None


def test_a_job_that_leads_is_not_misled_by_an_agent_that_listens_elsewhere(run, runtime):
    """The agent of an earlier job on this node is still there for a while."""
    earlier = runtime.start_agent()
    options = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair")
    jobs = [run("exit 0", *options, "--node-rank", str(n), *(["--node", "b"] if n else [])) for n in (0, 1)]
    assert [job.end() for job in jobs] == [0, 0]
    assert len(runtime.agents()) == 3
    earlier.terminate()
    assert earlier.wait(10) == 0


@pytest.mark.parametrize("command", [("run", "--no-python", "true"), ("status",)])
def test_a_directory_that_is_open_to_others_is_neither_written_to_nor_trusted(runtime, tmp_path, command):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    environ = runtime.environ | {"CKPTSVC_AGENT_SOCKET_DIR": str(theirs)}
    program = [sys.executable, "-m", "ckptsvc.cli.main", *command]
    ended = subprocess.run(program, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == EXIT_STATUS["config"]
    assert f"{theirs} is open to other users" in ended.stderr
    assert list(theirs.iterdir()) == []


PRINT_LIMIT = """
import pathlib, resource, sys, time
pathlib.Path(sys.argv[0] + ".limit").write_text(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
time.sleep(60)
"""
LIMIT = {
    "sh": ('ulimit -Sn > "$0.limit"; sleep 60', ("--no-python", "sh")),
    "warm": (PRINT_LIMIT, ("--preload", "json")),
}


@pytest.mark.parametrize("kind", LIMIT)
def test_agent_and_launcher_may_open_more_files_but_ranks_have_the_limit_they_were_given(runtime, tmp_path, kind):
    script, options = LIMIT[kind]
    rank, found = tmp_path / "rank", tmp_path / "rank.limit"
    rank.write_text(script)
    limited = ["sh", "-c", 'ulimit -Sn 300; exec "$@"', "sh"]
    command = [*limited, sys.executable, "-m", "ckptsvc.cli.main", "run", *options, str(rank)]
    with subprocess.Popen(command, env=runtime.environ, stderr=subprocess.PIPE, text=True) as job:
        eventually(lambda: found.exists() and found.read_text(), "the rank")
        for pid in (job.pid, *(agent.pid for agent in runtime.agents())):
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            assert soft == hard > 300
        job.send_signal(signal.SIGINT)
        said = job.communicate(timeout=30)[1]
    assert found.read_text().strip() == "300"
    assert ("a warm interpreter of" in said) == (kind == "warm")
