"""Who stores what: a placement's ranks hold copies of each other's tensors; every element is stored by one of them.

What several ranks hold is shared out among them (`geometry.layout.split_replicated`). What ZeRO divides is stored where
ZeRO puts it (`geometry.zero`), all that a rank holds of one kind in one group, in the order given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ckptsvc.geometry.box import Box, Region, Shape
from ckptsvc.geometry.layout import split_replicated
from ckptsvc.geometry.parallel import Coordinate
from ckptsvc.geometry.placement import Entry, Placement
from ckptsvc.geometry.rules import Local
from ckptsvc.geometry.zero import Flat, fragment, logical_regions


class _Holders(NamedTuple):
    """The ranks that hold the same.

    Attributes:
        divided: whether ZeRO divides it over them.
        expert: whether it belongs to experts, and with it which ranks are data parallel.
        stages: the pipeline stages.
        members: the tensor-parallel ranks.
    """

    divided: bool
    expert: bool
    stages: tuple[int, ...]
    members: tuple[int, ...]


class _Key(NamedTuple):
    """What tells bundles apart: holders, the expert-parallel rank (None: any), and whether experts are stacked."""

    holders: _Holders
    ep: int | None
    stacked: bool


class _Item(NamedTuple):
    """Tensors of one parameter that are divided alike: the parameter and its state, or some of it."""

    entries: tuple[Entry, ...]
    local: Local


class _Bundle:
    """All items that the same ranks hold."""

    def __init__(self, holders: _Holders, items: list[_Item], replicas: int, zero: int) -> None:
        self.holders = holders
        self._items = items
        self._replicas = replicas
        self._zero = zero
        self._numels = [Box.full(item.local.shape).size for item in items]
        self._flat = Flat(self._numels, replicas) if holders.divided and zero < 3 else None
        self._shares: list[list[tuple[str, Region]]] | None = None

    def stored(self, at: Coordinate, index: int, tp: int) -> Iterable[tuple[str, Region]]:
        """What the rank at a coordinate stores, which is number `index` of the data-parallel ranks."""
        stages, members = self.holders.stages, self.holders.members
        outer = stages.index(at.pp) * len(members) + members.index(tp)
        if self.holders.divided:  # copies of what ZeRO divides are stored by the first that have them
            return () if outer else self._divided(index)
        if self._shares is None:
            self._shares = self._shared_out(len(stages) * len(members) * self._replicas)
        return self._shares[outer * self._replicas + index]

    def _shared_out(self, number: int) -> list[list[tuple[str, Region]]]:
        named = [(entry, piece.box) for item in self._items for entry in item.entries for piece in item.local.pieces]
        shares: list[list[tuple[str, Region]]] = [[] for _ in range(number)]
        parts = split_replicated([(box, entry.itemsize) for entry, box in named], number)
        for (entry, _), held in zip(named, parts, strict=True):
            for holder, box in held:
                shares[holder].append((entry.name, box))
        return shares

    def _divided(self, index: int) -> Iterable[tuple[str, Region]]:
        for i, start, length in self._ranges(index):
            item = self._items[i]
            shape = item.entries[0].shape
            for region in logical_regions(shape, item.local, start, length):
                for entry in item.entries:
                    yield entry.name, region

    def _ranges(self, index: int) -> Iterable[tuple[int, int, int]]:
        """(item, first element, elements) of a data-parallel rank."""
        if self._flat is not None:
            yield from (share[:3] for share in self._flat.shares(index))
            return
        for i, numel in enumerate(self._numels):
            part = fragment(numel, self._replicas, index)[1]
            if part.length:
                yield i, part.start, part.length


class Shares:
    """Who stores what of a placement."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._members: dict[tuple[int, Shape, bool, int], tuple[tuple[int, ...], ...]] = {}
        self._by_holders: dict[_Key, _Bundle] = {}
        self._named: dict[tuple[int, ...], list[_Bundle]] = {}
        self._common: dict[tuple[int, ...], list[_Bundle]] = {}
        self._stacked = any(claim.rule.experts is not None for claim in placement.claims.values())

    def regions(self, rank: int) -> list[tuple[str, Region]]:
        """What a rank stores, by the names of the entries.

        Raises:
            LayoutError: there is no such rank, or a tensor does not divide.
        """
        parallel = self._placement.parallel
        at = parallel.coordinate(rank)
        found: list[tuple[str, Region]] = []
        for bundle in self._at(at):
            expert = bundle.holders.expert
            index = at.edp if expert else at.cp + parallel.cp * at.dp
            found.extend(bundle.stored(at, index, at.etp if expert else at.tp))
        return found

    def _at(self, at: Coordinate) -> list[_Bundle]:
        """The bundles of a rank: those of experts that have names, and those of all else."""
        common = (at.pp, at.tp, at.ep, at.etp) if self._stacked else (at.pp, at.tp)
        if common not in self._common:
            self._common[common] = self._grouped(self._placement.at(at.pp, None), at, None)
        named = (at.pp, at.ep, at.etp)
        if named not in self._named:
            self._named[named] = self._grouped(self._placement.at(at.pp, at.ep), at, at.ep)
        return self._common[common] + self._named[named]

    def _grouped(self, entries: Sequence[Entry], at: Coordinate, ep: int | None) -> list[_Bundle]:
        """Bundles of entries; what bundles are known already is not worked out again."""
        grouped: dict[_Key, dict[tuple[str, Shape], list[Entry]]] = defaultdict(dict)
        for entry in entries:
            holders, stacked = self._holders(entry, at)
            key = _Key(holders, at.ep if stacked else ep, stacked)
            grouped[key].setdefault((entry.parameter, entry.shape), []).append(entry)
        found = []
        for key, items in grouped.items():
            if key not in self._by_holders:
                self._by_holders[key] = self._bundle(key.holders, list(items.values()), at)
            found.append(self._by_holders[key])
        return found

    def _bundle(self, holders: _Holders, items: Sequence[list[Entry]], at: Coordinate) -> _Bundle:
        parallel = self._placement.parallel
        tp = at.etp if holders.expert else at.tp
        made = [_Item(tuple(entries), self._placement.local(entries[0], tp, at.ep)) for entries in items]
        replicas = parallel.expert_dp if holders.expert else parallel.dp * parallel.cp
        return _Bundle(holders, made, replicas, parallel.zero)

    def _holders(self, entry: Entry, at: Coordinate) -> tuple[_Holders, bool]:
        """Who holds an entry as the rank at a coordinate does, and whether it is stacked experts."""
        placement = self._placement
        home = placement.home(entry.parameter)
        rule, odd = home.claim.rule, placement.is_odd(entry)
        stacked = rule.experts is not None and not odd
        expert = rule.is_expert and (stacked or home.ep is not None)  # the step of stacked experts is everybody's
        key = (rule.number, entry.shape, odd, at.ep if stacked else 0)
        members = self._members.get(key)
        if members is None:
            ranks = placement.parallel.expert_tp if expert else placement.parallel.tp
            parts = [placement.local(entry, tp, at.ep).pieces for tp in range(ranks)]
            members = tuple(tuple(tp for tp in range(ranks) if parts[tp] == part) for part in parts)
            self._members[key] = members
        zero = placement.parallel.zero
        divided = not odd and (zero == 3 or (zero > 0 and entry.state))
        stages = tuple(chunk.stage for chunk in home.chunks)
        return _Holders(divided, expert, stages, members[at.etp if expert else at.tp]), stacked
