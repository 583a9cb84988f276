"""Whatever a group may lose can be made again of what is left, to the last bit."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import InvalidInput
from ckptsvc.pipeline.parity import Stripes, Sum, as_bytes, coefficient, inverse, times, zeros

EXTENT = 24 + 3


def slow_times(a, b):
    """By the definition: shift and add, modulo x^8 + x^4 + x^3 + x^2 + 1."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a, b = a << 1, b >> 1
        if a & 0x100:
            a ^= 0x11D
    return product


def test_products_and_inverses_are_those_of_the_field():
    for a, b in itertools.product(range(256), (0, 1, 2, 3, 77, 128, 255)):
        assert times(a, b) == slow_times(a, b)
    assert all(times(a, inverse(a)) == 1 for a in range(1, 256))
    with pytest.raises(ZeroDivisionError):
        inverse(0)


def test_the_second_line_has_another_factor_for_every_node():
    assert len({coefficient(1, node) for node in range(255)}) == 255
    assert {coefficient(0, node) for node in range(255)} == {1}


@given(st.binary(max_size=300), st.integers(0, 255), st.integers(0, 40))
def test_a_sum_is_that_of_its_bytes(data, factor, more):
    total = np.arange(len(data) + more, dtype=np.uint8)
    expected = [v ^ (slow_times(factor, data[i]) if i < len(data) else 0) for i, v in enumerate(total.tolist())]
    Sum().add(total, as_bytes(data), factor)
    assert total.tolist() == expected


def test_a_large_sum_is_right_at_the_seams():
    rng = np.random.default_rng(1)
    block, total = rng.integers(0, 256, 300_001, np.uint8), zeros(300_005)
    for factor in (1, 7):
        Sum().add(total, block, factor)
    table = np.array([slow_times(7, v) ^ v for v in range(256)], np.uint8)
    assert np.array_equal(total[:300_001], table[block])
    assert not total[300_001:].any()


def encode(stripes, data):
    """The parity of every stripe, line by line."""
    size, parity = stripes.chunk * EXTENT, {}
    for stripe in range(stripes.nodes):
        for line in range(stripes.losses):
            total = parity[stripe, line] = zeros(size)
            for node in stripes.data(stripe):
                start = stripes.first(node, stripe) * EXTENT
                Sum().add(total, data[node][start : start + size], coefficient(line, node))
    return parity


@pytest.mark.parametrize(("nodes", "losses"), [(2, 1), (3, 1), (5, 1), (3, 2), (4, 2), (7, 2)])
def test_any_nodes_that_may_be_lost_are_made_again(nodes, losses):
    rng = random.Random(nodes)
    extents = [rng.randint(1, 13) for _ in range(nodes)]
    stripes = Stripes(nodes, losses, max(extents))
    size = stripes.chunk * EXTENT
    data = []
    for count in extents:
        whole = zeros((nodes - losses) * size)
        whole[: count * EXTENT] = np.frombuffer(rng.randbytes(count * EXTENT), np.uint8)
        data.append(whole)
    parity = encode(stripes, data)
    for lost in itertools.chain(*(itertools.combinations(range(nodes), n) for n in range(1, losses + 1))):
        for node in lost:
            found = zeros(len(data[node]))
            for stripe in stripes.stripes_with(node):
                lines, chunks = stripes.recipe(stripe, node, lost)
                assert not {stripes.keepers(stripe)[line] for line in lines} & set(lost)
                assert not chunks.keys() & set(lost)
                start = stripes.first(node, stripe) * EXTENT
                into = found[start : start + size]
                for line, factor in lines.items():
                    Sum().add(into, parity[stripe, line], factor)
                for other, factor in chunks.items():
                    first = stripes.first(other, stripe) * EXTENT
                    Sum().add(into, data[other][first : first + size], factor)
            assert np.array_equal(found, data[node])


@given(st.integers(2, 12), st.integers(1, 2), st.integers(1, 1000))
def test_chunks_cover_a_node_and_every_node_has_as_much_to_do(nodes, losses, extents):
    if losses >= nodes:
        return
    stripes = Stripes(nodes, losses, extents)
    for node in range(nodes):
        having = stripes.stripes_with(node)
        assert [stripes.first(node, s) for s in having] == [i * stripes.chunk for i in range(nodes - losses)]
        assert (nodes - losses) * stripes.chunk >= extents
        assert len(stripes.stripes_of(node)) == losses
        assert all(stripes.keepers(s)[line] == node for line, s in enumerate(stripes.stripes_of(node)))


@pytest.mark.parametrize(
    ("nodes", "losses", "extents"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 0, 1), (256, 1, 1), (4, 1, 0)]
)
def test_what_cannot_be_protected_is_refused(nodes, losses, extents):
    with pytest.raises(InvalidInput):
        Stripes(nodes, losses, extents)


def test_too_many_losses_are_refused():
    stripes = Stripes(4, 2, 8)
    with pytest.raises(InvalidInput, match="3 nodes are lost"):
        stripes.recipe(0, 2, (1, 2, 3))
    with pytest.raises(InvalidInput):
        stripes.recipe(0, 0, (0,))  # it keeps parity there
