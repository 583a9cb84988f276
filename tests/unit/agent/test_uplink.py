import asyncio

from ckptsvc.agent.uplink import BUNDLE, RemoteUplink, bundles
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


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
        for report in (said(1), said(2), None):
            queue.put_nowait(report)
        return [message async for message in RemoteUplink._reports(pb.AgentHello(node="n1"), queue)]

    hello, rest = asyncio.run(story())
    assert hello == pb.Report(agent_hello=pb.AgentHello(node="n1"))
    assert ranks(rest) == [1, 2]
