"""Megatron's classic checkpoints (`--ckpt-format torch`), written for wanted degrees of parallelism.

Written into a folder `iter_<step>`, with `latest_checkpointed_iteration.txt` beside it; see `megatron_ranks` for what
is in it. The optimizer is one without the distributed optimizer (in 16-bit training with fp32 masters): Megatron finds
its state by numbers, which count parameters in the order of Megatron-Core's modules. Options:

    tp=N, pp=N, ep=N, vpp=N   degrees of parallelism, each 1 without it; tensor parallelism of experts is tp
    stages=N/N/...            layers of each stage, where they do not divide, or "balanced"
    dp=N, cp=N                have no effect: replicas have no files
    spec=local, spec=te       names of norms: modules of their own, or inside the linear layers as of Transformer
                              Engine; without it they stay as they are
    heads=N, kv_heads=N       of the attention, where the checkpoint's configuration does not say them
    vocab=N                   tokens that there are: rows after them are left out and, with zeros, made a multiple of
    vocab_multiple=N          so many times tp (128, or what the arguments say); without vocab= rows stay as they are

Random states belong to ranks and are not written: load with --no-load-rng.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import msgspec

from ckptsvc.errors import ConfigError, LayoutError
from ckptsvc.geometry.box import Box, Shape, as_flat
from ckptsvc.geometry.layout import Piece
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.placement import Entry, Held, Placement
from ckptsvc.geometry.rules import Local
from ckptsvc.interop.logical import MASTER, Logical, Note
from ckptsvc.interop.megatron.files import LATEST
from ckptsvc.interop.megatron.groups import Groups, rest_of, step_tensor
from ckptsvc.interop.megatron.layers import FUSED, SPECS, Parameter, Source, separate
from ckptsvc.interop.megatron.names import EMBEDDING, OUTPUT, module_order
from ckptsvc.interop.megatron.ranks import EXTRA, MODEL_FILE
from ckptsvc.interop.naming.families import family, variables
from ckptsvc.interop.outputs import Output, OutputFile, Small
from ckptsvc.interop.torch_format.write import Packed, Slot, torch_output

LAYOUT = ("tp", "pp", "ep", "vpp", "stages", "dp", "cp")
SIZES = ("heads", "kv_heads", "vocab", "vocab_multiple")
OPTIONS = (*LAYOUT, "spec", *SIZES)


class _Wanted(NamedTuple):
    parallel: Parallel
    spec: str | None
    sizes: Mapping[str, int]


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """An `interop.formats.Exporter`; options: see the module.

    Raises:
        ConfigError: an option is unknown or has a value it cannot have.
        LayoutError: a tensor does not divide, or no rule takes it.
        InvalidInput: the optimizer's state cannot be in such a checkpoint.
    """
    wanted = _check(options)
    found = {p.name: p for p in separate(logical, wanted.spec)}
    groups = Groups(logical, list(found.values()))
    writer = _Writer(logical, found, groups, wanted)
    notes = [*groups.notes]
    degrees = {name: getattr(wanted.parallel, name) for name in ("tp", "pp", "ep", "expert_tp")}
    rest = rest_of(logical, degrees, notes)
    files = [writer.file(tp, pp, ep, rest) for pp, ep, tp in writer.places()]
    last = Small(LATEST, str(logical.step).encode())
    facts = {"format": "megatron-classic", "options": dict(options)}
    return Output(files, lambda _: [last], [*notes, *writer.notes], facts)


def _check(options: Mapping[str, str]) -> _Wanted:
    if unknown := options.keys() - set(OPTIONS):
        raise ConfigError(f"megatron-classic has no option {min(unknown)!r}", hint=f"it has {', '.join(OPTIONS)}")
    sizes = {name: options[name] for name in SIZES if name in options}
    wrong = next((name for name, text in sizes.items() if not re.fullmatch(r"[1-9]\d{0,8}", text)), None)
    if wrong is not None:
        raise ConfigError(f"{wrong}={sizes[wrong]!r} is no number from 1 on")
    spec = options.get("spec")
    if spec is not None and spec not in SPECS:
        raise ConfigError(f"spec={spec!r} is not one of {', '.join(SPECS)}")
    given = {name: options[name] for name in LAYOUT if name in options}
    if "ep" in given:  # experts are divided over ranks of data parallelism: of which there are as many then
        given |= {"dp": given["ep"], "cp": "1", "etp": given.get("tp", "1")}
    parallel = Parallel.parse(",".join(f"{name}={text}" for name, text in given.items())) if given else Parallel()
    if parallel.ep == 1:
        parallel = msgspec.structs.replace(parallel, dp=1, cp=1)
    return _Wanted(parallel, spec, {name: int(text) for name, text in sizes.items()})


class _Writer:
    """Plans the file of every rank.

    Attributes:
        notes: what was done to the vocabulary.
    """

    def __init__(self, logical: Logical, found: Mapping[str, Parameter], groups: Groups, wanted: _Wanted) -> None:
        self.notes: list[Note] = []
        self._found, self._groups, self._parallel = found, groups, wanted.parallel
        self._folder = f"iter_{logical.step:07d}"
        shapes = {name: p.model.shape for name, p in found.items()}
        known = {**variables(logical.document(), shapes), **wanted.sizes}
        if "heads" in known:
            known.setdefault("kv_heads", known["heads"])
        if wanted.parallel.tp > 1 and "kv_heads" not in known and any("linear_qkv" in name for name in found):
            raise LayoutError(
                f"{logical.origin} does not say how many key and value heads there are, between which tp > 1 cuts",
                hint="say kv_heads=N, or heads=N if there are as many",
            )
        shapes = self._without_padding(shapes, known, "vocab" in wanted.sizes)
        order = sorted(found, key=module_order)
        entries = [Entry(name, name, shapes[name], 1) for name in order]
        self._placement = Placement(family("megatron").rules, self._parallel, entries, known).check()
        self._fused = any(name.endswith(FUSED) for name in found)
        self._masters = any(MASTER in p.state for p in found.values())

    def _without_padding(self, shapes: dict[str, Shape], known: dict[str, int], given: bool) -> dict[str, Shape]:
        """Shapes with as many rows of a vocabulary as there are tokens, if that is said."""
        known["vocab_multiple"] = known.get("vocab_multiple", 128) if given else 1
        padded = known["vocab_multiple"] * self._parallel.tp
        made = dict(shapes)
        for name in (EMBEDDING, OUTPUT):
            if name not in shapes or not shapes[name]:
                continue
            rows, kept = shapes[name][0], min(known["vocab"], shapes[name][0]) if given else shapes[name][0]
            added = -kept % padded
            made[name] = (kept, *shapes[name][1:])
            if kept < rows:
                self.notes.append(Note("lost", f"{rows - kept} rows of padding of {name}"))
            if added:
                self.notes.append(Note("warning", f"{added} rows of zeros are added to {name} as padding"))
        return made

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(pp, ep, tp) of every file."""
        p = self._parallel
        return ((pp, ep, tp) for pp in range(p.pp) for ep in range(p.ep) for tp in range(p.tp))

    def file(self, tp: int, pp: int, ep: int, rest: Mapping[str, Any]) -> OutputFile:
        """The file of one rank."""
        p = self._parallel
        held = self._placement.held(p.rank(dp=ep, tp=tp, pp=pp))
        held.sort(key=lambda h: (h.chunk, module_order(h.name)))
        folder = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if p.pp > 1 else "") + (f"_{ep:03d}" if p.ep > 1 else "")
        root = dict(rest)
        if p.vpp == 1:
            root["model"] = self._model(held)
        else:
            for chunk in range(p.vpp):
                root[f"model{chunk}"] = self._model([h for h in held if h.chunk == chunk])
        if self._groups.step is not None:
            root["optimizer"] = self._optimizer(held, self._groups.step)
        number = (pp * p.ep + ep) * p.tp + tp
        return torch_output(f"{self._folder}/{folder}/{MODEL_FILE}", root, rank=number)

    def _model(self, held: Sequence[Held]) -> OrderedDict[str, Any]:
        """The state dict of a chunk; modules with `_extra_state` have nothing in it, but the key must be there."""
        made: OrderedDict[str, Any] = OrderedDict()
        names = [h.name for h in held]
        for h, following in zip(held, [*names[1:], ""], strict=True):
            made[h.name] = _slot(self._found[h.entry.name].model, h.local)
            module, _, _ = h.name.rpartition(".")
            if following.startswith(f"{module}."):
                continue
            if module.rpartition(".")[2].startswith("linear_") or module == "output_layer":
                made[f"{module}.{EXTRA}"] = None
            if self._fused and module.endswith("self_attention.linear_qkv"):
                made[f"{module.removesuffix('linear_qkv')}core_attention.{EXTRA}"] = None
        return made

    def _optimizer(self, held: Sequence[Held], step: float) -> dict[str, Any]:
        """Every rank has all param groups, also those of which it has no parameter."""
        by_name = {h.entry.name: h for h in held}
        order = {h.entry.name: i for i, h in enumerate(held)}
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        masters: list[list[Any]] = []
        for group, members in zip(self._groups.groups, self._groups.members, strict=True):
            mine = sorted((name for name in members if name in by_name), key=order.__getitem__)
            numbers = list(range(len(state), len(state) + len(mine)))
            low = []
            for number, name in zip(numbers, mine, strict=True):
                found, local = self._found[name].state, by_name[name].local
                slots = {slot: _slot(source, local) for slot, source in found.items() if slot not in {"step", MASTER}}
                state[number] = {"step": step_tensor(step), **slots}
                if MASTER in found:
                    low.append(_slot(found[MASTER], local))
            groups.append({**group, "params": numbers})
            masters.append(low)
        inner = {"state": state, "param_groups": groups}
        return {"optimizer": inner, "fp32_from_fp16_params": masters} if self._masters else inner


