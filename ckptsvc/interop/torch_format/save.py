"""Single files of `torch.save`: plain dicts, DDP, Horovod, Lightning's `.ckpt`, optimizers of trainers; in and out.

The model and the optimizer are looked for under the names that people give them; all other values go into the document
under their own keys. Optimizer state is known by numbers in most of these files (see `naming`).

Read options:
    model       key of the model's state dict; default: the first of "model", "state_dict", "model_state_dict", "module"
    optimizer   key of the optimizer's state dict; default: the first of "optimizer", "optimizer_state_dict", "optim",
                "optimizer_states" (Lightning: its first)
    names       file with the names of the optimizer's parameters in its order, one a line; an empty line ends a group
    strip       prefix that is taken off the model's names ("net." of a Lightning module)
Write options:
    file        name of the file; default "checkpoint.pt"
    form        "plain" ({"model", "optimizer", ...}), "lightning", or "weights" (a bare state dict); default plain
    optimizer   "names" or "numbers": what stands for parameters in the optimizer's state; default numbers, as torch
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ckptsvc.errors import Damaged, InvalidInput, LayoutError
from ckptsvc.format.document import assemble, join, replace_refs, split
from ckptsvc.format.objects import TensorRef
from ckptsvc.geometry.box import Box
from ckptsvc.interop.files import Files, LocalFiles
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Foreign, Logical, Note
from ckptsvc.interop.naming.options import listed, named, numbered, unwrapped
from ckptsvc.interop.options import choice, known
from ckptsvc.interop.outputs import Output
from ckptsvc.interop.torch_format.file import StoredTensor, read_torch
from ckptsvc.interop.torch_format.pickles import Stub
from ckptsvc.interop.torch_format.write import Slot, torch_output
from ckptsvc.types import TensorMeta

MODELS = ("model", "state_dict", "model_state_dict", "module")
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")
STEPS = ("global_step", "step", "iteration")
LIGHTNING = "pytorch-lightning_version"
ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".tar")


def detect(files: Files) -> bool:
    """One file with a usual ending that begins as torch's do."""
    if not isinstance(files, LocalFiles) or not files.only.endswith(ENDINGS):
        return False
    head = bytearray(4)
    files.read_into(files.only, 0, memoryview(head))
    return head == b"PK\x03\x04" or head[:2] == b"\x80\x02"


def read(files: Files, origin: str, options: Mapping[str, str]) -> Logical:
    """One file.

    Raises:
        InvalidInput: the address is no file, there is no model in it, or its pickle is refused.
        Damaged: it is not a file of torch.save, or is truncated.
        LayoutError: the names given do not fit the optimizer.
    """
    known(options, ("model", "optimizer", "names", "strip"))
    key = files.only if isinstance(files, LocalFiles) else ""
    if not key:
        raise InvalidInput(f"{origin} is a folder: name the file")
    root = read_torch(files, key).root
    if not isinstance(root, dict):
        raise InvalidInput(f"{origin} holds {type(root).__name__}, not a dict")
    foreign = Foreign(origin, files)
    model, optimizer, rest = _divided(root, options, origin)
    _add_model(foreign, model, options.get("strip", ""))
    if optimizer is not None:
        foreign.plain["optimizer"] = _optimizer(foreign, optimizer)
    foreign.step = next((int(rest[k]) for k in STEPS if type(rest.get(k)) in (int, float) and rest[k] >= 0), 0)
    for name, value in rest.items():
        if name not in foreign.plain:
            foreign.plain[str(name)] = _plain(foreign, value, str(name))
    foreign.seal()
    return _with_names(foreign, options)


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """One file that `torch.load(weights_only=True)` reads.

    Raises:
        InvalidInput: an option is wrong.
        UnsupportedObject: a plain value cannot be in such a file.
    """
    known(options, ("file", "form", "optimizer"))
    form = choice(options, "form", ("plain", "lightning", "weights"))
    numbers = choice(options, "optimizer", ("numbers", "names")) == "numbers"
    slots = {name: _slot(logical, name) for name in logical.names()}
    for alias, name in logical.aliases.items():
        slots[alias] = slots[name]
    model = OrderedDict(("/".join(split(n)[1:]), slot) for n, slot in slots.items() if n.startswith(MODEL))
    notes: list[Note] = []
    extra = logical.document().get("model")
    if isinstance(extra, dict):  # extra states of modules
        model.update(_restored(extra, slots, "model", notes))
    if form == "weights":
        dropped = sum(not n.startswith((MODEL, "@")) for n in slots)
        if dropped:
            notes.append(Note("lost", f"{dropped} tensors that are not the model's have no place in a bare state dict"))
        root: dict[Any, Any] = model
    else:
        document = {k: v for k, v in logical.document().items() if not k.startswith("@")}
        optimizer = _optimizer_state(document.pop("optimizer", None), slots, notes, numbers=numbers)
        rest = _rest({key: value for key, value in document.items() if key != "model"}, slots, notes)
        root = _framed(form, model, optimizer, rest, logical.step)
    return Output([torch_output(options.get("file", "checkpoint.pt"), root)], notes=notes, facts=dict(options))


