"""A snapshot in memory: what an arena holds is looked at, whatever the agent says that it holds."""

import pytest

from ckptsvc.client.restore import _describe
from ckptsvc.errors import Damaged
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.types import TensorMeta


def image(**changes):
    template = ShardTemplate([Part(TensorMeta("w", "float32", (2,)), Box.full((2,)))])
    where = {"step": 10, "epoch": 1, "rank": 3, **changes}
    info = ShardInfo(run="file:///run", job="job", attempt=1, world_size=8, **where)
    return template.header(info, 2) + bytes(8) + b"{}"


def told_of(data):
    shard = agent_pb2.LocalShard(rank=3, bytes=len(data), extent=4096, digests=bytes(8))
    return _describe(shard, memoryview(data), (1, 10))


def test_the_shard_that_was_spoken_of_is_taken():
    assert told_of(image()).rank == 3


@pytest.mark.parametrize("changes", [{"step": 20}, {"epoch": 2}, {"rank": 4}])
def test_a_shard_of_another_step_or_rank_is_refused(changes):
    with pytest.raises(Damaged, match="rank 3: the memory holds step"):
        told_of(image(**changes))
