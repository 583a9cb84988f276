"""Directories of torch.distributed.checkpoint (DCP): which tensors and values there are, and where every piece lies.

    .metadata            one pickle, written last; or, of `dcp.save(use_collectives=False)`,
    __<rank>.metadata    one for each rank with that rank's pieces, which are united here
    __<rank>_<n>.distcp  files of entries: each is a whole `torch.save` file of one tensor or one object

What is said here holds for torch 2.0 to 2.13 (`torch/distributed/checkpoint/metadata.py`). Megatron-Core and
ByteCheckpoint write the same with attributes of their own, which are in `Directory.extra`. The names of tensors are
left as they are: what they mean is the business of the format's module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeGuard

import msgspec

from ckptsvc.errors import Damaged, LayoutError, NotFound
from ckptsvc.geometry.box import Box, fits
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.file import MAX_DIMS, TORCH
from ckptsvc.interop.torch_format.pickles import Allowed, Fixed, loads, stub
from ckptsvc.types import DTYPES

METADATA = ".metadata"

MAX_METADATA = 16 << 30
"""Largest metadata file, in bytes: about 400 bytes for each piece of each tensor."""

_RANKS = re.compile(r"__\d{1,9}\.metadata")


class Place(NamedTuple):
    """An entry of a file.

    Attributes:
        key: the file.
        start: first byte.
        nbytes: length in bytes.
        transforms: what was done to its bytes, the last first ("stream.zstd/1").
        raw: it is the data of a tensor itself, not a file of `torch.save`.
    """

    key: str
    start: int
    nbytes: int
    transforms: tuple[str, ...] = ()
    raw: bool = False


class Chunk(NamedTuple):
    """A stored piece of a tensor."""

    box: Box
    place: Place


class Tensor(msgspec.Struct, frozen=True):
    """A tensor: its pieces are not empty and do not overlap; whether they cover it is not checked here."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]

    def nbytes(self, box: Box) -> int:
        """Bytes of the elements of a piece."""
        return box.size * DTYPES[self.dtype].itemsize


class Directory(msgspec.Struct, frozen=True):
    """What a DCP directory holds, by the framework's own names.

    Attributes:
        tensors: every tensor.
        values: every other value: the entry is a file of `torch.save` (see `dcp_entries.read_value`).
        paths: for a name the keys under which it stood in the nested state; empty where the writer did not say.
        plain: values that are not in an entry.
        extra: attributes of the metadata beyond DCP's own, read by the restricted reader ("mcore_data").
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Place]
    paths: Mapping[str, tuple[str | int, ...]]
    extra: Mapping[str, Any]
    plain: Mapping[str, Any] = {}

    def path(self, name: str) -> tuple[str | int, ...]:
        """The keys of a name in the nested state."""
        return self.paths.get(name, (name,))


def has_metadata(names: Iterable[str]) -> bool:
    """Whether there is metadata of DCP among the names of a directory's files."""
    return any(name == METADATA or _RANKS.fullmatch(name) for name in names)


def read_directory(files: Files, prefix: str = "") -> Directory:
    """What is in a DCP directory.

    Args:
        files: where it is.
        prefix: the directory below it, "" or ending in "/".

    Raises:
        NotFound: there is no metadata, so the checkpoint was never completed.
        InvalidInput: the metadata names a class that is not on the list.
        Damaged: it contradicts itself, or a file it names is missing or too short.
    """
    names = files.children(prefix.rstrip("/"))
    metadata = [METADATA] if METADATA in names else [name for name in names if _RANKS.fullmatch(name)]
    if not metadata:
        raise NotFound(
            f"{files.url}/{prefix} has no {METADATA}",
            hint="DCP writes it last: the checkpoint was never completed, or this is not its directory",
        )
    merged = _Merge(f"{files.url}/{prefix}", prefix)
    for name in metadata:
        what = f"{files.url}/{prefix}{name}"
        merged.add(loads(files.read(prefix + name, MAX_METADATA), ALLOWED, what))
    directory = merged.done()
    check_files(files, directory)
    return directory


def check_files(files: Files, directory: Directory) -> None:
    """Check that every file that is named is there and long enough: before anything is read, not half-way.

    Raises:
        Damaged: names the first that is not.
    """
    ends: dict[str, int] = {}
    places = [chunk.place for tensor in directory.tensors.values() for chunk in tensor.chunks]
    for place in (*places, *directory.values.values()):
        ends[place.key] = max(ends.get(place.key, 0), place.start + place.nbytes)

    def look(key: str) -> None:
        try:
            size = files.size(key)
        except NotFound:
            raise Damaged(f"{files.url}/{key} is missing") from None
        if size < ends[key]:
            raise Damaged(f"{files.url}/{key} has {size} bytes, and an entry of it ends at byte {ends[key]}")

    with ThreadPoolExecutor(8, thread_name_prefix="ckptsvc-files") as pool:
        for _ in pool.map(look, sorted(ends)):
            pass


# ---- what the pickle may build ------------------------------------------------------------------------------


class _Plain(metaclass=Fixed):
    """An object of a dataclass: its attributes, which the unpickler sets without calling anything."""


class _Properties(metaclass=Fixed):
    """TensorProperties: its state is (dtype, layout, requires_grad, memory format, pinned)."""

    dtype: Any = None

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) and state else None


class _Bytes(_Plain):
    """BytesStorageMetadata: there is a value that is not a tensor."""


class _TensorData(_Plain):
    """TensorStorageMetadata."""


_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"

