"""Checkpoints of other formats in tests: their tensors as torch has them, and plans of files as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness.truth import image

from ckptsvc.geometry.box import Box
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.outputs import Fill, Output
from ckptsvc.pipeline.read import Want, read_arrays


def tensor(logical: Logical, name: str, box: Box | None = None) -> torch.Tensor:
    """A tensor, or a part of it."""
    meta = logical.meta(name)
    region = box or Box.full(meta.shape)
    (array,) = read_arrays(logical, logical.source, [Want(name, meta.dtype, meta.shape, region)])
    data = bytearray(array.tobytes())
    if not data:
        return torch.empty(region.shape, dtype=getattr(torch, meta.dtype))
    return torch.frombuffer(data, dtype=getattr(torch, meta.dtype)).reshape(region.shape)


def compare(logical: Logical, truth: dict[str, Any]) -> set[str]:
    """Compare every tensor and group with what was gathered from the live job, bit for bit.

    Returns:
        the names of tensors that the truth does not have.
    """
    expected = {f"model/{name}": value for kind in ("frozen", "buffers") for name, value in truth[kind].items()}
    for name, values in truth["params"].items():
        expected[f"model/{name}"] = values["param"]
        expected |= {f"optimizer/state/{name}/{slot}": values[slot] for slot in ("exp_avg", "exp_avg_sq")}
        expected[f"optimizer/state/{name}/step"] = torch.tensor(values["step"])
    for name, value in expected.items():
        found = tensor(logical, name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        assert torch.equal(found, value), name
    groups = {frozenset(g["params"]): g for g in logical.document()["optimizer"]["param_groups"]}
    assert groups.keys() == {frozenset(group["names"]) for group in truth["groups"]}
    for group in truth["groups"]:
        found = groups[frozenset(group["names"])]
        assert all(found[key] == group[key] for key in ("lr", "weight_decay")), found
        assert tuple(found["betas"]) == tuple(group["betas"])
    return set(logical.names()) - expected.keys()


def render(output: Output, logical: Logical, folder: Path) -> None:
    """Write the files of a plan: what `convert` does, without its care."""

    def content(fill: Fill) -> bytes:
        assert isinstance(fill.region, Box)
        found = tensor(logical, fill.name, fill.region).to(getattr(torch, fill.dtype)).contiguous()
        return found.reshape(-1).view(torch.uint8).numpy().tobytes()

    for file in output.files:
        data = image(file, content)
        (folder / file.key).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.key).write_bytes(data)
    for small in output.finish({}):
        (folder / small.key).write_bytes(small.data)
