"""Whatever a group may lose can be made again of what is left, to the last bit."""

import functools
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import InvalidInput
from ckptsvc.pipeline.parity import MAX_GROUP, ONE, PRIMES, Stripes, Sum, add_up, zeros

EXTENT = 4096


def slow_times(block, powers, prime):
    """By the definition: rows are coefficients, lowest first; x^(p - 1) is the sum of all lower powers."""
    rows = list(block.reshape(prime - 1, -1))
    product = [np.zeros_like(rows[0]) for _ in range(prime)]
    for power in powers:
        for row, content in enumerate(rows):
            product[(row + power) % prime] ^= content
    return np.concatenate([row ^ product[-1] for row in product[:-1]])


@given(
    st.sampled_from(PRIMES),
    st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=2, unique=True), min_size=1, max_size=4),
    st.integers(0, 1 << 32),
)
@settings(deadline=None, max_examples=40)
def test_a_sum_is_that_of_the_products(prime, factors, seed):
    rng = np.random.default_rng(seed)
    factors = [tuple(power % prime for power in powers) for powers in factors]
    blocks = [rng.integers(0, 256, EXTENT, np.uint8) for _ in factors]
    total, expected = np.arange(EXTENT).astype(np.uint8), zeros(EXTENT)
    for block, powers in zip(blocks, factors, strict=True):
        expected ^= slow_times(block, powers, prime)
    sums = Sum(prime, EXTENT)
    sums.put(total, [*zip(blocks, factors, strict=True), (zeros(0), (1,))])
    assert np.array_equal(total, expected)
    sums.put(total, [(zeros(0), (1,))])
    assert not total.any()


@pytest.mark.parametrize("prime", PRIMES)
def test_what_was_multiplied_can_be_divided(prime):
    block = np.random.default_rng(prime).integers(0, 256, EXTENT, np.uint8)
    for divisor in {1, 2, prime // 2, prime - 1}:
        product, back = zeros(EXTENT), zeros(EXTENT)
        sums = Sum(prime, EXTENT)
        sums.put(product, [(block, (0, divisor))])
        sums.put(back, [(product, ONE)], divisor)
        assert np.array_equal(back, block)


def test_a_large_sum_is_right_at_the_seams():
    rng = np.random.default_rng(1)
    extent = (2 << 20) + 3 * EXTENT
    blocks = [rng.integers(0, 256, extent, np.uint8) for _ in range(3)]
    total = np.ones(extent, np.uint8)
    for count in (1, 2, 3):
        add_up(total, blocks[:count])
        assert np.array_equal(total, functools.reduce(np.bitwise_xor, blocks[:count]))
    back, sums = zeros(extent), Sum(17, extent)
    sums.put(total, [(blocks[0], (3, 5))])
    sums.put(back, [(total, (17 - 3,))], 2)
    assert np.array_equal(back, blocks[0])


def test_the_second_line_has_another_factor_for_every_node():
    stripes = Stripes(MAX_GROUP, 2, 1)
    assert len({stripes.factor(1, node) for node in range(MAX_GROUP)}) == MAX_GROUP <= stripes.prime
    assert {stripes.factor(0, node) for node in range(MAX_GROUP)} == {ONE}


def put(total, terms, divisor, stripes):
    """Extent by extent."""
    sums = Sum(stripes.prime, EXTENT)
    for start in range(0, len(total), EXTENT):
        part = slice(start, start + EXTENT)
        sums.put(total[part], [(block[part], powers) for block, powers in terms], divisor)


def encode(stripes, data):
    """The parity of every stripe, line by line."""
    size, parity = stripes.chunk * EXTENT, {}
    for stripe in range(stripes.nodes):
        for line in range(stripes.losses):
            terms = []
            for node in stripes.data(stripe):
                start = stripes.first(node, stripe) * EXTENT
                terms.append((data[node][start : start + size], stripes.factor(line, node)))
            parity[stripe, line] = zeros(size)
            put(parity[stripe, line], terms, 0, stripes)
    return parity


@pytest.mark.parametrize(("nodes", "losses"), [(2, 1), (3, 1), (5, 1), (3, 2), (4, 2), (7, 2), (18, 2)])
def test_any_nodes_that_may_be_lost_are_made_again(nodes, losses):
    rng = random.Random(nodes)
    extents = [rng.randint(1, 13 if nodes < 10 else 3) for _ in range(nodes)]
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
                recipe = stripes.recipe(stripe, node, lost)
                assert not {stripes.keepers(stripe)[line] for line in recipe.lines} & set(lost)
                assert not recipe.nodes.keys() & set(lost)
                terms = [(parity[stripe, line], factor) for line, factor in recipe.lines.items()]
                for other, factor in recipe.nodes.items():
                    first = stripes.first(other, stripe) * EXTENT
                    terms.append((data[other][first : first + size], factor))
                start = stripes.first(node, stripe) * EXTENT
                put(found[start : start + size], terms, recipe.divisor, stripes)
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
    ("nodes", "losses", "extents"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 0, 1), (258, 1, 1), (4, 1, 0)]
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
