"""Checkpoints in memory, as importers present them, made of arrays; and what is in a checkpoint, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ckptsvc.format.document import join
from ckptsvc.geometry.box import Box
from ckptsvc.interop.files import open_files
from ckptsvc.interop.logical import Foreign, Logical
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import TensorMeta

DTYPES = {"float32": np.float32, "float64": np.float64, "int64": np.int64, "uint16": np.uint16, "uint8": np.uint8}


def checkpoint(
    tensors: Mapping[str, np.ndarray], document: dict[str, Any] | None = None, aliases: dict[str, str] | None = None
) -> Foreign:
    """A checkpoint of tensors by their full names; bfloat16 is given as uint16."""
    foreign = Foreign("memory:test", open_files(str(Path(__file__).parent)))
    for name, array in tensors.items():
        dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
        foreign.add_value(TensorMeta(name, dtype, array.shape), np.ascontiguousarray(array).tobytes())
    foreign.plain = document or {}
    foreign.aliases = aliases or {}
    return foreign.seal()


def trained(parameters: Mapping[str, np.ndarray], seed: int = 0, step: float = 5.0) -> dict[str, np.ndarray]:
    """All tensors of a model with Adam's state, which is random."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, array in parameters.items():
        found[join("model", name)] = array
        for slot in ("exp_avg", "exp_avg_sq", "master"):
            found[join("optimizer/state", name, slot)] = rng.standard_normal(array.shape).astype(np.float32)
        found[join("optimizer/state", name, "step")] = np.array(step, np.float32)
    return found


def arrays(logical: Logical) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by their names."""
    metas = [logical.meta(name) for name in logical.names()]
    wants = [Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape)) for meta in metas]
    found = read_arrays(logical, logical.source, wants)
    kinds = [DTYPES.get(meta.dtype, np.uint16) for meta in metas]
    return {m.name: a.view(k).reshape(m.shape) for m, a, k in zip(metas, found, kinds, strict=True)}


def same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    """Assert that the same tensors are in both, bit for bit."""
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name
