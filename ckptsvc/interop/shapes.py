"""Checkpoints that are declared instead of read: the tensors of known models, to plan with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ckptsvc.errors import InvalidInput
from ckptsvc.format.checksum import EXTENT, Digests
from ckptsvc.geometry.box import Box, Region
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.interop.logical import MODEL, STATE, Note
from ckptsvc.types import DTYPES, TensorMeta

SHARD = 16 << 30
"""Bytes of the files that a declared checkpoint is said to lie in."""


class Model(NamedTuple):
    """The sizes of a decoder as its papers give them; `gated` feed-forward networks have three matrices, others two."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    gated: bool = True


MODELS = {
    # Llama Team, "The Llama 3 Herd of Models", arXiv:2407.21783, table 3
    "llama3-8b": Model(4096, 32, 32, 8, 14336, 128256),
    "llama3-70b": Model(8192, 80, 64, 8, 28672, 128256),
    "llama3-405b": Model(16384, 126, 128, 8, 53248, 128256),
    # Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", arXiv:2104.04473, table 1
    "gpt-1t": Model(25600, 128, 160, 160, 102400, 51200, gated=False),
}


class Declared:
    """Tensors with a place in files that do not exist; see `interop.logical.Logical`. It cannot be read.

    Args:
        origin: for messages.
        metas: the tensors, in the order they are said to lie in.
    """

    step = 0
    world_size = 1
    extent = EXTENT

    def __init__(self, origin: str, metas: Sequence[TensorMeta]) -> None:
        self.origin = origin
        self.identity = origin
        self.aliases: Mapping[str, str] = {}
        self.notes: list[Note] = []
        self.source = self
        self._metas = {meta.name: meta for meta in metas}
        self._places: dict[str, tuple[int, int, int]] = {}
        self._sizes = [0]
        for meta in metas:
            nbytes = prod(meta.shape) * DTYPES[meta.dtype].itemsize
            if self._sizes[-1] and self._sizes[-1] + nbytes > SHARD:
                self._sizes.append(0)
            start = -(-self._sizes[-1] // 64) * 64
            self._places[meta.name] = len(self._sizes) - 1, start, nbytes
            self._sizes[-1] = start + nbytes

    def names(self) -> list[str]:
        """See Logical."""
        return sorted(self._metas)

    def __contains__(self, name: object) -> bool:
        return name in self._metas

    def resolve(self, name: str) -> str:
        """See Catalogue."""
        return name

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        return self._metas[name]

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """See Catalogue."""
        return [StoredRegion(name, Box.full(self._metas[name].shape), *self._places[name])]

    def shard_name(self, shard: int) -> str:
        """See Catalogue."""
        return f"{self.origin}, file {shard}"

    def document(self, rank: int = 0) -> dict[str, Any]:
        """See Logical."""
        return {}

    def close(self) -> None:
        """See Logical."""

    def size(self, shard: int) -> int:
        """See pipeline.read.Source."""
        return self._sizes[shard]

    def digests(self, shard: int) -> Digests | None:
        """See pipeline.read.Source."""
        return None

    def name(self, shard: int) -> str:
        """See pipeline.read.Source."""
        return self.shard_name(shard)

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Raises InvalidInput: there is nothing to read."""
        raise InvalidInput(f"{self.origin} is a shape to plan with; it has no data")

    def view(self, shard: int) -> memoryview | None:
        """See pipeline.read.Source."""
        return None


def declared(name: str, *, optimizer: bool = True) -> Declared:
    """The checkpoint of a known model trained in bfloat16, with Adam's state in float32 unless that is left out.

    Raises:
        InvalidInput: the model is not known.
    """
    if name not in MODELS:
        raise InvalidInput(f"no shape is called {name!r}", hint=f"known are {', '.join(MODELS)}")
    parameters = _parameters(MODELS[name])
    metas = [TensorMeta(MODEL + key, "bfloat16", shape) for key, shape in parameters.items()]
    if optimizer:
        slots = ("master", "exp_avg", "exp_avg_sq")
        metas += [TensorMeta(f"{STATE}{key}/{slot}", "float32", s) for slot in slots for key, s in parameters.items()]
        metas += [TensorMeta(f"{STATE}{key}/step", "float32", ()) for key in parameters]
    return Declared(f"the shape {name}", metas)


def _parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Names as Hugging Face's Llama has them."""
    kv = model.hidden // model.heads * model.kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (model.hidden,),
            f"{prefix}.self_attn.q_proj.weight": (model.hidden, model.hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, model.hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, model.hidden),
            f"{prefix}.self_attn.o_proj.weight": (model.hidden, model.hidden),
            f"{prefix}.post_attention_layernorm.weight": (model.hidden,),
            **({f"{prefix}.mlp.gate_proj.weight": (model.ffn, model.hidden)} if model.gated else {}),
            f"{prefix}.mlp.up_proj.weight": (model.ffn, model.hidden),
            f"{prefix}.mlp.down_proj.weight": (model.hidden, model.ffn),
        }
    return found | {"model.norm.weight": (model.hidden,), "lm_head.weight": (model.vocab, model.hidden)}
