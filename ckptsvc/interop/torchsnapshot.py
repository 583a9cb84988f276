"""Snapshots of torchsnapshot 0.1, read.

    .snapshot_metadata    YAML (JSON since 0.1.0): {"version", "world_size", "manifest": {"<rank>/<key>/...": entry}};
                          written last
    <location>            what an entry says: the bytes of a tensor ("buffer_protocol"), or a file of torch.save; small
                          tensors share files ("batched/<id>") and have a `byte_range` in them

In paths "/" and "%" of a key are %2F and %25. Entries are containers (list, dict, OrderedDict), values in place (int,
str, bool, bytes, float), objects, and tensors: whole (Tensor), in chunks (ChunkedTensor), or the shards of one rank
(ShardedTensor; DTensor in unreleased versions, which were not at hand). Shards of all ranks are united here; of what
every rank has for itself the first rank's is taken. Options are those of `interop.dcp.read`; the optimizer knows its
parameters by number unless it was made from named ones.
"""

from __future__ import annotations

import base64
import importlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import msgspec

from ckptsvc.errors import ConfigError, Damaged, InvalidInput, NotFound
from ckptsvc.geometry.box import Box, fits
from ckptsvc.interop.dcp.metadata import Chunk, Directory, Place, Tensor, check_files
from ckptsvc.interop.dcp.read import step_of
from ckptsvc.interop.dcp.state import State
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Foreign, Note
from ckptsvc.interop.torch_format.file import MAX_DIMS
from ckptsvc.types import DTYPES

METADATA = ".snapshot_metadata"

RAW, SAVED = "buffer_protocol", "torch_save"

Path = tuple[str | int, ...]


class _Entry(msgspec.Struct):
    """Any entry of the manifest; which attributes it has depends on its type."""

    type: str = "Tensor"
    location: str = ""
    serializer: str = ""
    dtype: str = ""
    shape: list[int] = []
    byte_range: tuple[int, int] | None = None
    replicated: bool = False
    serialized_value: str = ""
    shards: list[_Shard] = []
    chunks: list[_Shard] = []


class _Shard(msgspec.Struct):
    offsets: list[int]
    sizes: list[int]
    tensor: _Entry


class _Metadata(msgspec.Struct):
    version: str
    world_size: int
    manifest: dict[str, _Entry]


