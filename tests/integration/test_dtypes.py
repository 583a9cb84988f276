"""Every kind of tensor goes through the service bit for bit, and lies in a file that `safetensors` opens."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import xxhash
from harness.damage import checkpoints
from harness.job import Launch
from harness.programs import raw
from harness.rank import Rank
from safetensors import safe_open

import ckptsvc
from ckptsvc.types import DTYPES


def every_kind(seed: int) -> dict[str, Any]:
    """Tensors of every dtype that can be stored, of every shape that is easily got wrong."""
    generator = torch.Generator().manual_seed(seed)

    def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Random bits, so that every not-a-number, infinity and subnormal comes up."""
        tensor = torch.empty(shape, dtype=dtype)
        count = tensor.numel() * tensor.element_size()
        noise = torch.randint(
            0, 256 if dtype is not torch.bool else 2, (count,), generator=generator, dtype=torch.uint8
        )
        return noise.view(dtype).reshape(shape)

    tree: dict[str, Any] = {name: filled(getattr(torch, name), 3, 5) for name in DTYPES}
    base = filled(torch.float32, 6, 8)
    tree |= {
        "zero-d": filled(torch.float64),
        "zero-d bfloat16": filled(torch.bfloat16),
        "empty": filled(torch.float32, 0),
        "empty 3-d": filled(torch.int16, 4, 0, 3),
        "transposed": filled(torch.float32, 5, 7).t(),
        "strided": base[::2, 1::3],
        "float8 strided": filled(torch.float8_e4m3fn, 6, 8)[:, ::2],
        "expanded": filled(torch.float32, 1, 4).expand(3, 4).clone(),
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "large": filled(torch.float32, 700, 1001),
        "name with / and ~ and @ and ü": filled(torch.int8, 2),
    }
    return tree


def bits(tensor: torch.Tensor) -> str:
    """Dtype, shape and every bit."""
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(raw(tensor))}"


class Tied(torch.nn.Module):
    """Two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


def save_and_restore(rank: Rank, store: str) -> dict[str, Any]:
    """Saves, overwrites everything, restores; then loads without live objects."""
    torch.manual_seed(0)
    tree = every_kind(1) | {"tied": Tied()}
    with ckptsvc.attach(tree, store=store, every="off") as run:
        run.step()
        run.save(wait=True)
    torch.manual_seed(1)
    fresh = every_kind(2) | {"tied": Tied()}
    with ckptsvc.attach(fresh, store=store, every="off") as run:
        values = run.state
    model = fresh["tied"]
    loaded = ckptsvc.load(store)
    flat = {name: bits(value) for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return {
        "saved": {name: bits(value) for name, value in tree.items() if name != "tied"},
        "in place": {name: bits(value) for name, value in fresh.items() if name != "tied"},
        "returned": {name: bits(values[name]) for name in fresh if name != "tied"},
        "loaded": flat,
        "still tied": model.head.weight is model.embed.weight,
        "tied": [bits(tree["tied"].embed.weight), bits(model.embed.weight), bits(loaded["tied"]["head.weight"])],
    }


def test_every_dtype_and_shape_bit_for_bit(launch: Launch, tmp_path: Path) -> None:
    store = tmp_path / "run"
    (found,) = launch.plain(1, save_and_restore, str(store)).results()
    for how in ("in place", "returned", "loaded"):
        assert found[how] == found["saved"], how
    assert found["still tied"]
    assert len(set(found["tied"])) == 1

    (folder,) = checkpoints(store)
    (shard,) = folder.glob("r*.safetensors")
    with safe_open(shard, "pt") as file:
        seen = {unescaped(key): bits(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118  it is no mapping
        described = json.loads(file.metadata()["ckptsvc.parts"])
    plain = found["saved"].keys() - described.keys()
    assert plain >= {"float32", "bfloat16", "float8_e4m3fn", "bool", "uint64", "empty 3-d", "zero-d", "strided"}
    assert {name: seen[name] for name in plain} == {name: found["saved"][name] for name in plain}
    # What safetensors has no name for lies there as plain bytes, and the file says what they are.
    assert described.keys() >= {"complex128", "float8_e5m2fnuz", "int4"}
    for name, (logical, dtype, shape, *_) in described.items():
        saved_dtype, saved_shape, digest = re.fullmatch(r"torch\.(\w+) (\(.*\)) (\w+)", found["saved"][name]).groups()
        assert (logical, dtype, str(tuple(shape)), seen[name].split()[-1]) == (name, saved_dtype, saved_shape, digest)
    # One copy of the tied parameter, under the first of its names.
    assert {key for key in seen if "tied" in key} == {"tied/embed.weight"}


def unescaped(key: str) -> str:
    """A key of the state tree from the JSON pointer to it."""
    return key.replace("~1", "/").replace("~0", "~") if "/" not in key else key
