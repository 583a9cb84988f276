"""Arena -> shard in the store, with a checksum for every extent on the way."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from ckptsvc.errors import Damaged, SaveFailed
from ckptsvc.format.checksum import Digests, extent_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import checkpoint_name, shard_name
from ckptsvc.format.segments import SegmentMap
from ckptsvc.format.shard import ShardInfo, decode_header, header_length
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.packing import Verdict
from ckptsvc.storage import Progress, Store

DIGESTING = threading.Semaphore(2)
"""How many shards are checksummed at a time: the cores belong to the training."""


@dataclass(frozen=True, slots=True)
class ShardImage:
    """A shard in memory: the first `nbytes` of `image`, page-aligned, whole pages."""

    image: memoryview
    nbytes: int
    extent: int
    epoch: int
    step: int
    rank: int

    @property
    def folder(self) -> str:
        """The checkpoint's folder."""
        return checkpoint_name(self.step, self.epoch)

    def bytes_of(self, first: int, last: int) -> memoryview:
        """The bytes of the extents from `first` to before `last`."""
        return self.image[first * self.extent : min(last * self.extent, self.nbytes)]

    def describe(self) -> tuple[Columns, ShardInfo]:
        """Its table and where it comes from. Raises Damaged when it has no valid header."""
        prefix = 8 + header_length(bytes(self.image[:8]))
        table = decode_header(bytes(self.image[:prefix]), self.nbytes)
        return Columns.from_table(table), table.info


@dataclass(frozen=True, slots=True)
class Written:
    """A shard that is durable.

    Attributes:
        name: of its file, or of the first of the files that were written for it.
        nbytes: of the shard.
        digests: the xxh3_64 of each extent.
        columns: its table.
        info: where it comes from.
        segments: where its bytes are, unless all are in that file.
        stored: bytes that were written for it.
        verdict: whether it was worth it to compress it, if that was a question.
    """

    name: str
    nbytes: int
    digests: Digests
    columns: Columns
    info: ShardInfo
    segments: SegmentMap | None
    stored: int
    verdict: Verdict | None = None


class _Asking:
    """Passes questions on, and remembers what was asked for most."""

    def __init__(self, ready: Progress) -> None:
        self._ready, self.most = ready, 0

    def __call__(self, nbytes: int) -> None:
        self._ready(nbytes)
        self.most = max(self.most, nbytes)


def write_shard(
    store: Store,
    image: memoryview,
    nbytes: int,
    *,
    extent: int,
    epoch: int,
    step: int,
    rank: int,
    pool: Executor,
    on_digests: Callable[[Digests], None],
    ready: Progress = lambda nbytes: None,
    digest_with: Callable[[memoryview, int], Digests] = extent_digests,
) -> Written:
    """Write the shard image in the first `nbytes` of `image` (page-aligned, whole pages) and return its table.

    Checksums and table are made beside the write (the first at 30 GB/s against 2, the second 10 us a tensor: both are
    done before it). The checksums are handed out through `on_digests` as soon as they are known: with them the snapshot
    can be restored from memory. `ready` returns when so many bytes of the image are final (see `Store.write`).
    `digest_with` computes what `extent_digests` does.

    Raises:
        Damaged: the image has no valid header.
        SaveFailed: the store took bytes without asking whether they are ready.
        StoreError: as the store raises.
    """
    shard = ShardImage(image, nbytes, extent, epoch, step, rank)
    ready(8)
    prefix = 8 + header_length(bytes(image[:8]))

    def describe() -> tuple[Columns, ShardInfo]:
        ready(prefix)
        return shard.describe()

    def digest() -> Digests:
        ready(nbytes)  # not piece by piece: the rank that copies needs the cores more
        with DIGESTING:
            found = digest_with(image[:nbytes], extent)
        on_digests(found)
        return found

    asking = _Asking(ready)
    description, digests = pool.submit(describe), pool.submit(digest)
    name = shard_name(rank, secrets.token_hex(4))
    key = f"{shard.folder}/{name}"
    try:
        store.write(key, image, nbytes, ready=asking, progress=lambda _: failpoint("in_shard"))
    finally:
        for beside in (digests, description):
            beside.exception()  # they look at the caller's memory until they have ended
    try:
        columns, info = description.result()
    except Damaged:
        store.delete(key)  # nothing will ever refer to it
        raise
    if asking.most < nbytes:  # the checksums would fit what came later
        store.delete(key)
        raise SaveFailed(f"the store {store.url} does not wait for what it writes: its driver ignores `ready`")
    return Written(name, nbytes, digests.result(), columns, info, None, nbytes)
