"""Rules and a parallel layout, applied to the tensors of a model: which rank holds what.

`Placement.held` are a rank's tensors as its framework has them, copies of other ranks' among them; `geometry.shares`
says who stores what, so that every element is stored once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.geometry.layout import Piece
from ckptsvc.geometry.parallel import Chunk, Parallel
from ckptsvc.geometry.rules import Claim, Local, Rules, local_part

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


class Home(NamedTuple):
    """Where a parameter lives, apart from tensor parallelism: the chunks, and the expert-parallel rank (None: all)."""

    claim: Claim
    chunks: tuple[Chunk, ...]
    ep: int | None


class Placement:
    """Tensors under a layout.

    Attributes:
        parallel: the layout.
        tensors: all tensors, in the order given.
        entries: those that are placed.
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
        self.tensors = list(entries)
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
        self._shapes: dict[str, Shape] = {}
        for entry in self.entries:  # the model's own, or else the first there is
            if not entry.state or entry.parameter not in self._shapes:
                self._shapes[entry.parameter] = entry.shape
        self.variables = {**self._counted(), **variables}
        self._chunks: list[Chunk] | None = None
        self._of_layer: dict[int, Chunk] = {}
        self._homes: dict[str, Home] = {}
        self._locals: dict[tuple[int, Shape, int, int], Local] = {}
        self._by_place: dict[tuple[int, int | None], list[Entry]] | None = None

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
        alike = set()
        for parameter, shape in self._shapes.items():
            rule = self.home(parameter).claim.rule
            if (rule.number, shape) not in alike:
                alike.add((rule.number, shape))
                for tp in range(self.parallel.expert_tp if rule.is_expert else self.parallel.tp):
                    self.local(Entry(parameter, parameter, shape, 1), tp, 0)
        return self

    def home(self, parameter: str) -> Home:
        """The chunks of layers that hold a parameter (one per stage), and the expert-parallel rank (None: all of them).

        Raises:
            LayoutError: layers or experts do not divide.
        """
        home = self._homes.get(parameter)
        if home is None:
            claim = self.claims[parameter]
            home = self._homes[parameter] = Home(claim, self._held_by(claim), self._expert_rank(parameter, claim))
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
        if self.is_odd(entry):
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
        for entry in (*self.at(at.pp, None), *self.at(at.pp, at.ep)):
            home = self.home(entry.parameter)
            tp = at.etp if home.claim.rule.is_expert else at.tp
            local = self.local(entry, tp, at.ep)
            found += [
                Held(entry, self._local_name(home, chunk), chunk.number, local)
                for chunk in home.chunks
                if chunk.stage == at.pp
            ]
        return found

    def is_odd(self, entry: Entry) -> bool:
        """Whether it is state of another shape than its parameter: nothing divides it."""
        return entry.shape != self._shapes[entry.parameter]

    def bytes_of(self, entry: Entry, tp: int, ep: int) -> int:
        """Bytes that a rank that holds a tensor has of it: padding counted, what ZeRO puts elsewhere not."""
        parallel, nbytes = self.parallel, Box.full(self.local(entry, tp, ep).shape).size
        if not self.is_odd(entry) and (parallel.zero == 3 or (parallel.zero and entry.state)):
            expert = self.claims[entry.parameter].rule.is_expert
            nbytes = -(-nbytes // (parallel.expert_dp if expert else parallel.dp * parallel.cp))
        return nbytes * entry.itemsize

    def bytes_held(self, rank: int) -> int:
        """Bytes that a rank has in memory of what is placed."""
        at = self.parallel.coordinate(rank)
        return sum(
            self.bytes_of(held.entry, at.etp if self.claims[held.entry.parameter].rule.is_expert else at.tp, at.ep)
            for held in self.held(rank)
        )

    def at(self, stage: int, ep: int | None) -> Sequence[Entry]:
        """What a stage holds of the experts that have a name each, at an expert-parallel rank; None: all the rest."""
        if self._by_place is None:
            self._by_place = defaultdict(list)
            for entry in self.entries:
                home = self.home(entry.parameter)
                for chunk in home.chunks:
                    self._by_place[chunk.stage, home.ep].append(entry)
        return self._by_place.get((stage, ep), ())

    def chunks(self) -> list[Chunk]:
        """Which layers are where.

        Raises:
            LayoutError: they do not divide.
        """
        if self._chunks is None:
            self._chunks = self.parallel.chunks(self.variables.get("layers", self.parallel.pp * self.parallel.vpp))
            self._of_layer = {layer: c for c in self._chunks for layer in range(c.first, c.first + c.layers)}
        return self._chunks

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
        chunks = self.chunks()
        if claim.rule.stage == ("layer",):
            return (self._of_layer.get(claim.layer or 0, chunks[-1]),)
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
            raise LayoutError(f"{parameter}: {experts} experts cannot be divided over ep={ep}, as {claim.rule} says")
        return claim.expert // (experts // ep)

    def _local_name(self, home: Home, chunk: Chunk) -> str:
        values = dict(home.claim.values)
        if home.claim.rule.stage == ("layer",):
            values["layer"] = str(int(values["layer"]) - chunk.first)
        if home.ep is not None:
            values["expert"] = str(int(values["expert"]) % (self.variables["experts"] // self.parallel.ep))
        if home.claim.rule.tied and len(home.chunks) > 1 and chunk is home.chunks[-1]:
            return home.claim.rule.tied
        return home.claim.pattern.fill(values)
