"""`ckptsvc.load`: a checkpoint as a plain dict of tensors and values, without a process group or live objects."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ckptsvc.client.restore import StoredNames
from ckptsvc.errors import NoCheckpoint, NotFound
from ckptsvc.format.document import assemble
from ckptsvc.format.objects import decode
from ckptsvc.format.shard import objects_name
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.catalog import Checkpoint, Refused, find, open_checkpoint
from ckptsvc.pipeline.read import Want, array_sink, carrier, plan_windows, read_windows
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.storage import Store, connect
from ckptsvc.types import DTYPES


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
        store: the URL or path of a run, or a connected store.
        step: which step; None is the newest checkpoint.
        only: patterns of logical names (`fnmatch`), for example "model/*"; tensors that match none are left out.
        rank: whose plain values and own tensors to take.
        options: for the store's driver.

    Raises:
        NoCheckpoint: there is none, or none of that step.
        Damaged: its bytes do not verify.
        StoreError: the store cannot be read.
    """
    where = connect(store, options or {}) if isinstance(store, str) else store
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
    patterns = [only] if isinstance(only, str) else only
    document_name = objects_name(rank)
    own = f"@rank/{rank}/"
    stored = StoredNames(index)
    names = [
        name
        for name in stored
        if (not name.startswith("@") or name.startswith(own))
        and name != document_name
        and (patterns is None or any(fnmatch.fnmatchcase(name, p) for p in patterns))
    ]
    # A tied tensor is read once and stands under all its names.
    held = {index.resolve(name) for name in names}
    tensors = dict(zip(sorted(held), _tensors(checkpoint, sorted(held)), strict=True))
    document = decode(_tensors(checkpoint, [document_name])[0].numpy().tobytes(), document_name, strict=False)
    return assemble(document, {n: tensors[index.resolve(n)] for n in names}, lambda t: t.numpy())


def _tensors(checkpoint: Checkpoint, names: Sequence[str]) -> list[torch.Tensor]:
    metas = [checkpoint.index.meta(name) for name in names]
    arrays = [np.empty(m.shape, carrier(DTYPES[m.dtype].itemsize)) for m in metas]
    wants = [Want(m.name, m.dtype, m.shape, Box.full(m.shape)) for m in metas]
    windows = plan_windows(checkpoint.index, wants)
    source = StoreSource(checkpoint)
    ordered = [windows[key] for key in sorted(windows)]
    read_windows(ordered, source, checkpoint.index.info.extent, array_sink(arrays, wants))
    return [_as_tensor(array, meta.dtype) for array, meta in zip(arrays, metas, strict=True)]


def _as_tensor(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    wanted: torch.dtype = getattr(torch, dtype)
    if array.dtype == np.complex128:
        return torch.from_numpy(array)
    signed = array.view(np.uint8 if array.itemsize == 1 else f"<i{array.itemsize}")
    return torch.from_numpy(signed).view(wanted)
