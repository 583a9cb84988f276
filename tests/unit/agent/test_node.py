"""Orders of a coordinator of another version."""

from pathlib import Path

import pytest

from ckptsvc.agent.local import Local
from ckptsvc.agent.node import Node
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.pipeline.arena import ArenaPool
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
