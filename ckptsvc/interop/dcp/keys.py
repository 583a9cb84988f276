"""What the keys of a DCP checkpoint mean: model, optimizer state, parameter groups, and everything else.

`get_state_dict` makes {"model": ..., "optim": ...} of a job, and people save it under these or other keys:

    model.<fqn>                                  parameters and buffers
    optim.state.<fqn>.<slot>                     exp_avg, exp_avg_sq, step
    optim.param_groups.<i>.<key>                 groups by number; `params` is a list of names
    optim.param_groups.<fqn>.<key>               of flatten_optimizer_state_dict: hyper-parameters of each parameter
    <fqn>                                        a model saved without a key (torchtitan)

The metadata says under which keys a name stood in the nested state; names have dots in them, so
that nothing else could.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ckptsvc.errors import Damaged

Path = tuple[str | int, ...]

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
"""Names of modules that wrap another and add nothing: FSDP-1, torch.compile, activation checkpointing."""

_MODELS = ("model", "state_dict")
_OPTIMIZERS = ("optim", "optimizer", "optimizer_0")
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")


class Key(NamedTuple):
    """What one name of the checkpoint is.

    Attributes:
        kind: "model", "state", "group" or "other".
        name: the parameter or buffer; of a group "" where groups have numbers.
        path: the rest of the keys: the slot of a state; number and hyper-parameter of a group; all keys of the others.
    """

    kind: str
    name: str
    path: Path


class Keys:
    """Sorts the keys of one checkpoint.

    Attributes:
        model: the key of the model; "" if its names stand alone.
        optimizer: the key of the optimizer; "" if `state` and `param_groups` stand alone; None if there is none.
        more: keys of further optimizers, which are kept as they are.
    """

    def __init__(self, paths: Mapping[str, Path], model: str | None = None, optimizer: str | None = None) -> None:
        """Find out which keys are which.

        Args:
            paths: the keys of every name.
            model: what the user says the model's key is.
            optimizer: what the user says the optimizer's key is.
        """
        below: dict[str, list[Path]] = {}
        for path in paths.values():
            below.setdefault(str(path[0]), []).append(path)
        found = [top for top, all_below in below.items() if _is_optimizer(all_below)]
        found.sort(key=lambda top: (*(top != name for name in _OPTIMIZERS), top))
        if optimizer is None:
            alone = {"state", "param_groups"} & below.keys() or any(_flat_state(str(p[0])) for p in paths.values())
            optimizer = found[0] if found else "" if alone else None
        nested = (top for top in _MODELS if top in below and all(len(path) > 1 for path in below[top]))
        self.model = next(nested, "") if model is None else model
        self.optimizer = optimizer
        self.more = [top for top in found if top != optimizer]
        self._wrapped = False
        self._names: set[str] = set()
        keys = [self.key(path) for path in paths.values()]
        names = [k.name for k in keys if k.kind == "model"] or [k.name for k in keys if k.kind == "state"]
        self._names = {k.name for k in keys if k.kind == "model"}
        self._wrapped = bool(names) and all(name.startswith("module.") for name in names)

    def key(self, path: Path) -> Key:
        """What a name with these keys is."""
        if self._is_model(path):
            name = ".".join(map(str, path[1:] if self.model else path))
            return Key("model", self.stripped(name), ())
        if self.optimizer is not None and (not self.optimizer or path[0] == self.optimizer):
            found = _of_optimizer(path[1:] if self.optimizer else path)
            if found is not None:
                return self._split(found)
        return Key("other", "", path)

    def stripped(self, name: str) -> str:
        """A parameter's name without what wrappers put into it."""
        if self._wrapped:
            name = name.removeprefix("module.")
        return _WRAPPER.sub("", name)

    def _split(self, key: Key) -> Key:
        """A flat key cut after the parameter's name, which has dots as what follows it may have."""
        parts = key.name.split(".")
        whole = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self._names)
        cut = next(whole, len(parts))
        return key._replace(name=self.stripped(".".join(parts[:cut])), path=(*parts[cut:], *key.path))

    def _is_model(self, path: Path) -> bool:
        if self.model:
            return path[0] == self.model
        return len(path) == 1 and _of_optimizer(path) is None


def _of_optimizer(path: Path) -> Key | None:
    match path:
        case ("state", name, *slot) if slot:
            return Key("state", str(name), tuple(slot))
        case ("param_groups", *rest):
            return Key("group", "", tuple(rest))
        case (str() as flat,) if _flat_state(flat):
            kind, _, both = flat.partition(".")
            name, _, last = both.rpartition(".")
            return Key("state" if kind == "state" else "group", name, (last,))
    return None


def _flat_state(name: str) -> bool:
    """Whether it is a name as flatten_optimizer_state_dict makes them."""
    return name.startswith(("state.", "param_groups.")) and name.count(".") > 1


def _is_optimizer(paths: Iterable[Path]) -> bool:
    second = [str(path[1]) for path in paths if len(path) > 1]
    return any(name in {"state", "param_groups"} or _flat_state(name) for name in second)


def nested_path(name: str, path: Path | None, tops: Iterable[str]) -> Path:
    """The keys of a name; where the writer did not say them, the first is split off if it is one of `tops`."""
    if path:
        return path
    top, dot, rest = name.partition(".")
    return (top, rest) if dot and top in tops else (name,)


def unique(names: Mapping[str, str]) -> None:
    """Check that no two names have become one.

    Raises:
        Damaged: names both.
    """
    seen: dict[str, str] = {}
    for original, name in names.items():
        if (other := seen.setdefault(name, original)) != original:
            raise Damaged(f"{other} and {original} are both called {name} once wrappers are taken off")
