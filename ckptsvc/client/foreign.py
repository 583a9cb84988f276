"""Starting a job from another framework's checkpoint: `attach(..., init_from="deepspeed:/path/global_step100")`.

The foreign checkpoint is fitted to the state tree (keys, numbered optimizer state, masters), and then restored as one
of our own is, with nothing copied in between. What it does not have (schedulers, generators) stays as it is; a model
that it has only a part of is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from ckptsvc.client.exchange import Progress, Readable
from ckptsvc.client.group import Group, together
from ckptsvc.client.restore import Image, StoredNames, fill
from ckptsvc.client.state import StateTree
from ckptsvc.client.wanted import listed
from ckptsvc.errors import LayoutError
from ckptsvc.format.document import split
from ckptsvc.interop.formats import open_foreign
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Logical
from ckptsvc.interop.naming.options import named, numbered, rekeyed
from ckptsvc.interop.views import Mapped, View, whole

log = logging.getLogger("ckptsvc")


def restore_foreign(
    address: str,
    state: Mapping[str, Any],
    tree: StateTree,
    group: Group,
    progress: Progress,
) -> tuple[dict[str, Any], int]:
    """Fill the live state from a foreign checkpoint; all ranks call this together.

    Args:
        address: see `interop.formats`.
        state: the state tree's objects.
        tree: the state tree.
        group: the job's ranks.
        progress: called with the bytes of every window that has come in.

    Returns:
        the plain values of the state tree, and the step of the checkpoint.

    Raises:
        InvalidInput, Damaged, StoreError: it cannot be read.
        LayoutError: it does not fit the state.
    """
    with together(group):
        logical = open_foreign(address)
    try:
        with together(group):
            fitted = _fitted(logical, state, tree)
            document = _document(fitted, state)
            image = Image(fitted, StoredNames(fitted), fitted.source, Readable(True), lambda _: document)
            parts = tree.targets(image.stored, document, strict=False, cast=True).parts
        _check(logical, tree, state, group)
        values = fill(image, tree, parts, document, group, progress)
        if group.rank == 0:
            _report(logical, tree)
        return values, logical.step
    finally:
        logical.close()


def _document(logical: Logical, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the foreign document says of objects of the tree; all else of it means nothing to the tree."""
    spoken_of = {name.partition("/")[0] for name in logical.names()}
    modules = {key for key, value in state.items() if isinstance(value, nn.Module)}
    document: dict[str, Any] = {key: {} for key in modules & spoken_of}
    return document | {k: v for k, v in logical.document().items() if k in state and isinstance(v, dict)}


def _fitted(logical: Logical, state: Mapping[str, Any], tree: StateTree) -> Logical:
    """The same checkpoint under the keys of the state tree, its optimizer named, masters where they are wanted."""
    keys = {"model": _only(state, nn.Module), "optimizer": _only(state, Optimizer)}
    optimizer = keys["optimizer"]
    if optimizer and numbered(logical):
        groups = [list(map(str, g["params"])) for g in tree.capture().objects[optimizer]["param_groups"]]
        logical = named(logical, groups)
    logical = _with_masters(logical, tree, keys["model"] or "model")
    return rekeyed(logical, {old: new for old, new in keys.items() if new and new != old})


def _only(state: Mapping[str, Any], kind: type) -> str:
    """The key of the only object of a kind; "" if there are several or none."""
    keys = [key for key, value in state.items() if isinstance(value, kind)]
    return keys[0] if len(keys) == 1 else ""


def _with_masters(logical: Logical, tree: StateTree, key: str) -> Logical:
    """fp32 parameters are filled from the fp32 masters; masters are no state of a torch optimizer."""
    names = set(logical.names())
    masters = {name for name in names if name.startswith(STATE) and split(name)[-1] == MASTER}
    if not masters:
        return logical
    live = {part.meta.name: part.meta.dtype for part in tree.capture().parts}
    views: list[View] = []
    for name in sorted(names - masters):
        master = f"{STATE}{name.removeprefix(MODEL)}/{MASTER}"
        precise = name.startswith(MODEL) and master in masters
        if precise and live.get(f"{key}/{name.removeprefix(MODEL)}") == logical.meta(master).dtype:
            views.append(whole(logical.meta(master), name))
        else:
            views.append(whole(logical.meta(name), name))
    return Mapped(logical, views, aliases=logical.aliases)


def _check(logical: Logical, tree: StateTree, state: Mapping[str, Any], group: Group) -> None:
    """Refuse a model or an optimizer of which only a part is there, and tensors for which no rank has a place."""
    unexpected: set[str] | None = None
    for told in group.all_gather(msgspec.json.encode(tree.unexpected)):
        names = set(msgspec.json.decode(told, type=list[str]))
        unexpected = names if unexpected is None else unexpected & names
    with together(group):
        kinds = {key: isinstance(value, nn.Module) for key, value in state.items()}
        for name in tree.absent:
            key = split(name)[0]
            if kinds.get(key) or name != key:
                raise LayoutError(
                    listed(tree.absent, f"in the state tree and not in {logical.origin}"),
                    hint="if they only have other names, convert it first: `ckptsvc convert --rename`",
                )
        alien = sorted(n for n in unexpected or () if kinds.get(split(n)[0]))
        if alien:
            raise LayoutError(
                listed(alien, f"in {logical.origin} and not in the state tree"),
                hint="attach the model that was saved, or select with `ckptsvc convert --only`",
            )


def _report(logical: Logical, tree: StateTree) -> None:
    for note in logical.notes:
        log.warning("%s: %s", logical.origin, note.what)
    if tree.cast:
        log.warning("%s: %d tensors are cast to the live precision", logical.origin, len(tree.cast))
    if tree.absent:
        log.warning("%s", listed(tree.absent, f"not in {logical.origin}: left as they are"))