ALLOWED: Allowed = {
    **TORCH,
    **{(_METADATA, n): _Plain for n in ("Metadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")},
    (_METADATA, "TensorStorageMetadata"): _TensorData,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): int,
    (_SHARDED, "TensorProperties"): _Properties,
    (_SHARDED, "MEM_FORMAT_ENCODING"): int,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Plain,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Plain,
    **{(_PLANNER, name): _Plain for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")},
    (_PLANNER, "WriteItemType"): stub("WriteItemType"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Plain,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Plain,
    ("bytecheckpoint.checkpointer.meta_type", "Metadata"): _Plain,
    ("bytecheckpoint.checkpointer.meta_type", "_StorageInfo"): _Plain,
}
"""What the metadata of DCP, Megatron-Core and ByteCheckpoint names."""

_IGNORED = {"all_local_plans", "state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}


class _Merge:
    """Unites metadata of several ranks; every number is checked here."""

    def __init__(self, what: str, prefix: str) -> None:
        self._what, self._prefix = what, prefix
        self._places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
        self._tensors: dict[str, tuple[str, tuple[int, ...], dict[Box, None]]] = {}
        self._values: dict[str, None] = {}
        self._paths: dict[str, tuple[str | int, ...]] = {}
        self._extra: dict[str, Any] = {}

    def add(self, metadata: Any) -> None:
        """One file's object."""
        found = vars(metadata) if isinstance(metadata, _Plain) else {}
        entries, storage = found.get("state_dict_metadata"), found.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise Damaged(f"{self._what}: its metadata does not say what is in it")
        for name, entry in entries.items():
            if not isinstance(name, str):
                raise Damaged(f"{self._what}: a name is {str(name)[:80]!r}")
            if isinstance(entry, _TensorData):
                self._tensor(name, vars(entry))
            elif isinstance(entry, _Bytes):
                self._values[name] = None
            else:
                raise Damaged(f"{self._what}: {name[:200]} is neither a tensor nor a value")
        for index, info in storage.items():
            self._place(index, info)
        paths = found.get("planner_data")
        if isinstance(paths, dict):
            for name, path in paths.items():
                if isinstance(path, tuple) and path and all(type(key) in (str, int) for key in path):
                    self._paths.setdefault(name, path)
        self._extra.update((name, value) for name, value in found.items() if name not in _IGNORED)

    def _tensor(self, name: str, found: dict[str, Any]) -> None:
        dtype = getattr(getattr(found.get("properties"), "dtype", None), "dtype", None)
        shape, chunks = found.get("size"), found.get("chunks")
        if not isinstance(dtype, str) or dtype not in DTYPES or not _is_shape(shape) or not isinstance(chunks, list):
            raise Damaged(f"{self._what}: {name[:200]} has no type or shape that can be")
        known = self._tensors.setdefault(name, (dtype, shape, {}))
        if known[:2] != (dtype, shape):
            raise Damaged(
                f"{self._what}: {name[:200]} is {known[0]}{list(known[1])} to one rank and {dtype}{list(shape)} to"
                " another"
            )
        for chunk in chunks:
            stated = vars(chunk) if isinstance(chunk, _Plain) else {}
            origin, extent = stated.get("offsets"), stated.get("sizes")
            if not _is_shape(origin) or not _is_shape(extent) or not fits(box := Box(origin, extent), shape):
                raise Damaged(f"{self._what}: a piece of {name[:200]} {list(shape)} is at {origin!r}, of {extent!r}")
            if not box.is_empty:
                known[2][box] = None

    def _place(self, index: Any, info: Any) -> None:
        of = vars(index) if isinstance(index, _Plain) else {}
        at = vars(info) if isinstance(info, _Plain) else {}
        name, offset = of.get("fqn"), of.get("offset")
        key, start, nbytes = at.get("relative_path"), at.get("offset"), at.get("length")
        transforms = at.get("transform_descriptors") or ()
        if (
            not isinstance(name, str)
            or not (offset is None or _is_shape(offset))
            or not isinstance(key, str)
            or not (type(start) is int and type(nbytes) is int and 0 <= start < 1 << 62 and 0 <= nbytes < 1 << 62)
            or not (isinstance(transforms, list | tuple) and all(isinstance(text, str) for text in transforms))
        ):
            raise Damaged(f"{self._what}: an entry of {str(name)[:200]} is at {key!r}, {start!r}, {nbytes!r}")
        self._places.setdefault((name, offset), Place(self._prefix + key, start, nbytes, tuple(transforms)))

    def done(self) -> Directory:
        """All of it."""
        tensors = {name: self._with_places(name, *found) for name, found in self._tensors.items()}
        values: dict[str, Place] = {}
        for name in self._values:
            place = self._places.get((name, None))
            if place is None:
                raise Damaged(f"{self._what}: no file has the value {name[:200]}")
            values[name] = place
        return Directory(tensors, values, self._paths, self._extra)

    def _with_places(self, name: str, dtype: str, shape: tuple[int, ...], boxes: dict[Box, None]) -> Tensor:
        chunks = []
        for box in boxes:
            place = self._places.get((name, box.origin))
            if place is None:
                raise LayoutError(f"{self._what}: no file has {box} of {name[:200]} {list(shape)}")
            chunks.append(Chunk(box, place))
        if sum(box.size for box in boxes) > math.prod(shape):
            raise Damaged(
                f"{self._what}: pieces of {name[:200]} {list(shape)} overlap",
                hint="files of two saves may lie in one directory: remove those of the older one",
            )
        if not chunks and 0 not in shape:
            raise LayoutError(f"{self._what}: no file has anything of {name[:200]} {list(shape)}")
        return Tensor(dtype, shape, chunks)


def _is_shape(value: Any) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and len(value) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