# ---- reading ------------------------------------------------------------------------------------------------


def _divided(
    root: dict[Any, Any], options: Mapping[str, str], origin: str
) -> tuple[dict[Any, Any], Any, dict[Any, Any]]:
    """(the model's state dict, the optimizer's or None, everything else)."""
    rest = dict(root)
    if "model" in options and options["model"] not in root:
        raise InvalidInput(f"{origin} has no {options['model']!r}", hint=f"it has {', '.join(map(str, root))[:500]}")
    candidates = (options["model"],) if "model" in options else MODELS
    key = next((k for k in candidates if isinstance(root.get(k), dict)), None)
    if key is None and any(isinstance(value, StoredTensor) for value in root.values()):
        return root, None, {}
    keys = (options["optimizer"],) if "optimizer" in options else OPTIMIZERS
    place = next((k for k in keys if k in root), None)
    if key is None and place is None and "param_groups" in root and "state" in root:  # optimizer.pt of a trainer
        return {}, root, {}
    if key is None:
        raise InvalidInput(
            f"no model is found in {origin}: it has {', '.join(map(str, root))[:500]}",
            hint="name it with the option model=KEY",
        )
    optimizer = rest.pop(place, None) if place is not None else None
    if isinstance(optimizer, list):
        optimizer, others = (optimizer[0], optimizer[1:]) if optimizer else (None, [])
        rest |= {f"{place}.{i}": other for i, other in enumerate(others, 1)}
    return rest.pop(key), optimizer if isinstance(optimizer, dict) else None, rest


def _add_model(foreign: Foreign, model: dict[Any, Any], strip: str) -> None:
    names = unwrapped(name for name in model if isinstance(name, str))
    stored: dict[StoredTensor, str] = {}
    extra: dict[str, Any] = {}
    for name, value in model.items():
        short = names.get(name, str(name)).removeprefix(strip)
        if not isinstance(value, StoredTensor):
            extra[short] = value
            continue
        logical = join("model", short)
        if value in stored and value.nbytes:  # the same memory under two names: tied
            foreign.aliases[logical] = stored[value]
            continue
        stored[value] = logical
        foreign.add(TensorMeta(logical, value.dtype, value.shape), Box.full(value.shape), value.where, value.block())
    if extra:
        foreign.plain["model"] = _plain(foreign, extra, "model")


def _optimizer(foreign: Foreign, optimizer: dict[Any, Any]) -> dict[str, Any]:
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise Damaged(f"{foreign.origin}: its optimizer has no state and parameter groups")
    names: dict[Any, Any] = {}
    for group in groups:
        given = group.get("param_names")
        if isinstance(given, list) and isinstance(group.get("params"), list) and len(given) == len(group["params"]):
            names |= dict(zip(group["params"], given, strict=True))
    short = unwrapped(str(name) for name in names.values())
    names = {number: short[str(name)] for number, name in names.items()}
    mixed: dict[Any, Any] = {}
    for number, entries in state.items():
        name = names.get(number, number)
        for slot, value in entries.items() if isinstance(entries, dict) else ():
            path = join("optimizer", "state", name, slot)
            if isinstance(value, StoredTensor):
                meta = TensorMeta(path, value.dtype, value.shape)
                foreign.add(meta, Box.full(value.shape), value.where, value.block())
                if type(name) is not str:  # the names of tensors cannot tell a number from a string
                    mixed.setdefault(name, {})[slot] = TensorRef(path)
            else:
                mixed.setdefault(name, {})[slot] = _plain(foreign, value, path)
    plain = []
    for i, group in enumerate(groups):
        entries = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
        members = [names.get(number, number) for number in group.get("params", ())]
        plain.append({**_plain(foreign, entries, join("optimizer", "param_groups", i)), "params": members})
    return {"state": mixed, "param_groups": plain}


