"""A fingerprint sees other memory and other shapes, and costs no garbage collection."""

import gc

import torch

from ckptsvc.client.fingerprint import Fingerprint


def fingerprint(tensors: list[torch.Tensor]) -> Fingerprint:
    return Fingerprint(lambda: tensors, tensors, shapes=True)


def test_the_same_tensors_hold() -> None:
    tensors = [torch.zeros(3), torch.zeros(2, 2)]
    found = fingerprint(tensors)
    tensors[0].fill_(7)
    assert found.holds()


def test_another_object_memory_or_shape_does_not_hold() -> None:
    for change in (
        lambda tensors: tensors.__setitem__(0, torch.zeros(4)),
        lambda tensors: tensors.append(torch.zeros(1)),
        lambda tensors: tensors[0].set_(torch.zeros(4)),
        lambda tensors: setattr(tensors[0], "data", tensors[0].data[:2]),
        lambda tensors: setattr(tensors[0], "data", tensors[0].data.view(2, 2)),
    ):
        tensors = [torch.zeros(4), torch.zeros(2)]
        found = fingerprint(tensors)
        change(tensors)
        assert not found.holds()


def test_thousands_of_tensors_do_not_set_off_the_garbage_collector() -> None:
    tensors = [torch.zeros(1) for _ in range(20_000)]
    found = fingerprint(tensors)
    gc.collect()
    before = [generation["collections"] for generation in gc.get_stats()]
    assert found.holds()
    assert [generation["collections"] for generation in gc.get_stats()][1:] == before[1:]
