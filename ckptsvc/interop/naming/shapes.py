"""Checkpoints that are declared, not read: the tensors of models of known shape, for dry runs and tests of scale.

    llama3-8b, llama3-70b, llama3-405b   Llama 3 (arXiv:2407.21783, table 3), under the names of transformers
    gpt-1t                               the 1008B model of arXiv:2104.04473, table 1, under the names of Megatron-Core
    moe-1t                               1.03T parameters in DeepSeek-V3's architecture, 384 experts (arXiv:2507.20534)

Parameters are bfloat16; optimizer state is what Adam in mixed precision keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.checksum import Digests
from ckptsvc.format.document import join
from ckptsvc.geometry.box import Box, Region, Shape
from ckptsvc.geometry.reshard import StoredRegion
from ckptsvc.interop.logical import EXTENT, MASTER, Note
from ckptsvc.pipeline.read import Source
from ckptsvc.types import DTYPES, TensorMeta

Config = Mapping[str, Any]
Shapes = Iterator[tuple[str, Shape]]

SHARD = 16 << 30
"""Bytes of the files that a declared checkpoint is said to lie in."""

_ALIGNMENT = 64
_STATE = {"exp_avg": "float32", "exp_avg_sq": "float32", MASTER: "float32"}


def _llama(hidden: int, ffn: int, layers: int, heads: int) -> Config:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": hidden // heads, "vocab_size": 128256,
    }  # fmt: skip


_GPT_1T: Config = {
    "num_layers": 128, "hidden_size": 25600, "ffn_hidden_size": 4 * 25600, "num_attention_heads": 160,
    "kv_channels": 160, "vocab_size": 51200, "max_position_embeddings": 2048, "swiglu": False,
}  # fmt: skip

_MOE_1T: Config = {
    "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 163840,
}  # fmt: skip


def _llama_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        yield from _mlp(f"{at}.mlp", hidden, ffn)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp(at: str, hidden: int, ffn: int) -> Shapes:
    yield f"{at}.gate_proj.weight", (ffn, hidden)
    yield f"{at}.up_proj.weight", (ffn, hidden)
    yield f"{at}.down_proj.weight", (hidden, ffn)


def _moe_shapes(config: Config) -> Shapes:
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_a_proj.weight", (q_rank, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", (q_rank,)
        yield f"{at}.self_attn.q_b_proj.weight", (heads * (nope + rope), q_rank)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (kv_rank,)
        yield f"{at}.self_attn.kv_b_proj.weight", (heads * (nope + value), kv_rank)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
        else:
            yield f"{at}.mlp.gate.weight", (config["n_routed_experts"], hidden)
            yield f"{at}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
            for expert in range(config["n_routed_experts"]):
                yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, ffn)
            yield from _mlp(f"{at}.mlp.shared_experts", hidden, ffn * config["n_shared_experts"])
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _gpt_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    yield "embedding.word_embeddings.weight", (config["vocab_size"], hidden)
    yield "embedding.position_embeddings.weight", (config["max_position_embeddings"], hidden)
    for layer in range(config["num_layers"]):
        at = f"decoder.layers.{layer}"
        for norm in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            yield f"{at}.{norm}.layer_norm_weight", (hidden,)
            yield f"{at}.{norm}.layer_norm_bias", (hidden,)
        linear = {"linear_qkv": (3 * hidden, hidden), "linear_proj": (hidden, hidden)}
        for name, shape in linear.items():
            yield f"{at}.self_attention.{name}.weight", shape
            yield f"{at}.self_attention.{name}.bias", shape[:1]
        for name, shape in {"linear_fc1": (ffn, hidden), "linear_fc2": (hidden, ffn)}.items():
            yield f"{at}.mlp.{name}.weight", shape
            yield f"{at}.mlp.{name}.bias", shape[:1]
    yield "decoder.final_layernorm.weight", (hidden,)
    yield "decoder.final_layernorm.bias", (hidden,)


MODELS: dict[str, tuple[Callable[[Config], Shapes], Config]] = {
    "llama3-8b": (_llama_shapes, _llama(4096, 14336, 32, 32)),
    "llama3-70b": (_llama_shapes, _llama(8192, 28672, 80, 64)),
    "llama3-405b": (_llama_shapes, _llama(16384, 53248, 126, 128)),
    "gpt-1t": (_gpt_shapes, _GPT_1T),
    "moe-1t": (_moe_shapes, _MOE_1T),
}
"""The models by name: what lists their tensors, and their configuration."""


def declared(name: str, *, optimizer: bool = True) -> Declared:
    """The checkpoint of a model of known shape.

    Args:
        name: a key of `MODELS`.
        optimizer: with optimizer state.

    Raises:
        InvalidInput: there is no such model.
    """
    if name not in MODELS:
        raise InvalidInput(f"{name!r} is no model of known shape", hint=f"known are {', '.join(MODELS)}")
    shapes, config = MODELS[name]
    metas, params = [], []
    for parameter, shape in shapes(config):
        trained = not parameter.endswith("e_score_correction_bias")  # a buffer
        metas.append(TensorMeta(join("model", parameter), "bfloat16" if trained else "float32", shape))
        if optimizer and trained:
            params.append(parameter)
            slots = [(slot, dtype, shape) for slot, dtype in _STATE.items()]
            for slot, dtype, extent in [*slots, ("step", "float32", ())]:
                metas.append(TensorMeta(join("optimizer/state", parameter, slot), dtype, extent))
    document: dict[str, Any] = {"config": dict(config)}
    if optimizer:
        document["optimizer"] = {"state": {}, "param_groups": [{"lr": 1e-4, "params": params}]}
    return Declared(name, metas, document)


class Declared:
    """A checkpoint of which there are no bytes; see `interop.logical.Logical`.

    Its tensors are whole, one after another in files of about `SHARD` bytes.
    """

    extent = EXTENT
    step = 0
    world_size = 1

    def __init__(self, name: str, metas: Sequence[TensorMeta], document: Mapping[str, Any]) -> None:
        self.origin = self.identity = f"declared:{name}"
        self.aliases: dict[str, str] = {}
        self.notes: list[Note] = []
        self._metas = {meta.name: meta for meta in metas}
        self._document = dict(document)
        self._places: dict[str, tuple[int, int, int]] = {}
        self.sizes = [0]
        for meta in metas:
            nbytes = prod(meta.shape) * DTYPES[meta.dtype].itemsize
            if self.sizes[-1] and self.sizes[-1] + nbytes > SHARD:
                self.sizes.append(0)
            start = -(-self.sizes[-1] // _ALIGNMENT) * _ALIGNMENT
            self._places[meta.name] = len(self.sizes) - 1, start, nbytes
            self.sizes[-1] = start + nbytes
        self.source: Source = _NoSource(self)

    def names(self) -> list[str]:
        """See Logical."""
        return sorted(self._metas)

    def __contains__(self, name: object) -> bool:
        return name in self._metas

    def document(self, rank: int = 0) -> dict[str, Any]:
        """See Logical."""
        return self._document

    def close(self) -> None:
        """See Logical."""

    def resolve(self, name: str) -> str:
        """See Catalogue."""
        return self.meta(name).name

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        if name not in self._metas:
            raise LayoutError(f"{self.origin} has no tensor {name[:200]!r}")
        return self._metas[name]

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """See Catalogue."""
        return [StoredRegion(name, Box.full(self.meta(name).shape), *self._places[name])]

    def shard_name(self, shard: int) -> str:
        """See Catalogue."""
        return f"{self.origin}, file {shard}"


class _NoSource:
    """Refuses to read; see pipeline.read.Source."""

    def __init__(self, declared: Declared) -> None:
        self._declared = declared

    def size(self, shard: int) -> int:
        return self._declared.sizes[shard]

    def digests(self, shard: int) -> Digests | None:
        return None

    def name(self, shard: int) -> str:
        return self._declared.shard_name(shard)

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        raise InvalidInput(f"{self._declared.origin} has no bytes: it can be planned with, not read")

    def view(self, shard: int) -> memoryview | None:
        return None
