"""The way to a coordinator whose port somebody else has: he learns nothing, and is not obeyed."""

import asyncio
import logging

import pytest
from harness.impostor import Impostor, words

from ckptsvc.agent.uplink import RemoteUplink
from ckptsvc.errors import ConfigError, StoreDenied
from ckptsvc.rpc.proof import CHALLENGE_KEY, PROOF_KEY
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

SECRET = "5" * 64
NOTHING = ()
MADE_UP = ((CHALLENGE_KEY, "0" * 64), (PROOF_KEY, "0" * 64))


@pytest.mark.parametrize("answer", [NOTHING, MADE_UP])
def test_an_impostor_learns_nothing_and_is_not_obeyed(answer, caplog):
    orders = []

    async def run():
        impostor = Impostor(answer=answer)
        await impostor.start()
        hello = pb.AgentHello(node="n1", job="the job")
        uplink = RemoteUplink(hello, impostor.address, orders.append, lambda: [pb.Report(agent_hello=hello)], SECRET)
        while len(impostor.heard) < 2:  # it has tried, and tries again
            await asyncio.sleep(0.05)
            uplink.report(pb.Report(stop_requested=pb.StopRequested(job="the job")))
        with pytest.raises(StoreDenied, match="no agent of this user"):
            await uplink.list_complete("the job")
        await uplink.close()
        await impostor.stop()
        return impostor

    caplog.set_level(logging.WARNING)
    impostor = asyncio.run(run())
    assert not orders
    assert not impostor.said
    for known in (SECRET, "n1", "the job"):
        assert known not in words(impostor)
    (warning,) = [record.getMessage() for record in caplog.records if "no agent of this user" in record.getMessage()]
    assert impostor.address in warning


def test_a_coordinator_on_another_host_is_refused():
    async def run():
        RemoteUplink(pb.AgentHello(node="n1"), "10.0.0.1:7", print, list, SECRET)

    with pytest.raises(ConfigError, match="not loopback"):
        asyncio.run(run())
