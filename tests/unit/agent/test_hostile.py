"""Members of a job that may speak, and say what cannot be: agents, a coordinator, ranks, launchers. From seeds."""

import asyncio
import contextlib
import json
import random
import time

import grpc
import pytest
from harness.hostile import fill, one_of

from ckptsvc.agent import servicer
from ckptsvc.agent.coordination.uplink import LocalUplink, RemoteUplink
from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import AllotEpoch, Answer, Commit, CommitDone, EpochDone, Probe, Probed, Send
from ckptsvc.control.redundancy import PartnerPolicy
from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.bounds import check, check_report, fits
from ckptsvc.rpc.channel import OPTIONS, TOKEN_KEY, error_of
from ckptsvc.rpc.trust import BySecret
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


def says(rng, node, sound):
    """A report at random, by the agent of that node as a rule."""
    report = one_of(rng, pb.Report(), "event", sound)
    event = getattr(report, report.WhichOneof("event"))
    if "node" in event.DESCRIPTOR.fields_by_name and rng.random() < 0.9:
        event.node = node
    return report


@pytest.mark.parametrize("seed", range(12))
def test_whatever_agents_report_a_coordinator_decides(seed):
    """What is within the bounds is false, contradicts itself, and breaks nothing."""
    rng, now, heard = random.Random(seed), 100.0, 0
    core = Coordinator(mark="m", partners=PartnerPolicy(rng.choice(["off", "copy", "xor", "rs"]), 2))

    def obey(decision):
        for effect in decision.effects:
            if isinstance(effect, Send):
                assert fits(effect.order), effect.order
            elif isinstance(effect, AllotEpoch):
                obey(core.epoch_done(EpochDone(effect.job, effect.attempt, effect.rewinds, 3), now))
            elif isinstance(effect, Commit):
                assert len(effect.shards) == effect.world_size > 0
                code = rng.choice(["", "store", "fenced"])
                obey(core.commit_done(CommitDone(effect.job, effect.epoch, effect.step, code, "why"), now))
            elif isinstance(effect, Probe):
                obey(core.probed(Probed(effect.job, effect.node, rng.choice(list(Answer))), now))

    for _ in range(250):
        node = rng.choice(["n1", "n2", "n3"])
        report = says(rng, node, rng.choice([0.3, 0.8, 1.0]))
        with contextlib.suppress(InvalidInput):
            check_report(report, node)
            heard += 1
            now += rng.choice([0.0, 0.1, 5.0, 60.0])
            obey(core.handle(node, report, now))
            obey(core.tick(now))
            for job in list(core.jobs):
                obey(core.recover(job, now))
                core.snapshots(job)
    assert 50 < heard < 250


HELLO = pb.Report(agent_hello=pb.AgentHello(node="n1"))


class Peer:
    """A member of the job that speaks for node `n1`, and does not look at what it says."""

    def __init__(self, agent):
        self.trust = BySecret((agent.directory.parent / "secret").read_text().strip())
        self.address = json.loads(agent.call("GetStatus", agent_pb2.GetStatusRequest()).json)["address"]

    async def say(self, *reports, hello=HELLO):
        """All of that in one stream; how it ends."""
        async with self.trust.channel(self.address, OPTIONS) as channel:
            admission = await self.trust.ask(channel, self.address, "Attend")
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            call = stub.Attend(iter([hello, *reports]), metadata=admission.metadata)
            try:
                async for _ in call:
                    pass
            except grpc.RpcError as failure:
                return failure.code(), error_of(failure)
        return None


def test_an_agent_that_reports_what_cannot_be_is_hung_up_on_and_nothing_else_suffers(agent):
    rank = agent.register(world_size=1)
    rng = random.Random(9)

    async def story():
        peer, ends = Peer(agent), []
        for _ in range(25):
            bad = says(rng, "n1", 0.3)
            while fits(bad):
                bad = says(rng, "n1", 0.3)
            ends.append(await peer.say(bad))
        more = pb.Report(more=[pb.Report(node_left=pb.NodeLeft(job="job", node="another"))])
        nobody = pb.Report(agent_hello=pb.AgentHello(node="n\n1"))
        return [*ends, await peer.say(more), await peer.say(hello=nobody)]

    ends = asyncio.run(story())
    assert {code for code, _ in ends} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert "of another node" in str(ends[-2][1])
    assert "AgentHello.node" in str(ends[-1][1])
    assert rank.call("Prepare", agent_pb2.PrepareRequest(plain_digest="d")).complete
    log = (agent.directory / "agent.log").read_text()
    (line,) = [each for each in log.splitlines() if "reports of agents were refused: 1 so far" in each]
    assert "by the agent of n1 at ipv4:127.0.0.1:" in line
    assert "Traceback" not in log
    assert all(each.isprintable() for each in log.splitlines())


