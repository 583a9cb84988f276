"""The families that ship: every rule and pair is sound, names tell them apart, maps are invertible on whole models."""

import argparse
import tomllib
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tensors import arrays, checkpoint, same, trained

from ckptsvc.errors import InvalidInput, LayoutError, NotFound
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.placement import Entry, Placement
from ckptsvc.interop.naming.families import families, family, guess, read_family, variables
from ckptsvc.interop.naming.layouts import arrange, translate
from ckptsvc.interop.naming.mapping import mapped, parameters
from ckptsvc.interop.naming.shapes import MODELS, declared

HIDDEN, FFN, VOCAB, LAYERS, EXPERTS = 12, 10, 14, 3, 4

CONFIG = {
    "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "vocab_size": VOCAB,
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def mlp(at: str, ffn: int = FFN) -> Shapes:
    return {f"{at}.gate_proj.weight": (ffn, HIDDEN), f"{at}.up_proj.weight": (ffn, HIDDEN)} | {
        f"{at}.down_proj.weight": (HIDDEN, ffn)
    }


def llama(
    feed_forward: Callable[[int], Shapes] | None = None, attention: Callable[[str], Shapes] | None = None
) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= attention(f"{at}.self_attn") if attention else grouped(f"{at}.self_attn")
        shapes |= feed_forward(layer) if feed_forward else mlp(f"{at}.mlp")
        shapes |= {f"{at}.input_layernorm.weight": (HIDDEN,), f"{at}.post_attention_layernorm.weight": (HIDDEN,)}
    return shapes


def grouped(at: str) -> Shapes:
    shapes: Shapes = {f"{at}.o_proj.weight": (HIDDEN, 24), f"{at}.q_norm.weight": (6,), f"{at}.k_norm.weight": (6,)}
    for part, rows in (("q", 24), ("k", 12), ("v", 12)):
        shapes |= {f"{at}.{part}_proj.weight": (rows, HIDDEN), f"{at}.{part}_proj.bias": (rows,)}
    return shapes


def latent(at: str) -> Shapes:
    return {
        f"{at}.q_a_proj.weight": (8, HIDDEN), f"{at}.q_a_layernorm.weight": (8,), f"{at}.q_b_proj.weight": (24, 8),
        f"{at}.kv_a_proj_with_mqa.weight": (7, HIDDEN), f"{at}.kv_a_layernorm.weight": (5,),
        f"{at}.kv_b_proj.weight": (32, 5), f"{at}.o_proj.weight": (HIDDEN, 16),
    }  # fmt: skip


def named_experts(layer: int) -> Shapes:
    at = f"model.layers.{layer}.mlp"
    shapes: Shapes = {f"{at}.gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        shapes |= mlp(f"{at}.experts.{expert}")
    return shapes


def stacked_experts(layer: int) -> Shapes:
    at = f"model.layers.{layer}.mlp"
    return {
        f"{at}.gate.weight": (EXPERTS, HIDDEN), f"{at}.experts.gate_up_proj": (EXPERTS, 2 * FFN, HIDDEN),
        f"{at}.experts.down_proj": (EXPERTS, HIDDEN, FFN),
    }  # fmt: skip


def qwen_moe(layer: int) -> Shapes:
    at = f"model.layers.{layer}.mlp"
    return named_experts(layer) | mlp(f"{at}.shared_expert", 8) | {f"{at}.shared_expert_gate.weight": (1, HIDDEN)}


def deepseek(layer: int) -> Shapes:
    at = f"model.layers.{layer}.mlp"
    if layer == 0:
        return mlp(at)
    return named_experts(layer) | mlp(f"{at}.shared_experts", 8) | {f"{at}.gate.e_score_correction_bias": (EXPERTS,)}


def mixtral(layer: int) -> Shapes:
    at = f"model.layers.{layer}.block_sparse_moe"
    shapes: Shapes = {f"{at}.gate.weight": (EXPERTS, HIDDEN)}
    for e in range(EXPERTS):
        shapes |= {
            f"{at}.experts.{e}.{w}.weight": (HIDDEN, FFN) if w == "w2" else (FFN, HIDDEN) for w in ("w1", "w2", "w3")
        }
    return shapes


def gpt2() -> Shapes:
    shapes: Shapes = {"transformer.wte.weight": (VOCAB, HIDDEN), "transformer.wpe.weight": (9, HIDDEN)}
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        widths = {"attn.c_attn": 3 * HIDDEN, "attn.c_proj": HIDDEN, "mlp.c_fc": 48}
        for name, width in widths.items():
            shapes |= {f"{at}.{name}.weight": (HIDDEN, width), f"{at}.{name}.bias": (width,)}
        shapes |= {f"{at}.mlp.c_proj.weight": (48, HIDDEN), f"{at}.mlp.c_proj.bias": (HIDDEN,)}
        shapes |= {f"{at}.{norm}.{kind}": (HIDDEN,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return shapes | {f"transformer.ln_f.{kind}": (HIDDEN,) for kind in ("weight", "bias")}


def neox() -> Shapes:
    shapes: Shapes = {"gpt_neox.embed_in.weight": (VOCAB, HIDDEN), "embed_out.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"gpt_neox.layers.{layer}"
        matrices = {
            "attention.query_key_value": (3 * HIDDEN, HIDDEN), "attention.dense": (HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h": (48, HIDDEN), "mlp.dense_4h_to_h": (HIDDEN, 48),
        }  # fmt: skip
        for name, shape in matrices.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}.{norm}.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
    return shapes | {f"gpt_neox.final_layer_norm.{kind}": (HIDDEN,) for kind in ("weight", "bias")}


WHOLE: dict[str, tuple[Shapes, tuple[str, ...]]] = {
    "llama": (llama(), ()),
    "mixtral": (llama(mixtral), ()),
    "qwen_moe": (llama(qwen_moe), ()),
    "deepseek": (llama(deepseek, latent), ()),
    "gpt2": (gpt2(), ()),
    "neox": (neox(), ()),
    "mixtral in memory": (llama(stacked_experts), ("memory",)),
    "gpt2 without a head": ({name.removeprefix("transformer."): shape for name, shape in gpt2().items()}, ("bare",)),
}
"""Family (first word) -> the parameters of a whole small model, and the forms its names are."""


def config_of(name: str) -> dict[str, Any]:
    without_groups = {"num_key_value_heads": 4, "head_dim": 3} if name.startswith(("gpt2", "neox")) else {}
    return CONFIG | without_groups


def model(name: str) -> Any:
    rng = np.random.default_rng(len(name))
    shapes, _ = WHOLE[name]
    document = {
        "model_config": config_of(name),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": sorted(shapes)}]},
    }
    return checkpoint(trained({n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}), document)


def variables_of(logical: Any) -> dict[str, int]:
    known, _ = parameters(logical)
    return variables(logical.document(), {name: parameter.shape for name, parameter in known.items()})


def test_there_is_a_family_for_each_kind_of_model() -> None:
    assert families() == ["deepseek", "gpt2", "llama", "megatron", "mixtral", "neox", "qwen_moe"]
    for name in families():
        assert family(name).title
        assert family(name).names is not None


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("forms", [(), ("local",), ("grouped",)])
def test_a_model_becomes_megatrons_and_comes_back(name: str, forms: tuple[str, ...]) -> None:
    base, own = model(name), WHOLE[name][1]
    names = family(name.split()[0]).names
    assert names is not None
    over = mapped(base, names, variables_of(base), to="megatron", forms=forms)
    rules = family("megatron").rules
    known, _ = parameters(over)
    assert [n for n in known if len(rules.claims(n)) != 1] == []
    back = mapped(over, names, variables_of(base), to="hf", forms=own)
    same(arrays(back), arrays(base))
    before, after = (x.document()["optimizer"]["param_groups"][0] for x in (base, back))
    assert sorted(before["params"]) == sorted(after["params"])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_megatrons_layers_are_stacked_and_come_back(name: str) -> None:
    base = model(name)
    names, stacks = family(name).names, family("megatron").names
    assert names is not None
    assert stacks is not None
    over = mapped(base, names, variables_of(base), to="megatron")
    stacked = mapped(over, stacks, {}, to="stacked")
    assert stacked.meta("model/decoder.layers.self_attention.linear_proj.weight").shape[0] == LAYERS
    same(arrays(mapped(stacked, stacks, {}, to="layers")), arrays(over))
    local = mapped(stacked, stacks, {}, to="layers", forms=("local",))
    assert "model/decoder.layers.1.input_layernorm.weight" in local.names()
    same(arrays(mapped(local, names, variables_of(base), to="hf")), arrays(base))


def test_the_two_halves_of_gate_and_up_are_in_order() -> None:
    base = model("llama")
    found = arrays(base)
    names = family("llama").names
    assert names is not None
    over = arrays(mapped(base, names, variables_of(base), to="megatron"))
    at = "model/model.layers.1.mlp"
    expected = np.concatenate([found[f"{at}.gate_proj.weight"], found[f"{at}.up_proj.weight"]])
    assert np.array_equal(over["model/decoder.layers.1.mlp.linear_fc1.weight"], expected)


def test_a_checkpoint_is_translated_by_the_family_that_its_names_tell() -> None:
    base = model("llama")
    over = translate(base, to="megatron")
    assert "model/decoder.layers.2.mlp.linear_fc1.weight" in over.names()
    with pytest.raises(InvalidInput, match="no side 'hf'"):  # Megatron's names do not tell whose model it is
        translate(over, to="hf")
    same(arrays(translate(over, to="hf", model=family("llama"))), arrays(base))
    with pytest.raises(LayoutError, match=r"says 48 \+ 12 \+ 12"):
        translate(over, to="hf", model=family("llama"), given={"heads": 8})
    assert translate(over, to="stacked").meta("model/decoder.layers.mlp.linear_fc2.weight").shape == (3, HIDDEN, FFN)


@pytest.mark.parametrize("name", WHOLE)
def test_names_tell_families_apart(name: str) -> None:
    best = guess(WHOLE[name][0])[0]
    assert best.family == name.split()[0]
    assert best.sure == 1.0


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "layout", ["tp=2,pp=3", "dp=4,tp=2,ep=2,zero=1", "tp=4,uneven=1", "dp=2,pp=2,vpp=2,stages=balanced,zero=3"]
)
def test_their_rules_place_every_tensor_and_megatrons_place_what_they_become(name: str, layout: str) -> None:
    base = model(name)
    names = family(name.split()[0]).names
    assert names is not None
    for logical in (base, mapped(base, names, variables_of(base), to="megatron")):
        arrangement = arrange(logical, Parallel.parse(layout))
        placement = arrangement.placement.check()
        ranks = range(placement.parallel.world_size)
        stored = sum(region.size for rank in ranks for _, region in arrangement.regions(rank))
        assert stored == sum(prod(logical.meta(n).shape) for n in logical.names())


def test_sizes_come_from_a_config_anywhere_in_the_document() -> None:
    found = variables({"hf": {"config": CONFIG}}, {})
    assert {key: found[key] for key in ("heads", "kv_heads", "head_dim", "vocab")} == {
        "heads": 4, "kv_heads": 2, "head_dim": 6, "vocab": VOCAB,
    }  # fmt: skip
    megatron = {
        "num_attention_heads": 8, "hidden_size": 64, "num_query_groups": 1, "group_query_attention": False,
        "num_experts": None, "swiglu": True, "num_layers": 2,
    }  # fmt: skip
    found = variables({"args": megatron}, {})
    assert (found["kv_heads"], found["head_dim"], found["gated"]) == (8, 8, 1)
    assert "experts" not in found
    assert variables({"args": megatron | {"group_query_attention": True}}, {})["kv_heads"] == 1


def test_shapes_show_whether_an_mlp_is_gated_whatever_the_arguments_say() -> None:
    at = "decoder.layers.0.mlp.linear_fc"
    assert (
        variables({"swiglu": True, "num_layers": 2}, {f"{at}1.weight": (8, 4), f"{at}2.weight": (4, 8)})["gated"] == 0
    )
    assert variables({}, {f"{at}1.weight": (16, 4), f"{at}2.weight": (4, 8)})["gated"] == 1


class TestFiles:
    def test_rules_of_ones_own_may_include_a_family(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text('include = "llama"\n[[rule]]\nname = "model.adapter"\nstage = "last"\n')
        mine = read_family(str(path))
        assert (mine.name, len(mine.rules.rules)) == ("mine", len(family("llama").rules.rules) + 1)
        assert mine.names is not None

    @pytest.mark.parametrize(
        "text",
        ["rule", "include = 3", 'include = "nobody"', "rule = 3\ninclude = 'llama'", "title = 3", "colour = 1",
         'include = "llama"\n[names]\nsides = ["a", "b"]\n'],
    )  # fmt: skip
    def test_a_file_of_another_form_is_refused_by_name(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        with pytest.raises(InvalidInput, match=r"mine\.toml"):
            read_family(str(path))

    def test_a_file_that_is_not_there_is(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            read_family(str(tmp_path / "none.toml"))
        with pytest.raises(InvalidInput, match="no family"):
            family("nobody")

    def test_a_checkpoint_of_no_family_is_refused_with_the_nearest(self) -> None:
        base = checkpoint({"model/tok_emb.weight": np.zeros((3, 2), np.float32)})
        with pytest.raises(LayoutError, match="no family that is known"):
            arrange(base, Parallel())


@pytest.mark.parametrize(
    ("name", "billions"), [("llama3-8b", 8.03), ("llama3-70b", 70.6), ("llama3-405b", 405.9), ("gpt-1t", 1008)]
)
def test_declared_models_have_the_parameters_that_their_papers_say(name: str, billions: float) -> None:
    logical = declared(name)
    assert sum(prod(logical.meta(n).shape) for n in logical.names() if n.startswith("model/")) / 1e9 == pytest.approx(
        billions, rel=2e-3
    )
    assert guess(parameters(logical)[0])[0].sure == 1.0
    pieces = [stored for n in logical.names() for stored in logical.touching(n, [])]
    spans = sorted((piece.shard, piece.offset, piece.nbytes) for piece in pieces)
    for (shard, offset, nbytes), (next_shard, next_offset, _) in pairwise(spans):
        assert (shard, offset + nbytes) <= (next_shard, next_offset)
    with pytest.raises(InvalidInput, match="planned with, not read"):
        logical.source.read_into(0, 0, memoryview(bytearray(4)))
    assert len(declared(name, optimizer=False).names()) * 5 == len(logical.names())


def test_a_trillion_parameters_are_declared_too() -> None:
    logical = declared("moe-1t", optimizer=False)
    assert sum(prod(logical.meta(n).shape) for n in logical.names()) / 1e12 == pytest.approx(1.03, rel=5e-3)
    assert "moe-1t" in MODELS
    with pytest.raises(InvalidInput, match="no model of known shape"):
        declared("gpt-9")


def test_llama_405b_on_8192_ranks_is_stored_exactly_once() -> None:
    logical = declared("llama3-405b")
    arrangement = arrange(logical, Parallel.parse("dp=16,tp=8,pp=64,zero=1,stages=balanced"))
    arrangement.placement.check()
    stored = sum(region.size for rank in range(8192) for _, region in arrangement.regions(rank))
    assert stored == sum(prod(logical.meta(name).shape) for name in logical.names())


def test_ranks_of_a_real_megatron_checkpoint_hold_what_the_rules_say(foreign: Callable[[str], Path]) -> None:
    """Megatron-Core 0.16.1, TP 2 x PP 2, vocabulary of 67 padded to 68, tied output, norms by themselves."""
    root = foreign("megatron-tp2pp2_legacy")
    truth = torch.load(next(root.rglob("truth.pt")), weights_only=True)["params"]
    files = {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in root.rglob("model_optim_rng.pt"):
            files[path.parent.name] = torch.load(path, weights_only=True)
    full = {name: (value["param"] if isinstance(value, dict) else value) for name, value in truth.items()}
    args = vars(files["mp_rank_00_000"]["args"])
    sizes = variables({"args": args}, {name: tuple(t.shape) for name, t in full.items()}) | {
        "vocab_multiple": 1,
        "kv_heads": 2,
    }
    parallel = Parallel.parse("tp=2,pp=2")
    entries = [Entry(name, name, tuple(tensor.shape), 4) for name, tensor in full.items()]
    placement = Placement(family("megatron").rules, parallel, entries, sizes).check()
    for rank in range(4):
        at = parallel.coordinate(rank)
        state = files[f"mp_rank_{at.tp:02d}_{at.pp:03d}"]["model"]
        stored = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        held = {h.name: h for h in placement.held(rank)}
        assert held.keys() == stored.keys()
        for name, tensor in stored.items():
            assert tuple(tensor.shape) == held[name].local.shape, name
            for piece in held[name].local.pieces:
                expected = full[held[name].entry.name][piece.box.slices()]
                assert torch.equal(tensor[piece.local.slices()], expected), name


def test_every_file_that_ships_is_toml_with_a_comment_that_says_what_it_is() -> None:
    room = Path(__file__).resolve().parents[3] / "ckptsvc" / "interop" / "naming" / "maps"
    for path in room.iterdir():
        text = path.read_text()
        assert text.startswith("# ")
        assert tomllib.loads(text)
    assert {path.stem for path in room.iterdir()} == {*families(), "moe_parts", "variables"}
