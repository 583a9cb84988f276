"""Parity over the memories of a group of nodes: which bytes go into which, and the arithmetic.

What a node holds of a snapshot is one row of extents: its shards by rank, each beginning at a boundary between extents;
beyond its end are zeros. The group has k nodes, of which m may be lost (1 or 2), and k stripes. In stripe s the nodes
s, s + 1, ..., s + m - 1 (modulo k) keep parity, of all the others one chunk each: every node has k - m chunks, one for
each stripe in which it keeps none, in the order of the stripes. All chunks are equally long, so every node reads the
chunks of the others for m stripes, keeps m chunks of parity, and no node has more to do than another.

The parity of a stripe is one line (m = 1) or two: the sum of the chunks, and the sum of each times 2^i for node number
i of the group, in GF(256) with the polynomial x^8 + x^4 + x^3 + x^2 + 1 (as in RAID 6: H. P. Anvin, "The mathematics
of RAID-6"). Any two chunks can be solved for, of at most 255 nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput

MAX_GROUP = 255
"""Nodes whose powers of 2 differ."""

_POLYNOMIAL = 0x11D
_BLOCK = 128 << 10
"""Bytes that are worked on at a time: what a step leaves is still in the cache at the next one."""

Bytes = NDArray[np.uint8]


def _powers() -> tuple[list[int], list[int]]:
    exp, log, value = [0] * 510, [0] * 256, 1
    for power in range(255):
        exp[power] = exp[power + 255] = value
        log[value] = power
        value <<= 1
        if value > 255:
            value ^= _POLYNOMIAL
    return exp, log


_EXP, _LOG = _powers()


def times(a: int, b: int) -> int:
    """The product in GF(256)."""
    return _EXP[_LOG[a] + _LOG[b]] if a and b else 0


def inverse(a: int) -> int:
    """1/a in GF(256); ZeroDivisionError for 0."""
    if not a:
        raise ZeroDivisionError("0 has no inverse")
    return _EXP[255 - _LOG[a]]


def coefficient(line: int, node: int) -> int:
    """What a node's chunk is multiplied by in a line of parity."""
    return _EXP[line * node % 255]


@functools.lru_cache(maxsize=64)
def _table(factor: int) -> NDArray[np.uint16]:
    """The products of all pairs of bytes: a table of 128 KiB is looked up twice as fast as one of 256 bytes."""
    single = np.array([times(factor, value) for value in range(256)], np.uint16)
    table: NDArray[np.uint16] = np.bitwise_or(single[:, None] << np.uint16(8), single[None, :]).reshape(-1)
    return table


class Sum:
    """Adds multiples of blocks to a block; keeps the memory for that."""

    def __init__(self) -> None:
        self._product = np.empty(_BLOCK // 2, np.uint16)

    def put(self, total: Bytes, block: Bytes, factor: int) -> None:
        """Begin anew: the total is factor * block, and zeros beyond it."""
        total[len(block) :] = 0
        if factor == 1:
            np.copyto(total[: len(block)], block)
            return
        total[: len(block)] = 0
        self.add(total, block, factor)

    def add(self, total: Bytes, block: Bytes, factor: int) -> None:
        """Add factor * block to the total, in GF(256); the block may be shorter, and is followed by zeros then."""
        if factor == 1:
            _xor(total[: len(block)], block)
        elif factor:
            for start in range(0, len(block), _BLOCK):
                self._add_product(total[start:], block[start : start + _BLOCK], factor)

    def _add_product(self, total: Bytes, block: Bytes, factor: int) -> None:
        pairs = len(block) // 2
        product = self._product[:pairs]
        # "clip" checks no bounds: there is an entry for every pair of bytes
        np.take(_table(factor), block[: 2 * pairs].view(np.uint16), out=product, mode="clip")
        _xor(total[: 2 * pairs], product.view(np.uint8))
        if len(block) % 2:
            total[len(block) - 1] ^= times(factor, int(block[-1]))


def _xor(total: Bytes, block: Bytes) -> None:
    """Add to the total, which is as long as the block: eight bytes at a time, then the rest."""
    whole = len(block) // 8 * 8
    wide = total[:whole].view(np.uint64)
    np.bitwise_xor(wide, block[:whole].view(np.uint64), out=wide)
    np.bitwise_xor(total[whole:], block[whole:], out=total[whole:])


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

    def recipe(self, stripe: int, node: int, lost: Collection[int]) -> tuple[dict[int, int], dict[int, int]]:
        """How a lost node's chunk in a stripe is made of what is left.

        Returns:
            ({line of parity: its factor}, {node: the factor of its chunk}); the chunk is the sum of all of them.

        Raises:
            InvalidInput: too much is lost.
        """
        unknown = [other for other in self.data(stripe) if other in lost]
        lines = [line for line, keeper in enumerate(self.keepers(stripe)) if keeper not in lost][: len(unknown)]
        if node not in unknown or len(lines) < len(unknown):
            raise InvalidInput(f"{len(lost)} nodes are lost, where parity makes up for {self.losses}")
        factors = dict(zip(lines, _solution(lines, unknown, unknown.index(node)), strict=True))
        known = [other for other in self.data(stripe) if other not in lost]
        chunks = {
            other: functools.reduce(int.__xor__, (times(f, coefficient(line, other)) for line, f in factors.items()))
            for other in known
        }
        return factors, chunks


def _solution(lines: Sequence[int], unknown: Sequence[int], which: int) -> list[int]:
    """Factors with which lines of parity add up to one of as many unknowns (and to nothing of the others)."""
    rows = [[coefficient(line, node) for node in unknown] for line in lines]
    if len(rows) == 1:
        return [inverse(rows[0][0])]
    (a, b), (c, d) = rows
    scale = inverse(times(a, d) ^ times(b, c))
    return [times(scale, factor) for factor in ((d, b) if which == 0 else (c, a))]


def zeros(nbytes: int) -> Bytes:
    """A block to add to."""
    return np.zeros(nbytes, np.uint8)


def as_bytes(view: Any) -> Bytes:
    """Any buffer as an array of its bytes, without a copy."""
    return np.frombuffer(view, np.uint8)
