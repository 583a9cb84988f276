"""JAX's own arrays in a state tree."""

import pytest
import torch

from ckptsvc.client.state import StateTree

jax = pytest.importorskip("jax")


def test_jax_arrays_are_captured_and_come_back() -> None:
    params = {"w": jax.numpy.arange(6.0).reshape(2, 3), "b": jax.numpy.ones(3, jax.numpy.bfloat16)}
    tree = StateTree({"params": params}, 0, 1, include_rng=False)
    capture = tree.capture()
    parts = {part.meta.name: part for part in capture.parts}
    assert parts["params/b"].meta.dtype == "bfloat16"
    assert torch.equal(parts["params/w"].tensor, torch.arange(6.0).reshape(2, 3))
    for part in tree.targets({n: p.meta for n, p in parts.items()}, capture.objects).parts:
        part.tensor.copy_(parts[part.meta.name].tensor)
    values = tree.load(capture.objects)["params"]
    for name, array in params.items():
        assert (jax.dlpack.from_dlpack(values[name]) == array).all()
