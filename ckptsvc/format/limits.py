"""Every limit of the format, in one place. A file beyond one of them is refused, by the writer and by the
reader.

They bound what a hostile or broken file can make a reader allocate. `proto/FORMAT.md` has the same table;
each limit has a test that offers a file just beyond it.
"""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 100_000_000
"""JSON header of a shard or of an index, without the 8 bytes of length: the limit of the safetensors
library."""

MAX_ENTRY_BYTES: Final = 32_768
"""JSON of one tensor in a header, or in its list of parts: room for any name and any shape."""

MAX_NAME_BYTES: Final = 4096
"""UTF-8 bytes of a tensor name or of an alias; at least 1."""

MAX_NDIM: Final = 64
"""Dimensions of a tensor: the limit of NumPy and of torch."""

MAX_TENSOR_BYTES: Final = 2**63 - 1
"""Bytes of one logical tensor, so that every element number and byte offset fits in a signed 64-bit
integer."""

MAX_ELEMENTS: Final = 2**62
"""Elements of all tensors of a checkpoint together, so that they can be numbered through."""

MAX_RECORD_BYTES: Final = 65_536
"""A commit record, an epoch record, or the info record of a shard."""

MAX_INDEX_INFO_BYTES: Final = 16_777_216
"""The info record of an index, which lists the aliases of tied tensors."""

MAX_SHARDS: Final = 2**24
"""Shards of one checkpoint."""

MAX_OBJECTS_BYTES: Final = 268_435_456
"""One objects document."""

MAX_OBJECTS_ITEMS: Final = 2**23
"""Commas and opening brackets in an objects document: a bound on the values a reader has to allocate for
it."""

MAX_OBJECTS_DEPTH: Final = 100
"""Containers that a value of an objects document may lie in."""

MAX_REFERS: Final = 1024
"""Other checkpoints whose files one checkpoint needs."""

MAX_SEGMENT_BYTES: Final = 67_108_864
"""Bytes of a shard that are compressed as one: what a reader must hold to get at any of them."""
