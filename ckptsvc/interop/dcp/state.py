"""What DCP directories hold, as a checkpoint of ours: canonical names, parameter groups, tied weights, values."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptsvc.errors import ConfigError, InvalidInput
from ckptsvc.format.document import join, split
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box
from ckptsvc.interop.dcp import entries as dcp_entries
from ckptsvc.interop.dcp import groups as dcp_groups
from ckptsvc.interop.dcp.entries import UNREADABLE
from ckptsvc.interop.dcp.keys import Key, Keys, Path, nested_path, unique
from ckptsvc.interop.dcp.metadata import Directory
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MODEL, STATE, Foreign, Note
from ckptsvc.interop.naming.tied import tie
from ckptsvc.interop.plain import Plain, put
from ckptsvc.interop.torch_format.numbered import give_names
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import TensorMeta

OPTIONS = ("model", "optimizer", "names", "tied", "unreadable")
"""See `interop.dcp.read`."""


class State:
    """Makes a checkpoint of one or several DCP directories: `add` each, then `done`."""

    def __init__(self, files: Files, origin: str, options: Mapping[str, str]) -> None:
        """Raises ConfigError if an option is not known."""
        if unknown := options.keys() - set(OPTIONS):
            raise ConfigError(f"{min(unknown)!r} is no option here", hint=f"options are {', '.join(OPTIONS)}")
        self._files, self._options = files, options
        self._foreign = Foreign(origin, files)
        self._plain = Plain(self._foreign)
        self._values: list[tuple[Key, Path, Any]] = []
        self._keys: Keys | None = None
        self._said = {kind: options[kind] for kind in ("model", "optimizer") if kind in options}
        self._present: set[str] = set()

    def add(self, directory: Directory, *, model: str | None = None, optimizer: str | None = None) -> None:
        """All tensors and values of a directory.

        Args:
            directory: what it holds.
            model: the key of the model, where the format says it; "" if its names stand alone.
            optimizer: the same for the optimizer.

        Raises:
            InvalidInput, Damaged: as `interop.dcp.read.read`.
        """
        tops = {"model", "optim", "optimizer", *self._said.values()} if model != "" else ()
        names = (*directory.tensors, *directory.values, *directory.plain)
        paths = {name: nested_path(name, directory.paths.get(name), tops) for name in names}
        present = {str(path[0]) for path in paths.values()}
        said = {kind: key for kind, key in self._said.items() if not key or key in present}
        self._present |= present
        self._keys = keys = Keys(paths, said.get("model", model), said.get("optimizer", optimizer))
        found = {name: keys.key(path) for name, path in paths.items()}
        self._add_tensors(directory, found, paths)
        known = {**dict(zip(directory.values, self._read(directory), strict=True)), **directory.plain}
        for name, value in known.items():
            if value is not UNREADABLE:
                self._values.append((found[name], paths[name], self._plain.value(value, join("", *paths[name]))))
        if keys.more:
            kept = f"{keys.optimizer!r} is taken as the optimizer, the others are kept as {', '.join(keys.more)}"
            self._foreign.notes.append(Note("warning", f"there are several optimizers: {kept}"))

    def _add_tensors(self, directory: Directory, found: Mapping[str, Key], paths: Mapping[str, Path]) -> None:
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
            in_list = found[name].kind == "other" and any(type(key) is int for key in paths[name])
            if in_list or found[name].kind == "group":
                self._values.append((found[name], paths[name], TensorRef(canonical[name])))

    def _read(self, directory: Directory) -> list[Any]:
        places = list(directory.values.values())
        if self._options.get("unreadable") != "skip":
            return dcp_entries.read_values(self._files, places)
        refused: list[InvalidInput] = []
        values = dcp_entries.read_values(self._files, places, refused)
        self._foreign.notes += [Note("lost", error.what) for error in refused]
        return values

    def done(self) -> Foreign:
        """The checkpoint, sealed.

        Raises:
            InvalidInput: a key that the user says is nowhere, or as `interop.dcp.read.read`.
            Damaged, LayoutError: as `interop.dcp.read.read`.
        """
        foreign = self._foreign
        if absent := {key for key in self._said.values() if key} - self._present:
            hint = f"there are {', '.join(sorted(self._present)[:10])}"
            raise InvalidInput(f"{foreign.origin}: there is no key {min(absent)!r}", hint=hint)
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
        self._plain.note()
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
        if trained and all(name.isdigit() and join(MODEL[:-1], name) not in foreign for name in trained):
            give_names(foreign, groups, self._options.get("names"))
            trained = _trained(foreign)
        elif self._keys is not None:
            for group in groups:
                group["params"] = [self._keys.stripped(str(name)) for name in group["params"]]
        foreign.notes += dcp_groups.with_all(groups, trained, self._dims) + dcp_groups.uneven(groups)
        optimizer = foreign.plain.setdefault("optimizer", {})
        optimizer.setdefault("state", {})
        optimizer["param_groups"] = groups

    def _dims(self, name: str) -> int:
        names = (join(MODEL[:-1], name), *(join(STATE[:-1], name, slot) for slot in ("exp_avg", "momentum_buffer")))
        return next((len(self._foreign.meta(known).shape) for known in names if known in self._foreign), -1)


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
