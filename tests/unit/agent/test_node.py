"""Orders of a coordinator of another version."""

import asyncio
from pathlib import Path

import pytest

from ckptsvc.agent.local import UNUSED_FOR, Local
from ckptsvc.agent.node import Node
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.pipeline.arena import ArenaPool
from ckptsvc.rpc.trust import BySecret
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Metrics


@pytest.fixture
def node(tmp_path: Path) -> Node:
    local = Local("n0", ArenaPool(tmp_path, 1), Metrics("test"), None, "")  # type: ignore[arg-type]
    local.jobs["job"] = LocalJob("job", "", "file:///run")
    return Node(local, None, slots=1, linger=1.0, save_timeout=1.0)  # type: ignore[arg-type]


def test_a_reason_that_is_not_known_here_is_one_all_the_same(node: Node) -> None:
    attempt = node._local.jobs["job"].attempt(1)
    node.on_order(pb.Order(job="job", epoch_allotted=pb.EpochAllotted(attempt=1, code="new", why="no epoch today")))
    assert str(attempt.epoch_error) == "no epoch today"
    node.on_order(pb.Order(job="job", job_refused=pb.JobRefused(attempt=1, code="newer", why="not this one")))
    assert str(attempt.refused) == "not this one"


def test_an_order_that_is_not_known_here_is_passed_over(node: Node) -> None:
    order = pb.Order(job="job")
    order.MergeFromString(b"\xfa\x3e\x02\x08\x01")  # field 1007, a message
    assert order.WhichOneof("effect") is None
    node.on_order(order)
    node.on_order(pb.Order(job="another", kill=pb.Kill(attempt=1, rank=0)))


def test_a_way_that_nothing_needs_any_more_is_closed(node: Node) -> None:
    async def story() -> None:
        local = node._local
        local._trust = BySecret("secret")
        for port in (1, 2, 3):
            local.job(f"job{port}", f"127.0.0.1:{port}", "file:///run")
        local.launchers = lambda way: iter([pb.Report()] if way == "127.0.0.1:3" else [])
        lines = asyncio.all_tasks()
        for job in ("job2", "job3"):
            del local.jobs[job]
        local.hang_up_unused(100.0)
        local.standing.vacate("a fan")
        local.hang_up_unused(101.0 + UNUSED_FOR)
        assert "127.0.0.1:2" in local._uplinks, "it may hear from there that it takes jobs again"
        local.standing.vacate("")
        local.hang_up_unused(101.0 + UNUSED_FOR)
        assert local._uplinks.keys() == {"127.0.0.1:1", "127.0.0.1:3"}
        await asyncio.sleep(0.2)
        assert len(lines & asyncio.all_tasks()) == len(lines) - 1, "nobody tries to reach it any more"
        assert local.job("job2", "127.0.0.1:2", "file:///run").coordinator in local._uplinks
        local.hang_up_unused(102.0 + UNUSED_FOR)
        assert "127.0.0.1:2" in local._uplinks
        await local.close()

    asyncio.run(story())
