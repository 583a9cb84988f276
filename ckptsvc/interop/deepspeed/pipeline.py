"""The weights of a pipeline: one file for each layer, with the layer's own names in it.

A parameter of layer 3 is "3.<name>" to the optimizer. A tied layer is in the file of its first index, and its
parameters are "tied_modules.<key>.<name>"; which key it is, its file does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptsvc.errors import Damaged, LayoutError
from ckptsvc.interop.deepspeed.files import ModelState, Shape, Tag, read_pickle
from ckptsvc.interop.files import Files
from ckptsvc.interop.torch_format.file import StoredTensor

TIED = "tied_modules."


def read_layers(files: Files, tag: Tag, models: Sequence[ModelState]) -> dict[str, list[StoredTensor]]:
    """The tensors of all layers by their names in the PipelineModule, each with one tensor for each rank.

    Args:
        files: where they are.
        tag: says which.
        models: the model states of all model-parallel ranks.

    Raises:
        Damaged: ranks have different tensors.
        LayoutError: two tied layers could be meant.
    """
    tps = 1 + max(tp for _, tp in tag.layers)
    named = {name: shape for model in models for group in model.shapes for name, shape in group.items()}
    plain = {name.split(".", 1)[0] for name in [*named, *(b for model in models for b in model.buffers)]}
    tied: dict[str, dict[str, Shape]] = {}
    for name, shape in named.items():
        if name.startswith(TIED):
            key, _, local = name.removeprefix(TIED).partition(".")
            tied.setdefault(key, {})[local] = shape
    found: dict[str, list[StoredTensor]] = {}
    for layer in sorted({layer for layer, _ in tag.layers}):
        keys = [tag.layers.get((layer, tp)) for tp in range(tps)]
        ranks = [_tensors(files, key) for key in keys if key is not None]
        if len(ranks) != tps or any(set(rank) != set(ranks[0]) for rank in ranks):
            raise Damaged(f"{files.url}/{tag.name}: the ranks' files of layer {layer} are not complete, or not alike")
        prefix = _prefix(layer, ranks[0], plain, tied, f"{files.url}/{keys[0]}")
        for name in ranks[0]:
            found[prefix + name] = [rank[name] for rank in ranks]
    return found


def _tensors(files: Files, key: str) -> dict[str, StoredTensor]:
    return {str(n): t for n, t in read_pickle(files, key).root.items() if isinstance(t, StoredTensor)}


def _prefix(
    layer: int,
    tensors: Mapping[str, StoredTensor],
    plain: set[str],
    tied: dict[str, dict[str, Shape]],
    where: str,
) -> str:
    """What the names of a layer begin with; a tied key that was found is taken out."""
    if str(layer) in plain or not tensors:
        return f"{layer}."
    fitting = [
        key
        for key, shapes in tied.items()
        if all(name in tensors and tensors[name].shape == shape for name, shape in shapes.items())
    ]
    if len(fitting) > 1:
        raise LayoutError(f"{where} may be any of the tied layers {', '.join(fitting)[:200]}")
    if fitting:
        del tied[fitting[0]]
        return f"{TIED}{fitting[0]}."
    return f"{layer}."
