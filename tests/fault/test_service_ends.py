"""The end of a service for many users, and of one of its agents: nobody else notices."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from harness.runtime import eventually
from harness.users import ALICE, BOB, Node, Person, ids_of, wait_until_gone
from harness.users_jobs import UsersJob, ask, rank_of

from ckptsvc.errors import AgentUnavailable, StoreDenied

ROOT = Person("root", 0, 0, (0,))
PTRACE_SEIZE = 0x4206


class TestTheServicesOwnEnd:
    def test_by_kill_leaves_agents_and_their_ranks_and_another_finds_them(self, node: Node) -> None:
        node.start()
        for person in (ALICE, BOB):
            ask(node, person)
        before = node.agents()
        rank = rank_of(node, ALICE)
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted")
        node.stop(signal.SIGKILL)
        assert node.command(ALICE, "status")[0] == 0  # nobody needs the service for what is there
        node.start()
        eventually(lambda: {a["state"] for a in node.agents().values()} == {"serves"}, "the agents to come back")
        assert {u: a["pid"] for u, a in node.agents().items()} == {u: a["pid"] for u, a in before.items()}
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted again")
        assert rank.poll() is None

    def test_before_it_knew_of_an_agent_does_not_leave_that_alone(self, node: Node) -> None:
        node.start()
        ask(node, ALICE)
        agent, record = node.agents()[ALICE.uid]["pid"], node.directory / "agents" / str(ALICE.uid)
        node.stop(signal.SIGKILL)
        record.rename(node.root / "record")
        node.start()
        assert node.agents() == {}
        (node.root / "record").rename(record)  # an entrance is on its way, and writes it a little later
        eventually(lambda: ALICE.uid in node.agents(), "the agent to be found")
        assert (node.agents()[ALICE.uid]["pid"], node.agents()[ALICE.uid]["state"]) == (agent, "serves")

    @pytest.mark.slow
    def test_is_none_when_it_is_told_to_read_its_settings_again(self, node: Node) -> None:
        settings = node.root / "config.toml"
        settings.write_text('[system]\nuser_memory = "10%"\n')
        new = node.root / "new" / "ckptsvc"
        node.environ["PYTHONPATH"] = f"{new.parent}:{node.environ['PYTHONPATH']}"
        node.start(config=str(settings))
        ask(node, ALICE)
        agent = node.agents()[ALICE.uid]["pid"]
        assert node.supervisor is not None
        settings.write_text('[system]\nuser_memories = "10%"\n')
        node.supervisor.send_signal(signal.SIGHUP)
        log = node.root / "service.log"
        eventually(
            lambda: "the service and its settings stay as they were" in log.read_text(), "the mistake to be noticed"
        )
        settings.write_text('[system]\nusers = "ck-bob"\n')
        new.mkdir(parents=True)
        (new / "__init__.py").write_text("raise SystemExit('this version is broken')")
        node.supervisor.send_signal(signal.SIGUSR2)
        eventually(lambda: "this version is broken" in log.read_text(), "the trial to fail")
        assert ask(node, ALICE)["ok"] is True
        shutil.rmtree(new)
        hers = node.agent_directory(ALICE) / "agent.log"
        node.supervisor.send_signal(signal.SIGUSR2)
        eventually(lambda: log.read_text().count("listens in") == 2, "it to listen again")
        eventually(lambda: hers.read_text().count("listens on") == 2, "her agent to begin anew too")
        assert node.supervisor.poll() is None
        assert ask(node, BOB)["ok"] is True  # while it begins anew, callers wait
        eventually(lambda: node.agents()[ALICE.uid]["state"] == "serves", "her agent to come back")
        assert node.agents()[ALICE.uid]["pid"] == agent
        os.kill(agent, signal.SIGTERM)
        wait_until_gone(agent)  # and is no zombie, though another program has started it
        with pytest.raises(StoreDenied, match="ck-alice may not use"):
            ask(node, ALICE)

    @pytest.mark.slow
    def test_in_good_order_leaves_them_too(self, node: Node) -> None:
        node.start()
        ask(node, ALICE)
        pid = node.agents()[ALICE.uid]["pid"]
        assert node.stop() == 0
        assert ids_of(pid)["Uid"].split()[0] == str(ALICE.uid)
        assert not any(s in ids_of(pid)["State"] for s in "ZX")

    @pytest.mark.slow
    def test_a_second_one_is_refused(self, shared: Node) -> None:
        status, said = shared.command(ROOT, "agent", "--system")
        assert (status, "another service serves" in said) == (11, True)

    @pytest.mark.slow
    def test_needs_root_and_ports_that_agents_can_share(self, shared: Node) -> None:
        status, said = shared.command(ALICE, "agent", "--system")
        assert (status, "must be started by root" in said) == (2, True)
        status, said = shared.command(ROOT, "agent", "--system", "--listen", "127.0.0.1:7070")
        assert (status, "every user's agent needs a port of its own" in said) == (2, True)


class TestAnAgentsEnd:
    @pytest.mark.slow
    def test_is_survived_by_a_job_that_goes_on_saving(self, node: Node) -> None:
        node.start()
        job = UsersJob(node, ALICE, node.home(ALICE) / "run", 1, patient=True)
        for _ in range(3):
            done = job.reports("saved")
            job.wait_for_save(done[-1]["step"] + 1 if done else 1)
            os.kill(node.agents()[ALICE.uid]["pid"], signal.SIGKILL)
        job.wait_for_save(job.reports("saved")[-1]["step"] + 3)
        (job.folder / "go-end").touch()
        assert job.result()["steps"] > 6

    def test_under_its_ranks_brings_another_at_once(self, node: Node) -> None:
        node.start()
        ask(node, ALICE)
        rank_of(node, ALICE)
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted")
        first = node.agents()[ALICE.uid]["pid"]
        os.kill(first, signal.SIGKILL)
        eventually(lambda: node.agents()[ALICE.uid]["pid"] not in (first, -1), "another agent")
        eventually(lambda: node.agents()[ALICE.uid]["state"] == "serves", "it to serve")

    def test_that_its_user_keeps_from_being_reaped_stops_nobody(self, node: Node) -> None:
        """A process that is traced is its tracer's to reap first, and he sleeps."""
        node.start()
        ask(node, BOB)
        first = node.agents()[BOB.uid]["pid"]
        code = f"""
import ctypes, os, signal, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
if libc.ptrace({PTRACE_SEIZE}, {first}, None, None):
    print(os.strerror(ctypes.get_errno()), flush=True)
os.kill({first}, signal.SIGKILL)
print("killed", flush=True)
time.sleep(120)
"""
        tracer = node.spawn(BOB, [sys.executable, "-c", code])
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "killed\n"
        eventually(lambda: node.agents()[BOB.uid]["pid"] == -1, "its end to be noticed")  # the service answers
        assert ids_of(first)["State"].startswith("Z")
        assert ask(node, ALICE)["ok"] is True
        with pytest.raises(AgentUnavailable, match=f"runs already: process {first}"):  # one such process is enough
            ask(node, BOB)
        assert tracer.poll() is None
        tracer.kill()
        eventually(lambda: not Path(f"/proc/{first}").exists(), "it to be reaped, once it can be")

    @pytest.mark.slow
    def test_after_doing_nothing_is_no_failure_and_it_is_started_again_on_demand(self, node: Node) -> None:
        node.start(system_linger="1s")
        ask(node, ALICE)
        first = node.agents()[ALICE.uid]["pid"]
        wait_until_gone(first)
        eventually(lambda: node.agents()[ALICE.uid]["state"] == "ended", "it to be noticed")
        assert ask(node, ALICE)["ok"] is True
        assert node.agents()[ALICE.uid]["pid"] not in (first, -1)
