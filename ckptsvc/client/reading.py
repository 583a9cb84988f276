"""`ckptsvc.load`: a checkpoint as a plain dict of tensors and values, without a process group or live objects."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ckptsvc.client.restore import StoredNames
from ckptsvc.client.wanted import Stored
from ckptsvc.errors import NoCheckpoint, NotFound
from ckptsvc.format.document import assemble
from ckptsvc.format.objects import decode
from ckptsvc.format.shard import objects_name
from ckptsvc.geometry.box import Box
from ckptsvc.interop.formats import is_foreign, open_foreign, split_address
from ckptsvc.pipeline.catalog import Checkpoint, Refused, find, open_checkpoint
from ckptsvc.pipeline.read import Catalogue, Source, Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.storage import Store
from ckptsvc.storage.opening import open_apart


def load(
    store: str | Store,
    step: int | None = None,
    *,
    only: str | Sequence[str] | None = None,
    rank: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint as one nested dict, as it was given to `attach`, every tensor whole and on the CPU.

    Args:
        store: the URL or path of a run, or a connected store; or the address of another framework's checkpoint, as
            "hf:/path" or "deepspeed:/path/global_step100" (see `ckptsvc.interop.formats`).
        step: which step; None is the newest checkpoint.
        only: patterns of logical names (`fnmatch`), for example "model/*"; tensors that match none are left out.
        rank: whose plain values and own tensors to take.
        options: for the store's driver, or of the foreign format.

    Raises:
        InvalidInput: the foreign checkpoint is not one, or its pickle is refused.
        NoCheckpoint: there is none, or none of that step.
        Damaged: its bytes do not verify.
        StoreError: the store cannot be read.
    """
    if isinstance(store, str) and is_foreign(store):
        logical = open_foreign(store, {name: str(value) for name, value in (options or {}).items()})
        try:
            return _tree(logical, StoredNames(logical), logical.source, logical.document(), _taken(only, "@"))
        finally:
            logical.close()
    store = split_address(store)[1] if isinstance(store, str) else store
    where = open_apart(store, options) if isinstance(store, str) else store
    try:
        return read_tree(newest(where, step), only, rank)
    finally:
        if isinstance(store, str):
            where.close()


def newest(store: Store, step: int | None = None) -> Checkpoint:
    """The newest committed checkpoint (of one step).

    Raises:
        NoCheckpoint, Damaged, StoreError: as in `load`.
    """
    try:
        found = find(store, step)
    except NotFound:
        found = []
    if not found:
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise NoCheckpoint(f"{store.url} has no committed {what}", hint="`ckptsvc ls` lists what there is")
    ref, commit = found[0]
    if isinstance(commit, Refused):
        raise commit
    return open_checkpoint(store, ref, commit)


def read_tree(checkpoint: Checkpoint, only: str | Sequence[str] | None = None, rank: int = 0) -> dict[str, Any]:
    """An opened checkpoint as a nested dict; see `load`."""
    index = checkpoint.index
    rank %= index.info.world_size
    name = objects_name(rank)
    source = StoreSource(checkpoint)
    document = decode(_tensors(index, source, [name])[0].numpy().tobytes(), name, strict=False)
    taken = _taken(only, f"@rank/{rank}/")
    return _tree(index, StoredNames(index), source, document, lambda n: n != name and taken(n))


def _taken(only: str | Sequence[str] | None, own: str) -> Callable[[str], bool]:
    patterns = [only] if isinstance(only, str) else only

    def taken(name: str) -> bool:
        mine = not name.startswith("@") or name.startswith(own)
        return mine and (patterns is None or any(fnmatch.fnmatchcase(name, p) for p in patterns))

    return taken


def _tree(
    catalogue: Catalogue, stored: Stored, source: Source, document: dict[str, Any], taken: Callable[[str], bool]
) -> dict[str, Any]:
    names = list(filter(taken, stored))
    # A tied tensor is read once and stands under all its names.
    held = sorted({catalogue.resolve(name) for name in names})
    tensors = dict(zip(held, _tensors(catalogue, source, held), strict=True))
    return assemble(document, {n: tensors[catalogue.resolve(n)] for n in names}, lambda t: t.numpy())


def _tensors(catalogue: Catalogue, source: Source, names: Sequence[str]) -> list[torch.Tensor]:
    metas = [catalogue.meta(name) for name in names]
    wants = [Want(m.name, m.dtype, m.shape, Box.full(m.shape)) for m in metas]
    arrays = read_arrays(catalogue, source, wants)
    return [_as_tensor(array, meta.dtype) for array, meta in zip(arrays, metas, strict=True)]


def _as_tensor(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    wanted: torch.dtype = getattr(torch, dtype)
    if array.dtype == np.complex128:
        return torch.from_numpy(array)
    signed = array.view(np.uint8 if array.itemsize == 1 else f"<i{array.itemsize}")
    return torch.from_numpy(signed).view(wanted)
