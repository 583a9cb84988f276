"""A running agent: what it serves, what it refuses, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from harness.runtime import eventually
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ckptsvc.errors import (
    EXIT_STATUS,
    AgentUnavailable,
    ArenaExhausted,
    CkptsvcError,
    InvalidInput,
    StoreDenied,
    StoreError,
)
from ckptsvc.rpc.channel import OPTIONS, error_of
from ckptsvc.rpc.proof import CHALLENGE_KEY, PROOF_KEY
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Metrics

SIZE = 4096
AGENT, COORDINATOR = "ckptsvc.rpc.v1.AgentService", "ckptsvc.rpc.v1.CoordinatorService"


def ready(agent):
    """(pid, address for other agents, address of the metrics)."""
    pid, address, metrics = (agent.directory / "ready").read_text().splitlines()[:3]
    return int(pid), address, metrics


def status(agent):
    return json.loads(agent.call("GetStatus", agent_pb2.GetStatusRequest()).json)


def attached(agent, **changes):
    """A rank that has an epoch and arenas."""
    rank = agent.register(**changes)
    answer = rank.call("Prepare", agent_pb2.PrepareRequest(plain_digest="d"))
    assert answer.complete
    rank.call("Provide", agent_pb2.ProvideRequest(bytes=SIZE))
    return rank


def acquire(rank, step, nbytes=SIZE, patience=0.0):
    return rank.call("Acquire", agent_pb2.AcquireRequest(step=step, bytes=nbytes, patience=patience))


def reflected(channel):
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    return list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=5))


class TestServices:
    def test_health_answers_on_the_socket(self, agent):
        stub = health_pb2_grpc.HealthStub(agent.channel)
        for name in ("", AGENT):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_reflection_names_the_services_on_the_socket(self, agent):
        (answer,) = reflected(agent.channel)
        names = {each.name for each in answer.list_services_response.service}
        assert names == {AGENT, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}

    def test_the_status_says_who_it_is(self, agent):
        document = status(agent)
        assert (document["status_version"], document["pid"]) == (1, agent.process.pid)
        assert document["address"] == ready(agent)[1]
        assert (document["ranks"], document["arenas"], document["saves"]) == ([], [], [])

    def test_metrics_are_those_that_are_declared(self, start, runtime):
        agent = start("a", "--metrics-listen", "127.0.0.1:0")
        rank = attached(agent)
        found = runtime.metrics(ready(agent)[2])
        families = {family.name: family for family in text_string_to_metric_families(found)}
        declared = generate_latest(Metrics("test").registry).decode()
        known = {family.name for family in text_string_to_metric_families(declared)}
        assert {name for name in families if not name.endswith("_created")} == {
            name for name in known if not name.endswith("_created")
        }
        (sessions,) = families["ckptsvc_sessions"].samples
        assert sessions.value == 1
        assert sum(sample.value for sample in families["ckptsvc_arena_bytes"].samples) == sum(
            arena["bytes"] for arena in status(agent)["arenas"]
        )
        rank.close()


class TestRefusals:
    """Every call that acts for a rank needs its token, and every number is checked."""

    CALLS = {
        "Prepare": agent_pb2.PrepareRequest(plain_digest="d"),
        "Rewind": agent_pb2.RewindRequest(count=1),
        "Provide": agent_pb2.ProvideRequest(bytes=SIZE),
        "Acquire": agent_pb2.AcquireRequest(step=1, bytes=SIZE),
        "Submit": agent_pb2.SubmitRequest(slot="x", step=1, bytes=SIZE),
        "Abandon": agent_pb2.AbandonRequest(slot="x", step=1),
        "WaitSave": agent_pb2.WaitSaveRequest(step=1),
        "ListSnapshots": agent_pb2.ListSnapshotsRequest(),
        "Refill": agent_pb2.RefillRequest(epoch=1, step=1),
        "Leave": agent_pb2.LeaveRequest(),
    }

    def test_without_a_token_and_with_a_wrong_one(self, agent):
        every = {m.name for m in agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods}
        assert every - set(self.CALLS) == {"GetStatus", "Launch"}
        for method, request in self.CALLS.items():
            with pytest.raises(InvalidInput, match="for registered ranks only"):
                agent.call(method, request)
            for token in ("", "0" * 32, "x" * 1000):
                with pytest.raises(AgentUnavailable, match="does not know the session"):
                    agent.call(method, request, token)

    def test_numbers_that_cannot_be(self, agent):
        rank = agent.register()
        for method, request in (
            ("Prepare", agent_pb2.PrepareRequest(plain_digest="d", generation=-1)),
            ("Prepare", agent_pb2.PrepareRequest(plain_digest="d" * 65)),
            ("Provide", agent_pb2.ProvideRequest(bytes=0)),
            ("Provide", agent_pb2.ProvideRequest(bytes=1 << 60)),
            ("Acquire", agent_pb2.AcquireRequest(step=-1, bytes=SIZE)),
            ("Acquire", agent_pb2.AcquireRequest(step=1, bytes=0)),
            ("Acquire", agent_pb2.AcquireRequest(step=1, bytes=(1 << 64) - 1)),
        ):
            with pytest.raises(InvalidInput):
                rank.call(method, request)
        rank.close()

    def test_a_submit_of_what_was_not_acquired(self, agent):
        rank = attached(agent)
        other = attached(agent, job="other", store="memory://other")
        slot = acquire(rank, 10).slot
        free = next(a for a in rank.call("Provide", agent_pb2.ProvideRequest(bytes=SIZE)).slots if a != slot)
        for submitter, request in (
            (rank, agent_pb2.SubmitRequest(slot="nobody", step=10, bytes=SIZE)),
            (rank, agent_pb2.SubmitRequest(slot=free, step=10, bytes=SIZE)),
            (rank, agent_pb2.SubmitRequest(slot=slot, step=11, bytes=SIZE)),
            (rank, agent_pb2.SubmitRequest(slot=slot, step=10, bytes=0)),
            (rank, agent_pb2.SubmitRequest(slot=slot, step=10, bytes=1 << 40)),
            (other, agent_pb2.SubmitRequest(slot=slot, step=10, bytes=SIZE)),
        ):
            with pytest.raises(InvalidInput):
                submitter.call("Submit", request)
        assert [a["state"] for a in status(agent)["arenas"] if a["step"] == 10] == ["filling"]
        rank.call("Abandon", agent_pb2.AbandonRequest(slot=slot, step=10, reason="test"))
        for each in (rank, other):
            each.close()

    def test_an_arena_of_somebody_else_is_not_abandoned(self, agent):
        rank, other = attached(agent), attached(agent, job="other", store="memory://other")
        slot = acquire(rank, 10).slot
        other.call("Abandon", agent_pb2.AbandonRequest(slot=slot, step=10, reason="not mine"))
        assert [a["state"] for a in status(agent)["arenas"] if a["step"] == 10] == ["filling"]
        for each in (rank, other):
            each.close()

    def test_more_memory_than_there_is(self, agent):
        rank = attached(agent)
        assert list(rank.call("Provide", agent_pb2.ProvideRequest(bytes=1 << 41)).slots) == []
        with pytest.raises(ArenaExhausted):
            acquire(rank, 10, nbytes=1 << 41)
        outcome = rank.call("WaitSave", agent_pb2.WaitSaveRequest(step=10)).outcome
        assert outcome.outcome == agent_pb2.OUTCOME_SKIPPED
        acquire(rank, 11, patience=5.0)
        rank.close()

    def test_a_submit_after_another_rank_has_begun_a_new_epoch(self, agent):
        """Its shard may lie in the old epoch's folder already."""
        rank = attached(agent)
        slot = acquire(rank, 10).slot
        assert rank.call("Rewind", agent_pb2.RewindRequest(count=1)).epoch == 2
        with pytest.raises(CkptsvcError, match="another rank has begun a new epoch"):
            rank.call("Submit", agent_pb2.SubmitRequest(slot=slot, step=10, bytes=SIZE))
        rank.call("Abandon", agent_pb2.AbandonRequest(slot=slot, step=10, reason="refused"))
        assert acquire(rank, 10, patience=5.0).epoch == 2, "the save of the new epoch is not the one that was given up"
        rank.close()

    def test_a_store_that_gives_no_epoch_turns_saves_off(self, agent):
        rank = agent.register(store="nonsense://x")
        assert rank.call("Prepare", agent_pb2.PrepareRequest(plain_digest="d")).complete
        with pytest.raises((StoreDenied, StoreError, CkptsvcError), match="saves are off"):
            acquire(rank, 10)
        rank.close()

    def test_a_second_job_of_the_same_run(self, agent):
        first = attached(agent)
        second = agent.register(job="second")
        with pytest.raises(CkptsvcError, match="job job with 1 live ranks") as caught:
            second.call("Prepare", agent_pb2.PrepareRequest(plain_digest="d"))
        assert caught.value.code == "run-busy"
        second.close()
        first.close()
        attached(agent, job="third").close()

    def test_a_launcher_that_cannot_be(self, agent):
        stub = agent_pb2_grpc.AgentServiceStub(agent.channel)
        for hello in (
            agent_pb2.LauncherHello(),
            agent_pb2.LauncherHello(job="j", nproc=0, min_nodes=1, max_nodes=1),
            agent_pb2.LauncherHello(job="j", nproc=1 << 30, min_nodes=1, max_nodes=1),
            agent_pb2.LauncherHello(job="j", nproc=1, min_nodes=2, max_nodes=1),
            agent_pb2.LauncherHello(job="j", nproc=1, min_nodes=0, max_nodes=1),
            agent_pb2.LauncherHello(job="j", nproc=1, min_nodes=1, max_nodes=1, doorbell=65536),
            agent_pb2.LauncherHello(job="j", nproc=1, min_nodes=1, max_nodes=1, crash_loop=-1),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Launch(iter([agent_pb2.LaunchRequest(hello=hello)]), timeout=5))
            assert isinstance(error_of(caught.value), InvalidInput)
        assert status(agent)["coordinates"] == []

    def test_a_launcher_that_hangs_up_without_a_word(self, agent):
        stub = agent_pb2_grpc.AgentServiceStub(agent.channel)
        with pytest.raises(grpc.RpcError):
            list(stub.Launch(iter([]), timeout=5))
        assert status(agent)["ranks"] == []

    def test_an_agent_without_the_secret(self, start, runtime):
        agent = start("a", "--metrics-listen", "127.0.0.1:0")
        with grpc.insecure_channel(ready(agent)[1], options=OPTIONS) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            hello = pb.Report(agent_hello=pb.AgentHello(node="stranger"))
            wrong = ((CHALLENGE_KEY, "0" * 64), (PROOF_KEY, "0" * 64))
            nonsense = channel.unary_unary(f"/{COORDINATOR}/ListComplete")
            health = health_pb2_grpc.HealthStub(channel)
            calls = (
                lambda: list(stub.Attend(iter([hello]), timeout=5)),
                lambda: stub.ListComplete(pb.ListCompleteRequest(job="job"), timeout=5),
                lambda: stub.ListComplete(pb.ListCompleteRequest(job="job"), timeout=5, metadata=wrong),
                lambda: nonsense(b"\xff" * (1 << 20), timeout=5),
                lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=5),
                lambda: reflected(channel),
            )
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert isinstance(error_of(caught.value), StoreDenied)
        assert f"ckptsvc_calls_refused_total {float(len(calls))}" in runtime.metrics(ready(agent)[2])


