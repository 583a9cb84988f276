"""`.metadata` of a DCP checkpoint, as torch 2.6 to 2.13 unpickles it (see `dcp_metadata` for what is in it)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ckptsvc.interop.dcp.metadata import Place, Tensor
from ckptsvc.interop.torch_format.write import Call, Global, New, Pickler, torch_dtype

_METADATA = "torch.distributed.checkpoint.metadata"
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_STRIDED = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))


def metadata(tensors: Mapping[str, Tensor], values: Mapping[str, Place], paths: Mapping[str, tuple[Any, ...]]) -> bytes:
    """The file.

    Args:
        tensors: by DCP's name, with the places of their pieces.
        values: the places of everything else.
        paths: for every name the keys under which it stands in the nested state.
    """
    storage = {
        _index(name, chunk.box.origin, i): _info(chunk.place)
        for name, tensor in tensors.items()
        for i, chunk in enumerate(tensor.chunks)
    }
    storage |= {_index(name, None, None): _info(place) for name, place in values.items()}
    entries: dict[str, New] = {name: _entry(tensor) for name, tensor in tensors.items()}
    entries |= dict.fromkeys(values, New(Global(_METADATA, "BytesStorageMetadata")))
    nothing: dict[str, Any] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    root = {
        "state_dict_metadata": entries,
        "planner_data": dict(paths),
        "storage_data": storage,
        "storage_meta": New(Global(_METADATA, "StorageMeta"), nothing),
        "version": "1.0.0",
    }
    return Pickler().dump(New(Global(_METADATA, "Metadata"), root))


def _entry(tensor: Tensor) -> New:
    properties = (torch_dtype(tensor.dtype), _STRIDED, False, _CONTIGUOUS, False)
    chunks = [
        New(
            Global(_METADATA, "ChunkStorageMetadata"),
            {"offsets": _size(chunk.box.origin), "sizes": _size(chunk.box.shape)},
        )
        for chunk in tensor.chunks
    ]
    return New(
        Global(_METADATA, "TensorStorageMetadata"),
        {
            "properties": New(Global(_METADATA, "TensorProperties"), properties),
            "size": _size(tensor.shape),
            "chunks": chunks,
        },
    )


def _index(name: str, offset: tuple[int, ...] | None, hint: int | None) -> New:
    state = {"fqn": name, "index": hint, "offset": None if offset is None else _size(offset)}
    return New(Global(_METADATA, "MetadataIndex"), state)


def _info(place: Place) -> New:
    return New(_INFO, {"relative_path": place.key, "offset": place.start, "length": place.nbytes})


@lru_cache(1024)
def _size(shape: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (shape,))