def _slot(source: Source, local: Local) -> Slot | Packed:
    """A rank's local tensor as the regions of the checkpoint's tensor that it is made of."""
    if source.shape == () and local.shape:
        raise LayoutError(f"{source.meta.name} is a number, and its parameter has the shape {list(local.shape)}")
    dtype = source.meta.dtype
    if len(local.pieces) == 1 and local.pieces[0].local == Box.full(local.shape):
        return Slot(source.meta.name, source.box(local.pieces[0].box), dtype, local.shape)
    runs = sorted(run for piece in local.pieces for run in _runs(local.shape, piece))
    parts = tuple((first, source.meta.name, source.box(Box(origin, shape))) for first, origin, shape in runs)
    return Packed(dtype, prod(local.shape), parts, local.shape)


def _runs(shape: Shape, piece: Piece) -> Iterator[tuple[int, Shape, Shape]]:
    """Parts of a piece that are contiguous in the local tensor: first element there; origin and shape in the whole."""
    flat = as_flat(shape, piece.local)
    if flat is not None:
        yield flat.start, piece.box.origin, piece.box.shape
        return
    d = next(d for d, n in enumerate(piece.local.shape) if n > 1)
    for i in range(piece.local.shape[d]):
        yield from _runs(shape, Piece(_row(piece.box, d, i), _row(piece.local, d, i)))


def _row(box: Box, d: int, i: int) -> Box:
    return Box((*box.origin[:d], box.origin[d] + i, *box.origin[d + 1 :]), (*box.shape[:d], 1, *box.shape[d + 1 :]))
