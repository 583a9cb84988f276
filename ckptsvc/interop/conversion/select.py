"""A part of a checkpoint, under other names, in another precision; nothing is copied.

select    --only, --drop-optimizer, --rename
Recast    --dtype
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.document import join, split
from ckptsvc.geometry.box import Region
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.interop.conversion.casts import is_float
from ckptsvc.interop.logical import MODEL, STATE, Logical, Note
from ckptsvc.pipeline.read import Source
from ckptsvc.types import TensorMeta

OPTIMIZER = "optimizer"

Rename = Callable[[str], str]
"""From the name of a parameter to another, as the model writes them (not escaped)."""


class Derived:
    """A checkpoint that is another one but for what a subclass says; see `interop.logical.Logical`."""

    def __init__(self, base: Logical) -> None:
        self.base = base
        self.notes: list[Note] = list(base.notes)
        self.aliases: Mapping[str, str] = base.aliases
        self.touching, self.resolve, self.shard_name = base.touching, base.resolve, base.shard_name
        self.names, self.document, self.close = base.names, base.document, base.close

    @property
    def origin(self) -> str:
        """See Logical."""
        return self.base.origin

    @property
    def step(self) -> int:
        """See Logical."""
        return self.base.step

    @property
    def world_size(self) -> int:
        """See Logical."""
        return self.base.world_size

    @property
    def extent(self) -> int:
        """See Catalogue."""
        return self.base.extent

    @property
    def source(self) -> Source:
        """See Logical."""
        return self.base.source

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        return self.base.meta(name)

    def __contains__(self, name: object) -> bool:
        return name in self.base


class Recast(Derived):
    """The weights as they will be written: floating-point tensors below "model/" say another dtype.

    For exporters, to plan with: the bytes are those of `base`, which `conversion.produce` reads and casts.
    """

    def __init__(self, base: Logical, dtype: str) -> None:
        """Raises InvalidInput for a dtype that floats cannot be cast to."""
        super().__init__(base)
        if not is_float(dtype):
            raise InvalidInput(
                f"weights cannot be cast to {dtype!r}", hint="known are float16, bfloat16, float32 and float64"
            )
        self._dtype = dtype

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        meta = self.base.meta(name)
        return meta._replace(dtype=self._dtype) if name.startswith(MODEL) and is_float(meta.dtype) else meta


class Selected(Derived):
    """Some tensors of a checkpoint under names of their own.

    Args:
        base: the checkpoint.
        kept: new name -> name in the base.
        aliases: further names: new alias -> new name.
        edit: what becomes of the plain values of a rank.
        notes: added to the base's.
    """

    def __init__(
        self,
        base: Logical,
        kept: Mapping[str, str],
        aliases: Mapping[str, str],
        edit: Callable[[dict[str, Any]], dict[str, Any]],
        notes: Sequence[Note],
    ) -> None:
        super().__init__(base)
        self._kept, self.aliases, self._edit = dict(kept), dict(aliases), edit
        self.notes += notes
        self.names = lambda: sorted(self._kept)
        self.document = lambda rank=0: self._edit(base.document(rank))
        self.resolve = self._resolve
        self.touching = self._touching

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        stored = self._resolve(name)
        return self.base.meta(self._kept[stored])._replace(name=stored)

    def __contains__(self, name: object) -> bool:
        return name in self._kept or name in self.aliases

    def _resolve(self, name: str) -> str:
        stored = self.aliases.get(name, name)
        if stored not in self._kept:
            raise LayoutError(f"{self.origin} has no tensor {name[:200]!r} any more")
        return stored

    def _touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        return self.base.touching(self._kept[self._resolve(name)], wanted)


def select(
    base: Logical,
    *,
    only: Sequence[str] = (),
    drop_optimizer: bool = False,
    rename: Rename = lambda name: name,
    own: bool = True,
) -> Logical:
    """A part of a checkpoint, under other names.

    Args:
        base: the checkpoint.
        only: patterns (`fnmatch`); a tensor is kept if one fits its name, its name with dots for slashes, or the name
            of its parameter. None of them keeps all.
        drop_optimizer: leave the optimizer out.
        rename: of parameters; their optimizer state and param groups follow.
        own: keep the tensors of single ranks.

    Raises:
        InvalidInput: nothing is left, or two tensors would get one name.
    """
    notes: list[Note] = []
    names = base.names()
    chosen = [name for name in names if _fits(name, only)]
    if drop_optimizer:
        chosen = [name for name in chosen if not name.startswith(f"{OPTIMIZER}/")]
        notes.append(Note("lost", "the optimizer's state and its settings are left out, as asked"))
    if not own and (single := [name for name in chosen if name.startswith("@")]):
        chosen = [name for name in chosen if not name.startswith("@")]
        notes.append(Note("lost", f"{len(single)} tensors that belong to single ranks, for example {single[0]}"))
    if only and len(chosen) < len(names):
        notes.append(Note("lost", f"{len(names) - len(chosen)} of {len(names)} tensors are left out, as asked"))
    if names and not chosen:
        raise InvalidInput(f"no tensor of {base.origin} is left", hint="`ckptsvc inspect` lists their names")
    kept = _renamed(chosen, rename)
    there = set(chosen)
    new = {old: name for name, old in kept.items()}
    aliases = {
        _new_name(alias, rename): new[name]
        for alias, name in base.aliases.items()
        if name in there and _fits(alias, only)
    }
    with_optimizer = not drop_optimizer and (not only or any(name.startswith(STATE) for name in chosen))
    gone = {_parameter(name) for name in names if name.startswith(STATE)} - {
        _parameter(name) for name in chosen if name.startswith(STATE)
    }
    return Selected(base, kept, aliases, lambda plain: _edited(plain, rename, gone, with_optimizer), notes)


def renaming(rules: Sequence[str]) -> Rename:
    """A `Rename` that applies "REGEX=REPLACEMENT" one after the other, wherever in the name they match.

    Raises:
        InvalidInput: a rule has no "=", or its expression is none.
    """
    compiled = []
    for rule in rules:
        pattern, equals, replacement = rule.partition("=")
        try:
            compiled.append((re.compile(pattern), replacement))
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise InvalidInput(f"{rule!r} is no rule for renaming: {error}") from None
        if not equals or not pattern:
            raise InvalidInput(
                f"{rule!r} is no rule for renaming", hint="for example '^module\\.=' or 'h\\.(\\d+)=layers.\\1'"
            )

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


def _fits(name: str, patterns: Sequence[str]) -> bool:
    if not patterns:
        return True
    spellings = (name, name.replace("/", "."), _parameter(name))
    return any(fnmatch.fnmatchcase(spelling, pattern) for spelling in spellings for pattern in patterns)


def _parameter(name: str) -> str:
    """The name of the parameter that a tensor is, or is state of; of other tensors their own."""
    for prefix in (MODEL, STATE):
        if name.startswith(prefix):
            return split(name.removeprefix(prefix))[0]
    return name


def _new_name(name: str, rename: Rename) -> str:
    for prefix in (MODEL, STATE):
        if name.startswith(prefix):
            parameter, slash, rest = name.removeprefix(prefix).partition("/")
            return prefix + join("", rename(split(parameter)[0])) + slash + rest
    return name if name.startswith("@") else rename(name)


def _renamed(names: Iterable[str], rename: Rename) -> dict[str, str]:
    kept: dict[str, str] = {}
    for name in names:
        new = _new_name(name, rename)
        if not new or new in kept:
            other = f" and {kept[new]!r}" if new in kept else ""
            raise InvalidInput(f"{name!r}{other} would be called {new!r}")
        kept[new] = name
    return kept


def _edited(plain: dict[str, Any], rename: Rename, gone: set[str], with_optimizer: bool) -> dict[str, Any]:
    """The plain values without what the optimizer no longer has, and with the new names of parameters."""
    optimizer = plain.get(OPTIMIZER)
    if not with_optimizer:
        return {key: value for key, value in plain.items() if key != OPTIMIZER}
    if not isinstance(optimizer, dict):
        return plain
    edited = dict(optimizer)
    if isinstance(state := optimizer.get("state"), dict):
        edited["state"] = {rename(str(name)): value for name, value in state.items() if name not in gone}
    if isinstance(groups := optimizer.get("param_groups"), list):
        edited["param_groups"] = [_edited_group(group, rename, gone) for group in groups]
    return {**plain, OPTIMIZER: edited}


def _edited_group(group: Any, rename: Rename, gone: set[str]) -> Any:
    if not isinstance(group, dict) or not isinstance(names := group.get("params"), list):
        return group
    return {**group, "params": [rename(name) if isinstance(name, str) else name for name in names if name not in gone]}
