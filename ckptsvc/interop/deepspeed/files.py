"""The files of a DeepSpeed checkpoint: their names, what their pickles hold, every number of it checked.

    latest                                                text: the tag
    <tag>/mp_rank_{MP}_model_states.pt                    stages 0 to 2, one for each model-parallel rank
    <tag>/[bf16_]zero_pp_rank_{DP}_mp_rank_{MP}_optim_states.pt     "pp" is the data-parallel rank
    <tag>/zero_pp_rank_{DP}_mp_rank_{MP}_model_states.pt  stage 3
    <tag>/layer_{LL}[-model_{TP}]-model_states.pt         weights of a pipeline, one file for each layer

All are files of torch.save. Source: DeepSpeed 0.19.8, `runtime/engine.py`, and checkpoints written by it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format.document import join
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.file import StoredTensor, read_torch
from ckptsvc.interop.torch_format.pickles import MAX_DEPTH, Allowed, Stub, stub
from ckptsvc.types import DTYPES

Shape = tuple[int, ...]

MAX_RANK = 1 << 20
"""Largest rank that a file name may carry."""

READERS = 8
"""Files whose pickles are read at the same time."""

ALLOWED: Allowed = {
    (module, name): stub(name)
    for module, name in (
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"),
    )
}
"""What DeepSpeed's pickles name beyond torch's own."""

_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,7})_)?mp_rank_(\d{1,7})_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,7})_mp_rank_(\d{1,7})_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d{1,7})(?:-model_(\d{1,7}))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_.*")


class Tag(msgspec.Struct, frozen=True):
    """The files of one checkpoint.

    Attributes:
        name: the directory's name, "" if the files lie in the given directory itself.
        models: (data-parallel rank, model-parallel rank) -> file; the data-parallel rank is -1 below stage 3.
        optims: the same of the optimizer's files.
        layers: (layer, tensor-parallel rank) -> file.
    """

    name: str
    models: dict[tuple[int, int], str]
    optims: dict[tuple[int, int], str]
    layers: dict[tuple[int, int], str]

    @property
    def is_stage3(self) -> bool:
        """Whether the parameters themselves are partitioned."""
        return any(dp >= 0 for dp, _ in self.models)


def find_tag(files: Files, wanted: str = "", latest: str = "latest") -> str:
    """The directory of a checkpoint below the given one: "" for that itself, the wanted one, or the latest.

    Raises:
        InvalidInput: there is no checkpoint of DeepSpeed.
    """
    names = files.children()
    if wanted:
        return wanted.strip("/")
    if any(_MODEL.fullmatch(name) for name in names):
        return ""
    if latest in names:
        tag = files.read(latest, 4096).decode("utf-8", "replace").strip()
        if not tag or "/" in tag or tag.startswith("."):
            raise Damaged(f"{files.url}/{latest} names {tag[:200]!r}, which is no directory beside it")
        return tag
    raise InvalidInput(
        f"{files.url} has neither model states of DeepSpeed nor a file {latest!r} that says where they are",
        hint="name the directory of the tag, such as global_step100",
    )


def list_tag(files: Files, name: str) -> Tag:
    """The files of a checkpoint, by their ranks.

    Raises:
        InvalidInput: there are none, or it is of a kind that is not read.
        Damaged: files are missing, or two claim one rank.
    """
    tag = Tag(name, {}, {}, {})
    for child in files.children(name):
        key = f"{name}/{child}" if name else child
        if _EXPERT.fullmatch(child):
            raise InvalidInput(f"{files.url}/{key} holds experts of DeepSpeed-MoE, which are not read")
        for pattern, found in ((_MODEL, tag.models), (_OPTIM, tag.optims), (_LAYER, tag.layers)):
            if match := pattern.fullmatch(child):
                default = "-1" if pattern is _MODEL else "0"
                ranks = (int(match[1] or default), int(match[2] or 0))
                if ranks in found:
                    raise Damaged(f"{files.url}/{key} and {found[ranks]} are of the same rank")
                found[ranks] = key
    if not tag.models:
        raise InvalidInput(f"{files.url}/{name} has no model states of DeepSpeed")
    for kind, grid in (("model", tag.models), ("optim", tag.optims)):
        _check_grid(f"{files.url}/{name}", kind, grid)
    if tag.is_stage3 and tag.optims and set(tag.models) != set(tag.optims):
        odd = min(set(tag.models) ^ set(tag.optims))
        raise Damaged(f"{files.url}/{name}: dp rank {odd[0]}, mp rank {odd[1]} has model or optimizer states only")
    if not tag.is_stage3 and tag.optims and {mp for _, mp in tag.models} != {mp for _, mp in tag.optims}:
        raise Damaged(f"{files.url}/{name}: model and optimizer states are not of the same model-parallel ranks")
    return tag


def _check_grid(where: str, kind: str, grid: Mapping[tuple[int, int], str]) -> None:
    if not grid:
        return
    first = min(dp for dp, _ in grid)
    dps, mps = max(dp for dp, _ in grid) + 1, max(mp for _, mp in grid) + 1
    if max(dps, mps) > MAX_RANK or len(grid) != (dps - first) * mps:
        for dp in range(first, min(dps, MAX_RANK)):
            for mp in range(min(mps, MAX_RANK)):
                if (dp, mp) not in grid:
                    of = f"data-parallel rank {dp}, " if dp >= 0 else ""
                    raise Damaged(f"{where} lacks the {kind} states of {of}model-parallel rank {mp}")
        raise Damaged(f"{where} has {kind} states of stage 3 and of a lower stage")


# ---- what the pickles hold ------------------------------------------------------------------------------------


class Pickled(NamedTuple):
    """The object in a file, with the file's name for messages."""

    where: str
    root: Mapping[Any, Any]

    def mapping(self, name: str, *, optional: bool = False) -> Mapping[Any, Any]:
        """An entry that is a dict; where optional, an empty one if it is missing or None."""
        value = self.root.get(name)
        if value is None and optional:
            return {}
        if not isinstance(value, Mapping):
            raise Damaged(f"{self.where}: {name!r} is {_kind(value)}, not a dict")
        return value

    def sequence(self, name: str) -> Sequence[Any]:
        """An entry that is a list; empty if it is missing or None."""
        value = self.root.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise Damaged(f"{self.where}: {name!r} is {_kind(value)}, not a list")
        return value

    def number(self, name: str, default: int) -> int:
        """An entry that is a whole number, not negative."""
        value = self.root.get(name)
        if value is None:
            return default
        value = enum_value(value)
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise Damaged(f"{self.where}: {name!r} is {str(value)[:80]!r}, not a number")
        return value


