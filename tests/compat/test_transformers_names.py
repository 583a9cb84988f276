"""The name maps and layout rules against transformers' own models, in memory and as it writes their files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tensors import arrays, checkpoint, same

from ckptsvc.geometry.parallel import Parallel
from ckptsvc.interop.naming.families import family, guess, variables
from ckptsvc.interop.naming.layouts import arrange
from ckptsvc.interop.naming.mapping import mapped, parameters

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

DENSE = {
    "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "vocab_size": 68, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
LATENT = DENSE | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 2,
    "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", DENSE | {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("llama", DENSE),
    "Qwen2": ("llama", DENSE),
    "Qwen3": ("llama", DENSE | {"head_dim": 8}),
    "GPT2": ("gpt2", {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 68, "n_positions": 16}),
    "GPTNeoX": ("neox", {k: v for k, v in DENSE.items() if k != "num_key_value_heads"}),
    "Mixtral": ("mixtral", DENSE | {"num_local_experts": 4}),
    "Qwen2Moe": ("qwen_moe", DENSE | MOE | {"shared_expert_intermediate_size": 12}),
    "Qwen3Moe": ("qwen_moe", DENSE | MOE | {"head_dim": 6}),
    "DeepseekV2": ("deepseek", LATENT | {"q_lora_rank": None}),
    "DeepseekV3": ("deepseek", LATENT),
}
"""Model -> its family here, and a small configuration."""


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    config = getattr(transformers, f"{name}Config")(**MODELS[name][1])
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}{suffix}")(config).to(dtype).eval()


def as_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def as_checkpoint(tensors: dict[str, torch.Tensor], model: Any) -> Any:
    return checkpoint({f"model/{n}": as_array(t) for n, t in tensors.items()}, {"config": model.config.to_dict()})


def sizes(logical: Any) -> dict[str, int]:
    return variables(logical.document(), {name: p.shape for name, p in parameters(logical)[0].items()})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_model_becomes_megatrons_and_comes_back(name: str, where: str, tmp_path: Path) -> None:
    model = built(name)
    tensors = dict(model.state_dict())
    if where == "file":
        model.save_pretrained(tmp_path)
        tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    base = as_checkpoint(tensors, model)
    best = guess(parameters(base)[0])[0]
    assert best.sure == 1.0
    # what transformers has in memory of Qwen3-MoE and of Mixtral has the same names
    assert best.family == MODELS[name][0] or (name, where) == ("Qwen3Moe", "memory")
    names = family(MODELS[name][0]).names
    assert names is not None
    over = mapped(base, names, sizes(base), to="megatron")
    forms = ("memory",) if where == "memory" else ()
    same(arrays(mapped(over, names, sizes(base), to="hf", forms=forms)), arrays(base))
    for logical in (base, over):
        arrange(logical, Parallel.parse("dp=2,tp=2,pp=2,ep=2,zero=1")).placement.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_projection_computes_what_llama_computes(dtype: torch.dtype) -> None:
    """Megatron's own reading of `linear_qkv`: [groups, heads of a group + 2, head_dim], cut into query, key, value."""
    model = built("Llama", dtype)
    base = as_checkpoint(dict(model.state_dict()), model)
    names = family("llama").names
    assert names is not None
    over = arrays(mapped(base, names, sizes(base), to="megatron"))

    def tensor(name: str) -> torch.Tensor:
        array = torch.from_numpy(over[f"model/decoder.layers.1.{name}"].copy())
        return array.view(torch.bfloat16) if dtype == torch.bfloat16 else array

    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    x = torch.randn(3, 16).to(dtype)
    groups, per_group, dim = 2, 2, 4
    with torch.no_grad():
        mixed = torch.nn.functional.linear(
            x, tensor("self_attention.linear_qkv.weight"), tensor("self_attention.linear_qkv.bias")
        )
        mixed = mixed.view(3, groups, (per_group + 2) * dim)
        q, k, v = torch.split(mixed, [per_group * dim, dim, dim], dim=2)
        torch.testing.assert_close(q.reshape(3, -1), attention.q_proj(x))
        torch.testing.assert_close(k.reshape(3, -1), attention.k_proj(x))
        torch.testing.assert_close(v.reshape(3, -1), attention.v_proj(x))
        both = torch.nn.functional.linear(x, tensor("mlp.linear_fc1.weight"), tensor("mlp.linear_fc1.bias"))
        gate, up = both.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out = torch.nn.functional.linear(hidden, tensor("mlp.linear_fc2.weight"), tensor("mlp.linear_fc2.bias"))
        torch.testing.assert_close(out, mlp(x))


def test_gpt2s_projection_computes_what_gpt2_computes() -> None:
    model = built("GPT2")
    base = as_checkpoint(dict(model.state_dict()), model)
    names = family("gpt2").names
    assert names is not None
    over = arrays(mapped(base, names, sizes(base), to="megatron"))
    at = "model/decoder.layers.1.self_attention.linear_qkv"
    x = torch.randn(3, 16)
    with torch.no_grad():
        mixed = torch.nn.functional.linear(
            x, torch.from_numpy(over[f"{at}.weight"]), torch.from_numpy(over[f"{at}.bias"])
        )
        q, k, v = mixed.view(3, 4, 3, 4).unbind(2)
        expected = model.transformer.h[1].attn.c_attn(x).split(16, dim=-1)
        for got, wanted in zip((q, k, v), expected, strict=True):
            torch.testing.assert_close(got.reshape(3, -1), wanted)
