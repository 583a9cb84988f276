"""Whole models under layouts: all ranks together hold every tensor, and store every element exactly once."""

import tomllib
from collections import Counter
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, FlatRange, Region
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.placement import Entry, Placement
from ckptsvc.geometry.rules import Rules
from ckptsvc.geometry.shares import Shares

RULES = Rules.parse(
    tomllib.loads("""
[[rule]]
name = "embed"
stage = "first"
cut = 0
tied = "head"
pad = "2 * tp"
[[rule]]
name = "head"
stage = "last"
cut = 0
[[rule]]
name = ["layers.{layer}.column", "layers.{layer}.scalar_of_a_row"]
cut = 0
[[rule]]
name = "layers.{layer}.row"
cut = 1
[[rule]]
name = "layers.{layer}.gated"
cut = 0
sections = 2
[[rule]]
name = "layers.{layer}.kv"
cut = 0
whole = 2
copies = true
[[rule]]
name = "layers.{layer}.norm"
[[rule]]
name = "layers.{layer}.experts.{expert}.w"
cut = 1
[[rule]]
name = "layers.{layer}.stacked"
experts = 0
cut = 2
[[rule]]
name = "everywhere"
stage = "all"
""")
)

SHAPES = {"column": (8, 3), "row": (3, 8), "gated": (16, 2), "kv": (4, 3), "norm": (5,), "stacked": (4, 2, 8)}


def model(layers: int, tied: bool = False, experts: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed": (13, 3), "everywhere": (7,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
        shapes |= {f"layers.{layer}.experts.{e}.w": (3, 8) for e in range(experts)}
    return shapes if tied else shapes | {"head": (16, 3)}


def entries(shapes: dict[str, tuple[int, ...]], state: bool = True) -> list[Entry]:
    found = [Entry(name, name, shape, 2) for name, shape in shapes.items()]
    for name, shape in shapes.items() if state else ():
        found += [Entry(f"{name}/exp_avg", name, shape, 4, True), Entry(f"{name}/step", name, (), 4, True)]
    return found


def counted(placed: Sequence[Entry], regions: Sequence[tuple[str, Region]]) -> dict[str, np.ndarray]:
    """How often each element is in the regions."""
    counts = {entry.name: np.zeros(entry.shape, int) for entry in placed}
    for name, region in regions:
        if isinstance(region, FlatRange):
            counts[name].reshape(-1)[region.start : region.stop] += 1
        else:
            counts[name][region.slices()] += 1
    return counts


@st.composite
def layouts(draw: st.DrawFn) -> Parallel:
    dp, cp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 1, 2]))
    tp, pp, vpp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    stage = dp * cp * tp
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if stage % n == 0]))
    etp = draw(st.sampled_from([0, *[n for n in (1, 2, 4) if stage % (n * ep) == 0]]))
    zero = draw(st.sampled_from([0, 1, 2, 3]))
    return Parallel(dp=dp, cp=cp, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, zero=zero, balanced=True)


@settings(max_examples=40)
@given(layouts(), st.integers(1, 5), st.booleans())
def test_ranks_store_every_element_once_and_only_what_they_hold(parallel: Parallel, layers: int, tied: bool) -> None:
    placed = entries(model(layers, tied))
    placement = Placement(RULES, parallel, placed, {}).check()
    shares = Shares(placement)
    stored: list[tuple[str, Region]] = []
    for rank in range(parallel.world_size):
        mine = shares.regions(rank)
        holds = counted(placed, [(h.entry.name, p.box) for h in placement.held(rank) for p in h.local.pieces])
        assert all((holds[name] >= count).all() for name, count in counted(placed, mine).items())
        stored += mine
    assert all((count == 1).all() for count in counted(placed, stored).values())


@settings(max_examples=30)
@given(layouts(), st.integers(1, 5), st.booleans())
def test_local_tensors_are_made_of_pieces_that_tile_them_and_every_replica_is_there(
    parallel: Parallel, layers: int, tied: bool
) -> None:
    shapes = model(layers, tied)
    placement = Placement(RULES, parallel, entries(shapes, state=False), {}).check()
    total: Counter[str] = Counter()
    names: list[list[tuple[int, str]]] = []
    for rank in range(parallel.world_size):
        held = placement.held(rank)
        names.append([(h.chunk, h.name) for h in held])
        for h in held:
            filled = np.zeros(h.local.shape, int)
            for piece in h.local.pieces:
                assert piece.box.shape == piece.local.shape
                filled[piece.local.slices()] += 1
            assert filled.max(initial=0) <= 1
            assert (filled == 0).sum() == h.local.padding
            assert h.local.padding == 0 or h.entry.name == "embed"
            total[h.entry.name] += sum(p.box.size for p in h.local.pieces)
    assert all(len(set(mine)) == len(mine) for mine in names), "two tensors of a rank have one name"
    stage = parallel.dp * parallel.cp * parallel.tp
    for name, shape in shapes.items():
        kind = name.split(".")[-1]
        copies = stage if kind == "norm" else stage // parallel.tp
        if kind in ("w", "stacked"):
            copies = parallel.expert_dp
        if kind == "kv":
            copies = stage // min(parallel.tp, 2)
        if name == "everywhere":
            copies = stage * parallel.pp
        if name == "embed" and tied and parallel.pp > 1:
            copies *= 2
        assert total[name] == copies * prod(shape), name


