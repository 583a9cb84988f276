"""Optimizer state of Megatron-Core's distributed optimizer in flat buffers (`dp_reshardable`), in a DCP directory.

    optimizer.distributed.dp_group_idx_<g>.gbuf_idx_<b>.dtype_(<params>, <grads>).bucket_idx_<n>.<slot>

g counts the model-parallel ranks, tensor parallelism innermost. There are no names: the order of the model's parameters
has to be known, and how tensor parallelism divides them (the rules of the family `megatron`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.document import join
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.geometry.layout import Piece
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.placement import Entry, Held, Placement
from ckptsvc.geometry.rules import Local
from ckptsvc.interop.dcp.metadata import Directory, Tensor
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Foreign
from ckptsvc.interop.megatron.flat import Item, pieces, spots_in
from ckptsvc.interop.megatron.layers import SPECS, spelled
from ckptsvc.interop.megatron.names import STACKED, is_expert, module_order
from ckptsvc.interop.megatron.ranks import argument, reading
from ckptsvc.interop.megatron.reformulated import located
from ckptsvc.interop.naming.families import family, variables
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import DTYPES, TensorMeta

_KEY = re.compile(
    r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_(\d{1,6})\.gbuf_idx_(\d{1,4})"
    r"\.dtype_\(torch\.(\w+), torch\.\w+\)\.bucket_idx_(\d{1,6})\.(param|exp_avg|exp_avg_sq)"
)
_GRID = re.compile(r"rng_state/shard_\d+(?:\.\d+){1,2}_(\d{1,5})\.(\d{1,5})(?:\.\d+)?")
_STEPS = {"bfloat16": 2.0**-8, "float16": 2.0**-10}
_LOCAL = {"input_layernorm": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_"}
_LAYER = re.compile(r"((?:\w+\.)*layers)\.(\d{1,9})\.(.+)")


class _Target(NamedTuple):
    """The tensor of the checkpoint that a parameter of the model is, and (layer,) if that has all layers stacked."""

    key: str
    layer: tuple[int, ...]


def add_buffers(
    foreign: Foreign,
    directory: Directory,
    buffers: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    order: str | None,
    common: Mapping[Any, Any],
) -> None:
    """Add the optimizer's state.

    Args:
        foreign: the checkpoint.
        directory: all of the DCP directory.
        buffers: its flat buffers.
        model: its tensors of the model, by name.
        order: the option `names`: a file, one of `SPECS`, or None.
        common: what is in common.pt.

    Raises:
        InvalidInput: the order, or the degrees of parallelism, are not known.
        LayoutError: the order does not go with the lengths of the buffers.
    """
    tp, pp = _grid(directory, common, foreign.origin)
    names = _names(order, model, foreign.origin)
    targets = {name: _target(name, model, foreign.origin) for name in names}
    shapes = {name: model[t.key].shape[len(t.layer) :] for name, t in targets.items()}
    parallel = Parallel(tp=tp, pp=pp)
    entries = [Entry(name, name, shape, 1) for name, shape in shapes.items()]
    placement = Placement(family("megatron").rules, parallel, entries, variables({}, shapes) | reading(tp)).check()
    found: dict[tuple[int, str], dict[tuple[int, int, str], Tensor]] = {}
    for name, tensor in buffers.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise InvalidInput(f"{foreign.origin}: {name[:200]} is a part of an optimizer that is not known")
        group, buffer, dtype, bucket, slot = int(key[1]), int(key[2]), key[3], int(key[4]), key[5]
        found.setdefault((group, dtype), {})[buffer, bucket, slot] = tensor
    for (group, dtype), parts in found.items():
        if group >= tp * pp:
            raise LayoutError(f"{foreign.origin}: it has buffers of rank {group}, and tp={tp} x pp={pp}")
        at = parallel.rank(tp=group % tp, pp=group // tp)
        held = [h for h in _in_order(placement.held(at), names) if model[targets[h.entry.name].key].dtype == dtype]
        _add_group(foreign, held, targets, model, parts)


def check_order(foreign: Foreign, names: Sequence[str]) -> None:
    """Compare the weights in the buffers with the model's: the first row of each, which tells wrong orders.

    Masters that are the weights once more are dropped then.

    Args:
        foreign: a sealed checkpoint; it must be sealed again.
        names: its parameters.

    Raises:
        LayoutError: they are not the same: the order is not that of the model.
    """
    pairs = [(join(MODEL[:-1], name), join(STATE[:-1], name, MASTER)) for name in names]
    pairs = [(model, master) for model, master in pairs if master in foreign]
    rows = [(box, pair) for pair in pairs for box in _rows(pair[0], foreign.meta(pair[0]).shape)]
    wants = [Want(name, foreign.meta(name).dtype, foreign.meta(name).shape, box) for box, pair in rows for name in pair]
    arrays = [_floats(a, w.dtype) for a, w in zip(read_arrays(foreign, foreign.source, wants), wants, strict=True)]
    for (_, (model, _)), weights, masters in zip(rows, arrays[::2], arrays[1::2], strict=True):
        step = _STEPS.get(foreign.meta(model).dtype)
        near = step is not None and (np.abs(weights - masters) <= np.abs(masters) * step + step * 1e-4).all()
        if not near and not np.array_equal(weights, masters, equal_nan=True):
            raise LayoutError(
                f"{foreign.origin}: what the flat buffers would have of {model} are not its weights",
                hint="the order given is not that of the model's parameters",
            )
    for model, master in pairs:
        if foreign.meta(model).dtype == foreign.meta(master).dtype:
            foreign.drop(master)


def _rows(name: str, shape: Shape) -> list[Box]:
    if not shape or 0 in shape:
        return []
    row = (*(1 for _ in shape[:-1]), shape[-1])
    layers = shape[0] if STACKED.match(name.removeprefix(MODEL)) and len(shape) > 1 else 1
    return [Box((layer, *(0 for _ in shape[1:])), row) for layer in range(layers)]


def _floats(array: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    data = np.frombuffer(array.tobytes(), np.uint16 if dtype == "bfloat16" else dtype)
    if dtype == "bfloat16":
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float64)


def _grid(directory: Directory, common: Mapping[Any, Any], origin: str) -> tuple[int, int]:
    """Degrees of tensor and pipeline parallelism, as the arguments or the names of random states say them."""
    said = [argument(common, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    if all(type(degree) is int and 0 < degree < 1 << 16 for degree in said):
        return said[0], said[1]
    grids = {(int(found[2]), int(found[1])) for name in directory.values if (found := _GRID.fullmatch(name))}
    if len(grids) != 1:
        raise InvalidInput(
            f"{origin}: its optimizer's state is in flat buffers, and nothing says for which tp and pp",
            hint="save it with --dist-ckpt-optim-fully-reshardable; optimizer=no leaves the state out",
        )
    (grid,) = grids
    return grid


def _names(order: str | None, model: Mapping[str, Tensor], origin: str) -> list[str]:
    if order is None:
        raise InvalidInput(
            f"{origin}: its optimizer's state is in flat buffers (`dp_reshardable`), which have no names: what is"
            " missing is the order of the model's parameters",
            hint="names=FILE gives it, a name in each line, in the order of model.named_parameters() over all pipeline"
            " stages with layers numbered through; names=te or names=local if it is a GPTModel with or without"
            " Transformer Engine; optimizer=no leaves the state out",
        )
    if order in SPECS:
        names = [spelled(name, order) for key, tensor in model.items() for name in _layers(key, tensor.shape)]
        return sorted(names, key=module_order)
    try:
        names = Path(order).read_text("utf-8").split()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"names={order}: the file cannot be read: {error}") from None
    if len(set(names)) < len(names) or not names:
        raise InvalidInput(f"names={order}: there are no names, or one is there twice")
    return names


def _layers(key: str, shape: Shape) -> list[str]:
    stacked = STACKED.match(key)
    if stacked is None or not shape:
        return [key]
    return [f"{stacked[1]}.{i}.{key[stacked.end() :]}" for i in range(shape[0])]


def _target(name: str, model: Mapping[str, Tensor], origin: str) -> _Target:
    layer = _LAYER.fullmatch(name)
    spelled = [layer[3]] if layer else []
    for local, fused in _LOCAL.items():
        if layer and layer[3].startswith(f"{local}."):
            spelled.append(fused + layer[3].removeprefix(f"{local}."))
    for inner in spelled:
        assert layer is not None
        if f"{layer[1]}.{inner}" in model and model[f"{layer[1]}.{inner}"].shape[:1] > (int(layer[2]),):
            return _Target(f"{layer[1]}.{inner}", (int(layer[2]),))
        if f"{layer[1]}.{layer[2]}.{inner}" in model:
            return _Target(f"{layer[1]}.{layer[2]}.{inner}", ())
    if name not in model:
        raise LayoutError(f"{origin} has no parameter {name[:200]}, which is in the given order")
    if is_expert(name):
        raise InvalidInput(f"{origin}: flat buffers of experts are not known", hint="optimizer=no leaves the state out")
    return _Target(name, ())


def _in_order(held: Sequence[Held], names: Sequence[str]) -> list[Held]:
    """As the rank's model has them: the copy of a tied embedding that a last stage has comes last."""
    place = {name: i for i, name in enumerate(names)}
    return sorted(held, key=lambda h: (h.name == "output_layer.weight", place[h.entry.name]))