class TestSaves:
    def test_what_is_no_shard_fails_its_save_and_nothing_else(self, agent):
        rank = attached(agent)
        slot = acquire(rank, 10).slot
        rank.call("Submit", agent_pb2.SubmitRequest(slot=slot, step=10, bytes=SIZE))
        outcome = rank.call("WaitSave", agent_pb2.WaitSaveRequest(step=10)).outcome
        assert (outcome.outcome, outcome.code) == (agent_pb2.OUTCOME_FAILED, "damaged")
        assert agent.alive
        acquire(rank, 20)
        rank.close()

    def test_how_long_a_rank_fills_an_arena_is_measured(self, start, runtime):
        agent = start("a", "--metrics-listen", "127.0.0.1:0")
        rank = attached(agent)
        slot = acquire(rank, 10).slot
        time.sleep(0.1)
        rank.call("Submit", agent_pb2.SubmitRequest(slot=slot, step=10, bytes=SIZE))
        metrics = runtime.metrics(ready(agent)[2])
        found = re.findall(r'save_duration_seconds_(?:count|sum){phase="stage"} (.+)', metrics)
        count, seconds = map(float, found)
        assert count == 1
        assert 0.1 <= seconds < 60
        rank.call("WaitSave", agent_pb2.WaitSaveRequest(step=10))
        rank.close()

    def test_to_wait_for_a_save_that_never_was_ends_with_the_deadline(self, agent):
        rank = attached(agent)
        outcome = rank.call("WaitSave", agent_pb2.WaitSaveRequest(step=99), timeout=0.5).outcome
        assert outcome.outcome == agent_pb2.OUTCOME_UNSPECIFIED
        rank.close()

    def test_an_arena_is_waited_for(self, agent):
        rank = attached(agent)
        first = acquire(rank, 10).slot
        rank.call("Submit", agent_pb2.SubmitRequest(slot=first, step=10, bytes=SIZE))
        second = acquire(rank, 11).slot
        assert second != first
        rank.call("Submit", agent_pb2.SubmitRequest(slot=second, step=11, bytes=SIZE))
        assert acquire(rank, 12, patience=10.0).slot in (first, second)  # both were in use, maybe for a moment only
        for step in (10, 11):  # a snapshot whose save has not ended is left for the next agent
            rank.call("WaitSave", agent_pb2.WaitSaveRequest(step=step))
        rank.close()


