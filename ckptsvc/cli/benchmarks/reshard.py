"""The reshard workload: how many bytes a job really reads to bring one layout into another.

The shards of `stored` ranks are written by one process, as their agents would write them; then all ranks of the job
read what they hold in another layout, through the planner and the exchange that every restore goes through. Bytes are
counted at the store, index and commit record included.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptsvc.cli.benchmarks.machine import evict
from ckptsvc.cli.benchmarks.spec import Results, Sample, Spec
from ckptsvc.client.exchange import exchange
from ckptsvc.client.group import Group, the_group
from ckptsvc.client.reading import newest
from ckptsvc.client.restore import store_image
from ckptsvc.errors import Damaged
from ckptsvc.format.index import IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.format.objects import encode
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box, FlatRange, Region
from ckptsvc.geometry.layout import Placement, Replicate, Shard, local_box
from ckptsvc.pipeline.clock import now_iso
from ckptsvc.pipeline.commit import commit_checkpoint
from ckptsvc.pipeline.read import Want, array_sink, carrier, plan_windows
from ckptsvc.pipeline.write import write_shard
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Measured
from ckptsvc.types import DTYPES, TensorMeta

EXTENT = 1 << 20
COLUMNS = 1000
"""Columns of every matrix: no power of two, so that nothing is aligned by luck."""

Layout = Callable[[tuple[int, ...], int, int], Region]
"""(global shape, rank, number of ranks) -> what that rank holds."""


def rows(shape: tuple[int, ...], rank: int, ranks: int) -> Region:
    """Cut in dimension 0, as FSDP does."""
    return local_box(shape, (ranks,), (rank,), (Shard(0),))


def columns(shape: tuple[int, ...], rank: int, ranks: int) -> Region:
    """Cut in dimension 1, as tensor parallelism does."""
    return local_box(shape, (ranks,), (rank,), (Shard(1),))


def grid(shape: tuple[int, ...], rank: int, ranks: int) -> Region:
    """Cut in both dimensions."""
    across = next(n for n in range(int(ranks**0.5), 0, -1) if ranks % n == 0)
    placements: Sequence[Placement] = (Shard(0), Shard(1))
    return local_box(shape, (ranks // across, across), divmod(rank, across), placements)


def flat(shape: tuple[int, ...], rank: int, ranks: int) -> Region:
    """A range of the elements in their order, as ZeRO cuts."""
    size = shape[0] * shape[1]
    share = -(-size // ranks)
    start = min(rank * share, size)
    return FlatRange(start, min(share, size - start))


def everything(shape: tuple[int, ...], rank: int, ranks: int) -> Region:
    """All of it on every rank."""
    return local_box(shape, (ranks,), (rank,), (Replicate(),))


CASES: dict[str, tuple[Layout, Layout]] = {
    "dim 0": (rows, rows),
    "dim 1": (rows, columns),
    "flat": (flat, rows),
    "to flat": (rows, flat),
    "2-D": (grid, grid),
    "replicated": (rows, everything),
}
"""Stored layout -> wanted layout."""


def reshard(spec: Spec, progress: Callable[[float], None]) -> Results:
    """Every case `repeat` times: bytes read by this rank, bytes that are needed of it job-wide, seconds."""
    group = the_group()
    metas = matrices(spec.nbytes)
    results = Results(nbytes=sum(_nbytes(meta) for meta in metas))
    for number, (case, (stored, wanted)) in enumerate(CASES.items()):
        store = f"{spec.store}/{case.replace(' ', '-')}"
        if group.rank == 0:
            write_checkpoint(store, metas, stored, spec.stored)
        group.all_true(True)
        for repetition in range(spec.repeat + 1):
            if group.rank == 0 and store.startswith("file://"):
                evict(sorted(Path(store.removeprefix("file://")).glob("step-*/*")))
            group.all_true(True)
            sample = read_checkpoint(store, metas, wanted, group)
            sample["needed"] = float(results.nbytes) if group.rank == 0 else 0.0
            results.add(case, repetition, sample)
        progress((number + 1) / len(CASES))
    return results


def matrices(nbytes: int) -> list[TensorMeta]:
    """A weight and its two Adam moments, of about `nbytes` bytes together; no height is a multiple of another."""
    height = max(1, nbytes // (COLUMNS * 10))
    kinds = (("weight", "bfloat16", 0), ("exp_avg", "float32", 1), ("exp_avg_sq", "float32", 3))
    return [TensorMeta(f"model/{name}", dtype, (height + more, COLUMNS)) for name, dtype, more in kinds]


def _nbytes(meta: TensorMeta) -> int:
    return meta.shape[0] * meta.shape[1] * DTYPES[meta.dtype].itemsize


def content(meta: TensorMeta, region: Region) -> NDArray[Any]:
    """What the tensor has there: every element its own number, modulo a prime."""
    kind = carrier(DTYPES[meta.dtype].itemsize)
    if isinstance(region, FlatRange):
        numbers = np.arange(region.start, region.start + region.length)
    else:
        (top, left), (height, width) = region.origin, region.shape
        numbers = np.arange(top, top + height)[:, None] * meta.shape[1] + np.arange(left, left + width)
    made: NDArray[Any] = (numbers % 65521).astype(kind)
    return made


def write_checkpoint(url: str, metas: Sequence[TensorMeta], layout: Layout, ranks: int) -> None:
    """Write and commit a checkpoint as `ranks` ranks would."""
    store = connect(url)
    with ThreadPoolExecutor(1) as pool:
        records = []
        for rank in range(ranks):
            parts = [Part(m, region) for m in metas if not (region := layout(m.shape, rank, ranks)).is_empty]
            image, nbytes = _image(parts, rank, ranks)
            written = write_shard(
                store, image, nbytes, extent=EXTENT, epoch=1, step=1, rank=rank, pool=pool, on_digests=lambda _: None
            )
            records.append(ShardRecord(written.name, rank, nbytes, written.digests, written.columns))
    info = IndexInfo(step=1, epoch=1, attempt=0, job="bench", world_size=ranks, created=now_iso(), extent=EXTENT)
    commit_checkpoint(store, info, records, "bench")
    store.close()


def _image(parts: Sequence[Part], rank: int, ranks: int) -> tuple[memoryview, int]:
    """A shard image in page-aligned memory, and its size."""
    template, document = ShardTemplate(parts), encode({})
    total = template.total(len(document))
    image = memoryview(mmap.mmap(-1, -(-total // mmap.PAGESIZE) * mmap.PAGESIZE))
    info = ShardInfo(run="bench", job="bench", step=1, epoch=1, attempt=0, rank=rank, world_size=ranks)
    image[: template.data_start] = template.header(info, len(document))
    for part, entry in zip(parts, template.entries, strict=True):
        image[entry.offset : entry.offset + entry.nbytes] = content(part.meta, part.region).tobytes()
    image[template.objects_offset : total] = document
    return image, total


def read_checkpoint(url: str, metas: Sequence[TensorMeta], layout: Layout, group: Group) -> Sample:
    """Read this rank's part in a layout and check it; all ranks call this together.

    Raises:
        Damaged: what was read is not what was written.
    """
    read = 0

    def observe(op: str, seconds: float, nbytes: int, error: Exception | None) -> None:
        nonlocal read
        read += nbytes if op in ("read", "read_into") else 0

    regions = [(m, layout(m.shape, group.rank, group.size)) for m in metas]
    wants = [Want(m.name, m.dtype, m.shape, region) for m, region in regions if not region.is_empty]
    shapes = [w.region.shape if isinstance(w.region, Box) else (w.region.length,) for w in wants]
    arrays = [np.zeros(s, carrier(DTYPES[w.dtype].itemsize)) for s, w in zip(shapes, wants, strict=True)]
    began = time.perf_counter()
    store = Measured(connect(url), observe)
    image = store_image(newest(store))
    windows = plan_windows(image.catalogue, wants)
    exchange(group, windows, image.readable, image.source, EXTENT, array_sink(arrays, wants))
    seconds = time.perf_counter() - began
    store.close()
    for (meta, region), array in zip([r for r in regions if not r[1].is_empty], arrays, strict=True):
        if not np.array_equal(array, content(meta, region)):
            raise Damaged(f"{meta.name}: what rank {group.rank} read of {url} is not what was written")
    return {"read": float(read), "seconds": seconds}