def detect(files: Files) -> bool:
    """Whether there is a snapshot's metadata."""
    return not getattr(files, "only", "") and METADATA in files.children()


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NotFound: there is no metadata: the snapshot was never completed.
        ConfigError: the metadata is YAML, and the package that reads it is not installed; or an option is not known.
        CkptsvcError: as `interop.dcp.read.read`.
    """
    if METADATA not in files.children():
        raise NotFound(f"{files.url} has no {METADATA}", hint="torchsnapshot writes it last")
    manifest = _Manifest(files, _metadata(files.read(METADATA), f"{files.url}/{METADATA}"))
    state = State(files, origin, options)
    directory = manifest.directory()
    check_files(files, directory)
    state.add(directory)
    foreign = state.done()
    foreign.notes += manifest.notes
    foreign.step = step_of(foreign.plain, origin)
    return foreign


def _metadata(data: bytes, what: str) -> _Metadata:
    if not data.lstrip().startswith(b"{"):
        try:
            yaml = importlib.import_module("yaml")
        except ImportError:
            raise ConfigError(f"{what} is YAML, as before torchsnapshot 0.1.0", hint="pip install pyyaml") from None
        try:
            data = msgspec.json.encode(yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise Damaged(f"{what} is not readable: {error}") from None
    try:
        return msgspec.json.decode(data, type=_Metadata)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Damaged(f"{what} is not readable: {error}") from None


class _Manifest:
    """Unites the entries of all ranks.

    Attributes:
        notes: what a person should know.
    """

    def __init__(self, files: Files, metadata: _Metadata) -> None:
        self.notes: list[Note] = []
        self._files, self._metadata = files, metadata
        self._what = f"{files.url}/{METADATA}"
        self._shards: dict[str, list[_Shard]] = {}
        self._entries: dict[str, _Entry] = {}
        self._own = 0

    def directory(self) -> Directory:
        """The tensors and values by path."""
        for path, entry in sorted(self._metadata.manifest.items(), key=lambda item: self._rank(item[0])):
            _, _, name = path.partition("/")
            if entry.type in {"ShardedTensor", "DTensor"}:
                self._shards.setdefault(name, []).extend(entry.shards)
            elif name in self._entries:
                self._own += not entry.replicated and entry.type not in _CONTAINERS
            self._entries.setdefault(name, entry)
        if self._own:
            what = f"{self._own} tensors and values that ranks saved each for themselves; those of the first are kept"
            self.notes.append(Note("warning", what))
        tensors: dict[str, Tensor] = {}
        values: dict[str, Place] = {}
        plain: dict[str, Any] = {}
        parents = {name.rpartition("/")[0] for name in self._entries}
        for name, entry in self._entries.items():
            if entry.type in _TENSORS:
                tensors[name] = self._tensor(name, entry)
            elif entry.type == "object":
                values[name] = Place(self._location(entry), 0, -1)
            elif entry.type in _CONTAINERS:
                if name not in parents and name:
                    plain[name] = [] if entry.type == "list" else {}
            else:
                plain[name] = self._value(name, entry)
        paths = {name: self._path(name) for name in (*tensors, *values, *plain)}
        return self._sized(Directory(tensors, values, paths, {}, plain))

    def _rank(self, path: str) -> int:
        rank = path.partition("/")[0]
        if not rank.isdecimal() or int(rank) >= self._metadata.world_size:
            raise Damaged(f"{self._what}: the path {path[:200]!r} begins with no rank")
        return int(rank)

    def _path(self, name: str) -> Path:
        keys: list[str | int] = []
        above = ""
        for part in name.split("/"):
            parent = self._entries.get(above)
            in_list = parent is not None and parent.type == "list"
            if in_list and not re.fullmatch(r"\d{1,6}", part):
                raise Damaged(f"{self._what}: {name[:200]!r} is in a list, and has no number there")
            keys.append(int(part) if in_list else unquote(part))
            above = f"{above}/{part}" if above else part
        return tuple(keys)

    def _tensor(self, name: str, entry: _Entry) -> Tensor:
        if entry.type == "Tensor":
            shards = [_Shard([0] * len(entry.shape), entry.shape, entry)]
        else:
            shards = self._shards.get(name, entry.chunks)
        dtype = (entry.dtype or next((shard.tensor.dtype for shard in shards), "")).removeprefix("torch.")
        boxes = [self._box(name, shard) for shard in shards]
        shape = tuple(entry.shape) if entry.shape or entry.type == "Tensor" else _reach(boxes)
        chunks: dict[Box, Chunk] = {}
        for box, shard in zip(boxes, shards, strict=True):
            same = shard.tensor.dtype.removeprefix("torch.") == dtype and tuple(shard.tensor.shape) == box.shape
            if dtype not in DTYPES or not fits(box, shape) or not same:
                raise Damaged(
                    f"{self._what}: {name[:200]!r}, {dtype}{list(shape)}, cannot have {shard.tensor.dtype}{box}"
                )
            if not box.is_empty:
                chunks.setdefault(box, Chunk(box, self._place(name, shard.tensor, dtype, box)))
        if sum(box.size for box in chunks) > math.prod(shape):
            raise Damaged(f"{self._what}: pieces of {name[:200]!r}, {dtype}{list(shape)}, overlap")
        return Tensor(dtype, shape, list(chunks.values()))

    def _box(self, name: str, shard: _Shard) -> Box:
        numbers = (*shard.offsets, *shard.sizes)
        if not all(0 <= n < 1 << 48 for n in numbers) or not len(shard.offsets) == len(shard.sizes) <= MAX_DIMS:
            raise Damaged(f"{self._what}: a piece of {name[:200]!r} is at {shard.offsets}, of {shard.sizes}")
        return Box(tuple(shard.offsets), tuple(shard.sizes))

    def _place(self, name: str, entry: _Entry, dtype: str, box: Box) -> Place:
        first, last = entry.byte_range or (0, -1)
        if entry.byte_range is not None and not 0 <= first <= last:
            raise Damaged(f"{self._what}: {name[:200]!r} is in bytes {first} to {last}")
        if entry.serializer == RAW:
            nbytes = box.size * DTYPES[dtype].itemsize
            if entry.byte_range is not None and last - first != nbytes:
                raise Damaged(f"{self._what}: {name[:200]!r} has {last - first} bytes, and not {nbytes}")
            return Place(self._location(entry), first, nbytes, raw=True)
        if entry.serializer != SAVED:
            raise InvalidInput(f"{self._what}: {name[:200]!r} is stored as {entry.serializer!r}, which is not known")
        return Place(self._location(entry), first, last - first if entry.byte_range is not None else -1)

    def _location(self, entry: _Entry) -> str:
        if not entry.location or entry.location.startswith("/"):
            raise Damaged(f"{self._what}: an entry is at {entry.location[:200]!r}")
        return entry.location

    def _sized(self, directory: Directory) -> Directory:
        """Entries that are whole files (-1 bytes) with their lengths."""
        chunks = [chunk.place for tensor in directory.tensors.values() for chunk in tensor.chunks]
        keys = sorted({place.key for place in (*chunks, *directory.values.values()) if place.nbytes < 0})

        def size(key: str) -> int:
            try:
                return self._files.size(key)
            except NotFound:
                raise Damaged(f"{self._files.url}/{key} is missing") from None

        with ThreadPoolExecutor(8, thread_name_prefix="ckptsvc-files") as pool:
            sizes = dict(zip(keys, pool.map(size, keys), strict=True))

        def sized(place: Place) -> Place:
            return place if place.nbytes >= 0 else place._replace(nbytes=sizes[place.key] - place.start)

        tensors = {
            name: Tensor(tensor.dtype, tensor.shape, [Chunk(chunk.box, sized(chunk.place)) for chunk in tensor.chunks])
            for name, tensor in directory.tensors.items()
        }
        values = {name: sized(place) for name, place in directory.values.items()}
        return Directory(tensors, values, directory.paths, directory.extra, directory.plain)

    def _value(self, name: str, entry: _Entry) -> Any:
        text = entry.serialized_value
        try:
            match entry.type:
                case "int":
                    return int(text)
                case "str":
                    return text
                case "bool":
                    return {"True": True, "False": False}[text]
                case "bytes":
                    return base64.b64decode(text, validate=True)
                case "float":
                    return struct.unpack("<d", base64.b64decode(text, validate=True))[0]
        except (ValueError, KeyError, struct.error):
            raise Damaged(f"{self._what}: {name[:200]!r} is no {entry.type}: {text[:80]!r}") from None
        raise InvalidInput(f"{self._what}: {name[:200]!r} is an entry of the unknown type {entry.type[:80]!r}")


_TENSORS = {"Tensor", "ChunkedTensor", "ShardedTensor", "DTensor"}
_CONTAINERS = {"list", "dict", "OrderedDict"}


def _reach(boxes: Sequence[Box]) -> tuple[int, ...]:
    """The shape of a tensor of which these are all pieces."""
    if len({box.ndim for box in boxes}) != 1:
        raise Damaged("pieces of a tensor have different numbers of dimensions")
    return tuple(max(stops) for stops in zip(*(box.stop for box in boxes), strict=True))
