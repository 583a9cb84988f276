"""What pickles name for numpy arrays and scalars: states of random number generators have them.

An array is pickled as `_reconstruct(ndarray, (0,), b"b")` and a state (version, shape, dtype, Fortran order, bytes), a
dtype as `dtype("f8", False, True)` and a state whose second item is the byte order, a scalar as `scalar(dtype, bytes)`.
Only types of plain numbers are made; everything else is refused.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import Damaged

KINDS = "biufc"
"""Kinds of element types: bool, integers, floats, complex."""


class PickledDtype:
    """A dtype; its byte order follows as its state."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self._code, self._order = code, "|"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Damaged("a numpy dtype has a state that is none")
        self._order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """The real one."""
        code = self._code
        if not isinstance(code, str) or len(code) > 4 or code[:1] not in KINDS or not code[1:].isdigit():
            raise Damaged(f"a numpy array has elements of type {code[:80] if isinstance(code, str) else type(code)!r}")
        try:
            return np.dtype(self._order + code)
        except TypeError:
            raise Damaged(f"a numpy array has elements of type {code!r}") from None


class PickledArray:
    """An array; all of it follows as its state.

    Attributes:
        array: the real one.
    """

    array: NDArray[Any]

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        match state:
            case (_, tuple() as shape, PickledDtype() as kind, fortran, bytes() as data):
                self.array = _array(shape, kind.dtype(), data, "F" if fortran is True else "C")
            case _:
                raise Damaged("a numpy array has a state that is none")


def scalar(kind: Any, data: Any = b"") -> np.generic[Any]:
    """A scalar of a pickle."""
    if not isinstance(kind, PickledDtype) or not isinstance(data, bytes):
        raise Damaged("a numpy scalar that is none")
    return cast("np.generic[Any]", _array((), kind.dtype(), data, "C")[()])


def _array(shape: tuple[Any, ...], dtype: np.dtype[Any], data: bytes, order: Any) -> NDArray[Any]:
    if len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise Damaged("a numpy array has a shape that cannot be")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise Damaged(f"a numpy array of shape {list(shape)} and type {dtype} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))


_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")

NUMPY = {
    ("numpy", "dtype"): PickledDtype,
    ("numpy", "ndarray"): PickledArray,
    **{(module, "_reconstruct"): PickledArray for module in _MODULES},
    **{(module, "scalar"): scalar for module in _MODULES},
}
"""(module, name) -> what stands for it."""
