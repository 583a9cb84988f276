"""What a rank stages: the pieces of all ranks are every tensor once, and the image is what the tensors were."""

import itertools
import math
import mmap

import numpy as np
import pytest
import torch
from dense import bits
from dense import raw as raw_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.client.parts import DTYPE_NAMES, EVERYONE, Capture, Holders, LocalPart, digest
from ckptsvc.client.stage import StagePlan, choose, storable
from ckptsvc.format.shard import ShardInfo, decode_header
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.geometry.layout import SMALL_BYTES
from ckptsvc.pipeline.arena import TAIL
from ckptsvc.types import DTYPES, TensorMeta


def on_meta(meta):
    """A tensor without memory, of the dtype and shape of a logical one."""
    return torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device="meta")


@st.composite
def jobs(draw):
    """What each rank of a job holds.

    Plain tensors are held whole by every rank; others are cut along one dimension, each piece held by several ranks
    (a row of a mesh). Ranks have their parts in an order of their own.
    """
    size = draw(st.integers(1, 6))
    held = [[] for _ in range(size)]
    metas = {}
    for i in range(draw(st.integers(1, 5))):
        big = draw(st.booleans())
        dims = st.integers(1, 300) if big else st.integers(0, 9)
        shape = tuple(draw(st.lists(dims, max_size=2 if big else 3)))
        meta = metas[f"t{i}"] = TensorMeta(f"t{i}", draw(st.sampled_from(["uint8", "bfloat16", "float64"])), shape)
        splittable = draw(st.booleans())
        if draw(st.booleans()) or not shape:
            for rank in range(size):
                held[rank].append(LocalPart(meta, Box.full(shape), on_meta(meta), EVERYONE, splittable))
            continue
        pieces = draw(st.integers(1, size))
        dim = draw(st.integers(0, len(shape) - 1))
        cuts = [shape[dim] * n // pieces for n in range(pieces + 1)]
        for number, (low, high) in enumerate(itertools.pairwise(cuts)):
            box = Box(
                tuple(low if d == dim else 0 for d in range(len(shape))),
                tuple(high - low if d == dim else n for d, n in enumerate(shape)),
            )
            ranks = tuple(r for r in range(size) if r % pieces == number)
            for rank in ranks:
                tensor = on_meta(meta)[box.slices()]
                held[rank].append(LocalPart(meta, box, tensor, Holders(ranks), splittable))
    return metas, [draw(st.permutations(parts)) for parts in held]


def staged(held):
    """(rank, part, region) of all that is staged."""
    everyone = tuple(range(len(held)))
    return [
        (rank, parts[chosen.part], chosen)
        for rank, parts in enumerate(held)
        for chosen in choose(parts, rank, everyone)
    ]


class TestChoosing:
    @given(jobs())
    def test_the_pieces_of_all_ranks_are_every_element_once(self, job):
        metas, held = job
        counts = {name: np.zeros(meta.shape, np.int64) for name, meta in metas.items()}
        for _, part, chosen in staged(held):
            counts[part.meta.name][chosen.region.slices()] += 1
        for name, count in counts.items():
            assert (count == 1).all(), name

    @given(jobs())
    def test_empty_tensors_are_staged_by_somebody(self, job):
        metas, held = job
        names = {part.meta.name for _, part, _ in staged(held)}
        assert {name for name, meta in metas.items() if math.prod(meta.shape) == 0} <= names

    @given(jobs())
    def test_what_must_not_be_torn_is_whole_and_from_its_first_holder(self, job):
        _, held = job
        for rank, part, chosen in staged(held):
            if not part.splittable:
                assert chosen.region == part.region
                assert chosen.index is None
                assert part.holders.ranks is None or rank == part.holders.ranks[0]
                assert part.holders.ranks is not None or rank == 0

    @given(jobs())
    def test_the_index_cuts_the_region_out_of_the_tensor(self, job):
        _, held = job
        for _, part, chosen in staged(held):
            tensor = part.tensor if chosen.index is None else part.tensor[chosen.index]
            assert tuple(tensor.shape) == chosen.region.shape

    @given(jobs())
    @settings(deadline=None)
    def test_a_rank_knows_what_another_one_stages_of_what_both_hold(self, job):
        _, held = job
        everyone = tuple(range(len(held)))

        def pieces(parts, rank):
            return [(parts[c.part].meta.name, parts[c.part].region, c.region) for c in choose(parts, rank, everyone)]

        for one, other in itertools.permutations(everyone, 2):
            shared = [part for part in held[other] if part.holders.ranks is None or one in part.holders.ranks]
            both = {(part.meta.name, part.region) for part in shared}
            wanted = {piece for piece in pieces(held[other], other) if piece[:2] in both}
            assert set(pieces(held[one], other)) == wanted

    def test_the_work_is_divided_evenly(self):
        meta = TensorMeta("w", "float32", (1000, 100))
        held = [[LocalPart(meta, Box.full(meta.shape), on_meta(meta), EVERYONE, True)] for _ in range(4)]
        sizes = [chosen.region.size for _, _, chosen in staged(held)]
        assert sizes == [25000] * 4

    def test_small_tensors_stay_whole(self):
        rows = SMALL_BYTES // 4 - 1
        metas = [TensorMeta(f"t{i}", "float32", (rows,)) for i in range(8)]
        held = [[LocalPart(m, Box.full(m.shape), on_meta(m), EVERYONE, True) for m in metas] for _ in range(4)]
        per_rank = [0] * 4
        for rank, part, chosen in staged(held):
            assert chosen.region == part.region
            per_rank[rank] += 1
        assert per_rank == [2] * 4

    def test_flat_ranges_are_divided_too(self):
        meta = TensorMeta("w", "float32", (500, 1000))
        region = FlatRange(1000, 400_000)
        tensor = torch.empty(region.length, device="meta")
        held = [[LocalPart(meta, region, tensor, Holders((0, 1)), True)] for _ in range(2)]
        ranges = [chosen.region for _, _, chosen in staged(held)]
        assert ranges == [FlatRange(1000, 200_000), FlatRange(201_000, 200_000)]
        assert [chosen.index for _, _, chosen in staged(held)] == [(slice(0, 200_000),), (slice(200_000, 400_000),)]

    def test_without_an_agreement_a_rank_stages_all_it_holds(self):
        """As client.session does when not every rank has answered."""
        meta = TensorMeta("w", "float32", (1000, 100))
        part = LocalPart(meta, Box.full(meta.shape), on_meta(meta), EVERYONE, True)
        (chosen,) = choose([part], 3, (3,))
        assert chosen.region == part.region


STORABLE = sorted(DTYPE_NAMES.values())


def filled(shape, name, seed=0):
    """Random bits of any dtype."""
    itemsize, count = DTYPES[name].itemsize, math.prod(shape)
    data = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, max(count, 1) * itemsize, np.uint8)
    return torch.from_numpy(data).view(getattr(torch, name))[:count].view(shape)


