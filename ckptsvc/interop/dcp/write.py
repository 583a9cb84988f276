"""Checkpoints of torch.distributed.checkpoint (DCP), written: `dcp.load` reads them into `get_state_dict` templates.

Keys are "model" and "optim" as `dcp.save({"model": ..., "optim": ...})` writes them; other plain values and tensors go
under their own names. Options:

    flatten=true     parameter groups as of flatten_optimizer_state_dict, which jobs with pipeline stages need
    weights=stored   the model's tensors as they are, masters beside them as `optim.state.<fqn>.master`, which nothing
                     loads; without it fp32 masters are written as the model's weights, as FSDP-2 keeps them: a model in
                     bfloat16 rounds them as it loads them
    files=N          `.distcp` files; without it one for every GiB, at most 1024
    chunk=BYTES      largest piece of a tensor, in bytes; 64 MiB without it: a rank reads whole pieces
    model=KEY        the model's key instead of "model"; with nothing behind the "=" its names stand alone (torchtitan)
    optimizer=KEY    the optimizer's key instead of "optim"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptsvc.errors import ConfigError, InvalidInput, UnsupportedObject
from ckptsvc.format.document import join, split
from ckptsvc.format.objects import TensorRef
from ckptsvc.interop.dcp.metadata import METADATA
from ckptsvc.interop.dcp.pack import Named, division, pack, value
from ckptsvc.interop.dcp.pickle import metadata
from ckptsvc.interop.logical import MASTER, Logical, Note
from ckptsvc.interop.outputs import Output, Small

OPTIONS = ("flatten", "weights", "files", "chunk", "model", "optimizer")

ADAM = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False,
    "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
"""What a group of torch's AdamW has: `dcp.load` asks for every key that the groups of the running job have."""

Path = tuple[str | int, ...]


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """An `interop.formats.Exporter`; options: see the module.

    Raises:
        ConfigError: an option is unknown or has a value it cannot have.
    """
    files, chunk = _check(options)
    plan = _Plan(logical, options)
    packed = pack(plan.tensors, plan.values, files=files, chunk=chunk)
    for name, kept in plan.shared.items():
        packed.tensors[name] = packed.tensors[kept]

    def finish(_: object) -> list[Small]:
        return [Small(METADATA, metadata(packed.tensors, packed.values, plan.paths))]

    return Output(packed.files, finish, plan.notes, {"format": "dcp", "options": dict(options)})


def _check(options: Mapping[str, str]) -> tuple[int, int]:
    """Number of files and bytes of a piece."""
    if unknown := options.keys() - set(OPTIONS):
        raise ConfigError(f"dcp has no option {min(unknown)!r}", hint=f"it has {', '.join(OPTIONS)}")
    for name, allowed in (("flatten", ("true", "false")), ("weights", ("master", "stored"))):
        if options.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{name}={options[name]!r} is not one of {', '.join(allowed)}")
    return division(options)


