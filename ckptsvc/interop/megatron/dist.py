"""Megatron-Core's `torch_dist` checkpoints, read: metadata.json, common.pt, and a DCP directory.

The address is the folder of one checkpoint, or the one with `latest_checkpointed_iteration.txt`. Layers that are
stacked become one tensor each, which the rules and name maps speak of. Keys call norms as models with Transformer
Engine do; a model without it has them as modules of their own, which its checkpoint shows: it has no
`core_attention._extra_state` beside other `_extra_state`. The optimizer's state is read in every form but that of
Megatron-FSDP:

    optimizer.state.<slot>.<key>     without distributed optimizer, or `fully_reshardable`
    the same, with flat pieces       `fully_sharded_model_space` of Megatron-Core up to 0.13
    optimizer.distributed...         `dp_reshardable`: flat buffers without names (see `megatron_buffers`)

Files do not say which parameters are in which param group: Megatron-Core's own rules do, where the groups bear its
marks (`megatron_names.of_group`). An fp32 model's `param` is its weights once more, and is not read. Options:

    layers=stacked    leave them as they are stored, keys and all
    layers=te         norms inside the linear layers, as of Transformer Engine, whatever the checkpoint shows
    layers=local      norms as modules of their own ("input_layernorm")
    names=FILE        for `dp_reshardable`: the parameters in the order of `model.named_parameters()` over all pipeline
                      stages, one name a line, layers numbered through; names=te or names=local: it is that of a
                      GPTModel with or without Transformer Engine
    optimizer=no      leave the optimizer's state out
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

from ckptsvc.errors import ConfigError, Damaged, InvalidInput, LayoutError, NotFound
from ckptsvc.format.document import join
from ckptsvc.interop.dcp import entries as dcp_entries
from ckptsvc.interop.dcp.metadata import METADATA, Tensor, read_directory
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Foreign, Logical, Note
from ckptsvc.interop.megatron.buffers import add_buffers, check_order
from ckptsvc.interop.megatron.files import (
    MEGATRON,
    checkpoint_folder,
    is_nothing,
    number,
    step_of,
    vocabulary_note,
    with_types,
)
from ckptsvc.interop.megatron.names import EMBEDDING, Group, known_groups, module_order, shared_out, tied, unstacked
from ckptsvc.interop.megatron.reformulated import add_reformulated
from ckptsvc.interop.naming.families import family, variables
from ckptsvc.interop.naming.mapping import mapped, parameters
from ckptsvc.interop.plain import Plain
from ckptsvc.interop.torch_format.file import read_torch
from ckptsvc.types import TensorMeta

CONFIG, COMMON = "metadata.json", "common.pt"
OPTIONS = ("layers", "names", "optimizer")
LAYERS = ("", "stacked", "te", "local")
MASTERS = ("param", "fp32_param")

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)")
_BUFFER = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")
_MODULE = "module."


def detect(files: Files) -> bool:
    """Whether there is a checkpoint with common.pt and DCP's metadata, or a folder of them."""
    folder = checkpoint_folder(files, COMMON)
    names = files.children(folder.rstrip("/"))
    return CONFIG in names and METADATA in names