def read_pickle(files: Files, key: str) -> Pickled:
    """The object in a file of torch.save, which must be a dict."""
    where = f"{files.url}/{key}"
    root = read_torch(files, key, allowed=ALLOWED).root
    if not isinstance(root, Mapping):
        raise Damaged(f"{where} holds {_kind(root)}, not a dict")
    return Pickled(where, root)


def read_pickles(files: Files, keys: Sequence[str]) -> list[Pickled]:
    """The objects in several files, read at the same time: on a parallel file system each takes a while to answer."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda key: read_pickle(files, key), keys))


def enum_value(value: Any) -> Any:
    """What an enumeration member stands for; anything else as it is."""
    return value.args[0] if isinstance(value, Stub) and value.args else value


class ModelState(msgspec.Struct, frozen=True):
    """What a file of model states says.

    Attributes:
        pickled: all of it.
        shapes: parameter -> shape, one dict for each flat group, in the order of the flat group.
        module: name -> tensor of the state dict; None of a pipeline.
        objects: names in the state dict that are no tensors.
        frozen_shapes, frozen: parameters without gradients and what this rank has of them.
        shared: further names of parameters -> the name that is stored.
        buffers: names of buffers.
        info: how the parameters are cut, where somebody wrote it down.
    """

    pickled: Pickled
    shapes: list[dict[str, Shape]]
    module: dict[str, StoredTensor] | None
    objects: list[str]
    frozen_shapes: dict[str, Shape]
    frozen: dict[str, StoredTensor]
    shared: dict[str, str]
    buffers: list[str]
    info: Mapping[Any, Any]


def read_model(files: Files, key: str) -> ModelState:
    """The model states in a file."""
    pickled = read_pickle(files, key)
    where = pickled.where
    module = pickled.root.get("module")
    if module is not None and not isinstance(module, Mapping):
        raise Damaged(f"{where}: 'module' is {_kind(module)}, not a dict")
    tensors = None if module is None else {str(n): t for n, t in module.items() if isinstance(t, StoredTensor)}
    shared = pickled.mapping("shared_params", optional=True)
    return ModelState(
        pickled,
        [_shapes(group, where) for group in pickled.sequence("param_shapes")],
        tensors,
        [str(n) for n, t in (module or {}).items() if not isinstance(t, StoredTensor) and t is not None],
        _shapes(pickled.mapping("frozen_param_shapes", optional=True), where),
        _tensors(pickled.mapping("frozen_param_fragments", optional=True), where),
        {str(alias): str(name) for alias, name in shared.items()},
        [str(name) for name in pickled.sequence("buffer_names")],
        pickled.mapping("universal_checkpoint_info", optional=True),
    )


def _shapes(group: Any, where: str) -> dict[str, Shape]:
    if not isinstance(group, Mapping):
        raise Damaged(f"{where}: shapes of parameters are {_kind(group)}, not a dict")
    found: dict[str, Shape] = {}
    for name, shape in group.items():
        sizes = (shape,) if type(shape) is int else shape
        if not isinstance(name, str) or not isinstance(sizes, tuple | list):
            raise Damaged(f"{where}: the shape of {str(name)[:200]!r} is {str(shape)[:80]!r}")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes) or math.prod(sizes) >= 1 << 62:
            raise Damaged(f"{where}: the shape of {name[:200]!r} is {str(shape)[:80]!r}")
        found[name] = tuple(sizes)
    return found


def _tensors(group: Mapping[Any, Any], where: str) -> dict[str, StoredTensor]:
    for name, tensor in group.items():
        if not isinstance(tensor, StoredTensor):
            raise Damaged(f"{where}: {str(name)[:200]!r} is {_kind(tensor)}, not a tensor")
    return {str(name): tensor for name, tensor in group.items()}


def scalar(files: Files, value: Any, where: str) -> float | None:
    """A number that is stored as one or as a tensor of one element; None if it is neither."""
    value = enum_value(value)
    if type(value) in (int, float):
        return float(value)
    if not isinstance(value, StoredTensor) or math.prod(value.shape) != 1:
        return None
    formats = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i", "float16": "<e"}
    if value.dtype not in formats:
        raise Damaged(f"{where}: a count of steps is stored as {value.dtype}")
    data = bytearray(DTYPES[value.dtype].itemsize)
    files.read_into(*value.where, memoryview(data))
    return float(struct.unpack(formats[value.dtype], data)[0])


def flat(value: Any, where: str) -> StoredTensor:
    """A tensor of one dimension without gaps."""
    if not isinstance(value, StoredTensor) or len(value.shape) != 1 or not value.is_contiguous():
        raise Damaged(f"{where} is {_kind(value)}, not a flat tensor")
    return value


def groups_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Groups of hyper-parameters."""
    if not isinstance(value, list | tuple) or not all(isinstance(group, Mapping) for group in value):
        raise Damaged(f"{where}: the parameter groups are {_kind(value)}, not a list of dicts")
    return [{str(key): item for key, item in group.items()} for group in value]


