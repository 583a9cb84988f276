"""Folders of Megatron's checkpoints, and what its pickles name beside tensors and plain values.

latest_checkpointed_iteration.txt    text: the iteration, or "release"; written last
iter_0000005/ or release/            one checkpoint
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ckptsvc.errors import Damaged, InvalidInput, NotFound
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import Note
from ckptsvc.interop.torch_format.file import TORCH, StoredTensor
from ckptsvc.interop.torch_format.pickles import Allowed, Stub, stub

LATEST = "latest_checkpointed_iteration.txt"

_NUMBERS = ("float32", "float64", "int64", "int32")
_FOLDER = re.compile(r"iter_(\d{7,12})|release")


def _enum(*args: Any) -> Any:
    """The value of an enumeration's member."""
    return args[0] if len(args) == 1 and type(args[0]) in (int, str) else None


_ENUMS = {
    "megatron.core.enums": ("ModelType", "Fp8Recipe", "Fp4Recipe"),
    "megatron.core.transformer.enums": (
        "ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend", "CudaGraphScope",
    ),
    "megatron.model.enums": ("LayerType", "AttnType", "AttnMaskType", "PositionEmbeddingType"),
    "megatron.core.rerun_state_machine": ("RerunMode", "RerunState"),
    "signal": ("Signals",),
}  # fmt: skip

MEGATRON: Allowed = {
    **{(module, name): _enum for module, names in _ENUMS.items() for name in names},
    ("_io", "BytesIO"): stub("BytesIO"),
    ("types", "SimpleNamespace"): stub("SimpleNamespace"),
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"): stub("OptimizerConfig"),
    ("megatron.core.rerun_state_machine", "RerunDiagnostic"): stub("RerunDiagnostic"),
    **{
        (module, name): stub(name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    },
    ("numpy", "ndarray"): stub("ndarray"),
    ("numpy", "dtype"): stub("dtype"),
    ("numpy.dtypes", "UInt32DType"): stub("UInt32DType"),
}
"""What its pickles name: enumerations in the arguments become their values, the rest stands for objects."""


def checkpoint_folder(files: Files, mark: str) -> str:
    """The folder of the checkpoint below the address, "" or ending in "/".

    Args:
        files: the address: one checkpoint, or what the trainer saves all of them to.
        mark: the beginning of a name that a checkpoint has in it.

    Raises:
        NotFound: there is none.
        InvalidInput: there are several, and nothing says which is the latest.
        Damaged: what says it is no number.
    """
    names = files.children()
    if any(name.startswith(mark) for name in names):
        return ""
    folders = [name for name in names if _FOLDER.fullmatch(name)]
    if LATEST in names:
        try:
            text = files.read(LATEST, 1000).decode().strip()
        except UnicodeDecodeError:
            raise Damaged(f"{files.url}/{LATEST} is no text") from None
        if not re.fullmatch(r"\d{1,12}|release", text):
            raise Damaged(f"{files.url}/{LATEST} says {text[:50]!r}, which is no iteration")
        folders = [text if text == "release" else f"iter_{int(text):07d}"]
    if len(folders) > 1:
        raise InvalidInput(
            f"{files.url} has {len(folders)} checkpoints and no {LATEST}", hint=f"name one, as in {folders[-1]}"
        )
    if not folders or not any(name.startswith(mark) for name in files.children(folders[0])):
        raise NotFound(f"{files.url} has no checkpoint of Megatron with {mark} in it")
    return folders[0] + "/"


def step_of(root: Mapping[Any, Any], folder: str, origin: str) -> int:
    """The training step, as the checkpoint or the name of its folder says it; 0 if neither does."""
    said = root.get("iteration")
    if type(said) is int and said >= 0:
        return said
    named = re.search(r"iter_(\d{7,12})/*$", folder or origin)
    return int(named[1]) if named else 0


def number(files: Files, value: Any) -> float | None:
    """A number, or a tensor of one element, as a number; None if it is neither."""
    if type(value) in (int, float):
        return float(value)
    if not isinstance(value, StoredTensor) or value.dtype not in _NUMBERS or math.prod(value.shape) != 1:
        return None
    key, at = value.where
    data = bytearray(value.nbytes)
    files.read_into(key, at, memoryview(data))
    return float(np.frombuffer(data, value.dtype)[0])


def is_nothing(value: Any) -> bool:
    """Whether an `_extra_state` has nothing in it: only Transformer Engine in FP8 keeps something there."""
    if isinstance(value, StoredTensor):
        return value.nbytes == 0
    if isinstance(value, Stub):
        held = [*getattr(value, "args", ()), getattr(value, "state", None)]
        return all(is_nothing(list(item) if isinstance(item, tuple) else item) for item in held)
    if isinstance(value, list | tuple):
        return all(is_nothing(item) for item in value)
    return value is None or value == b""


def with_types(value: Any) -> Any:
    """The arguments with element types as text, as in "torch.bfloat16"."""
    if isinstance(value, Stub) and isinstance(value.state, dict):
        value = value.state
    if isinstance(value, Mapping):
        return {key: with_types(item) for key, item in value.items()}
    is_type = type(value) is type(TORCH["torch", "float32"])
    return f"torch.{value.dtype}" if is_type else value


def vocabulary_note(rows: int, said: int | None) -> Iterator[Note]:
    """What to say about the rows of padding of an embedding, which are kept."""
    if said is not None and 0 < said < rows:
        yield Note(
            "warning",
            f"the vocabulary is padded: {rows} rows, of which {said} are tokens; the padding takes part in the loss of"
            " Megatron, and is kept",
        )
