"""Names of parameters: prefixes that wrappers put before them, and optimizer state that is known by numbers only.

torch's optimizers number their parameters through their groups, in the order in which they were given; the numbers
mean nothing without that order. It comes from the state itself (`param_names`), from a list of names, or from a live
optimizer. Shapes are checked and never used to guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.document import join, replace_refs, split
from ckptsvc.format.objects import TensorRef
from ckptsvc.interop.logical import MODEL, STATE, Logical
from ckptsvc.interop.views import Mapped, View, whole

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What DDP, torch.compile and FSDP-1 put into names."""


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names of a state dict -> the names without what wrappers added.

    `_orig_mod.` and `_fsdp_wrapped_module.` go wherever they stand; `module.` only if every name begins with it.
    """
    plain = {name: name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "") for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain


def listed(path: str) -> list[list[str]]:
    """The names in a file, one a line; an empty line ends a group.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from None
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def numbered(logical: Logical) -> bool:
    """Whether the optimizer state is known by numbers."""
    groups = _groups(logical.document())
    return any(type(name) is int for group in groups for name in group.get("params", ()))


def named(logical: Logical, names: Sequence[Sequence[str]]) -> Mapped:
    """The same checkpoint with names in the place of the numbers of its optimizer.

    Args:
        logical: a checkpoint with numbered optimizer state.
        names: of the parameters of each group, in the order in which the optimizer had them; or one list of all.

    Raises:
        LayoutError: there are more or fewer than the optimizer had, or a tensor of state has another shape than its
            parameter.
    """
    groups = _groups(logical.document())
    counts = [len(group.get("params", ())) for group in groups]
    flat = [name for group in names for name in group]
    if len(flat) != sum(counts) or (len(names) > 1 and [len(group) for group in names] != counts):
        raise LayoutError(
            f"{logical.origin}: its optimizer has {sum(counts)} parameters in groups of {counts}, and"
            f" {len(flat)} names are given in groups of {[len(group) for group in names]}",
            hint="give the names in the order in which the optimizer was built",
        )
    numbers = [number for group in groups for number in group["params"]]
    of = {str(number): name for number, name in zip(numbers, flat, strict=True)}
    views: list[View] = []
    for name in logical.names():
        meta = logical.meta(name)
        if name.startswith(STATE):
            number, *slot = split(name.removeprefix(STATE))
            parameter = of.get(number)
            if parameter is not None:
                _check(logical, parameter, meta.shape, slot)
                views.append(whole(meta, join(STATE.rstrip("/"), parameter, *slot)))
                continue
        views.append(whole(meta, name))
    document = dict(logical.document())
    renamed = [{**group, "params": [of[str(n)] for n in group["params"]]} for group in groups]
    state: dict[Any, Any] = {}
    for number, entries in document["optimizer"].get("state", {}).items():
        values = {slot: value for slot, value in entries.items() if not isinstance(value, TensorRef)}
        if values:  # tensors are found by their names
            state[of.get(str(number), number)] = values
    document["optimizer"] = {**document["optimizer"], "state": state, "param_groups": renamed}
    return Mapped(logical, views, document, aliases=logical.aliases)


def rekeyed(logical: Logical, keys: Mapping[str, str]) -> Logical:
    """The same checkpoint with other first parts of names: {"model": "net"} calls "model/w" "net/w"."""
    if not keys:
        return logical

    def new(name: str) -> str:
        first, slash, rest = name.partition("/")
        return keys.get(first, first) + slash + rest

    views = [whole(logical.meta(name), new(name)) for name in logical.names()]
    references = replace_refs(logical.document(), lambda ref: type(ref)(new(ref.name)))
    document = {keys.get(key, key): value for key, value in references.items()}
    return Mapped(logical, views, document, aliases={new(a): new(n) for a, n in logical.aliases.items()})


def _check(logical: Logical, parameter: str, shape: tuple[int, ...], slot: Sequence[str]) -> None:
    name = join(MODEL.rstrip("/"), parameter)
    expected = logical.meta(name).shape
    if shape and shape != expected and "step" not in slot:
        raise LayoutError(
            f"{logical.origin}: {parameter} has shape {list(expected)}, and the state that would be its own has"
            f" {list(shape)}: the names are in another order than the optimizer's"
        )


def _groups(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    optimizer = document.get("optimizer")
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
