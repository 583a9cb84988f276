"""Arrays of frameworks that are not torch: captured through DLPack, restored as tensors."""

from typing import Any

import numpy as np
import pytest
import torch

from ckptsvc.client.state import StateTree
from ckptsvc.errors import UnsupportedObject
from ckptsvc.format.objects import TensorRef


class Immutable:
    """As JAX's arrays: its memory is lent out through DLPack and is not to be written to."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.values.__dlpack__()

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self.values.__dlpack_device__()


def test_they_are_captured_where_they_are_and_restored_as_tensors() -> None:
    array = Immutable(np.arange(6, dtype=np.float32).reshape(2, 3))
    tree = StateTree({"params": {"w": array, "n": 3}}, 0, 1, include_rng=False)
    capture = tree.capture()
    (part,) = capture.parts
    assert part.meta.name == "params/w"
    assert part.tensor.data_ptr() == array.values.ctypes.data
    assert capture.objects["params"] == {"w": TensorRef("params/w"), "n": 3}
    metas = {part.meta.name: part.meta}
    (target,) = tree.targets(metas, capture.objects).parts
    assert target.tensor.data_ptr() != array.values.ctypes.data
    target.tensor.copy_(part.tensor + 1)
    values = tree.load(capture.objects)
    assert torch.equal(values["params"]["w"], torch.arange(6.0).reshape(2, 3) + 1)
    assert array.values[0, 0] == 0


def test_what_dlpack_cannot_lend_is_refused_with_its_place() -> None:
    class Closed(Immutable):
        def __dlpack__(self, **kwargs: Any) -> Any:
            raise BufferError("on another device")

    with pytest.raises(UnsupportedObject, match=r"/params/w: .*Closed cannot be read.*another device"):
        StateTree({"params": {"w": Closed(np.ones(2))}}, 0, 1, include_rng=False).capture()
