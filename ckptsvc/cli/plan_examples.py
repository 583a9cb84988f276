"""Jobs and stores that are known, as a beginning for a plan.

Shapes: MLPerf Storage's checkpoint workloads of LLaMA 3 (16-bit weights, 32-bit optimizer state; parallel layouts as
there). Aurora: 512 nodes of 12 ranks; a 1T-parameter model of 17 TB was written at 1.4 TB/s to 128 DAOS servers, its
Lustre takes 650 GB/s (published by Argonne). Failures are not part of any of them.
"""

from __future__ import annotations

from typing import NamedTuple

STATE = 14.0
"""Bytes of state for a parameter: 16-bit weights, 32-bit master weights and Adam's two moments."""


class Model(NamedTuple):
    """A decoder of the LLaMA 3 kind."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 128256

    @property
    def params(self) -> int:
        """Its parameters: attention, gated feed-forward and norms of all layers, embedding and output."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * (self.hidden * self.kv_heads // self.heads)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


class Example(NamedTuple):
    """What is known of a job.

    Attributes:
        what: for people.
        params: parameters of the model.
        state: bytes for each of them.
        ranks, nodes: of the job.
        store: bytes a second that the store takes; 0: to be given.
    """

    what: str
    params: float
    state: float
    ranks: int
    nodes: int
    store: float


LLAMA = {
    "8b": Model(32, 4096, 14336, 32, 8),
    "70b": Model(80, 8192, 28672, 128, 8),
    "405b": Model(126, 16384, 53248, 128, 8),
    "1t": Model(128, 25872, 98304, 192, 32),
}

EXAMPLES: dict[str, Example] = {
    "aurora-1t-daos": Example("1T parameters on 512 nodes of Aurora, 128 servers of DAOS", 1e12, 17, 6144, 512, 1.4e12),
    "aurora-1t-lustre": Example("the same, and Aurora's Lustre", 1e12, 17, 6144, 512, 650e9),
    "llama3-8b": Example("MLPerf Storage's LLaMA 3 8B: ZeRO-3", LLAMA["8b"].params, STATE, 8, 1, 0),
    "llama3-70b": Example("MLPerf Storage's LLaMA 3 70B: TP 8, ZeRO-3", LLAMA["70b"].params, STATE, 64, 8, 0),
    "llama3-405b": Example("MLPerf Storage's LLaMA 3 405B: TP 8, PP 32, ZeRO-1", LLAMA["405b"].params, STATE, 512, 64,
        0),
    "llama3-1t": Example("MLPerf Storage's LLaMA 3 1T: TP 8, PP 64, ZeRO-1; DAOS at 1 TB/s", LLAMA["1t"].params, STATE,
        1024, 128, 1e12),
}  # fmt: skip
