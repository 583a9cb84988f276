"""Megatron-Core's `torch_dist` checkpoints, written: `dist_checkpointing.load` takes them at any tp, pp and dp.

Written into a folder `iter_<step>`, with `latest_checkpointed_iteration.txt` beside it. Layers that are alike are
stacked, norms are called as Megatron-Core's keys call them whatever the model's modules are. Options:

    optimizer=plain         as without distributed optimizer, which is the default
    optimizer=reshardable   as of the distributed optimizer with --dist-ckpt-optim-fully-reshardable
    files=N, chunk=BYTES    as of the format `dcp`
    tp=N, pp=N, dp=N, ...   have no effect: the checkpoint is the same for all

Random states belong to ranks and are not written: load with --no-load-rng.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ckptsvc.errors import ConfigError, LayoutError
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.interop.dcp.metadata import METADATA
from ckptsvc.interop.dcp.pack import Named, division, pack, value
from ckptsvc.interop.dcp.pickle import metadata
from ckptsvc.interop.logical import MASTER, Logical, Note
from ckptsvc.interop.megatron.dist import COMMON, CONFIG
from ckptsvc.interop.megatron.files import LATEST
from ckptsvc.interop.megatron.groups import Groups, rest_of, step_tensor
from ckptsvc.interop.megatron.layers import FUSED, Parameter, Source, separate, stacked
from ckptsvc.interop.megatron.names import module_order
from ckptsvc.interop.outputs import Output, Small

OPTIONS = ("optimizer", "files", "chunk", *Parallel.__struct_fields__)
FORMS = ("plain", "reshardable")
_Members = Sequence[tuple[tuple[int, ...], Parameter]]


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """An `interop.formats.Exporter`; options: see the module.

    Raises:
        ConfigError: an option is unknown or has a value it cannot have.
        InvalidInput, LayoutError: the optimizer's state cannot be in such a checkpoint.
    """
    form, files, chunk = _check(options)
    found = separate(logical)
    groups = Groups(logical, found)
    notes = [*groups.notes]
    if not any(p.name.startswith(("decoder.", "embedding.")) for p in found):
        notes.append(Note("warning", "the names are not of Megatron-Core's GPTModel; a name map makes them so"))
    keys = stacked(found)
    tensors = [*_model(keys), *_state(keys, form)]
    common = rest_of(logical, {}, notes)
    if groups.step is not None:
        masters = any(MASTER in p.state for p in found)
        common["optimizer"] = _optimizer(groups, form, masters=masters)
    extra = dict.fromkeys(_extra(keys), value([None]))
    packed = pack(tensors, extra, files=files, chunk=chunk)
    folder = f"iter_{logical.step:07d}"
    last = [
        Small(f"{folder}/{COMMON}", value(common)),
        Small(f"{folder}/{METADATA}", metadata(packed.tensors, packed.values, {})),
        Small(f"{folder}/{CONFIG}", json.dumps(_CONFIG).encode()),
        Small(LATEST, str(logical.step).encode()),
    ]
    placed = [msgspec.structs.replace(file, key=f"{folder}/{file.key}") for file in packed.files]
    return Output(placed, lambda _: last, notes, {"format": "megatron", "options": dict(options)})


_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _check(options: Mapping[str, str]) -> tuple[str, int, int]:
    if unknown := options.keys() - set(OPTIONS):
        raise ConfigError(f"megatron has no option {min(unknown)!r}", hint=f"it has {', '.join(OPTIONS)}")
    form = options.get("optimizer", FORMS[0])
    if form not in FORMS:
        raise ConfigError(f"optimizer={form!r} is not one of {', '.join(FORMS)}")
    return form, *division(options)


def _model(keys: Mapping[str, _Members]) -> Iterator[Named]:
    for key in sorted(keys, key=module_order):
        yield _named(key, [(index, p.model) for index, p in keys[key]])


def _state(keys: Mapping[str, _Members], form: str) -> Iterator[Named]:
    """The optimizer's state, slot after slot of each key."""
    for key in sorted(keys, key=module_order):
        members = keys[key]
        for slot in dict.fromkeys(slot for _, p in members for slot in p.state if slot != "step"):
            if any(slot not in p.state for _, p in members):
                raise LayoutError(f"{key} is all layers in one tensor, and only some of them have {slot}")
            sources = [(index, p.state[slot]) for index, p in members]
            if any(source.shape != p.model.shape for (_, source), (_, p) in zip(sources, members, strict=True)):
                raise LayoutError(f"{slot} of {key} has another shape than its parameter: Megatron has no place for it")
            own = {MASTER: "param" if form == "reshardable" else "fp32_param"}.get(slot, slot)
            yield _named(f"optimizer.state.{own}.{key}", sources)
        if form == "reshardable" and all(p.state and MASTER not in p.state for _, p in members):
            yield _named(f"optimizer.state.param.{key}", [(index, p.model) for index, p in members], "float32")


def _named(name: str, sources: Sequence[tuple[tuple[int, ...], Source]], dtype: str | None = None) -> Named:
    first_index, first = sources[0]
    extents = tuple(max(index[d] for index, _ in sources) + 1 for d in range(len(first_index)))
    if len({(source.meta.dtype, source.shape) for _, source in sources}) > 1:
        raise LayoutError(f"{name} is all layers in one tensor, and they have different shapes or element types")
    count = 1
    for n in extents:
        count *= n
    if count != len(sources):
        raise LayoutError(f"{name} is all layers and experts in one tensor, and some are missing")
    members = tuple((index, source.meta.name, source.at) for index, source in sources)
    shape = (*extents, *first.shape)
    return Named(name, first.meta.name, dtype or first.meta.dtype, shape, members)


def _extra(keys: Mapping[str, _Members]) -> Iterator[str]:
    """Names of `_extra_state`, for which loading asks: of linear layers, and with Transformer Engine of attention."""
    fused = any(p.name.endswith(FUSED) for members in keys.values() for _, p in members)
    modules: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, members in keys.items():
        linear = re.match(r"(.*\.linear_\w+)\.", key)
        attention = re.match(r"(.*\.self_attention)\.linear_qkv\.weight", key) if fused else None
        for module in [m[1] for m in (linear,) if m] + [f"{m[1]}.core_attention" for m in (attention,) if m]:
            indices = [index for index, _ in members]
            extents = tuple(max(index[d] for index in indices) + 1 for d in range(len(indices[0])))
            modules[module] = (module, extents)
    for module, extents in modules.values():
        for place in _cells(extents or (1,)):
            at, of = ".".join(map(str, place)), ".".join(map(str, extents or (1,)))
            yield f"{module}._extra_state/shard_{at}_{of}"


def _cells(extents: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not extents:
        yield ()
        return
    for i in range(extents[0]):
        for rest in _cells(extents[1:]):
            yield (i, *rest)


def _optimizer(groups: Groups, form: str, *, masters: bool) -> dict[str, Any]:
    """What of the optimizer is in common.pt; steps both ways, for torch's Adam and for fused ones."""
    step = groups.step or 0.0
    stepped = [{**group, "step": int(step) if step.is_integer() else step} for group in groups.groups]
    if form == "reshardable":
        return {"optimizer": {"param_groups": stepped}, "param_state_sharding_type": "fully_reshardable"}
    inner = {"state": {"common_step": step_tensor(step)}, "param_groups": stepped}
    return {"optimizer": inner} if masters else inner
