"""What a foreign checkpoint must hold: `truth.pt` beside it, gathered from the live objects of the framework."""

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptsvc.format.document import join
from ckptsvc.geometry.box import Box
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.outputs import Fill, Output, OutputFile
from ckptsvc.pipeline.read import Want, read_arrays


def tensor(logical: Logical, name: str) -> torch.Tensor:
    """A logical tensor, whole."""
    meta = logical.meta(name)
    array = read_arrays(logical, logical.source, [Want(name, meta.dtype, meta.shape, Box.full(meta.shape))])[0]
    return (
        torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
        .view(getattr(torch, meta.dtype))
        .reshape(meta.shape)
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)))


def check_model(logical: Logical, truth: Mapping[str, Any], *, prefix: str = "") -> None:
    """Parameters, frozen parameters and buffers, bit for bit."""
    for name, entry in truth["params"].items():
        expected = entry["param"] if isinstance(entry, dict) else entry
        assert same(tensor(logical, join("model", prefix + name)), expected), name
    for kind in ("frozen", "buffers"):
        for name, expected in truth.get(kind, {}).items():
            assert same(tensor(logical, join("model", prefix + name)), expected), name


def check_optimizer(logical: Logical, truth: Mapping[str, Any], *, prefix: str = "") -> None:
    """Both moments and the step of every parameter, bit for bit, and what the groups say."""
    for name, entry in truth["params"].items():
        for slot in ("exp_avg", "exp_avg_sq"):
            assert same(tensor(logical, join("optimizer", "state", prefix + name, slot)), entry[slot]), (name, slot)
        assert tensor(logical, join("optimizer", "state", prefix + name, "step")).item() == entry["step"], name
    check_groups(logical.document()["optimizer"]["param_groups"], truth["groups"], prefix=prefix)


def check_groups(
    groups: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], *, prefix: str = ""
) -> None:
    """The hyperparameters that stand for every parameter."""

    def of(groups: Sequence[Mapping[str, Any]], key: str, prefix: str) -> dict[str, tuple[Any, ...]]:
        keys = ("lr", "weight_decay", "eps")
        return {prefix + n: (*(g[k] for k in keys), *g["betas"]) for g in groups for n in g[key]}

    assert of(groups, "params", "") == of(expected, "names", prefix)


def load(path: Path) -> dict[str, Any]:
    """The truth beside a checkpoint."""
    truth: dict[str, Any] = torch.load(path / "truth.pt", weights_only=True)
    return truth


def image(file: OutputFile, content: Callable[[Fill], bytes]) -> bytes:
    """The bytes of a planned file, given those of each of its fills."""
    data = bytearray(file.nbytes)
    for at, fixed in file.fixed:
        data[at : at + len(fixed)] = fixed
    for fill in file.fills:
        raw = content(fill)
        data[fill.offset : fill.offset + len(raw)] = raw
    for crc in file.crcs:
        for at in crc.at:
            data[at : at + 4] = struct.pack("<I", zlib.crc32(data[crc.start : crc.start + crc.nbytes]))
    return bytes(data)


def written(output: Output, logical: Logical, folder: Path) -> Path:
    """The files of a plan, without the engine; no casts."""

    def content(fill: Fill) -> bytes:
        meta = logical.meta(fill.name)
        assert meta.dtype == fill.dtype
        array = read_arrays(logical, logical.source, [Want(fill.name, meta.dtype, meta.shape, fill.region)])[0]
        return np.ascontiguousarray(array).tobytes()

    for file in output.files:
        data = image(file, content)
        (folder / file.key).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.key).write_bytes(data)
    for key, content in output.finish({}):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)
    return folder