def captured(tensors, rank=0, splittable=True):
    parts = tuple(
        LocalPart(
            TensorMeta(name, str(t.dtype)[6:], tuple(t.shape)), Box.full(t.shape), t, Holders((rank,)), splittable
        )
        for name, t in tensors.items()
    )
    return Capture(parts, {}, digest(parts, {}), None)


def raw(tensor):
    """All elements in row-major order, of any dtype."""
    return raw_of(bits(tensor))


def info(rank=0):
    return ShardInfo(run="run", job="job", step=1, epoch=1, attempt=1, rank=rank, world_size=1)


def image_of(plan, capture, objects=b"{}", arena=None, **options):
    """The shard image, and what is left to do."""
    arena = bytearray(plan.room(len(objects))) if arena is None else arena
    total, rest = plan.write(capture, memoryview(arena), "slot", info(), objects, **options)
    return memoryview(arena)[:total], rest


def stored(image):
    """Name -> bytes of every tensor in a shard image, by its header alone."""
    table = decode_header(bytes(image), len(image))
    return {e.meta.name: bytes(image[e.offset : e.offset + e.nbytes]) for e in table.entries}


class TestImage:
    @pytest.mark.parametrize("name", STORABLE)
    def test_every_dtype_is_stored_bit_for_bit(self, name):
        tensors = {"whole": filled((3, 5), name), "scalar": filled((), name, 1), "empty": filled((0, 4), name)}
        tensors["strided"] = filled((6, 4), name, 2).t()
        capture = captured(tensors)
        image, _ = image_of(StagePlan.make(capture, 0, (0,)), capture, b"[1]")
        found = stored(image)
        assert found.pop("@rank/0/objects") == b"[1]"
        assert found == {key: raw(tensor) for key, tensor in tensors.items()}

    def test_views_of_every_kind(self):
        base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
        tensors = {
            "transposed": base.permute(2, 0, 1),
            "every other": base[:, ::2],
            "inner": base[1:, 1:3, 2:4],
            "expanded": base[:1, :1].expand(3, 4, 5),
            "column": base[..., 3],
        }
        capture = captured(tensors)
        image, _ = image_of(StagePlan.make(capture, 0, (0,)), capture)
        found = stored(image)
        assert all(found[name] == raw(tensor) for name, tensor in tensors.items())

    def test_what_changes_in_place_is_staged_as_it_is_then(self):
        tensors = {"a": torch.zeros(100), "b": torch.zeros(4, 4).t()}
        capture = captured(tensors)
        plan = StagePlan.make(capture, 0, (0,))
        arena = bytearray(plan.room(2))
        for value in (1.0, 2.0):
            for tensor in tensors.values():
                tensor.fill_(value)
            image, _ = image_of(plan, capture, arena=arena)
            assert all(stored(image)[name] == raw(tensor) for name, tensor in tensors.items())

    def test_a_tensor_that_got_other_memory_is_found(self):
        tensor = torch.zeros(100)
        capture = captured({"a": tensor})
        plan = StagePlan.make(capture, 0, (0,))
        image_of(plan, capture)
        tensor.set_(torch.full((100,), 3.0))
        image, _ = image_of(plan, capture)
        assert stored(image)["a"] == raw(torch.full((100,), 3.0))

    def test_a_later_capture_of_the_same_structure_is_staged(self):
        first, second = captured({"a": torch.zeros(100)}), captured({"a": torch.ones(100)})
        plan = StagePlan.make(first, 0, (0,))
        image_of(plan, first)
        image, _ = image_of(plan, second)
        assert stored(image)["a"] == raw(torch.ones(100))

    def test_a_document_that_has_grown_fits_into_the_room(self):
        capture = captured({"a": torch.zeros(100)})
        plan = StagePlan.make(capture, 0, (0,))
        arena = bytearray(plan.room(2) + TAIL)
        objects = b"x" * (1 << 20)
        image, _ = image_of(plan, capture, objects, arena)
        assert stored(image)["@rank/0/objects"] == objects

    def test_arenas_that_are_forgotten_can_be_unmapped(self):
        capture = captured({"a": torch.zeros(100), "b": torch.zeros(3, 3).t()})
        plan = StagePlan.make(capture, 0, (0,))
        arena = mmap.mmap(-1, plan.room(2) + TAIL)
        view = memoryview(arena)
        plan.write(capture, view, "slot", info(), b"{}")
        plan.forget(but=("slot",))
        with pytest.raises(BufferError):
            arena.close()
        plan.forget(but=())
        view.release()
        arena.close()


