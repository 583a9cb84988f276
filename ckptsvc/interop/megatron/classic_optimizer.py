"""The optimizer in Megatron's classic checkpoints: whose state is whose, by order, numbers and shapes.

Without distributed optimizer the state has numbers that count through the param groups. In each group parameters are in
the order of the model, and who is in which group Megatron-Core's rules say (`megatron_names.of_group`). Numbers of
parameters and all shapes are checked; what does not go with them is refused. In 16-bit training the fp32 masters are
lists beside the state, a list for each group. The distributed optimizer keeps flat buffers (`megatron_flat`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ckptsvc.errors import Damaged, InvalidInput, LayoutError, NotFound
from ckptsvc.format.document import join
from ckptsvc.geometry.placement import Held
from ckptsvc.interop.logical import MASTER, STATE, Foreign, Note
from ckptsvc.interop.megatron.files import number
from ckptsvc.interop.megatron.flat import Item, pieces, spots
from ckptsvc.interop.megatron.names import EMBEDDING, OUTPUT, Group, is_expert, shared_out
from ckptsvc.interop.megatron.ranks import OPTIMIZER_FILE, Rank, Ranks, add_local
from ckptsvc.interop.plain import Plain
from ckptsvc.interop.torch_format.file import StoredTensor, read_torch
from ckptsvc.types import DTYPES, TensorMeta

BUFFERS = ("expert_bias", "local_tokens_per_expert", "inv_freq")
"""What modules of Megatron-Core have that is no parameter, by the ends of names."""

_HINT = "optimizer=no leaves the optimizer's state out"


class _Part(NamedTuple):
    """One of the optimizers that a rank has: torch's state dict, and masters by group."""

    state: Mapping[Any, Any]
    groups: Sequence[Group]
    masters: Sequence[Sequence[StoredTensor]] | None


