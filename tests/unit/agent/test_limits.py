"""What one client can ask an agent for, and what one job may take of its memory."""

import grpc
import pytest

from ckptsvc.errors import ArenaExhausted, CkptsvcError, InvalidInput
from ckptsvc.rpc.channel import error_of
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

MIB = 1 << 20


@pytest.fixture
def small(runtime, start):
    """An agent with 64 MiB for arenas."""

    def begin(**settings):
        runtime.environ |= {f"CKPTSVC_ARENA_{name.upper()}": value for name, value in settings.items()}
        return start()

    return begin


def slots(rank, nbytes):
    return len(rank.call("Provide", agent_pb2.ProvideRequest(bytes=nbytes)).slots)


class TestMemoryOfJobs:
    def test_is_limited_for_each(self, small):
        agent = small(limit="64MiB", job_limit="25%")
        one, two, other = (agent.register(job=j, rank=r, world_size=2) for j, r in (("a", 0), ("a", 1), ("b", 0)))
        assert [slots(rank, 7 * MIB) for rank in (one, two, other)] == [2, 0, 2]
        one.close()  # what a rank of the same job has left is there for the next one
        assert slots(two, 7 * MIB) == 2

    def test_that_is_more_than_one_arena_each_is_divided_while_there_are_several(self, small):
        agent = small(limit="64MiB")
        alone = agent.register(job="a")
        assert slots(alone, 21 * MIB) == 2
        alone.close()
        agent.register(job="b")
        assert slots(agent.register(job="c"), 21 * MIB) == 1  # 22 MiB are below half, 44 are not


class TestWhatIsTooLong:
    def test_is_refused_and_the_agent_goes_on(self, agent):
        rank = agent.register()
        names = {"a" * (5 << 20): "b" * (5 << 20)}
        with pytest.raises(InvalidInput, match=r"SubmitRequest\.aliases"):
            rank.call("Submit", agent_pb2.SubmitRequest(slot="x", step=1, bytes=1, aliases=names))
        with pytest.raises(CkptsvcError, match="larger than max"):
            rank.call("Abandon", agent_pb2.AbandonRequest(step=1, reason="r" * (40 << 20)))
        rank.call("Abandon", agent_pb2.AbandonRequest(step=1, reason="r" * (20 << 20)))
        with pytest.raises(ArenaExhausted):
            rank.call("Acquire", agent_pb2.AcquireRequest(step=1, bytes=1 << 41))
        assert agent.alive

    @pytest.mark.parametrize(
        "changes",
        [
            {"job": "j" * 257},
            {"node": "n" * 257},
            {"address": "a" * 257},
            {"unfit": "u" * 2001},
            {"log_dir": "/" * 4000},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_of_a_launcher_too(self, agent, changes):
        fields = {"job": "j", "node": "n", "nproc": 1, "min_nodes": 1, "max_nodes": 1, "address": "127.0.0.1"}
        hello = agent_pb2.LauncherHello(**(fields | changes))
        stub = agent_pb2_grpc.AgentServiceStub(agent.channel)
        with pytest.raises(grpc.RpcError) as failure:
            list(stub.Launch(iter([agent_pb2.LaunchRequest(hello=hello)]), timeout=10))
        assert isinstance(error_of(failure.value), InvalidInput)
