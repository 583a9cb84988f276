"""The way to a coordinator: what goes in one message; whoever else has its port learns nothing and is not obeyed."""

import asyncio
import logging

import pytest
from harness.impostor import Impostor, words

from ckptsvc.agent.coordination.uplink import BUNDLE, RemoteUplink, bundles
from ckptsvc.errors import ConfigError, StoreDenied
from ckptsvc.rpc.proof import CHALLENGE_KEY, PROOF_KEY
from ckptsvc.rpc.trust import BySecret
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
        uplink = RemoteUplink(
            hello, impostor.address, orders.append, lambda: [pb.Report(agent_hello=hello)], BySecret(SECRET)
        )
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
        RemoteUplink(pb.AgentHello(node="n1"), "10.0.0.1:7", print, list, BySecret(SECRET))

    with pytest.raises(ConfigError, match="not loopback"):
        asyncio.run(run())


def said(number, size=0):
    return pb.Report(dropped=pb.Dropped(job="j" * size, rank=number))


def ranks(message):
    return [one.dropped.rank for one in (message, *message.more) if one.HasField("dropped")]


def test_what_is_said_at_one_time_is_one_message_in_order():
    (message,) = bundles([said(n) for n in range(24)])
    assert ranks(message) == list(range(24))


def test_a_single_report_goes_as_it_is_and_nothing_as_nothing():
    assert list(bundles([said(3)])) == [said(3)]
    assert list(bundles([])) == []


def test_a_message_does_not_grow_without_end():
    messages = list(bundles([said(n, BUNDLE // 3) for n in range(5)]))
    assert [ranks(message) for message in messages] == [[0, 1], [2, 3], [4]]
    assert [ranks(message) for message in bundles([said(0, 2 * BUNDLE), said(1)])] == [[0], [1]]


def test_reports_that_are_kept_for_later_are_not_changed():
    kept = said(1)
    list(bundles([kept, said(2)]))
    assert not kept.more


def test_the_hello_comes_first_and_alone():
    async def story():
        queue = asyncio.Queue()
        for report in (hello, said(1), said(2), None):
            queue.put_nowait(report)
        return [message async for message in RemoteUplink._reports(queue)]

    hello = pb.Report(agent_hello=pb.AgentHello(node="n1"))
    first, rest = asyncio.run(story())
    assert first == hello
    assert ranks(rest) == [1, 2]