def test_layers_and_experts_are_counted_from_the_first_that_a_rank_has() -> None:
    placement = Placement(RULES, Parallel(pp=2, vpp=2, dp=2, ep=2), entries(model(8), state=False), {}).check()
    held = {(h.chunk, h.name): h.entry.name for h in placement.held(3)}  # stage 1, expert rank 1
    assert held[0, "layers.0.norm"] == "layers.2.norm"
    assert held[1, "layers.1.norm"] == "layers.7.norm"
    assert held[1, "layers.0.experts.1.w"] == "layers.6.experts.3.w"
    assert (1, "head") in held
    assert not any(name == "embed" for _, name in held)


def test_a_tied_vocabulary_is_held_by_the_last_stage_under_the_name_of_its_output() -> None:
    placement = Placement(RULES, Parallel(pp=2), entries(model(2, tied=True), state=False), {}).check()
    assert [(h.name, h.entry.name) for h in placement.held(1) if h.entry.name == "embed"] == [("head", "embed")]
    assert [h.name for h in placement.held(0) if h.entry.name == "embed"] == ["embed"]
    alone = Placement(RULES, Parallel(), entries(model(2, tied=True), state=False), {}).check()
    assert [h.name for h in alone.held(0) if h.entry.name == "embed"] == ["embed"]


def test_a_layer_beyond_the_last_is_on_the_last_stage() -> None:
    shapes = {**model(4), "layers.4.norm": (5,)}
    placement = Placement(RULES, Parallel(pp=2), entries(shapes), {"layers": 4}).check()
    assert [chunk.stage for chunk in placement.home("layers.4.norm").chunks] == [1]


def test_zero_puts_each_share_where_deepspeed_puts_it() -> None:
    """Two tensors of 24 elements and one of 5 in one buffer of 56 on 4 ranks: 14 each."""
    shapes = {"layers.0.column": (8, 3), "layers.0.row": (3, 8), "layers.0.norm": (5,)}
    placed = entries(shapes)
    shares = Shares(Placement(RULES, Parallel(dp=4, zero=1), placed, {}).check())
    of_state = [[(n, r) for n, r in shares.regions(rank) if n.endswith("exp_avg")] for rank in range(4)]
    assert of_state[0] == [("layers.0.column/exp_avg", FlatRange(0, 14))]
    assert of_state[1] == [("layers.0.column/exp_avg", FlatRange(14, 10)), ("layers.0.row/exp_avg", FlatRange(0, 4))]
    assert of_state[3] == [("layers.0.row/exp_avg", FlatRange(18, 6)), ("layers.0.norm/exp_avg", Box((0,), (5,)))]


def test_bytes_of_a_rank_count_zero_and_padding() -> None:
    shapes = {"embed": (13, 3), "layers.0.norm": (5,)}
    placed = [entry for entry in entries(shapes) if not entry.name.endswith("step")]
    assert Placement(RULES, Parallel(tp=2), placed, {}).bytes_held(0) == 8 * 3 * (2 + 4) + 5 * (2 + 4)
    assert Placement(RULES, Parallel(tp=2, dp=2, zero=1), placed, {}).bytes_held(0) == 24 * 2 + 12 * 4 + 10 + 3 * 4


def test_tensors_without_a_rule_or_with_two_are_named() -> None:
    twice = Rules.parse(tomllib.loads('[[rule]]\nname="a.{x}"\nstage="all"\n[[rule]]\nname="{x}.b"\nstage="all"'))
    placement = Placement(twice, Parallel(), [Entry("a.b", "a.b", (1,), 4)], {})
    with pytest.raises(LayoutError, match=r"a\.b is taken by rule 1 \(a\.\{x\}\) and by rule 2 \(\{x\}\.b\)"):
        placement.check()
    nobody = Placement(twice, Parallel(), [Entry(f"c.{i}", f"c.{i}", (1,), 4) for i in range(7)], {})
    with pytest.raises(LayoutError, match=r"no rule takes c\.0, c\.1, c\.2, c\.3, c\.4 and 2 more"):
        nobody.check()


def test_experts_that_do_not_divide_are_named() -> None:
    placed = entries(model(1, experts=6), state=False)
    with pytest.raises(LayoutError, match=r"experts\.0\.w: 6 experts cannot be divided over ep=4"):
        Placement(RULES, Parallel(dp=4, ep=4), placed, {}).check()
