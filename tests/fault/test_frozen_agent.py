"""An agent that was frozen and wakes up finds orders that were meant for another time."""

import os
import signal
import time

import pytest
from harness.job import free_port
from harness.runtime import eventually
from harness.shell_run import Run, kill

SCRIPT = "case $CKPTSVC_ATTEMPT-$RANK in 2-0) exit 3;; *) exec sleep 600;; esac"


@pytest.mark.slow  # a node whose agent is away is waited for
def test_an_order_to_start_an_attempt_that_is_over_is_not_obeyed(runtime, tmp_path):
    """It is sent to an agent that is frozen by then, and lies in its socket until it wakes up."""
    options = ("--nnodes", "1:2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair", "--no-preflight")
    a, b = (
        Run(runtime, tmp_path, SCRIPT, *options, "--node-rank", str(rank), "--node", name)
        for rank, name in enumerate("ab")
    )
    log = runtime.sockets / "node-a" / "agent.log"

    def said(text):
        return log.read_text().count(text)

    try:
        rank = {node: pid for pid, node in (a.rank(1, number) for number in (0, 1))}
        (agent,) = [agent for agent in runtime.agents() if "--name b" in agent.command]
        os.kill(a.process.pid, signal.SIGSTOP)  # a is not ready for the next attempt until it goes on
        kill(rank["b"])
        eventually(lambda: said("restart 1 of 3"), "the first attempt to fail")
        time.sleep(1.0)  # b is ready
        os.kill(agent.pid, signal.SIGSTOP)
        os.kill(a.process.pid, signal.SIGCONT)
        a.pid(3, 0)
        assert said("attempt 2 starts: 2 ranks on 2 nodes") == 1
        os.kill(agent.pid, signal.SIGCONT)
        eventually(lambda: said("node b joined") == 2, "b to come back")
        time.sleep(1.0)
        assert not (a.notes / "2-1").exists(), "b has started its rank of attempt 2, while attempt 3 runs"
    finally:
        for job in (a, b):
            job.process.send_signal(signal.SIGINT)
            job.end()
