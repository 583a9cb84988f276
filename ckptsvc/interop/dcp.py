"""Checkpoints of torch.distributed.checkpoint (DCP), read.

Also directories that are DCP inside: Lightning's and Fabric's sharded checkpoints (`meta.pt` beside `.metadata`),
accelerate's (`pytorch_model_fsdp_0/` and `optimizer_0/`), and shards of `HuggingFaceStorageWriter`. Options:

    model=KEY        the key of the model in the saved state; without it "model" or "state_dict", else the names that
                     stand under no key
    optimizer=KEY    the key of the optimizer; without it "optim", "optimizer", or what looks like one
    names=FILE       names of the parameters, where the optimizer has numbers (see `interop.numbered`)
    tied=NAME=NAME   the second name is another name of the first tensor; several with commas; "no": there are none;
                     without it see `interop.tied`

Other keys are kept under their own names.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptsvc.errors import ConfigError, Damaged
from ckptsvc.format.document import join, split
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box
from ckptsvc.interop import dcp_entries, dcp_groups, dcp_safetensors
from ckptsvc.interop.dcp_keys import Key, Keys, Path, nested_path, unique
from ckptsvc.interop.dcp_metadata import Directory, has_metadata, read_directory
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MODEL, STATE, Foreign, Note
from ckptsvc.interop.numbered import give_names
from ckptsvc.interop.plain import Plain, put
from ckptsvc.interop.tied import tie
from ckptsvc.interop.torch_file import StoredTensor, read_torch
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import TensorMeta

OPTIONS = ("model", "optimizer", "names", "tied")

ACCELERATE = re.compile(r"(?:pytorch_model_fsdp|optimizer)_0")
LIGHTNING = "meta.pt"

STEPS = ("step", "global_step", "iteration")
NAMED_STEP = re.compile(r"(?:step|iter|checkpoint)[-_=]?(\d{1,18})/*$")


def detect(files: Files) -> bool:
    """Whether there is DCP's metadata, or a directory of accelerate's or shards that have it."""
    if getattr(files, "only", ""):  # a file that lies beside a checkpoint is none
        return False
    return bool(_prefixes(files)) or dcp_safetensors.is_shards(files)


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NotFound: there is no metadata: the checkpoint was never completed.
        ConfigError: an option is not known.
        InvalidInput: the metadata or a value names a class that is not on the list, or data was transformed in a way
            that is not known.
        Damaged, LayoutError: files are missing or contradict each other.
    """
    if unknown := options.keys() - set(OPTIONS):
        raise ConfigError(f"dcp has no option {min(unknown)!r}", hint=f"it has {', '.join(OPTIONS)}")
    reader = Reader(files, origin, options)
    for prefix in _prefixes(files) or [""]:
        reader.add(_directory(files, prefix))
    foreign = reader.done()
    if LIGHTNING in files.children():
        _add_lightning(foreign)
    foreign.step = foreign.step or _step(foreign.plain, origin)
    return foreign


def _prefixes(files: Files) -> list[str]:
    names = files.children()
    if has_metadata(names):
        return [""]
    return [f"{name}/" for name in names if ACCELERATE.fullmatch(name) and has_metadata(files.children(name))]


def _directory(files: Files, prefix: str) -> Directory:
    if not has_metadata(files.children(prefix.rstrip("/"))) and dcp_safetensors.is_shards(files, prefix):
        return dcp_safetensors.read_shards(files, prefix)
    directory = read_directory(files, prefix)
    if dcp_safetensors.in_safetensors(directory):
        return dcp_safetensors.looked_up(files, directory)
    return directory