def test_an_agent_that_never_reads_its_orders_is_hung_up_on(monkeypatch):
    """What waits for it does not grow without end."""
    monkeypatch.setattr(servicer, "MOST_ORDERS", 100)
    order = pb.Order(job="job", vacate=pb.Vacate(reason="x" * 900))

    class Shell:
        def __init__(self):
            self.departed = asyncio.Event()

        def attend(self, node, deliver):
            self.deliver = deliver

        def report(self, node, report):
            self.heard = report

        def depart(self, node, deliver):
            assert deliver is self.deliver
            self.departed.set()

    async def story():
        shell, server = Shell(), grpc.aio.server(options=OPTIONS)
        servicer.add_coordinator_service(servicer.CoordinatorServicer(lambda job, term: shell, "n0", None), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        said = asyncio.Queue()
        said.put_nowait(HELLO)

        async def reports():
            while True:
                yield await said.get()

        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Attend(reports())
            while not hasattr(shell, "heard"):
                await asyncio.sleep(0.01)
            async with asyncio.timeout(10):
                while not shell.departed.is_set():
                    shell.deliver(order)
                    await asyncio.sleep(0)
            async with asyncio.timeout(10):
                with contextlib.suppress(grpc.RpcError):
                    [order async for order in call]
                code = await call.code()
        await server.stop(0)
        return code

    assert asyncio.run(story()) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_agent_does_not_say_what_its_coordinator_would_refuse(agent, caplog):
    """So one rank that lies does not cost the others of its node their way to the coordinator."""

    class Shell:
        def __init__(self):
            self.heard = []

        def attend(self, node, deliver):
            pass

        def report(self, node, report):
            self.heard.append(report.WhichOneof("event"))

    lie = pb.Report(progressed=pb.Progressed(job="job", node="n1", highest=(1 << 63) - 1))
    left = pb.Report(node_left=pb.NodeLeft(job="job", node="n1"))

    async def story():
        shell, peer, hello = Shell(), Peer(agent), pb.AgentHello(node="n1")
        local = LocalUplink(hello, shell, print)
        remote = RemoteUplink(hello, peer.address, lambda order: None, lambda: [lie, left], peer.trust)
        while not remote.is_connected:
            await asyncio.sleep(0.01)
        for report in (lie, lie, left):
            local.report(report)
            remote.report(report)
        await asyncio.sleep(0.3)
        assert remote.is_connected
        await remote.close()
        return shell.heard

    assert asyncio.run(story()) == ["agent_hello", "node_left"]
    said = [
        record.getMessage() for record in caplog.records if "of this agent's own were refused" in record.getMessage()
    ]
    assert len(said) == 2, "one for each way"
    assert "Progressed.highest" in said[0]
    assert "were refused" not in (agent.directory / "agent.log").read_text()


def test_orders_that_cannot_be_are_not_obeyed(agent):
    peer, rng, obeyed, refused = Peer(agent), random.Random(3), [], []

    async def story():
        uplink = RemoteUplink(pb.AgentHello(node="n1"), peer.address, obeyed.append, list, peer.trust)
        uplink.on_refused = lambda: refused.append(1)
        for _ in range(300):
            uplink._obey(one_of(rng, pb.Order(job="job"), "effect", rng.choice([0.3, 0.9])))
        await uplink.close()

    asyncio.run(story())
    assert len(obeyed) > 20
    assert len(refused) > 20
    for order in obeyed:
        check(order)


def test_ranks_and_launchers_that_say_anything_at_all(agent):
    """With a token that is good: each call is answered, refused, or waits; the agent has no traceback to show."""
    rng, rank = random.Random(5), agent.register(world_size=2)
    service = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
    methods = [m for m in service.methods if m.name not in ("Launch", "Leave") and m.input_type.name != "VerbRequest"]
    bad = []
    for _ in range(20):
        for method in methods:
            request = fill(rng, method.input_type._concrete_class(), rng.choice([0.3, 0.9]))
            call = agent.channel.unary_unary(f"/{service.full_name}/{method.name}")
            try:
                call(request.SerializeToString(), timeout=0.1, metadata=((TOKEN_KEY, rank.token),))
            except grpc.RpcError as failure:
                if failure.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                    bad.append((method.name, failure.details()))
    launch = agent.channel.stream_stream(f"/{service.full_name}/Launch")
    hello = agent_pb2.LauncherHello(job="launched", node="n", nproc=1, min_nodes=1, max_nodes=1, address="127.0.0.1")
    for number in range(30):
        first = agent_pb2.LaunchRequest(hello=hello)
        if number % 2:
            fill(rng, first.hello, 0.7)
        others = [one_of(rng, agent_pb2.LaunchRequest(), "report", 0.5) for _ in range(3)]
        try:
            list(launch((each.SerializeToString() for each in (first, *others)), timeout=0.1))
        except grpc.RpcError as failure:
            if failure.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                bad.append(("Launch", failure.details()))
    assert not bad
    began = time.monotonic()
    json.loads(agent.call("GetStatus", agent_pb2.GetStatusRequest()).json)
    assert time.monotonic() - began < 10
    assert "Traceback" not in (agent.directory / "agent.log").read_text()
