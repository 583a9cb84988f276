"""Rules and a parallel layout, applied to the tensors of a model: which rank holds what.

tensors + rules + layout -> Placement -> held(rank): the rank's tensors as its framework has them
                                      -> regions(rank): what it stores, every element once over all ranks
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, Region, Shape
from ckptsvc.geometry.layout import Piece, split_replicated
from ckptsvc.geometry.parallel import Chunk, Coordinate, Parallel
from ckptsvc.geometry.rules import Claim, Local, Rules, local_part
from ckptsvc.geometry.zero import Flat, logical_regions, split

_SHOWN = 5


class Entry(NamedTuple):
    """A tensor to be placed.

    Attributes:
        name: its name.
        parameter: the name that rules speak of: the parameter's, also for its optimizer state.
        shape: its global shape. State of another shape than its parameter (a step) goes with it, whole.
        itemsize: bytes per element.
        state: whether it is optimizer state.
    """

    name: str
    parameter: str
    shape: Shape
    itemsize: int
    state: bool = False


class Held(NamedTuple):
    """A tensor that a rank holds.

    Attributes:
        entry: which.
        name: what the rank calls the parameter: layers and experts counted from the first it has itself.
        chunk: which of the rank's chunks of layers it belongs to (0 without interleaving).
        local: its local tensor and what of it is where.
    """

    entry: Entry
    name: str
    chunk: int
    local: Local


class _Home(NamedTuple):
    """Where a parameter lives, apart from tensor parallelism: the chunks, and the expert-parallel rank (None: all)."""

    claim: Claim
    chunks: tuple[Chunk, ...]
    ep: int | None


class _Group(NamedTuple):
    """Tensors that the same ranks hold: whether ZeRO divides them, their stages, tensor ranks, and expert rank."""

    divided: bool
    stages: tuple[int, ...]
    members: tuple[int, ...]
    ep: int | None


class Placement:
    """Tensors under a layout.

    Attributes:
        parallel: the layout.
        entries: the tensors that are placed, in the order given.
        claims: parameter -> the rule that takes it.
        unclaimed: parameters no rule takes.
        contested: parameters that several take.
        variables: those given, and `layers` and `experts` as the names count them.
    """

    def __init__(
        self, rules: Rules, parallel: Parallel, entries: Sequence[Entry], variables: Mapping[str, int]
    ) -> None:
        """Find the rule of every tensor; `check` complains about those that have none."""
        self.parallel = parallel
        self.claims: dict[str, Claim] = {}
        self.unclaimed: list[str] = []
        self.contested: dict[str, list[Claim]] = {}
        for parameter in dict.fromkeys(entry.parameter for entry in entries):
            claims = rules.claims(parameter)
            if len(claims) == 1:
                self.claims[parameter] = claims[0]
            elif claims:
                self.contested[parameter] = claims
            else:
                self.unclaimed.append(parameter)
        self.entries = [entry for entry in entries if entry.parameter in self.claims]
        self._shapes = {entry.parameter: entry.shape for entry in reversed(self.entries)}
        self._shapes |= {entry.parameter: entry.shape for entry in self.entries if not entry.state}
        self.variables = {**self._counted(), **variables}
        self._chunks: list[Chunk] | None = None
        self._homes: dict[str, _Home] = {}
        self._locals: dict[tuple[int, Shape, int, int], Local] = {}
        self._members: dict[tuple[int, Shape, int], tuple[tuple[int, ...], ...]] = {}
        self._by_place: dict[tuple[int, int | None], list[Entry]] | None = None
        self._shares: dict[_Group, list[list[tuple[str, Box]]]] = {}

    def check(self) -> Placement:
        """Itself, if every tensor has exactly one rule and its place can be worked out.

        Raises:
            LayoutError: names tensor and rules.
        """
        for parameter, (first, second, *_) in self.contested.items():
            raise LayoutError(
                f"{parameter} is taken by {first.rule} and by {second.rule}", hint="make one of the patterns narrower"
            )
        if self.unclaimed:
            more = f" and {len(self.unclaimed) - _SHOWN:,} more" if len(self.unclaimed) > _SHOWN else ""
            raise LayoutError(
                f"no rule takes {', '.join(self.unclaimed[:_SHOWN])}{more}",
                hint="`ckptsvc layout --explain` shows what each rule takes; rules of your own: --rules FILE",
            )
        for entry in self.entries:
            experts = self.claims[entry.parameter].rule.is_expert
            for tp in range(self.parallel.expert_tp if experts else self.parallel.tp):
                self.local(entry, tp, 0)
            self.home(entry.parameter)
        return self

    def home(self, parameter: str) -> _Home:
        """The chunks of layers that hold a parameter (one per stage), and the expert-parallel rank (None: all of them).

        Raises:
            LayoutError: layers or experts do not divide.
        """
        home = self._homes.get(parameter)
        if home is None:
            claim = self.claims[parameter]
            home = self._homes[parameter] = _Home(claim, self._held_by(claim), self._expert_rank(parameter, claim))
        return home

    def local(self, entry: Entry, tp: int, ep: int) -> Local:
        """What ranks hold of a tensor.

        Args:
            entry: which.
            tp: tensor-parallel rank; expert tensor-parallel if it belongs to an expert.
            ep: expert-parallel rank.

        Raises:
            LayoutError: it does not divide.
        """
        shape, claim = entry.shape, self.claims[entry.parameter]
        if shape != self._shapes[entry.parameter]:
            whole = Box.full(shape)
            return Local(shape, () if whole.is_empty else (Piece(whole, whole),))
        rule = claim.rule
        key = (rule.number, shape, tp if rule.cut is not None else 0, ep if rule.experts is not None else 0)
        local = self._locals.get(key)
        if local is None:
            local = local_part(entry.parameter, shape, rule, self.parallel, self.variables, tp, ep)
            self._locals[key] = local
        return local

    def held(self, rank: int) -> list[Held]:
        """All that a rank holds when nothing is divided over data parallelism, replicas too, in the order given.

        The same for all ranks that differ in data parallelism only.
        """
        at = self.parallel.coordinate(rank)
        found = []
        for entry in self._at(at):
            home = self.home(entry.parameter)
            tp = at.etp if home.claim.rule.is_expert else at.tp
            local = self.local(entry, tp, at.ep)
            found += [
                Held(entry, self._local_name(home, chunk), chunk.number, local)
                for chunk in home.chunks
                if chunk.stage == at.pp
            ]
        return found

    def bytes_held(self, rank: int) -> int:
        """Bytes that a rank has in memory of what is placed: ZeRO counted, padding too."""
        nbytes = 0
        for held in self.held(rank):
            size = Box.full(held.local.shape).size
            if self._divided(held.entry):
                size = -(-size // self._replicas(held.entry))
            nbytes += size * held.entry.itemsize
        return nbytes

    def regions(self, rank: int) -> list[tuple[str, Region]]:
        """What a rank stores: over all ranks every element of every tensor exactly once.

        What several ranks hold is shared out among them (`geometry.layout.split_replicated`); what ZeRO divides is
        where ZeRO puts it, all parameters of a rank in one group, in the order given.
        """
        at = self.parallel.coordinate(rank)
        found: list[tuple[str, Region]] = []
        groups: dict[_Group, list[Entry]] = defaultdict(list)
        for entry in self._at(at):
            groups[self._group(entry, at)].append(entry)
        for key, entries in groups.items():
            tp = at.etp if self._is_expert(entries[0]) else at.tp
            replica, number = self._replica(at, entries[0], key, tp)
            if key.divided:
                if replica < number:
                    found.extend(self._divide(entries, tp, at.ep, replica, number))
                continue
            if key not in self._shares:
                self._shares[key] = self._share(entries, tp, at.ep, number)
            found.extend(self._shares[key][replica])
        return found

    # ---- where ------------------------------------------------------------------------------------------------

    def _counted(self) -> dict[str, int]:
        layers = [claim.layer for claim in self.claims.values() if claim.layer is not None]
        experts = [claim.expert for claim in self.claims.values() if claim.expert is not None]
        stacked = [
            self._shapes[name][claim.rule.experts]
            for name, claim in self.claims.items()
            if claim.rule.experts is not None and claim.rule.experts < len(self._shapes[name])
        ]
        counted = {"layers": max(layers) + 1} if layers else {}
        if experts or stacked:
            counted["experts"] = max(max(experts, default=-1) + 1, *stacked, 0)
        return counted

    def _held_by(self, claim: Claim) -> tuple[Chunk, ...]:
        if self._chunks is None:
            self._chunks = self.parallel.chunks(self.variables.get("layers", self.parallel.pp * self.parallel.vpp))
        chunks = self._chunks
        if claim.rule.stage == ("layer",):
            layer = claim.layer or 0
            return next(((c,) for c in chunks if c.first <= layer < c.first + c.layers), (chunks[-1],))
        ends = {"first": chunks[:1], "last": chunks[-1:], "all": chunks[: self.parallel.pp]}
        found = {c.stage: c for stage in reversed(claim.rule.stage) for c in ends[stage]}
        if claim.rule.tied and claim.rule.tied not in self._shapes:
            found = {c.stage: c for c in (*chunks[-1:], *found.values())}
        return tuple(found[stage] for stage in sorted(found))

    def _expert_rank(self, parameter: str, claim: Claim) -> int | None:
        if claim.expert is None:
            return None
        experts, ep = self.variables["experts"], self.parallel.ep
        if experts % ep or claim.expert >= experts:
            raise LayoutError(f"{parameter}: {claim.rule} divides {experts} experts over ep={ep}, which does not go")
        return claim.expert // (experts // ep)

    def _local_name(self, home: _Home, chunk: Chunk) -> str:
        values = dict(home.claim.values)
        if home.claim.rule.stage == ("layer",):
            values["layer"] = str(int(values["layer"]) - chunk.first)
        if home.ep is not None:
            values["expert"] = str(int(values["expert"]) % (self.variables["experts"] // self.parallel.ep))
        if home.claim.rule.tied and len(home.chunks) > 1 and chunk is home.chunks[-1]:
            return home.claim.rule.tied
        return home.claim.pattern.fill(values)

    def _at(self, at: Coordinate) -> Iterator[Entry]:
        if self._by_place is None:
            self._by_place = defaultdict(list)
            for entry in self.entries:
                home = self.home(entry.parameter)
                for chunk in home.chunks:
                    self._by_place[chunk.stage, home.ep].append(entry)
        yield from self._by_place.get((at.pp, None), ())
        yield from self._by_place.get((at.pp, at.ep), ())

    # ---- who of several stores it -----------------------------------------------------------------------------

    def _is_expert(self, entry: Entry) -> bool:
        return self.claims[entry.parameter].rule.is_expert

    def _divided(self, entry: Entry) -> bool:
        if entry.shape != self._shapes[entry.parameter]:
            return False
        return self.parallel.zero == 3 or (self.parallel.zero > 0 and entry.state)

    def _replicas(self, entry: Entry) -> int:
        parallel = self.parallel
        return parallel.expert_dp if self._is_expert(entry) else parallel.dp * parallel.cp

    def _group(self, entry: Entry, at: Coordinate) -> _Group:
        """What is the same for all tensors that the same ranks hold."""
        home = self.home(entry.parameter)
        rule = home.claim.rule
        ranks = self.parallel.expert_tp if rule.is_expert else self.parallel.tp
        tp, ep = (at.etp, at.ep) if rule.is_expert else (at.tp, 0)
        key = (rule.number, entry.shape, ep)
        members = self._members.get(key)
        if members is None:
            parts = [self.local(entry, t, ep).pieces for t in range(ranks)]
            members = tuple(tuple(u for u in range(ranks) if parts[u] == part) for part in parts)
            self._members[key] = members
        stages = tuple(chunk.stage for chunk in home.chunks)
        return _Group(self._divided(entry), stages, members[tp], ep if rule.is_expert else None)

    def _replica(self, at: Coordinate, entry: Entry, group: _Group, tp: int) -> tuple[int, int]:
        """(index, number) of a rank among those that store a tensor; an index past the number stores nothing."""
        number = self._replicas(entry)
        index = at.edp if self._is_expert(entry) else at.cp + self.parallel.cp * at.dp
        outer = group.stages.index(at.pp) * len(group.members) + group.members.index(tp)
        if group.divided:  # copies of what ZeRO divides are stored by the first rank that has them
            return (index, number) if outer == 0 else (number, number)
        return outer * number + index, len(group.stages) * len(group.members) * number

    def _share(self, entries: Sequence[Entry], tp: int, ep: int, number: int) -> list[list[tuple[str, Box]]]:
        named = [
            (entry.name, piece.box, entry.itemsize) for entry in entries for piece in self.local(entry, tp, ep).pieces
        ]
        shares: list[list[tuple[str, Box]]] = [[] for _ in range(number)]
        parts = split_replicated([(box, itemsize) for _, box, itemsize in named], number)
        for (name, _, _), held in zip(named, parts, strict=True):
            for holder, box in held:
                shares[holder].append((name, box))
        return shares

    def _divide(
        self, entries: Sequence[Entry], tp: int, ep: int, replica: int, number: int
    ) -> Iterable[tuple[str, Region]]:
        """The shares of one data-parallel rank."""
        same: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            same[entry.parameter].append(entry)
        parts = [self._local_of(parameter, tp, ep) for parameter in same]
        numels = [Box.full(part.shape).size for part in parts]
        if self.parallel.zero == 3:
            pieces = [(i, split(numel, number)[1][replica]) for i, numel in enumerate(numels)]
            ranges = [(i, piece.start, piece.length) for i, piece in pieces if piece.length]
        else:
            ranges = [share[:3] for share in Flat(numels, number).shares(replica)]
        groups = list(same.values())
        for i, start, length in ranges:
            for entry in groups[i]:
                for region in logical_regions(entry.shape, parts[i], start, length):
                    yield entry.name, region

    def _local_of(self, parameter: str, tp: int, ep: int) -> Local:
        return self.local(Entry(parameter, parameter, self._shapes[parameter], 1), tp, ep)
