"""What a rank puts into the copy of another one's snapshot: the very bytes of it, and never at its own cost."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from ckptsvc.client.parts import EVERYONE, Capture, Holders, LocalPart, digest
from ckptsvc.client.stage import StagePlan
from ckptsvc.client.twins import WITHOUT, Twins
from ckptsvc.format.shard import ShardInfo
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.arena import TAIL
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.types import TensorMeta

META = TensorMeta("w", "float32", (300, 1000))
EVERY_RANK = (0, 1)


class Link:
    """The arenas of an agent, mapped when they are asked for."""

    def __init__(self, room=1 << 20):
        self.room, self.mapped = room, {}

    def is_mapped(self, slot):
        return slot in self.mapped

    def arena(self, slot):
        return self.mapped.setdefault(slot, SimpleNamespace(view=memoryview(mmap.mmap(-1, self.room))))

    def unmap(self, slot):
        self.mapped.pop(slot, None)


def capture(holders=EVERYONE):
    tensor = torch.arange(300_000, dtype=torch.float32).view(META.shape)
    parts = (LocalPart(META, Box.full(META.shape), tensor, holders, True),)
    return Capture(parts, {}, digest(parts, {}), None)


def info(rank):
    return ShardInfo(run="file:///run", job="job", step=7, epoch=1, attempt=1, rank=rank, world_size=2)


def offered(twins, state, slot="a", *, overlap=False):
    """What rank 0 makes of an offer to be the twin of rank 1."""
    offer = agent_pb2.AcquireResponse(twin_slot=slot, twin_rank=1)
    plan = StagePlan.make(state, 0, EVERY_RANK)
    return twins.write(offer, state, plan, info(0), b"{}", overlap=overlap)


def mapped(link, *slots):
    for slot in slots:
        link.arena(slot)


@pytest.mark.parametrize("overlap", [False, True])
def test_it_is_the_image_that_the_other_rank_stages(overlap):
    link = Link()
    mapped(link, "a")
    twin = offered(Twins(link), capture(), overlap=overlap)
    twin.finish()
    own = memoryview(bytearray(link.room))
    total, _ = StagePlan.make(capture(), 1, EVERY_RANK).write(capture(), own, "own", info(1), b"{}")
    assert (twin.slot, twin.nbytes) == ("a", total)
    assert link.mapped["a"].view[:total] == own[:total]


def test_an_arena_that_is_not_mapped_is_for_the_next_time():
    link = Link()
    twins = Twins(link)
    assert offered(twins, capture()).slot == ""
    twins._mapping.join()
    assert offered(twins, capture()).nbytes > 0


@pytest.mark.parametrize("why", ["another state", "no room"])
def test_a_rank_that_cannot_says_so(why):
    link = Link(1 << 20 if why == "another state" else TAIL + 8192)
    mapped(link, "a")
    twin = offered(Twins(link), capture(Holders((0,)) if why == "another state" else EVERYONE))
    assert (twin.slot, twin.nbytes) == ("a", 0)


def test_trouble_with_it_costs_the_rank_nothing():
    link = Link()
    mapped(link, "a")
    link.mapped["a"].view = memoryview(bytes(link.room))  # that cannot be written to
    assert offered(Twins(link), capture())[:2] == ("", 0)


def test_nor_does_trouble_with_what_is_copied_beside_the_training(monkeypatch):
    def fails(*args):
        raise RuntimeError("the device is lost")

    link = Link()
    mapped(link, "a")
    twin = offered(Twins(link), capture(), overlap=True)
    assert twin.nbytes > 0
    monkeypatch.setattr("ckptsvc.client.stage._copy", fails)
    assert twin.finish()[:2] == ("", 0)


def test_no_more_arenas_stay_mapped_than_are_offered():
    link = Link()
    twins = Twins(link)
    for slot in "abc":
        mapped(link, slot)
        offered(twins, capture(), slot)
    assert set(link.mapped) == {"b", "c"}
    for _ in range(WITHOUT):
        offered(twins, capture(), "")
    assert link.mapped == {}
    mapped(link, "c")
    assert offered(twins, capture(), "c").nbytes > 0
