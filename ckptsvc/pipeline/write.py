"""Arena -> shard in the store, with a checksum for every extent on the way."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from ckptsvc.format.checksum import Digests, extent_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import checkpoint_name, shard_name
from ckptsvc.format.shard import ShardInfo, decode_header, header_length
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.storage import Store


@dataclass(frozen=True, slots=True)
class Written:
    """A shard that is durable."""

    name: str
    nbytes: int
    digests: Digests
    columns: Columns
    info: ShardInfo


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
) -> Written:
    """Write the shard image in the first `nbytes` of `image` (page-aligned, whole pages) and return its table.

    The checksums are computed beside the write (30 GB/s against 2: they are done long before it), and handed out
    through `on_digests` as soon as they are known: with them the snapshot can be restored from memory.

    Raises:
        Damaged: the image has no valid header.
        StoreError: as the store raises.
    """
    prefix = 8 + header_length(bytes(image[:8]))
    table = decode_header(bytes(image[:prefix]), nbytes)

    def digest() -> Digests:
        found = extent_digests(image[:nbytes], extent)
        on_digests(found)
        return found

    digests = pool.submit(digest)
    name = shard_name(rank, secrets.token_hex(4))
    try:
        key = f"{checkpoint_name(step, epoch)}/{name}"
        store.write(key, image, nbytes, progress=lambda _: failpoint("in_shard"))
    finally:
        known = digests.result()
    return Written(name, nbytes, known, Columns.from_table(table), table.info)
