"""Values of foreign checkpoints as torch tensors, and outputs of exporters written without the care of `convert`."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptsvc.geometry.box import Box, Region
from ckptsvc.interop.outputs import Output, OutputFile
from ckptsvc.pipeline.read import Want, read_arrays


def value(logical: Any, name: str, region: Region | None = None) -> torch.Tensor:
    """A tensor of a checkpoint, or the data of a region of it."""
    meta = logical.meta(name)
    whole = region or Box.full(meta.shape)
    array = read_arrays(logical, logical.source, [Want(name, meta.dtype, meta.shape, whole)])[0]
    data = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
    shape = whole.shape if isinstance(whole, Box) else (whole.length,)
    return data.view(getattr(torch, meta.dtype)).reshape(shape)


def render(output: Output, logical: Any, root: Path) -> None:
    """Write all files of an output."""
    for file in output.files:
        (root / file.key).parent.mkdir(parents=True, exist_ok=True)
        (root / file.key).write_bytes(_rendered(file, logical))
    for small in output.finish({}):
        (root / small.key).write_bytes(small.data)


def _rendered(file: OutputFile, logical: Any) -> bytes:
    data = bytearray(file.nbytes)
    for at, fixed in file.fixed:
        data[at : at + len(fixed)] = fixed
    for fill in file.fills:
        tensor = value(logical, fill.name, fill.region).to(getattr(torch, fill.dtype)).reshape(-1)
        content = tensor.view(torch.uint8).numpy().tobytes()
        data[fill.offset : fill.offset + len(content)] = content
    for crc in file.crcs:
        for at in crc.at:
            data[at : at + 4] = struct.pack("<I", zlib.crc32(data[crc.start : crc.start + crc.nbytes]))
    return bytes(data)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, shape and element type included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
