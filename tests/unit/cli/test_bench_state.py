"""The states that are saved have the sizes that the benchmark promises."""

import pytest
import torch
from torch import nn

from ckptsvc.cli.benchmarks.state import (
    is_intact,
    large_state,
    local_bytes,
    parameter_sizes,
    small_state,
    tensors,
    wipe,
)


def test_two_gibibytes_are_204_tensors_of_4_kib_to_64_mib() -> None:
    sizes = parameter_sizes(2 << 30)
    assert len(sizes) * 3 == 204
    assert (min(sizes) * 2, max(sizes) * 4) == (4 << 10, 64 << 20)
    assert sum(sizes) * 10 == pytest.approx(2 << 30, rel=0.001)


@pytest.mark.parametrize("nbytes", [1 << 20, 10 << 20, 1 << 30, 5 << 30])
def test_a_state_of_any_size_has_that_size(nbytes: int) -> None:
    assert sum(parameter_sizes(nbytes)) * 10 == pytest.approx(nbytes, rel=0.001)


def test_the_large_state_has_a_weight_and_two_moments_for_each_parameter() -> None:
    tree = large_state(4 << 20)
    assert local_bytes(tree) == pytest.approx(4 << 20, rel=0.001)
    assert {t.dtype for t in tree["model"].values()} == {torch.bfloat16}
    assert {t.dtype for t in tree["optimizer"].values()} == {torch.float32}
    assert len(tree["optimizer"]) == 2 * len(tree["model"])


def test_the_small_state_is_a_module_of_small_parameters() -> None:
    tree = small_state(300)
    assert isinstance(tree["model"], nn.Module)
    sizes = [t.nbytes for _, t in tensors(tree)]
    assert len(sizes) == 300
    assert 4 << 10 <= min(sizes) < max(sizes) <= 64 << 10


@pytest.mark.parametrize("tree", [large_state(1 << 20), small_state(20)], ids=["large", "small"])
def test_a_wiped_or_damaged_state_is_not_intact(tree: dict) -> None:
    assert is_intact(tree)
    kept = {name: tensor.clone() for name, tensor in tensors(tree)}
    wipe(tree)
    assert not any(t.count_nonzero() for _, t in tensors(tree))
    assert not is_intact(tree)
    with torch.no_grad():
        for name, tensor in tensors(tree):
            tensor.copy_(kept[name])
        assert is_intact(tree)
        next(iter(tensors(tree)))[1][-1] += 1
    assert not is_intact(tree)