def _plain(foreign: Foreign, value: Any, path: str) -> Any:
    """A value for the document: tensors become references, objects of classes that are not here their attributes."""
    if isinstance(value, StoredTensor):
        foreign.add(TensorMeta(path, value.dtype, value.shape), Box.full(value.shape), value.where, value.block())
        return TensorRef(path)
    if isinstance(value, Stub):
        foreign.notes.append(Note("lost", f"/{path}: an object of type {type(value).__name__} is kept as plain values"))
        value = value.state if value.state is not None else list(value.args)
    if isinstance(value, dict):
        return {key: _plain(foreign, item, join(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(foreign, item, join(path, i)) for i, item in enumerate(value))
    return value


def _with_names(foreign: Foreign, options: Mapping[str, str]) -> Logical:
    if not numbered(foreign):
        return foreign
    if "names" not in options:
        foreign.notes.append(
            Note(
                "warning",
                "the file numbers the parameters of the optimizer and does not name them; give their names in the"
                " optimizer's order with names=FILE, or attach to the optimizer itself",
            )
        )
        return foreign
    return named(foreign, listed(options["names"]))


# ---- writing ------------------------------------------------------------------------------------------------


def _slot(logical: Logical, name: str) -> Slot:
    meta = logical.meta(name)
    return Slot(name, Box.full(meta.shape), meta.dtype, meta.shape)


def _optimizer_state(plain: Any, slots: Mapping[str, Slot], notes: list[Note], *, numbers: bool) -> Any:
    """The state dict of the optimizer as torch makes it."""
    groups = plain.get("param_groups", []) if isinstance(plain, dict) else []
    order = [name for group in groups for name in group.get("params", ())]
    number = {str(name): i if numbers else name for i, name in enumerate(order)}
    state: dict[Any, dict[str, Any]] = {}
    for name, slot in slots.items():
        if name.startswith(STATE):
            parameter, *path = split(name.removeprefix(STATE))
            if parameter in number and len(path) == 1 and path[0] != MASTER:
                state.setdefault(number[parameter], {})[path[0]] = slot
            else:
                notes.append(Note("lost", f"/{name} has no place in the state of a torch optimizer"))
    for name, entries in (plain.get("state") or {}).items() if isinstance(plain, dict) else ():
        values = {k: v for k, v in entries.items() if not isinstance(v, TensorRef)}
        if values and str(name) in number:
            state.setdefault(number[str(name)], {}).update(values)
    if not groups and not state:
        return None
    plain_groups = [
        _restored({k: v for k, v in group.items() if k != "params"}, slots, join("optimizer", "param_groups", i), notes)
        | {"params": [number[str(name)] for name in group.get("params", ())]}
        | ({"param_names": [str(name) for name in group["params"]]} if _all_text(group) else {})
        for i, group in enumerate(groups)
    ]
    return {"state": dict(sorted(state.items(), key=lambda item: str(item[0]).zfill(12))), "param_groups": plain_groups}


def _rest(document: dict[str, Any], slots: Mapping[str, Slot], notes: list[Note]) -> dict[str, Any]:
    """What is neither model nor optimizer: plain values, with tensors where they refer to them or where names say."""
    own = {name: slot for name, slot in slots.items() if not name.startswith((MODEL, "optimizer/", "@"))}
    tree = assemble(document, own, lambda slot: slot)
    return {key: _storable(value, join("", key), notes) for key, value in tree.items()}


def _all_text(group: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) for name in group.get("params", ()))


def _restored(value: Any, slots: Mapping[str, Slot], path: str, notes: list[Note]) -> Any:
    """A value of the document with slots in the places of its references; what such a file cannot hold is left out."""

    def fetch(ref: Any) -> Any:
        if ref.name not in slots:
            raise LayoutError(f"/{path} refers to the tensor {ref.name[:200]!r}, which the checkpoint does not have")
        return slots[ref.name]

    return _storable(replace_refs(value, fetch), path, notes)


def _storable(value: Any, path: str, notes: list[Note]) -> Any:
    if value is None or type(value) in (bool, int, float, str, Slot):
        return value
    if isinstance(value, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        made.update((k, _storable(v, join(path, k), notes)) for k, v in value.items())
        return made
    if isinstance(value, list | tuple):
        return type(value)(_storable(item, join(path, i), notes) for i, item in enumerate(value))
    notes.append(Note("lost", f"/{path}: {type(value).__name__} has no place in a file that weights_only reads"))
    return None


def _framed(form: str, model: Any, optimizer: Any, rest: dict[str, Any], step: int) -> dict[str, Any]:
    """What stands around model and optimizer."""
    if form == "plain":
        return {"model": model, **({"optimizer": optimizer} if optimizer else {}), "step": step, **rest}
    return {
        "epoch": rest.pop("epoch", 0),
        "global_step": step,
        LIGHTNING: rest.pop(LIGHTNING, "2.0.0"),
        "state_dict": model,
        "loops": rest.pop("loops", {}),
        "callbacks": rest.pop("callbacks", {}),
        "optimizer_states": [optimizer] if optimizer else [],
        "lr_schedulers": rest.pop("lr_schedulers", []),
        **rest,
    }