class _Plan:
    """What goes under which name.

    Attributes:
        tensors: in the order of their canonical names.
        shared: further names of tensors.
        values: files of `torch.save` by name.
        paths: the keys of every name in the nested state.
        notes: what is lost or added.
    """

    def __init__(self, logical: Logical, options: Mapping[str, str]) -> None:
        self.tensors: list[Named] = []
        self.shared: dict[str, str] = {}
        self.values: dict[str, bytes] = {}
        self.paths: dict[str, Path] = {}
        self.notes: list[Note] = []
        self._logical = logical
        self._model, self._optimizer = options.get("model", "model"), options.get("optimizer", "optim")
        self._flat = options.get("flatten") == "true"
        self._masters = options.get("weights", "master") == "master"
        document = logical.document()
        leaves = list(self._leaves(document))
        self._refs = {leaf.name for _, leaf in leaves if isinstance(leaf, TensorRef)}
        self._add_tensors()
        for path, leaf in leaves:
            self._add_leaf(path, leaf)
        for alias, kept in logical.aliases.items():
            if (known := self._placed.get(logical.resolve(kept))) is not None:
                self.shared[self._name(self._path(split(alias)))] = known

    def _add_tensors(self) -> None:
        names, masters, own = self._logical.names(), 0, 0
        self._placed: dict[str, str] = {}
        for name in names:
            parts = split(name)
            own += parts[0].startswith("@")
            if parts[0].startswith("@") or name in self._refs:
                continue
            source = name
            if self._masters and parts[0] == "model":
                source = join("optimizer/state", *parts[1:], MASTER)
                source = source if source in self._logical else name
                masters += source != name
            elif self._masters and parts[:2] == ["optimizer", "state"] and parts[-1] == MASTER:
                continue
            self._placed[name] = self._add(self._path(parts), source)
        if masters:
            what = f"the weights of {masters} parameters are written as their fp32 masters"
            self.notes.append(Note("warning", f"{what}; weights=stored writes them as they are"))
        if own or self._logical.world_size > 1:
            self.notes.append(
                Note(
                    "lost",
                    f"what single ranks have of their own: {own} tensors, and plain values of other ranks than 0",
                )
            )

    def _add(self, path: Path, source: str) -> str:
        meta = self._logical.meta(source)
        name = self._name(path)
        self.tensors.append(Named(name, source, meta.dtype, meta.shape))
        return name

    def _path(self, parts: list[str]) -> Path:
        """The keys of a canonical name in the nested state."""
        if parts[0] == "model":
            name = ".".join(parts[1:])
            return (self._model, name) if self._model else (name,)
        if parts[0] != "optimizer":
            return tuple(parts)
        if self._flat and len(parts) > 2:
            return (self._optimizer, ".".join(parts[1:]))
        return (self._optimizer, *parts[1:])

    def _name(self, path: Path) -> str:
        name = ".".join(map(str, path))
        if name in self.paths:
            raise InvalidInput(f"{self._logical.origin}: two of its values would be called {name[:200]} in DCP")
        self.paths[name] = path
        return name

    def _add_leaf(self, path: Path, leaf: Any) -> None:
        if isinstance(leaf, TensorRef):
            if leaf.name in self._placed:
                self.shared[self._name(path)] = self._placed[leaf.name]
            elif leaf.name in self._logical and not leaf.name.startswith("@"):
                self._placed[leaf.name] = self._add(path, leaf.name)
            return
        try:
            data = value(leaf)
        except UnsupportedObject as error:
            self.notes.append(Note("lost", f"{'.'.join(map(str, path))}: {error.what}"))
            return
        self.values[self._name(path)] = data

    def _leaves(self, document: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
        """Everything in a document, taken apart as DCP does it."""
        for key, tree in document.items():
            if key.startswith("@"):
                continue
            if key == "optimizer" and isinstance(tree, Mapping):
                yield from self._of_optimizer(tree)
            else:
                yield from _flattened(tree, (self._model if key == "model" else key,))

    def _of_optimizer(self, tree: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
        groups = self._groups(tree.get("param_groups"))
        rest = {key: item for key, item in tree.items() if key != "param_groups"}
        for path, leaf in _flattened(rest, ()):
            flat = (".".join(map(str, path)),) if self._flat and len(path) > 1 else path
            yield (self._optimizer, *flat), leaf
        if not self._flat:
            yield from _flattened(groups, (self._optimizer, "param_groups"))
            return
        for group in groups:
            for name in group.get("params", ()):
                for key, item in group.items():
                    if key != "params":
                        yield (self._optimizer, f"param_groups.{name}.{key}"), item

    def _groups(self, groups: Any) -> list[dict[str, Any]]:
        """The parameter groups, with what torch's Adam has in them if this is an Adam."""
        if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
            return []
        if not any(name.endswith("/exp_avg_sq") for name in self._logical.names()):
            return [dict(group) for group in groups]
        added = {key for group in groups for key in ADAM if key not in group}
        if added:
            what = f"the parameter groups have no {', '.join(sorted(added))}: torch's defaults are written"
            self.notes.append(Note("warning", f"{what}, because dcp.load asks for them"))
        return [{**ADAM, **group} for group in groups]


def _flattened(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Dicts, and lists with dicts or tensors in them, are taken apart; all else is a leaf (torch 2.4 and later)."""
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from _flattened(item, (*path, str(key)))
    elif isinstance(tree, list) and not _is_leaf(tree):
        for i, item in enumerate(tree):
            yield from _flattened(item, (*path, i))
    else:
        yield path, tree


def _is_leaf(tree: list[Any]) -> bool:
    return not any(
        isinstance(item, Mapping | TensorRef) or (isinstance(item, list) and not _is_leaf(item)) for item in tree
    )