class TestEnd:
    def arenas(self, runtime):
        return list(Path(runtime.arenas).rglob("*"))

    def test_without_work_it_ends_and_leaves_nothing(self, start, runtime):
        agent = start("a", linger="1s")
        rank = attached(agent)
        assert len(list(Path(runtime.arenas).rglob("*.arena"))) == 2
        rank.close()
        eventually(lambda: not agent.alive, "the agent to end", 15)
        assert agent.process.returncode == 0
        assert self.arenas(runtime) == []
        assert not (agent.directory / "ready").exists()

    def test_with_a_rank_it_stays(self, start):
        agent = start("a", linger="1s")
        rank = attached(agent)
        with pytest.raises(AssertionError, match="waited"):
            eventually(lambda: not agent.alive, "the agent to end", 2.5)
        rank.close()

    def test_it_stops_when_told_to(self, start, runtime):
        agent = start()
        rank = attached(agent)
        agent.process.send_signal(signal.SIGINT)
        assert agent.process.wait(10) == 0
        assert [p for p in self.arenas(runtime) if p.suffix == ".arena"] == []  # nothing was staged
        rank.identity.close()

    def test_a_private_one_that_is_terminated_with_its_job_lets_the_ranks_save_first(self, start):
        agent = start()
        rank = attached(agent)
        agent.process.send_signal(signal.SIGTERM)
        agent.process.send_signal(signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            agent.process.wait(1.0)
        assert status(agent)["pid"] == agent.process.pid
        rank.close()
        assert agent.process.wait(10) == 0

    def test_told_twice_it_does_not_wait(self, start):
        agent = start()
        rank = attached(agent)
        agent.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            agent.process.wait(1.0)
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(10) == 0
        rank.identity.close()

    def test_the_agent_of_a_service_does_not_wait(self, runtime):
        process = runtime.start_agent()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0

    def test_a_port_that_another_program_has(self, runtime):
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            directory = runtime.sockets / "second"
            command = [sys.executable, "-m", "ckptsvc.agent.server", "--dir", str(directory), "--listen", address]
            ended = subprocess.run(
                command, env=runtime.environ, capture_output=True, text=True, check=False, timeout=20
            )
        assert ended.returncode == EXIT_STATUS["config"]
        assert f"cannot listen at {address}" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_two_cannot_share_a_directory(self, agent, runtime):
        command = [sys.executable, "-m", "ckptsvc.agent.server", "--dir", str(agent.directory)]
        second = subprocess.run(command, env=runtime.environ, capture_output=True, text=True, check=False, timeout=20)
        assert second.returncode == 11
        assert "an agent already serves" in second.stderr
        assert status(agent)["pid"] == agent.process.pid

    def test_after_a_kill_another_one_takes_its_place(self, start, runtime):
        first = start()
        attached(first)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        assert len(list(Path(runtime.arenas).rglob("*.arena"))) == 2
        second = start()
        assert list(Path(runtime.arenas).rglob("*.arena")) == []
        attached(second).close()