def read(files: Files, origin: str, options: Mapping[str, str]) -> Logical:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NotFound: there is no complete checkpoint.
        ConfigError: an option is not known.
        InvalidInput: a form of it is not known or needs an option, or a pickle names what is not on the list.
        Damaged, LayoutError: files are missing or contradict each other.
    """
    if unknown := options.keys() - set(OPTIONS):
        raise ConfigError(f"{min(unknown)!r} is no option here", hint=f"options are {', '.join(OPTIONS)}")
    layers = options.get("layers", LAYERS[0])
    if layers not in LAYERS or options.get("optimizer", "no") != "no":
        raise ConfigError("layers is stacked, te or local; optimizer can only be no")
    folder = checkpoint_folder(files, COMMON)
    reader = _Reader(files, folder, origin, options)
    foreign = reader.done()
    if layers == "stacked":
        return foreign
    table = family("megatron").names
    assert table is not None
    shapes = {name: parameter.shape for name, parameter in parameters(foreign)[0].items()}
    forms = ("local",) if layers == "local" or (not layers and reader.is_local) else ()
    return mapped(foreign, table, variables(foreign.document(), shapes), to="layers", forms=forms)


class _Reader:
    """Reads one checkpoint."""

    def __init__(self, files: Files, folder: str, origin: str, options: Mapping[str, str]) -> None:
        self._files, self._folder, self._options = files, folder, options
        self._foreign = Foreign(origin, files)
        self._what = f"{files.url}/{folder}"
        _check_backend(files, folder)
        self._directory = read_directory(files, folder)
        root = read_torch(files, folder + COMMON, allowed=MEGATRON).root
        if not isinstance(root, dict):
            raise Damaged(f"{self._what}{COMMON} has no dict in it")
        self._common = root
        self._model: dict[str, Tensor] = {}

    @property
    def is_local(self) -> bool:
        """Whether the model is without Transformer Engine: with it, attention has an `_extra_state` too."""
        extra = [name for name in self._directory.values if "._extra_state/" in name]
        return bool(extra) and not any(".core_attention." in name for name in extra)

    def done(self) -> Foreign:
        """The checkpoint, sealed."""
        foreign = self._foreign
        self._add_model()
        optimizer = self._common.get("optimizer")
        if self._options.get("optimizer") == "no":
            foreign.notes.append(Note("lost", "the optimizer's state was left out, as asked for"))
            optimizer = None
        else:
            self._add_state()
        rest = {str(name): value for name, value in self._common.items() if name != "optimizer"}
        plain = Plain(foreign)
        if "args" in rest:
            rest["args"] = with_types(rest["args"])
        foreign.plain["megatron"] = plain.value(rest, "megatron")
        foreign.seal()
        if any(_BUFFER.match(name) for name in self._directory.tensors) and optimizer is not None:
            check_order(foreign, list(self._model))
        self._set_groups(optimizer, plain)
        plain.note()
        self._note_values()
        foreign.step = step_of(self._common, self._folder.rstrip("/"), foreign.origin)
        shapes = {name: tensor.shape for name, tensor in self._model.items()}
        said = variables(foreign.plain, shapes).get("vocab")
        for name, shape in shapes.items():
            if name == EMBEDDING and shape:
                foreign.notes += vocabulary_note(shape[0], said)
        return foreign.seal()

    def _add_model(self) -> None:
        found = {
            name: tensor
            for name, tensor in self._directory.tensors.items()
            if not _STATE.fullmatch(name) and not _BUFFER.match(name)
        }
        wrapped = bool(found) and all(name.startswith(_MODULE) for name in found)
        for name, tensor in found.items():
            short = name.removeprefix(_MODULE) if wrapped else name
            self._model[short] = tensor
            dcp_entries.add(self._foreign, join(MODEL[:-1], short), tensor)
        if not found:
            raise Damaged(f"{self._what} has no tensor of a model")
        self._foreign.aliases |= tied(self._model)

    def _add_state(self) -> None:
        buffers = {}
        for name, tensor in self._directory.tensors.items():
            if _BUFFER.match(name):
                buffers[name] = tensor
            elif found := _STATE.fullmatch(name):
                self._add_one(found[1], found[2], tensor)
        if buffers:
            order = self._options.get("names")
            add_buffers(self._foreign, self._directory, buffers, self._model, order, self._common)

    def _add_one(self, slot: str, name: str, tensor: Tensor) -> None:
        key = name if name in self._model else name.removeprefix(_MODULE)
        model = self._model.get(key)
        if model is None:
            raise LayoutError(f"{self._what} has {slot} of {name[:200]}, and no such tensor of the model")
        if slot in MASTERS:
            slot = MASTER
            if model.dtype == tensor.dtype:
                return
        canonical = join(STATE[:-1], key, slot)
        if tensor.shape == model.shape:
            dcp_entries.add(self._foreign, canonical, tensor)
        else:
            add_reformulated(self._foreign, canonical, tensor, model.shape)

    def _set_groups(self, optimizer: Any, plain: Plain) -> None:
        """Param groups with the names of their parameters, and the step of each parameter."""
        trained = self._trained()
        groups = known_groups(optimizer) or self._stored_groups()
        if not trained and not groups:
            return
        found = shared_out(groups, {name: unstacked(name, len(self._model[name].shape)) for name in trained})
        if found is None or not groups:
            why = "their marks are not Megatron-Core's own" if groups else "there are none"
            self._foreign.notes.append(
                Note("lost", f"which of {len(trained)} parameters are in which param group: {why}")
            )
            found = [[] for _ in groups]
        self._add_steps(optimizer, groups, found, trained)
        made = []
        for i, (group, names) in enumerate(zip(groups, found, strict=True)):
            kept = {key: value for key, value in group.items() if key not in {"step", "params"}}
            made.append({**plain.value(kept, join("optimizer/param_groups", i)), "params": names})
        self._foreign.plain["optimizer"] = {"state": {}, "param_groups": made}
        if isinstance(optimizer, dict):
            rest = {k: v for k, v in optimizer.items() if k in {"grad_scaler", "param_state_sharding_type"}}
            self._foreign.plain["megatron"]["optimizer"] = plain.value(rest, "megatron/optimizer")

    def _trained(self) -> list[str]:
        names = {name for name in self._model if join(STATE[:-1], name, "exp_avg") in self._foreign}
        return sorted(names, key=module_order)

    def _stored_groups(self) -> list[Group]:
        """Groups that are values of the DCP directory: each model-parallel rank has written the same."""
        places = [
            place
            for name, place in sorted(self._directory.values.items())
            if _BUFFER.match(name) and ".optimizer/shard_" in name
        ]
        values = dcp_entries.read_values(self._files, places[:1])
        return known_groups(values[0]) if values else []

    def _add_steps(self, optimizer: Any, groups: list[Group], found: list[list[str]], trained: list[str]) -> None:
        """One step for each parameter: that of its group, or the common one."""
        steps = {step for value in _below(optimizer, ("common_step", "step")) for step in [self._number(value)]}
        common = steps.pop() if len(steps) == 1 else None
        of = {
            name: self._number(group.get("step")) for group, names in zip(groups, found, strict=True) for name in names
        }
        for name in trained:
            step = common if common is not None else of.get(name)
            if step is None:
                self._foreign.notes.append(
                    Note("lost", f"the optimizer's step: the files say {len(steps) or 'no'} different ones")
                )
                return
            meta = TensorMeta(join(STATE[:-1], name, "step"), "float32", ())
            self._foreign.add_value(meta, struct.pack("<f", step))

    def _number(self, value: Any) -> float | None:
        return number(self._files, value)

    def _note_values(self) -> None:
        """What the values of the DCP directory are, which belong to ranks of the old layout."""
        names = [name for name in self._directory.values if not _BUFFER.match(name)]
        extra = [name for name in names if "_extra_state/" in name]
        refused: list[InvalidInput] = []
        read = dcp_entries.read_values(self._files, [self._directory.values[name] for name in extra], refused)
        full = [name for name, value in zip(extra, read, strict=True) if not is_nothing(value)]
        if full:
            self._foreign.notes.append(
                Note("lost", f"{len(full)} values of `_extra_state` (Transformer Engine's FP8 scales), as {full[0]}")
            )
        for kind in sorted({name.partition("/")[0] for name in names if name not in set(extra)}):
            self._foreign.notes.append(Note("lost", f"{kind}: each rank of the old layout has its own"))


def _check_backend(files: Files, folder: str) -> None:
    """Refuse other forms of Megatron's distributed checkpoints than `torch_dist`."""
    what = f"{files.url}/{folder}{CONFIG}"
    try:
        config = json.loads(files.read(folder + CONFIG, 1 << 20))
    except NotFound:
        raise NotFound(
            f"{what} does not exist", hint="Megatron-Core writes it last: the checkpoint is not complete"
        ) from None
    except (ValueError, RecursionError):
        raise Damaged(f"{what} is no JSON") from None
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend != "torch_dist":
        raise InvalidInput(f"{what} says that the backend is {backend!r}; only 'torch_dist' is known")


def _below(tree: Any, keys: tuple[str, ...], depth: int = 0) -> list[Any]:
    """All values under one of the keys, anywhere in dicts and lists."""
    if depth > 20:
        return []
    if isinstance(tree, dict):
        mine = [tree[key] for key in keys if tree.get(key) is not None]
        return mine + [v for item in tree.values() for v in _below(item, keys, depth + 1)]
    if isinstance(tree, list | tuple):
        return [v for item in tree for v in _below(item, keys, depth + 1)]
    return []