class Optimizers:
    """Adds the optimizer's state of all ranks to a checkpoint."""

    def __init__(self, foreign: Foreign, ranks: Ranks, plain: Plain, bucket: int, *, tied: bool) -> None:
        """See `megatron_classic.read`; `bucket` and `tied` decide where things are in flat buffers."""
        self._foreign, self._ranks, self._plain = foreign, ranks, plain
        self._bucket, self._tied = bucket, tied
        self._groups: dict[str, Group] = {}
        self._done: set[str] = set()
        self._unnamed = False

    def add(self) -> None:
        """Raises InvalidInput, LayoutError, Damaged, NotFound as `megatron_classic.read`."""
        without = []
        for rank in self._ranks.ranks:
            parts = self._parts(rank)
            if not parts:
                without.append(rank.folder)
                continue
            held = self._ranks.held(rank)
            owned = [held[c, name] for c, tensors in enumerate(rank.chunks) for name in tensors if _is_parameter(name)]
            self._add_rank(rank, parts, {h.entry.name: h for h in owned})
        if without and len(without) < len(self._ranks.ranks):
            raise LayoutError(f"{self._foreign.origin}: {without[0]} has no optimizer, and others have one")
        if without:
            self._foreign.notes.append(Note("warning", "there is no optimizer in it"))
            return
        if self._unnamed:
            self._foreign.notes.append(
                Note("lost", "which parameters are in which param group: their marks are not Megatron-Core's own")
            )
        self._foreign.plain["optimizer"] = {"state": {}, "param_groups": list(self._groups.values())}

    def _parts(self, rank: Rank) -> list[_Part]:
        found = rank.root.get("optimizer")
        if found is None:
            return []
        parts = []
        for one in found if isinstance(found, list | tuple) else (found,):
            outer: Mapping[Any, Any] = one if isinstance(one, Mapping) else {}
            inner = outer.get("optimizer", outer.get("optimizer_state_dict", outer))
            groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
            if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
                raise Damaged(f"{self._foreign.origin}: the optimizer in {rank.folder} has no param groups")
            state = inner.get("state") or {}
            masters = outer.get("fp32_from_fp16_params", outer.get("fp32_from_fp16"))
            sound = masters is None or (isinstance(masters, list) and all(isinstance(m, list) for m in masters))
            if not isinstance(state, Mapping) or not sound or (masters is not None and len(masters) != len(groups)):
                raise Damaged(f"{self._foreign.origin}: the optimizer in {rank.folder} is of a form that is not known")
            parts.append(_Part(state, [dict(group) for group in groups], masters))
        return parts

    def _add_rank(self, rank: Rank, parts: Sequence[_Part], owned: Mapping[str, Held]) -> None:
        groups = [group for part in parts for group in part.groups]
        found = shared_out(groups, {name: len(h.entry.shape) for name, h in owned.items()})
        flat = all("params" not in group for group in groups)
        if not flat:
            found = self._checked(rank, groups, found)
        self._note_groups(groups, found)
        names = iter(found if found is not None else [[] for _ in groups])
        for part in parts:
            mine = [next(names) for _ in part.groups]
            if not flat:
                self._add_numbered(rank, part, mine, owned)
        if flat:
            self._add_flat(rank, owned)
            self._add_group_steps(groups, found, owned)

    def _checked(self, rank: Rank, groups: Sequence[Group], found: list[list[str]] | None) -> list[list[str]]:
        """The parameters of each group; refused if there are not as many as the group has."""
        if found is None:
            raise InvalidInput(
                f"{self._foreign.origin}: the param groups in {rank.folder} do not bear Megatron-Core's marks: which"
                " state belongs to which parameter cannot be proved", hint=_HINT,
            )  # fmt: skip
        for i, (group, names) in enumerate(zip(groups, found, strict=True)):
            numbers = group.get("params")
            if not isinstance(numbers, list) or len(numbers) != len(names) or any(type(n) is not int for n in numbers):
                there = len(numbers) if isinstance(numbers, list) else "no"
                raise InvalidInput(
                    f"{self._foreign.origin}: param group {i} in {rank.folder} has {there} parameters, and by"
                    f" Megatron-Core's rules {len(names)} are in it: frozen parameters, or groups of its own?",
                    hint=_HINT,
                )
        return found

    def _note_groups(self, groups: Sequence[Group], found: list[list[str]] | None) -> None:
        self._unnamed = self._unnamed or found is None
        for i, group in enumerate(groups):
            kept = {key: value for key, value in group.items() if key not in {"params", "step"}}
            made = self._groups.get(repr(kept))
            if made is None:
                path = join("optimizer/param_groups", len(self._groups))
                made = self._groups[repr(kept)] = {**self._plain.value(kept, path), "params": []}
            for name in found[i] if found is not None else ():
                if name not in self._done:
                    self._done.add(name)
                    made["params"].append(name)

    def _add_numbered(self, rank: Rank, part: _Part, found: Sequence[Sequence[str]], owned: Mapping[str, Held]) -> None:
        for i, (group, names) in enumerate(zip(part.groups, found, strict=True)):
            for key, name in zip(group["params"], names, strict=True):
                state = part.state.get(key, {})
                if not isinstance(state, Mapping):
                    raise Damaged(f"{self._foreign.origin}: the optimizer in {rank.folder} has no state of {key!r}")
                for slot, value in state.items():
                    if slot != "step":
                        self._add_slot(owned[name], str(slot), value)
                if state:
                    self._add_step(name, state.get("step", group.get("step")))
            if part.masters is not None:
                self._add_masters(rank, i, names, part.masters[i], owned)

    def _add_slot(self, held: Held, slot: str, value: Any) -> None:
        name = join(STATE[:-1], held.entry.name, slot)
        if isinstance(value, StoredTensor):
            add_local(self._foreign, name, held.entry.shape, held.local, value)
        elif value is not None:
            self._foreign.plain.setdefault("megatron", {}).setdefault("state", {})[name] = self._plain.value(
                value, name
            )

    def _add_masters(
        self, rank: Rank, i: int, names: Sequence[str], masters: Sequence[Any], owned: Mapping[str, Held]
    ) -> None:
        low = [name for name in names if self._ranks.dtypes[name] != "float32"]
        if len(low) != len(masters) or not all(isinstance(master, StoredTensor) for master in masters):
            raise InvalidInput(
                f"{self._foreign.origin}: param group {i} in {rank.folder} has {len(masters)} fp32 masters and"
                f" {len(low)} parameters of 16 bits", hint=_HINT,
            )  # fmt: skip
        for name, master in zip(low, masters, strict=True):
            self._add_slot(owned[name], MASTER, master)

    def _add_step(self, name: str, value: Any) -> None:
        step = number(self._foreign.files, value)
        canonical = join(STATE[:-1], name, "step")
        if step is not None and canonical not in self._foreign:
            self._foreign.add_value(TensorMeta(canonical, "float32", ()), struct.pack("<f", step))

    # ---- distributed optimizer --------------------------------------------------------------------------------

    def _add_group_steps(
        self, groups: Sequence[Group], found: list[list[str]] | None, owned: Mapping[str, Held]
    ) -> None:
        common = next((group["step"] for group in groups if group.get("step") is not None), None)
        steps = [group.get("step", common) for group in groups]
        if found is None:
            found, steps = [list(owned)], [common]
        for names, step in zip(found, steps, strict=True):
            for name in names:
                self._add_step(name, step)

    def _add_flat(self, rank: Rank, owned: Mapping[str, Held]) -> None:
        key = f"{rank.folder}/{OPTIMIZER_FILE}"
        try:
            root = read_torch(self._foreign.files, key).root
        except NotFound:
            raise NotFound(f"{self._foreign.files.url}/{key} is missing: it is the distributed optimizer's") from None
        if not isinstance(root, dict) or any(is_expert(name) for name in owned):
            raise InvalidInput(f"{key}: distributed optimizers of experts are not known", hint=_HINT)
        if root.get("buckets_coalesced") is not True:
            raise InvalidInput(f"{key} is in a form of Megatron-Core before 0.7, which is not known", hint=_HINT)
        waiting: dict[tuple[int, str], list[Held]] = {}  # a buffer for each chunk and element type, in this order
        for name, held in owned.items():
            waiting.setdefault((held.chunk, self._ranks.dtypes[name]), []).append(held)
        buffers = [(i, root[i]) for i in sorted(k for k in root if type(k) is int)]
        if len(buffers) != len(waiting):
            raise LayoutError(f"{key} has {len(buffers)} buffers, and {len(waiting)} are expected")
        for (i, buffer), ((_, dtype), rest) in zip(buffers, waiting.items(), strict=True):
            tensors = next(iter(buffer.values())) if isinstance(buffer, dict) and len(buffer) == 1 else None
            if not isinstance(tensors, dict):
                raise Damaged(f"{key}: its buffer {i} has no tensors in it")
            self._add_buffer(f"{key}: its buffer {i}", tensors, rest, dtype)

    def _add_buffer(self, what: str, tensors: Mapping[Any, Any], held: Sequence[Held], dtype: str) -> None:
        items = [
            Item(h.entry.name, prod(h.local.shape), self._tied and h.entry.name in (EMBEDDING, OUTPUT)) for h in held
        ]
        places, lengths = spots(items, self._bucket)
        for slot in ("param", "exp_avg", "exp_avg_sq"):
            stored = tensors.get(slot)
            if not isinstance(stored, StoredTensor) or len(stored.shape) != 1 or not stored.is_contiguous():
                raise Damaged(f"{what} has no flat tensor {slot}")
            if stored.shape[0] != sum(lengths):
                raise LayoutError(
                    f"{what} has {stored.shape[0]} elements, and the parameters of this rank take {sum(lengths)}",
                    hint="if it is in several buckets (overlapped gradient reduction), bucket=N says after how many"
                    f" elements a new one began; {_HINT}",
                )
            if slot == "param" and stored.dtype == dtype:
                continue
            key, at = stored.where
            for one, spot in zip(held, places, strict=True):
                meta = TensorMeta(
                    join(STATE[:-1], one.entry.name, MASTER if slot == "param" else slot), stored.dtype, one.entry.shape
                )
                start = at + (sum(lengths[: spot.bucket]) + spot.start) * DTYPES[stored.dtype].itemsize
                for box, first, block in pieces(one.local, 0, prod(one.local.shape)):
                    self._foreign.add(meta, box, (key, start + first * DTYPES[stored.dtype].itemsize), block)


def _is_parameter(name: str) -> bool:
    return not name.endswith(BUFFERS)
