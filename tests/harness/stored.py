"""Runs in a store, made of the product's own writer pieces without a session, and the command line run in this process.

run = Run("memory://x")
run.save(10, {"model/w": Tensor(array, cut="dim 0")}, world=2)
status, out, err = cli("ls", run.url)
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ckptsvc.cli.main import main
from ckptsvc.format.columns import Columns
from ckptsvc.format.index import IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.objects import encode
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box, FlatRange, Region
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.pipeline.clock import now_iso
from ckptsvc.pipeline.commit import commit_checkpoint
from ckptsvc.pipeline.write import write_shard
from ckptsvc.storage import connect
from ckptsvc.types import TensorMeta

EXTENT = 4096


class Tensor(NamedTuple):
    """A logical tensor.

    Attributes:
        array: its elements, of its NumPy type or of unsigned integers of the same size.
        dtype: name of its dtype; "" for that of the array.
        cut: "whole" (on rank 0), "dim 0", "dim 1" (one box a rank), "tiles" (a grid of 2 rows), "flat" (one range a
            rank), "bricks" (one box a rank that is no grid: for four ranks and two dimensions).
    """

    array: np.ndarray[Any, Any]
    dtype: str = ""
    cut: str = "whole"

    def meta(self, name: str) -> TensorMeta:
        return TensorMeta(name, self.dtype or str(self.array.dtype), self.array.shape)

    def regions(self, world: int) -> list[Region | None]:
        """What each rank holds of it."""
        shape = self.array.shape
        if self.cut == "whole":
            return [Box.full(shape), *([None] * (world - 1))]
        if self.cut == "flat":
            bounds = _bounds(math.prod(shape), world)
            return [FlatRange(a, b - a) for a, b in itertools.pairwise(bounds)]
        if self.cut.startswith("dim "):
            return [_slab(shape, int(self.cut[4:]), a, b) for a, b in _pairs(shape[int(self.cut[4:])], world)]
        rows, half = _pairs(shape[0], 2), world // 2
        if self.cut == "tiles":
            return [Box((a, c), (b - a, d - c)) for a, b in rows for c, d in _pairs(shape[1], half)]
        (a, b), (c, d) = rows
        return [Box((a, 0), (b - a, 1)), Box((a, 1), (b - a, shape[1] - 1)), *(
            Box((c, e), (d - c, f - e)) for e, f in ((0, 2), (2, shape[1])))]  # fmt: skip


class Outcome(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


class Run:
    """A run at an address; `options` are the driver's."""

    def __init__(self, url: str, options: Mapping[str, Any] = {}) -> None:
        self.store = connect(url, options)
        self.url = self.store.url

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor] = {},
        *,
        epoch: int = 1,
        world: int = 1,
        values: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        aliases: Mapping[str, str] = {},
        job: str = "job",
        commit: bool = True,
    ) -> str:
        """Write a checkpoint and return its name; `values` are the same for all ranks, or those of each."""
        ref = Ref(epoch, step)
        records = []
        for rank in range(world):
            held = [(t.regions(world)[rank], name, t) for name, t in tensors.items()]
            parts = [(Part(t.meta(name), region), t) for region, name, t in held if region is not None]
            document = encode(dict(values if isinstance(values, Mapping) else values[rank]))
            info = ShardInfo(run=self.url, job=job, step=step, epoch=epoch, attempt=1, rank=rank, world_size=world)
            records.append(self._write(ref, info, parts, document))
        if commit:
            self._commit(ref, records, world, job, dict(aliases))
        return ref.name

    def _write(self, ref: Ref, info: ShardInfo, parts: list[tuple[Part, Tensor]], document: bytes) -> ShardRecord:
        template = ShardTemplate([part for part, _ in parts])
        total = template.total(len(document))
        image = mmap.mmap(-1, -(-total // mmap.PAGESIZE) * mmap.PAGESIZE)
        image[: template.data_start] = template.header(info, len(document))
        for (part, tensor), entry in zip(parts, template.entries, strict=True):
            region, array = part.region, tensor.array
            flat = isinstance(region, FlatRange)
            data = array.reshape(-1)[region.start : region.stop] if flat else array[region.slices()]
            image[entry.offset : entry.offset + entry.nbytes] = data.tobytes()
        image[template.objects_offset : total] = document
        with ThreadPoolExecutor(1) as pool:
            made = write_shard(
                self.store, memoryview(image), total, extent=EXTENT, epoch=ref.epoch, step=ref.step,
                rank=info.rank, pool=pool, on_digests=lambda digests: None,
            )  # fmt: skip
        assert isinstance(made.columns, Columns)
        return ShardRecord(made.name, info.rank, made.nbytes, made.digests, made.columns)

    def _commit(self, ref: Ref, records: list[ShardRecord], world: int, job: str, aliases: dict[str, str]) -> None:
        info = IndexInfo(step=ref.step, epoch=ref.epoch, attempt=1, job=job, world_size=world, created=now_iso(),
            extent=EXTENT, aliases=aliases)  # fmt: skip
        commit_checkpoint(self.store, info, records, "writer")


def cli(*arguments: object) -> Outcome:
    """Run `ckptsvc` in this process, as if its output were a pipe."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return Outcome(status, out.getvalue(), err.getvalue())


def _slab(shape: tuple[int, ...], dim: int, start: int, stop: int) -> Box:
    origin = [0] * len(shape)
    origin[dim] = start
    return Box(tuple(origin), (*shape[:dim], stop - start, *shape[dim + 1 :]))


def _bounds(n: int, parts: int) -> list[int]:
    return [n * i // parts for i in range(parts + 1)]


def _pairs(n: int, parts: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(_bounds(n, parts)))
