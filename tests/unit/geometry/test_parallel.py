"""Parallel layouts: where ranks are, and which layers a stage holds, against the frameworks' own rules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.parallel import Chunk, Parallel

DEGREES = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Parallel:
    dp, cp, tp, pp = (draw(DEGREES) for _ in range(4))
    stage = dp * cp * tp
    ep = draw(st.sampled_from([n for n in (1, 2, 3, 4) if stage % n == 0]))
    etp = draw(st.sampled_from([0, *[n for n in (1, 2, 4) if stage % (n * ep) == 0]]))
    return Parallel(dp=dp, cp=cp, tp=tp, pp=pp, ep=ep, etp=etp)


def test_what_is_said_is_read_and_said_again() -> None:
    text = "dp=4,tp=2,pp=4,ep=8,zero=1"
    parallel = Parallel.parse(text)
    assert (parallel.dp, parallel.tp, parallel.pp, parallel.ep, parallel.zero) == (4, 2, 4, 8, 1)
    assert parallel.world_size == 32
    for said in (
        text,
        "tp=2, pp=2 ,vpp=3,cp=2,stages=1/2/3/4/5/6",
        "dp=2,order=tp-cp-pp-dp",
        "pp=3,stages=balanced,uneven=1",
    ):
        assert Parallel.parse(str(Parallel.parse(said))) == Parallel.parse(said)


@pytest.mark.parametrize(
    "text",
    ["", "dp", "dp=x", "dp=-1", "dp=2,dp=3", "dq=2", "dp=1e3", "balanced=1", "dp=٣", "stages=1/x", "dp=9999999999"],
)
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        Parallel.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "dp=0",
        "zero=4",
        "ep=3,dp=2",
        "etp=2,dp=1",
        "order=dp-tp",
        "pp=2,stages=1/2/3",
        "dp=99999,tp=99999",
        "pp=2,stages=1",
    ],
)
def test_degrees_that_do_not_go_together_are_refused(text: str) -> None:
    with pytest.raises(LayoutError):
        Parallel.parse(text)


@given(layouts())
def test_ranks_are_in_the_order_of_megatron_and_deepspeed(parallel: Parallel) -> None:
    """DeepSpeed's ProcessTopology counts the product of its axes (pipe, data, model); Megatron the same from inside."""
    axes = (range(parallel.pp), range(parallel.dp), range(parallel.cp), range(parallel.tp))
    for rank, (pp, dp, cp, tp) in enumerate(itertools.product(*axes)):
        at = parallel.coordinate(rank)
        assert (at.pp, at.dp, at.cp, at.tp) == (pp, dp, cp, tp)
        assert parallel.rank(dp=dp, cp=cp, tp=tp, pp=pp) == rank
    with pytest.raises(LayoutError):
        parallel.coordinate(parallel.world_size)


@given(layouts())
def test_experts_have_a_mesh_over_the_ranks_of_a_stage(parallel: Parallel) -> None:
    axes = (range(parallel.pp), range(parallel.expert_dp), range(parallel.ep), range(parallel.expert_tp))
    for rank, (pp, edp, ep, etp) in enumerate(itertools.product(*axes)):
        at = parallel.coordinate(rank)
        assert (at.pp, at.edp, at.ep, at.etp) == (pp, edp, ep, etp)
        assert parallel.expert_rank(edp=edp, ep=ep, etp=etp, pp=pp) == rank


def test_expert_groups_are_those_of_deepspeeds_documentation() -> None:
    """`groups._get_expert_parallel_ranks`: 16 ranks, model degree 2, expert degree 4."""
    parallel = Parallel.parse("dp=8,tp=2,ep=4")
    groups = [[r for r in range(16) if parallel.coordinate(r)[4::2] == (edp, m)] for m in range(2) for edp in range(2)]
    assert groups == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]


def test_the_other_order_has_data_parallelism_outermost() -> None:
    parallel = Parallel.parse("dp=3,tp=2,pp=4,order=tp-cp-pp-dp")
    for rank, (dp, pp, tp) in enumerate(itertools.product(range(3), range(4), range(2))):
        assert parallel.coordinate(rank)[:4] == (dp, 0, tp, pp)
        assert parallel.rank(dp=dp, tp=tp, pp=pp) == rank


@pytest.mark.parametrize(("layers", "pp", "vpp"), [(8, 4, 1), (16, 4, 2), (24, 2, 3), (7, 1, 1)])
def test_layers_are_where_megatron_puts_them(layers: int, pp: int, vpp: int) -> None:
    """offset = vp_stage * (layers // vpp) + pp_rank * (layers // pp // vpp)"""
    chunks = Parallel(pp=pp, vpp=vpp).chunks(layers)
    size = layers // pp // vpp
    expected = [Chunk(s, v, v * (layers // vpp) + s * size, size) for v in range(vpp) for s in range(pp)]
    assert chunks == expected


@given(st.integers(0, 200), st.integers(1, 12), st.integers(1, 3))
def test_balanced_stages_hold_every_layer_once_and_the_ends_fewest(layers: int, pp: int, vpp: int) -> None:
    chunks = Parallel(pp=pp, vpp=vpp, balanced=True).chunks(layers)
    assert [layer for c in chunks for layer in range(c.first, c.first + c.layers)] == list(range(layers))
    sizes = [chunk.layers for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)
    assert [c.stage for c in chunks] == [k % pp for k in range(pp * vpp)]


def test_stages_that_are_not_the_layers_are_refused_with_the_numbers() -> None:
    with pytest.raises(LayoutError, match="10 layers do not divide over pp 4 x vpp 1 = 4"):
        Parallel(pp=4).chunks(10)
    with pytest.raises(LayoutError, match="stages 3/4 are 7 layers, not 10"):
        Parallel.parse("pp=2,stages=3/4").chunks(10)
    assert [c.layers for c in Parallel.parse("pp=2,stages=3/7").chunks(10)] == [3, 7]