class Reader:
    """Makes a checkpoint of one or several DCP directories: `add` each, then `done`."""

    def __init__(self, files: Files, origin: str, options: Mapping[str, str]) -> None:
        self._files, self._options = files, options
        self._foreign = Foreign(origin, files)
        self._plain = Plain(self._keep)
        self._values: list[tuple[Key, Path, Any]] = []
        self._keys: Keys | None = None

    def add(self, directory: Directory) -> None:
        """All tensors and values of a directory."""
        names = (*directory.tensors, *directory.values)
        tops = {"model", "optim", "optimizer", *(self._options.get(name) or "" for name in ("model", "optimizer"))}
        paths = {name: nested_path(name, directory.paths.get(name), tops) for name in names}
        self._keys = keys = Keys(paths, self._options.get("model"), self._options.get("optimizer"))
        found = {name: keys.key(path) for name, path in paths.items()}
        canonical = {name: _canonical(found[name], paths[name]) for name in directory.tensors}
        unique(canonical)
        stored: dict[object, str] = {}
        for name, tensor in directory.tensors.items():
            if found[name].kind == "model" and tensor.chunks:
                # two names of the same bytes in the files are one tensor beyond doubt
                kept = stored.setdefault((tensor.dtype, tensor.shape, frozenset(tensor.chunks)), canonical[name])
                if kept != canonical[name]:
                    self._foreign.aliases[canonical[name]] = kept
                    continue
            dcp_entries.add(self._foreign, canonical[name], tensor)
            if found[name].kind == "group" or (
                found[name].kind == "other" and any(type(k) is int for k in paths[name])
            ):
                self._values.append((found[name], paths[name], TensorRef(canonical[name])))
        places = list(directory.values.values())
        for name, value in zip(directory.values, dcp_entries.read_values(self._files, places), strict=True):
            made = self._plain.value(value, join("", *paths[name]))
            self._values.append((found[name], paths[name], made))
        if keys.more:
            kept = f"{keys.optimizer!r} is taken as the optimizer, the others are kept as {', '.join(keys.more)}"
            self._foreign.notes.append(Note("warning", f"there are several optimizers: {kept}"))

    def done(self) -> Foreign:
        """The checkpoint, sealed."""
        foreign = self._foreign
        numbered: dict[Path, Any] = {}
        by_name: dict[str, dict[str, Any]] = {}
        for key, path, value in self._values:
            if key.kind == "state":
                self._state(key, value)
            elif key.kind == "group" and not key.name:
                numbered[key.path] = value
            elif key.kind == "group":
                by_name.setdefault(key.name, {})[str(key.path[0])] = value
            else:
                put(foreign.plain, ("model", key.name) if key.kind == "model" else path, value)
        self._plain.note(foreign)
        foreign.seal()
        if by_name:
            groups = dcp_groups.by_parameter({name: self._numbers(values) for name, values in by_name.items()})
        else:
            groups = dcp_groups.by_number(numbered, foreign.origin)
        self._set_groups(groups)
        tie(foreign, self._options.get("tied"))
        return foreign.seal()

    def _state(self, key: Key, value: Any) -> None:
        """State of a parameter that is not a tensor: a step that is a number becomes one."""
        if key.path == ("step",) and type(value) in (int, float):
            name = join(STATE[:-1], key.name, "step")
            self._foreign.add_value(TensorMeta(name, "float32", ()), struct.pack("<f", value))
        else:
            put(self._foreign.plain, ("optimizer", "state", key.name, *key.path), value)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Hyper-parameters of one parameter, those in tensors as numbers: parameters are grouped by them."""
        made = dict(values)
        for key, value in values.items():
            meta = self._foreign.meta(value.name) if isinstance(value, TensorRef) else None
            if meta is not None and meta.dtype in {"float32", "float64", "int64"} and math.prod(meta.shape) == 1:
                want = Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape))
                (array,) = read_arrays(self._foreign, self._foreign.source, [want])
                made[key] = array.view(np.dtype(meta.dtype)).item()
                self._foreign.drop(value.name)
        return made

    def _set_groups(self, groups: list[dcp_groups.Group]) -> None:
        """Parameter groups with the names that the model has, and parameters that are in no group."""
        foreign = self._foreign
        trained = _trained(foreign)
        if not groups and not trained:
            return
        if trained and all(name.isdigit() for name in trained):
            give_names(foreign, groups, self._options.get("names"))
            trained = _trained(foreign)
        elif self._keys is not None:
            for group in groups:
                group["params"] = [self._keys.stripped(str(name)) for name in group["params"]]
        foreign.notes += dcp_groups.with_all(groups, trained, self._dims)
        optimizer = foreign.plain.setdefault("optimizer", {})
        optimizer.setdefault("state", {})
        optimizer["param_groups"] = groups

    def _dims(self, name: str) -> int:
        names = (join(MODEL[:-1], name), *(join(STATE[:-1], name, slot) for slot in ("exp_avg", "momentum_buffer")))
        return next((len(self._foreign.meta(known).shape) for known in names if known in self._foreign), -1)

    def _keep(self, path: str, tensor: StoredTensor) -> Any:
        """A tensor inside a value becomes a tensor of the checkpoint."""
        if not tensor.storage.key:
            self._plain.left_out.append(f"{path} (a tensor in a compressed value)")
            return None
        self._foreign.add(
            TensorMeta(path, tensor.dtype, tensor.shape), Box.full(tensor.shape), tensor.where, tensor.block()
        )
        return TensorRef(path)


def _canonical(key: Key, path: Path) -> str:
    """The name of a tensor (see `interop.logical`)."""
    if key.kind == "model":
        return join(MODEL[:-1], key.name)
    if key.kind == "state":
        return join(STATE[:-1], key.name, *key.path)
    if key.kind == "group":
        return join("optimizer/param_groups", *((key.name,) if key.name else ()), *key.path)
    return join("", *path)


def _trained(foreign: Foreign) -> list[str]:
    return list(dict.fromkeys(split(name)[2] for name in foreign.names() if name.startswith(STATE)))


def _add_lightning(foreign: Foreign) -> None:
    """What Lightning and Fabric keep beside the DCP files; tensors in it become tensors of the checkpoint."""
    root = read_torch(foreign.files, LIGHTNING).root
    if not isinstance(root, dict):
        raise Damaged(f"{foreign.origin}: {LIGHTNING} has no dict in it")

    def keep(path: str, tensor: StoredTensor) -> TensorRef:
        foreign.add(TensorMeta(path, tensor.dtype, tensor.shape), Box.full(tensor.shape), tensor.where, tensor.block())
        return TensorRef(path)

    plain = Plain(keep)
    for name, value in plain.value(root, "").items():
        foreign.plain.setdefault(str(name), value)
    plain.note(foreign)
    foreign.seal()


def _step(document: Mapping[str, Any], origin: str) -> int:
    """The training step, by the names that jobs give it, or by the directory's."""
    for tree in (document, *(value for value in document.values() if isinstance(value, dict))):
        for name in STEPS:
            if type(tree.get(name)) is int and tree[name] >= 0:
                return int(tree[name])
    named = NAMED_STEP.search(origin)
    return int(named[1]) if named else 0