_LEFT_OUT = object()


def plain(value: Any, path: str, keep: Callable[[str, StoredTensor], Any], left_out: list[str], depth: int = 0) -> Any:
    """A value as plain Python; what is neither plain nor a container of plain values is left out and named.

    Args:
        value: of a pickle.
        path: its name (see format.document.join).
        keep: makes what stands for a tensor.
        left_out: the names of what is left out are added to it.
        depth: how deeply it is nested.

    Raises:
        Damaged: nested more deeply than `MAX_DEPTH`.
    """
    made = _plain(value, path, keep, left_out, depth)
    return None if made is _LEFT_OUT else made


def _plain(value: Any, path: str, keep: Callable[[str, StoredTensor], Any], left_out: list[str], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise Damaged(f"{path[:200]} is nested more than {MAX_DEPTH} deep")
    value = enum_value(value)
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, StoredTensor):
        return keep(path, value)
    if isinstance(value, Mapping):
        made = {}
        for key, item in value.items():
            kept = _plain(item, join(path, key), keep, left_out, depth + 1)
            if type(key) not in (str, int, float, bool):
                left_out.append(join(path, key))
            elif kept is not _LEFT_OUT:
                made[key] = kept
        return made
    if isinstance(value, list | tuple):
        items = [_plain(item, join(path, i), keep, left_out, depth + 1) for i, item in enumerate(value)]
        items = [None if item is _LEFT_OUT else item for item in items]
        return items if isinstance(value, list) else tuple(items)
    left_out.append(path)
    return _LEFT_OUT


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
