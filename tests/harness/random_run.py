"""Checkpoints to store: random tensors, cut into regions in random ways, spread over the shards of random ranks.

run = draw(runs())            # what is to be stored, with the truth
ref = run.store(store)        # shards, index, commit record
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ckptsvc.format.index import IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.pipeline.catalog import Ref, take_epoch
from ckptsvc.pipeline.commit import commit_checkpoint
from ckptsvc.pipeline.read import carrier
from ckptsvc.pipeline.write import write_shard
from ckptsvc.storage import connect
from ckptsvc.types import DTYPES, TensorMeta

DTYPE_NAMES = ["uint8", "int16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e8m0fnu"]
POOL = ThreadPoolExecutor(2)
_names = itertools.count()


def memory_store():
    """An empty store of its own."""
    return connect(f"memory://pipeline-{next(_names)}")


@dataclass
class Held:
    """A region of a tensor that a rank stores."""

    meta: TensorMeta
    region: Box | FlatRange
    rank: int


@dataclass
class Run:
    """What a job stores."""

    truth: dict[str, np.ndarray]
    metas: dict[str, TensorMeta]
    held: list[Held]
    world_size: int
    extent: int
    objects: list[bytes]

    def image(self, rank, step=10, epoch=1, job="job"):
        """The shard of a rank."""
        mine = [held for held in self.held if held.rank == rank]
        template = ShardTemplate([Part(held.meta, held.region) for held in mine])
        document = self.objects[rank]
        image = bytearray(template.total(len(document)))
        info = ShardInfo(run="run", job=job, step=step, epoch=epoch, attempt=1, rank=rank, world_size=self.world_size)
        image[: template.data_start] = template.header(info, len(document))
        for held, entry in zip(mine, template.entries, strict=True):
            data = part_of(self.truth[held.meta.name], held.region).tobytes()
            image[entry.offset : entry.offset + entry.nbytes] = data
        image[template.objects_offset :] = document
        return image

    def write(self, store, rank, step=10, epoch=1, job="job"):
        """Write a rank's shard; returns its record for the index."""
        image = self.image(rank, step, epoch, job)
        written = write_shard(
            store,
            memoryview(image),
            len(image),
            extent=self.extent,
            epoch=epoch,
            step=step,
            rank=rank,
            pool=POOL,
            on_digests=lambda digests: None,
        )
        return ShardRecord(written.name, rank, written.nbytes, written.digests, written.columns)

    def info(self, step=10, epoch=1, job="job", aliases=None):
        return IndexInfo(
            step=step,
            epoch=epoch,
            attempt=1,
            job=job,
            world_size=self.world_size,
            created="2026-01-01T00:00:00Z",
            extent=self.extent,
            aliases=aliases or {},
        )

    def store(self, store, step=10, epoch=1, job="job", writer="writer"):
        """Write and commit all of it."""
        shards = [self.write(store, rank, step, epoch, job) for rank in range(self.world_size)]
        commit_checkpoint(store, self.info(step, epoch, job), shards, writer)
        return Ref(epoch, step)


def part_of(array, region):
    """A region of a dense array."""
    if isinstance(region, FlatRange):
        return array.reshape(-1)[region.start : region.start + region.length]
    return array[region.slices()]


def small_run(world_size=2, extent=64):
    """One tensor of 100 rows, cut evenly."""
    meta = TensorMeta("w", "float32", (100, 3))
    truth = np.arange(300, dtype=np.uint32).reshape(100, 3)
    rows = 100 // world_size
    held = [Held(meta, Box((rank * rows, 0), (rows, 3)), rank) for rank in range(world_size)]
    objects = [b"{}" * (rank + 1) for rank in range(world_size)]
    return Run({"w": truth}, {"w": meta}, held, world_size, extent, objects)


def fence(store, job="other"):
    """Another job takes the run over."""
    return take_epoch(store, job, 1, "owner", "2026-01-01T00:00:00Z")


shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(1, 90), min_size=1, max_size=1).map(tuple),
    st.lists(st.integers(1, 14), min_size=2, max_size=2).map(tuple),
    st.lists(st.integers(1, 7), min_size=3, max_size=4).map(tuple),
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple),
)


@st.composite
def regions(draw, shape, kinds=("box", "flat")):
    """Any region of a tensor."""
    if draw(st.sampled_from(kinds)) == "flat":
        size = math.prod(shape)
        start = draw(st.integers(0, size))
        return FlatRange(start, draw(st.integers(0, size - start)))
    low = [draw(st.integers(0, n)) for n in shape]
    return Box(tuple(low), tuple(draw(st.integers(0, n - o)) for o, n in zip(low, shape, strict=True)))


@st.composite
def partitions(draw, shape):
    """Regions that together are the tensor: boxes cut again and again, or flat ranges; some may overlap."""
    size = math.prod(shape)
    if size == 0 or not shape:
        return [Box.full(shape)]
    if draw(st.booleans()):
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
        return [FlatRange(a, b - a) for a, b in itertools.pairwise(cuts)]
    boxes = [Box.full(shape)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[dim]))
        for low, high in ((0, at), (at, box.shape[dim])):
            origin = (*box.origin[:dim], box.origin[dim] + low, *box.origin[dim + 1 :])
            boxes.append(Box(origin, (*box.shape[:dim], high - low, *box.shape[dim + 1 :])))
        boxes = [b for b in boxes if not b.is_empty]
    if draw(st.booleans()):
        boxes.append(draw(regions(shape, kinds=("box",))))  # stored twice: by two ranks, say
    return list(dict.fromkeys(boxes))


@st.composite
def runs(draw):
    """What a job of one to four ranks stores."""
    world_size = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    truth, metas, held = {}, {}, []
    for i in range(draw(st.integers(1, 4))):
        name, dtype, shape = f"t{i}", draw(st.sampled_from(DTYPE_NAMES)), draw(shapes)
        itemsize = DTYPES[dtype].itemsize
        data = rng.integers(0, 256, math.prod(shape) * itemsize, np.uint8)
        truth[name] = np.frombuffer(data.tobytes(), carrier(itemsize)).reshape(shape)
        metas[name] = TensorMeta(name, dtype, shape)
        for region in draw(partitions(shape)):
            held.append(Held(metas[name], region, draw(st.integers(0, world_size - 1))))
    extent = draw(st.sampled_from([16, 64, 100, 256, 1 << 20]))
    objects = [rng.bytes(draw(st.integers(1, 200))) for _ in range(world_size)]
    return Run(truth, metas, held, world_size, extent, objects)
