"""A parallel layout: how many ranks along each kind of parallelism, and which rank is where.

    dp=4,tp=2,pp=4,ep=8,zero=1

Ranks are numbered as Megatron-Core numbers them by default (`parallel_state.initialize_model_parallel`, order
"tp-cp-ep-dp-pp", version 0.16): tensor parallelism innermost, then context, data, pipeline. DeepSpeed's
`PipeModelDataParallelTopology` (axes pipe, data, model; version 0.19) numbers them the same. `order="tp-cp-pp-dp"` is
Megatron-LM's `--use-tp-pp-dp-mapping`. Experts have a mesh of their own over the same ranks of a pipeline stage: expert
tensor parallelism innermost, then expert parallelism, and what is left are replicas, in both frameworks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError

ORDERS = ("tp-cp-dp-pp", "tp-cp-pp-dp")
"""Orders of ranks, innermost first."""

MOST_RANKS = 1 << 20
"""Layouts of more ranks, chunks or layers are refused: a typing error."""


class Coordinate(NamedTuple):
    """Where a rank is.

    Attributes:
        dp, cp, tp, pp: in the mesh of what is not an expert.
        edp, ep, etp: in the mesh of the experts of the same pipeline stage.
    """

    dp: int
    cp: int
    tp: int
    pp: int
    edp: int
    ep: int
    etp: int


class Chunk(NamedTuple):
    """Consecutive layers that one rank runs at a stretch (Megatron's model chunk).

    Attributes:
        stage: the pipeline stage that holds it.
        number: which of the stage's chunks; 0 unless stages are interleaved (vpp > 1).
        first: its first layer.
        layers: how many.
    """

    stage: int
    number: int
    first: int
    layers: int


class Parallel(msgspec.Struct, frozen=True):
    """Degrees of parallelism.

    Attributes:
        dp: data parallelism.
        cp: context parallelism: replicas of the weights too.
        tp: tensor parallelism.
        pp: pipeline stages.
        vpp: chunks of layers a stage holds; more than 1 are interleaved stages.
        ep: expert parallelism, over the ranks of a stage.
        etp: tensor parallelism of experts; 0: as `tp` where there are ranks enough for it, else 1.
        zero: 1 or 2 divide optimizer state over data parallelism, 3 the parameters too.
        order: of ranks, see `ORDERS`.
        stages: layers in each chunk, in the order of the model; empty: all the same.
        balanced: layers that do not divide are spread as evenly as they go, fewer on the first and the last stage.
        uneven: dimensions that do not divide are cut as `torch.chunk` cuts them, not refused.
    """

    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 0
    zero: int = 0
    order: str = ORDERS[0]
    stages: tuple[int, ...] = ()
    balanced: bool = False
    uneven: bool = False

    def __post_init__(self) -> None:
        """Check that the degrees go together.

        Raises:
            LayoutError: they do not.
        """
        for name in ("dp", "cp", "tp", "pp", "vpp", "ep"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name}={getattr(self, name)}: a degree of parallelism is at least 1")
        if self.world_size > MOST_RANKS or self.pp * self.vpp > MOST_RANKS:
            raise LayoutError(f"{self} is {self.world_size:,} ranks, more than the {MOST_RANKS:,} that are planned")
        if self.etp < 0 or self.zero not in range(4):
            raise LayoutError(f"{self}: etp is at least 1, zero is 0, 1, 2 or 3")
        if self.order not in ORDERS:
            raise LayoutError(f"{self.order!r} is no order of ranks", hint=f"known are {', '.join(ORDERS)}")
        inner = self.expert_tp * self.ep
        if (self.dp * self.cp * self.tp) % inner:
            raise LayoutError(
                f"{self}: experts take etp {self.expert_tp} x ep {self.ep} = {inner} ranks,"
                f" which do not divide the {self.dp * self.cp * self.tp} of a stage (dp x cp x tp)"
            )
        if self.order == ORDERS[1] and self.ep > 1 and inner != self.tp * self.cp:
            raise LayoutError(f"{self}: with order {self.order}, etp x ep must be tp x cp")
        if self.stages and (len(self.stages) != self.pp * self.vpp or min(self.stages) < 0):
            raise LayoutError(
                f"{self}: {len(self.stages)} numbers of layers for pp {self.pp} x vpp {self.vpp} chunks, one for each"
            )

    @classmethod
    def parse(cls, text: str) -> Parallel:
        """A layout from "dp=4,tp=2,...": the attributes by name.

        `stages` is "2/3/3/2" or "balanced"; `uneven` is 0 or 1. What is not named is 1 (zero and uneven: 0).

        Raises:
            InvalidInput: not of that form.
            LayoutError: the degrees do not go together.
        """
        given: dict[str, object] = {}
        for item in filter(None, (item.strip() for item in text.split(","))):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or key not in cls.__struct_fields__ or key == "balanced":
                known = ", ".join(field for field in cls.__struct_fields__ if field != "balanced")
                raise InvalidInput(f"{item!r} is no part of a layout", hint=f"as in dp=4,tp=2; known are {known}")
            if key in given:
                raise InvalidInput(f"{text!r} says {key} twice")
            if key == "stages" and value in ("balanced", "even"):
                given["balanced"] = value == "balanced"
            elif key == "stages":
                given[key] = tuple(_number(key, part) for part in value.split("/"))
            elif key == "order":
                given[key] = value
            else:
                given[key] = bool(_number(key, value)) if key == "uneven" else _number(key, value)
        if not given:
            raise InvalidInput("the layout is empty", hint="as in dp=4,tp=2,pp=2,zero=1")
        return cls(**given)  # type: ignore[arg-type]

    @property
    def expert_tp(self) -> int:
        """Tensor parallelism of experts."""
        if self.etp:
            return self.etp
        return self.tp if (self.dp * self.cp) % self.ep == 0 else 1

    @property
    def expert_dp(self) -> int:
        """How many ranks hold the same experts."""
        return self.dp * self.cp * self.tp // (self.expert_tp * self.ep)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.cp * self.tp * self.pp

    def coordinate(self, rank: int) -> Coordinate:
        """Where a rank is.

        Raises:
            LayoutError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"there is no rank {rank} in {self}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp) if self.order == ORDERS[0] else divmod(rest, self.pp)[::-1]
        inner = tp + self.tp * (cp + self.cp * dp)  # the rank within its stage
        rest, etp = divmod(inner, self.expert_tp)
        edp, ep = divmod(rest, self.ep)
        return Coordinate(dp, cp, tp, pp, edp, ep, etp)

    def rank(self, *, dp: int = 0, cp: int = 0, tp: int = 0, pp: int = 0) -> int:
        """The rank at a coordinate of the mesh of what is not an expert.

        Raises:
            LayoutError: there is none.
        """
        for name, at, n in (("dp", dp, self.dp), ("cp", cp, self.cp), ("tp", tp, self.tp), ("pp", pp, self.pp)):
            if not 0 <= at < n:
                raise LayoutError(f"there is no {name} rank {at} in {self}")
        outer = dp + self.dp * pp if self.order == ORDERS[0] else pp + self.pp * dp
        return tp + self.tp * (cp + self.cp * outer)

    def expert_rank(self, *, edp: int = 0, ep: int = 0, etp: int = 0, pp: int = 0) -> int:
        """The rank at a coordinate of the mesh of the experts."""
        inner = etp + self.expert_tp * (ep + self.ep * edp)
        rest, tp = divmod(inner, self.tp)
        dp, cp = divmod(rest, self.cp)
        return self.rank(dp=dp, cp=cp, tp=tp, pp=pp)

    def chunks(self, layers: int) -> list[Chunk]:
        """Which layers are where, in the order of the model: chunk k is on stage k % pp.

        As Megatron-Core cuts (`transformer_layer.get_transformer_layer_offset`), `stages` and `balanced` apart.

        Raises:
            LayoutError: the layers do not divide, or `stages` is for another number of them.
        """
        number = self.pp * self.vpp
        if not 0 <= layers <= MOST_RANKS:
            raise LayoutError(f"a model of {layers:,} layers: at most {MOST_RANKS:,} are planned")
        if self.stages:
            if sum(self.stages) != layers:
                raise LayoutError(
                    f"stages {'/'.join(map(str, self.stages))} are {sum(self.stages)} layers, not {layers}"
                )
            sizes: Sequence[int] = self.stages
        elif layers % number and not self.balanced:
            raise LayoutError(
                f"{layers} layers do not divide over pp {self.pp} x vpp {self.vpp} = {number} chunks",
                hint="say stages=balanced, or how many each has, as in stages=3/4/4/3",
            )
        else:
            sizes = _balanced(layers, number)
        firsts = [0, *accumulate(sizes)]
        return [Chunk(k % self.pp, k // self.pp, firsts[k], size) for k, size in enumerate(sizes)]

    def __str__(self) -> str:
        parts = [f"{name}={getattr(self, name)}" for name in ("dp", "tp", "pp")]
        parts += [f"{name}={n}" for name in ("cp", "ep", "vpp") if (n := getattr(self, name)) != 1]
        parts += [f"{name}={n}" for name in ("etp", "zero") if (n := getattr(self, name))]
        if self.stages or self.balanced:
            parts.append(f"stages={'/'.join(map(str, self.stages)) or 'balanced'}")
        if self.order != ORDERS[0]:
            parts.append(f"order={self.order}")
        return ",".join([*parts, "uneven=1"] if self.uneven else parts)


def _balanced(layers: int, number: int) -> list[int]:
    """As even as it goes; the chunks with one less come from both ends, the last first."""
    size, longer = divmod(layers, number)
    sizes = [size + (longer > 0)] * number
    ends = [k // 2 if k % 2 else number - 1 - k // 2 for k in range(number)]
    for k in ends[: (number - longer) % number]:
        sizes[k] = size
    return sizes


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidInput(f"{key}={text!r}: a number is expected")
    return int(text)
