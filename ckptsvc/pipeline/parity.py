"""Parity over the memories of a group of nodes: which bytes go into which, and the arithmetic.

What a node holds of a snapshot is one row of extents: its shards by rank, each beginning at a boundary between extents;
beyond its end are zeros. The group has k nodes, of which m may be lost (1 or 2), and k stripes. In stripe s the nodes
s, s + 1, ..., s + m - 1 (modulo k) keep parity, of all the others one chunk each: every node has k - m chunks, one for
each stripe in which it keeps none, in the order of the stripes. All chunks are equally long, so every node reads the
chunks of the others for m stripes, keeps m chunks of parity, and no node has more to do than another.

The parity of a stripe is one line (m = 1) or two: the sum of the chunks, and the sum of each times x^i for node number
i of the group, modulo 1 + x + ... + x^(p - 1), p a prime. To be multiplied, a block is cut in p - 1 rows, which are the
coefficients of a polynomial: times x moves them by one, and there is nothing but exclusive-or to do. Any two chunks can
be solved for, of at most p nodes (M. Blaum, R. M. Roth, "New array codes for multiple phased burst correction", IEEE
Transactions on Information Theory 39, 1993: Reed-Solomon codes over this ring).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput

PRIMES = (5, 17, 257)
"""The values of p: with p - 1 a power of 2, extents, which are whole pages, can be cut in as many rows."""

MAX_GROUP = PRIMES[-1]
"""Nodes whose powers of x differ."""

_BLOCK = 1 << 20
"""Bytes that are worked on at a time: what a step leaves is still in the cache at the next one."""

Bytes = NDArray[np.uint8]

Powers = tuple[int, ...]
"""A factor: the sum of these powers of x."""

ONE: Powers = (0,)


class Recipe(NamedTuple):
    """How a lost chunk is made of what is left of its stripe: a sum, which may have to be divided.

    Attributes:
        lines: {line of parity: its factor}.
        nodes: {node: the factor of its chunk}.
        divisor: d: the sum is 1 + x^d times the chunk; 0: it is the chunk.
    """

    lines: dict[int, Powers]
    nodes: dict[int, Powers]
    divisor: int = 0


class Sum:
    """Adds up multiples of blocks; keeps the memory for that.

    Args:
        prime: p, at least the number of nodes.
        extent: bytes of a block, a multiple of the page size.
    """

    def __init__(self, prime: int, extent: int) -> None:
        self._prime = prime
        self._rows = np.empty(prime * (min(_BLOCK, extent) // (prime - 1)), np.uint8)

    def put(self, total: Bytes, terms: Sequence[tuple[Bytes, Powers]], divisor: int = 0) -> None:
        """Set the total to the sum of all blocks times their factors, divided by 1 + x^divisor.

        All have the same length; a block of length 0 is one of zeros.
        """
        terms = [term for term in terms if len(term[0])]
        if not terms:
            total[:] = 0
        elif divisor or any(powers != ONE for _, powers in terms):
            for start in range(0, len(total), _BLOCK):
                part = slice(start, start + _BLOCK)
                self._put(total[part], [(block[part], powers) for block, powers in terms], divisor)
        else:
            add_up(total, [block for block, _ in terms])

    def _put(self, total: Bytes, terms: Sequence[tuple[Bytes, Powers]], divisor: int) -> None:
        width = len(total) // (self._prime - 1)
        flat = self._rows[: self._prime * width]
        begun = False
        for block, powers in terms:
            for power in powers:
                _add_moved(flat, block, power * width, begun=begun)
                begun = True
        rows, whole = flat.reshape(self._prime, width), total.reshape(self._prime - 1, width)
        if divisor:
            _divide(whole, rows, divisor)
        else:  # x^(p - 1) is the sum of all lower powers
            np.bitwise_xor(rows[:-1], rows[-1], out=whole)


def _divide(whole: Bytes, rows: Bytes, divisor: int) -> None:
    """Solve (1 + x^divisor) * whole = rows, row by row from the one that is 0, x^(p - 1)'s, around to that one again.

    What is left there is the sum of all rows, which had to be 0: the sum times 1 + x + ... + x^(p - 1), which is 0, is
    added to the rows for that, and so to every other row of the solution.
    """
    order = [(step * divisor - 1) % len(rows) for step in range(1, len(rows))]
    whole[order[0]] = rows[order[0]]
    for before, row in itertools.pairwise(order):
        np.bitwise_xor(rows[row], whole[before], out=whole[row])
    left = np.bitwise_xor(rows[-1], whole[order[-1]], out=rows[-1])
    for row in order[::2]:
        np.bitwise_xor(whole[row], left, out=whole[row])


def add_up(total: Bytes, blocks: Sequence[Bytes]) -> None:
    """Set the total to the sum of blocks of its length, at least one."""
    first, *others = (block.view(np.uint64) for block in blocks)
    wide = total.view(np.uint64)
    for start in range(0, len(wide), _BLOCK // 8):
        part = slice(start, start + _BLOCK // 8)
        if not others:
            np.copyto(wide[part], first[part])
            continue
        np.bitwise_xor(first[part], others[0][part], out=wide[part])
        for other in others[1:]:
            np.bitwise_xor(wide[part], other[part], out=wide[part])


def _add_moved(rows: Bytes, block: Bytes, by: int, *, begun: bool) -> None:
    """Add a block, which is one row shorter than `rows`, from byte `by` on, around the end; or begin anew with it."""
    head = min(len(block), len(rows) - by)
    tail = len(block) - head
    if begun:
        np.bitwise_xor(rows[by : by + head], block[:head], out=rows[by : by + head])
        np.bitwise_xor(rows[:tail], block[head:], out=rows[:tail])
    else:
        rows[by : by + head], rows[:tail] = block[:head], block[head:]
        rows[by + head :] = 0
        rows[tail:by] = 0


@dataclass(frozen=True, slots=True)
class Stripes:
    """How the parity of one group is laid out.

    Args:
        nodes: k.
        losses: m.
        extents: of the node that has most.

    Raises:
        InvalidInput: no parity can be made for that.
    """

    nodes: int
    losses: int
    extents: int

    def __post_init__(self) -> None:
        if not (1 <= self.losses <= 2 and self.losses < self.nodes <= MAX_GROUP and self.extents > 0):
            raise InvalidInput(f"{self.nodes} nodes of {self.extents} extents cannot lose {self.losses} of them")

    @property
    def prime(self) -> int:
        """The smallest that is enough for the nodes."""
        return next(prime for prime in PRIMES if prime >= self.nodes)

    def factor(self, line: int, node: int) -> Powers:
        """What a node's chunk is multiplied by in a line of parity."""
        return (line * node,)

    @property
    def chunk(self) -> int:
        """Extents of a chunk."""
        return -(-self.extents // (self.nodes - self.losses))

    def keepers(self, stripe: int) -> list[int]:
        """The nodes that keep the parity of a stripe, line by line."""
        return [(stripe + line) % self.nodes for line in range(self.losses)]

    def stripes_of(self, keeper: int) -> list[int]:
        """The stripes whose line 0, 1 a node keeps: its part of the parity is their chunks, in this order."""
        return [(keeper - line) % self.nodes for line in range(self.losses)]

    def data(self, stripe: int) -> list[int]:
        """The nodes that have a chunk of data in a stripe."""
        keepers = self.keepers(stripe)
        return [node for node in range(self.nodes) if node not in keepers]

    def first(self, node: int, stripe: int) -> int:
        """The first extent of a node's chunk in a stripe."""
        return sum(node not in self.keepers(earlier) for earlier in range(stripe)) * self.chunk

    def stripes_with(self, node: int) -> list[int]:
        """The stripes in which a node has data, in the order of its chunks."""
        return [stripe for stripe in range(self.nodes) if node not in self.keepers(stripe)]

    def recipe(self, stripe: int, node: int, lost: Collection[int]) -> Recipe:
        """How a lost node's chunk in a stripe is made of what is left.

        Raises:
            InvalidInput: too much is lost.
        """
        unknown = [other for other in self.data(stripe) if other in lost]
        lines = [line for line, keeper in enumerate(self.keepers(stripe)) if keeper not in lost][: len(unknown)]
        if node not in unknown or len(lines) < len(unknown):
            raise InvalidInput(f"{len(lost)} nodes are lost, where parity makes up for {self.losses}")
        known = [other for other in self.data(stripe) if other not in lost]

        def power(exponent: int) -> int:
            return exponent % self.prime

        if len(lines) == 1:
            line = lines[0]
            return Recipe({line: (power(-line * node),)}, {n: (power(line * (n - node)),) for n in known})
        # Of P = D + E + ... and Q = x^node D + x^other E + ..., both times x^-node, the second and x^(other - node)
        # times the first add up to (1 + x^(other - node)) D + ...
        other = next(n for n in unknown if n != node)
        apart = power(other - node)
        chunks: dict[int, Powers] = {n: (power(n - node), apart) for n in known}
        return Recipe({0: (apart,), 1: (power(-node),)}, chunks, apart)


def zeros(nbytes: int) -> Bytes:
    """A block to add to."""
    return np.zeros(nbytes, np.uint8)


def as_bytes(view: Any) -> Bytes:
    """Any buffer as an array of its bytes, without a copy."""
    return np.frombuffer(view, np.uint8)
