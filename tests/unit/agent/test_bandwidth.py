"""Measuring the way between two agents, over real gRPC."""

import asyncio
import time

import grpc
import pytest
from harness.runtime import Runtime

from ckptsvc.agent.coordination.bandwidth import CHUNK, RUN, RUNS, SECONDS, Mirror, measure
from ckptsvc.errors import AgentUnavailable, InvalidInput
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.rpc.v1 import coordinator_pb2_grpc


class Servicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers a measurement as it is told to."""

    def __init__(self, reflect):
        self._reflect = reflect

    async def Measure(self, requests, context):
        async for load in self._reflect(requests):
            yield load


def measured(reflect, seconds=SECONDS, times=1):
    """What comes of so many measurements at once, and the seconds they took."""

    async def run():
        server = grpc.aio.server()
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(Servicer(reflect), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)

            async def begin(loads):
                return stub.Measure(loads)

            began = time.monotonic()
            rates = await asyncio.gather(*(measure(begin, seconds) for _ in range(times)))
            taken = time.monotonic() - began
        await server.stop(0)
        return rates, taken

    return asyncio.run(run())


def test_a_way_through_this_machine():
    (rate,), _ = measured(Mirror().reflect, seconds=60.0)
    assert rate > 1e6


def test_many_at_once_take_turns():
    rates, _ = measured(Mirror().reflect, seconds=60.0, times=6)
    assert min(rates) > 1e6


def test_a_slow_way():
    async def reflect(requests):
        async for load in requests:
            await asyncio.sleep(0.1 if load.data else 0.0)
            yield load

    (rate,), taken = measured(reflect, seconds=1.5)
    assert CHUNK / 2 < rate <= CHUNK / 0.1
    assert taken < 30


def test_a_way_on_which_nothing_comes_back_is_slower_than_one_message():
    async def reflect(requests):
        async for load in requests:
            if load.data:
                await asyncio.sleep(60)
            yield load

    (rate,), taken = measured(reflect, seconds=1.5)
    assert 0 < rate <= CHUNK
    assert taken < 30


def test_one_that_is_never_our_turn_says_nothing():
    async def reflect(requests):
        await asyncio.sleep(60)
        yield pb.Load()

    assert measured(reflect, seconds=0.3)[0] == [0.0]


def test_nor_does_one_that_ends():
    async def reflect(requests):
        yield pb.Load()

    assert measured(reflect)[0] == [0.0]


def test_nor_one_that_cannot_be_begun():
    async def begin(loads):
        raise AgentUnavailable("nobody is there")

    assert asyncio.run(measure(begin)) == 0.0


def test_more_than_a_measurement_takes_is_refused():
    async def run():
        async def requests():
            for _ in range(RUNS * RUN + 1):
                yield pb.Load(data=bytes(CHUNK))

        return [len(load.data) async for load in Mirror().reflect(requests())]

    with pytest.raises(InvalidInput):
        asyncio.run(run())


def test_a_stranger_is_refused(runtime: Runtime):
    agent = runtime.start_agent()
    address = (runtime.sockets / "ready").read_text().split("\n")[1]
    with grpc.insecure_channel(address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Measure(iter([pb.Load()]), timeout=30))
    assert caught.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
    agent.terminate()
    agent.wait(30)
