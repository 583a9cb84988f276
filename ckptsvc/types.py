"""Values that every room speaks of: dtypes, and the description of a logical tensor. No behaviour."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """An element type, by the name torch gives it.

    Attributes:
        name: torch's name without the prefix, for example "bfloat16".
        code: the number that stands for it in an index (append-only).
        itemsize: bytes per element.
        tag: its tag in a safetensors header, or "" where safetensors readers of 2024 know none; such tensors are
            stored as U8 with one more last dimension of `itemsize` (none when itemsize is 1).
    """

    name: str
    code: int
    itemsize: int
    tag: str


_DTYPES = (
    DType("bool", 0, 1, "BOOL"),
    DType("uint8", 1, 1, "U8"),
    DType("int8", 2, 1, "I8"),
    DType("int16", 3, 2, "I16"),
    DType("int32", 4, 4, "I32"),
    DType("int64", 5, 8, "I64"),
    DType("uint16", 6, 2, "U16"),
    DType("uint32", 7, 4, "U32"),
    DType("uint64", 8, 8, "U64"),
    DType("float16", 9, 2, "F16"),
    DType("bfloat16", 10, 2, "BF16"),
    DType("float32", 11, 4, "F32"),
    DType("float64", 12, 8, "F64"),
    DType("float8_e4m3fn", 13, 1, "F8_E4M3"),
    DType("float8_e5m2", 14, 1, "F8_E5M2"),
    DType("float8_e4m3fnuz", 15, 1, ""),
    DType("float8_e5m2fnuz", 16, 1, ""),
    DType("float8_e8m0fnu", 17, 1, ""),
    DType("float4_e2m1fn_x2", 18, 1, ""),
    DType("complex32", 19, 4, ""),
    DType("complex64", 20, 8, ""),
    DType("complex128", 21, 16, ""),
    DType("bits8", 22, 1, ""),
    DType("bits16", 23, 2, ""),
    DType("bits1x8", 24, 1, ""),
    DType("bits2x4", 25, 1, ""),
    DType("bits4x2", 26, 1, ""),
    *(DType(f"uint{n}", 30 + n, 1, "") for n in range(1, 8)),
    *(DType(f"int{n}", 40 + n, 1, "") for n in range(1, 8)),
)

DTYPES: dict[str, DType] = {d.name: d for d in _DTYPES}
"""Every element type that can be stored, by name."""

DTYPE_BY_CODE: dict[int, DType] = {d.code: d for d in _DTYPES}
"""The same by the code used in an index."""


class TensorMeta(NamedTuple):
    """A logical tensor: as the model names it, independent of who holds which part.

    Attributes:
        name: the JSON pointer (RFC 6901) of its place in the state tree without the leading slash, for example
            "model/layers.0.weight" or "optimizer/state/layers.0.weight/exp_avg".
        dtype: a key of `DTYPES`.
        shape: the global shape, in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