def _add_group(
    foreign: Foreign,
    held: Sequence[Held],
    targets: Mapping[str, _Target],
    model: Mapping[str, Tensor],
    parts: Mapping[tuple[int, int, str], Tensor],
) -> None:
    items = [Item(h.name, prod(h.local.shape)) for h in held]
    if {buffer for buffer, _, _ in parts} != {min(buffer for buffer, _, _ in parts)}:
        raise InvalidInput(f"{foreign.origin}: flat buffers of interleaved pipeline stages are not known")
    for slot in sorted({slot for _, _, slot in parts}):
        buckets = [parts[key] for key in sorted(key for key in parts if key[2] == slot)]
        lengths = [prod(tensor.shape) for tensor in buckets]
        places = spots_in(items, lengths, f"{foreign.origin}: a flat buffer of {slot}")
        for one, spot in zip(held, places, strict=True):
            target = targets[one.entry.name]
            tensor = buckets[spot.bucket]
            name = join(STATE[:-1], target.key, MASTER if slot == "param" else slot)
            meta = TensorMeta(name, tensor.dtype, model[target.key].shape)
            local = _stacked(one.local, target.layer)
            _add_range(foreign, meta, local, tensor, spot.start, prod(local.shape))


def _stacked(local: Local, index: tuple[int, ...]) -> Local:
    """The same of a layer as a part of the tensor of all layers."""
    ones, zeros = (1,) * len(index), (0,) * len(index)
    return Local(
        (*ones, *local.shape),
        tuple(
            Piece(
                Box((*index, *piece.box.origin), (*ones, *piece.box.shape)),
                Box((*zeros, *piece.local.origin), (*ones, *piece.local.shape)),
            )
            for piece in local.pieces
        ),
    )


def _add_range(foreign: Foreign, meta: TensorMeta, local: Local, tensor: Tensor, start: int, length: int) -> None:
    """Add what a range of a bucket is; each data-parallel rank has written its part of the bucket."""
    itemsize = DTYPES[tensor.dtype].itemsize
    wanted = Box((start,), (length,))
    near = [chunk for chunk in tensor.chunks if chunk.box.intersect(wanted) is not None]
    for chunk, (key, at) in located(foreign, tensor, near):
        common = chunk.box.intersect(wanted)
        assert common is not None
        skipped = common.origin[0] - chunk.box.origin[0]
        for box, first, block in pieces(local, common.origin[0] - start, common.shape[0]):
            foreign.add(meta, box, (key, at + (skipped + first) * itemsize), block)