class TestOverlap:
    def test_only_what_an_optimizer_changes_is_left_for_later(self):
        tensors = {"buffer": torch.ones(10)}
        late = {"weight": torch.ones(50), "strided": torch.ones(4, 6).t()}
        parts = (*captured(tensors, splittable=False).parts, *captured(late).parts)
        capture = Capture(parts, {}, digest(parts, {}), None)
        plan = StagePlan.make(capture, 0, (0,))
        image, rest = image_of(plan, capture, overlap=True)
        assert stored(image)["buffer"] == raw(torch.ones(10))
        assert stored(image)["weight"] == bytes(200)
        tensors["buffer"].zero_()  # may change at once
        rest()
        assert stored(image)["buffer"] == raw(torch.ones(10))
        assert stored(image)["weight"] == raw(late["weight"])
        assert stored(image)["strided"] == raw(late["strided"])

    def test_nothing_is_left_without_it(self):
        tensors = {"weight": torch.ones(50)}
        capture = captured(tensors)
        image, rest = image_of(StagePlan.make(capture, 0, (0,)), capture)
        tensors["weight"].zero_()
        rest()
        assert stored(image)["weight"] == raw(torch.ones(50))


@pytest.mark.parametrize("name", STORABLE)
def test_storable_is_the_same_memory(name):
    tensor = filled((4, 6), name)
    seen = storable(tensor)
    assert (seen.data_ptr(), seen.shape, seen.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride())
    assert seen.element_size() == tensor.element_size()


@given(jobs())
def test_the_shards_of_all_ranks_hold_every_tensor(job):
    """From the choice to the images and back."""
    metas, held = job
    truth = {name: filled(meta.shape, meta.dtype, len(name)) for name, meta in metas.items()}
    copies = {name: np.zeros(math.prod(m.shape) * DTYPES[m.dtype].itemsize, np.uint8) for name, m in metas.items()}
    for rank, parts in enumerate(held):
        live = tuple(
            LocalPart(p.meta, p.region, truth[p.meta.name][p.region.slices()], p.holders, p.splittable) for p in parts
        )
        capture = Capture(live, {}, digest(live, {}), None)
        plan = StagePlan.make(capture, rank, tuple(range(len(held))))
        arena = memoryview(bytearray(plan.room(2)))
        total, _ = plan.write(capture, arena, "slot", info(rank), b"{}")
        for entry in decode_header(bytes(arena[:total]), total).entries[:-1]:
            meta, itemsize = metas[entry.meta.name], DTYPES[entry.meta.dtype].itemsize
            whole = copies[meta.name].reshape(*meta.shape, itemsize)
            data = np.frombuffer(arena[entry.offset : entry.offset + entry.nbytes], np.uint8)
            whole[entry.region.slices()] = data.reshape(*entry.region.shape, itemsize)
    for name, tensor in truth.items():
        assert copies[name].tobytes() == raw(tensor), name
