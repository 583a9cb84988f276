"""Checkpoints of which only what is new is written, made by the product's own writer without an agent.

saver = Saver(store)
checkpoint, written = saver.save(big_run({"w": floats(1000)}), step=1)
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import numpy as np
from harness.random_run import POOL, Held, Run, part_of

from ckptsvc.errors import InvalidInput
from ckptsvc.format.merge import ShardRecord
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.arena import Label
from ckptsvc.pipeline.catalog import Ref, open_checkpoint
from ckptsvc.pipeline.commit import commit_checkpoint
from ckptsvc.pipeline.increments import Economy, ShardWriter
from ckptsvc.pipeline.local_copy import Copy
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.references import Bases
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.pipeline.write import ShardImage, write_shard
from ckptsvc.types import TensorMeta

ALL = Economy(incremental=True, compression="zstd")
NONE = (0, -1)


class Saver:
    """A process that writes the shards of a run, its arenas, and the commits; with a disk, over that."""

    def __init__(self, store, economy: Economy = ALL, disk=None) -> None:
        self.store, self.arenas, self.committed, self.disk = store, {}, NONE, disk
        self.writer = ShardWriter(economy, POOL, self.pages)
        self.bases = Bases()

    @contextlib.contextmanager
    def pages(self, path: str, nbytes: int) -> Iterator[memoryview]:
        if len(self.arenas.get(path, b"")) < nbytes:
            raise InvalidInput("no such arena")
        yield memoryview(self.arenas[path])

    def shard(self, run, rank, step, epoch=1):
        """In its arena."""
        image, path = run.image(rank, step, epoch), self.path(rank, step)
        self.arenas[path] = image + bytes(-len(image) % mmap.PAGESIZE)
        return ShardImage(memoryview(self.arenas[path]), len(image), run.extent, epoch, step, rank)

    def path(self, rank, step):
        return f"{rank}-{step % 2}"

    def write(self, run, rank, step, epoch=1):
        shard = self.shard(run, rank, step, epoch)
        if self.disk is not None:
            return self.writer.drain(self.disk, self.store, self.keep(shard, run), self.committed, lambda: None)
        told = []
        written = self.writer.write(
            self.store, shard, path=self.path(rank, step), committed=self.committed, on_digests=told.append,
            ready=lambda nbytes: None,
        )  # fmt: skip
        assert len(told) == 1
        assert np.array_equal(told[0], written.digests)
        return written

    def keep(self, shard, run):
        """The shard as a copy on the disk."""
        written = write_shard(
            self.disk, shard.image, shard.nbytes, extent=shard.extent, epoch=shard.epoch, step=shard.step,
            rank=shard.rank, pool=POOL, on_digests=lambda digests: None,
        )  # fmt: skip
        label = Label(
            job="job", store=self.store.url, coordinator="", attempt=1, epoch=shard.epoch, step=shard.step,
            rank=shard.rank, world_size=run.world_size, nbytes=shard.nbytes, extent=shard.extent, aliases={},
        )  # fmt: skip
        return Copy(label=label, name=written.name, digests=written.digests.tobytes())

    def save(self, run, step, epoch=1):
        """Write and commit all of it; returns the checkpoint and what was written for it."""
        done = [self.write(run, rank, step, epoch) for rank in range(run.world_size)]
        records = [ShardRecord(w.name, r, w.nbytes, w.digests, w.columns, w.segments) for r, w in enumerate(done)]
        commit_checkpoint(self.store, run.info(step, epoch), records, "writer", self.bases)
        self.committed = (epoch, step)
        return open_checkpoint(self.store, Ref(epoch, step)), sum(w.stored for w in done)


def assert_holds(checkpoint, run) -> None:
    """Every tensor is what it was, and every extent verifies."""
    assert verify_checkpoint(checkpoint) == []
    wants = [
        Want(meta.name, meta.dtype, meta.shape, held.region)
        for held in run.held
        for meta in [held.meta]
        if held.region.size
    ]
    found = read_arrays(checkpoint.index, StoreSource(checkpoint), wants)
    for want, array in zip(wants, found, strict=True):
        assert array.tobytes() == part_of(run.truth[want.name], want.region).tobytes(), want.name


def big_run(tensors: dict[str, np.ndarray], extent: int = 4096, world_size: int = 1):
    """A run whose tensors, of float32, are on rank 0."""
    metas = {name: TensorMeta(name, "float32", array.shape) for name, array in tensors.items()}
    held = [Held(meta, Box.full(meta.shape), 0) for meta in metas.values()]
    return Run(dict(tensors), metas, held, world_size, extent, [b"{}"] * world_size)


def floats(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32).view(np.uint32)
